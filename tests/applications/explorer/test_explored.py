"""An autoencoder opened for exploring: which images it gets, what is encoded, what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from ldm_vae import config as configuration
from ldm_vae.applications.directions.fitting import Directions
from ldm_vae.applications.explorer import explored as module
from ldm_vae.applications.explorer.explored import Bundled, ExploreConfig, Explored, write_bundled
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.vector import AutoencoderVector
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.data import transforms
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.errors import UserError
from ldm_vae.files import write_text
from tests.applications.explorer.models import open_explored, open_two, saved

SMALL = {"count": 6, "size": 32}


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "kl")


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 10 gray images of its own."""
    folder = saved(
        tmp_path_factory.mktemp("models") / "digits", architecture="vector", preset="digits", latent_channels=2
    )
    images = torch.arange(10, dtype=torch.uint8)[:, None, None].expand(-1, 32, 32).contiguous()
    write_bundled(folder, Bundled(images, torch.arange(10) % 2, ("even", "odd"), "ten grays"))
    return folder


@pytest.fixture(scope="module")
def synthetic(kl: Path) -> Explored:
    return open_explored(kl, ExploreConfig(data="synthetic", **SMALL))


def test_every_image_went_through_the_encoder(synthetic: Explored) -> None:
    assert (synthetic.name, synthetic.kind, synthetic.deterministic, synthetic.downsampling) == ("kl", "kl", False, 8)
    assert synthetic.run_directory is None
    assert synthetic.fingerprint == fingerprint(synthetic.autoencoder)
    assert synthetic.parameters == sum(parameter.numel() for parameter in synthetic.autoencoder.parameters())
    source = SyntheticSource(SyntheticConfig(count=6, resolution=32))
    assert synthetic.ids == tuple(source.id(number) for number in range(6))
    assert synthetic.label_names[synthetic.labels[2]] == source.label_names[source.label(2)]
    picture = torch.from_numpy(source.read(4)).permute(2, 0, 1)
    assert torch.equal(synthetic.images[4], picture)
    mean, logvar = synthetic.autoencoder.encode_moments(transforms.from_uint8(picture[None]))
    assert synthetic.mean.shape == synthetic.logvar.shape == (6, 4, 4, 4)
    assert torch.allclose(synthetic.mean[4:5], mean, atol=1e-5)
    assert torch.allclose(synthetic.logvar[4:5], logvar, atol=1e-5)


def test_both_ways_are_those_of_the_package(synthetic: Explored) -> None:
    latent = synthetic.mean[:1]
    decoded = transforms.to_uint8(synthetic.autoencoder.decode_images(latent))
    assert torch.equal(synthetic.decode(latent), decoded)
    mean, _ = synthetic.encode(synthetic.images)
    assert torch.allclose(mean, synthetic.mean, atol=1e-5)


def test_long_work_goes_in_passes(synthetic: Explored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_PIXELS", 2 * 32 * 32)
    assert synthetic.batch == 2
    decoded = synthetic.decode(synthetic.mean[:5])
    assert decoded.shape == (5, 3, 32, 32)
    assert torch.equal(decoded[4:], synthetic.decode(synthetic.mean[4:5]))


def test_several_threads_get_their_own_images(synthetic: Explored) -> None:
    alone = [synthetic.decode(synthetic.mean[number : number + 1]) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: synthetic.decode(synthetic.mean[number : number + 1]), [*range(6)] * 4))
    assert all(torch.equal(found, alone[number % 6]) for number, found in enumerate(together))


def test_a_folder_gives_labels_and_bad_images_are_left_out(
    kl: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("000.png", "002.png", "004.png", "006.png"):
        folder = tmp_path / ("cats" if name < "003" else "dogs")
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes((image_folder / "a" / name).read_bytes())
    (tmp_path / "cats" / "001.png").write_bytes(b"no picture")
    opened = open_explored(kl, ExploreConfig(data=str(tmp_path), **SMALL))
    assert opened.ids == ("cats/000.png", "cats/002.png", "dogs/004.png", "dogs/006.png")
    assert opened.label_names == ("cats", "dogs")
    assert opened.labels.tolist() == [0, 0, 1, 1]
    assert [name for name, _ in opened.rejected] == ["cats/001.png"]
    assert "left out: 1 image that cannot be read, as cats/001.png" in caplog.text
    assert opened.images.shape == (4, 3, 32, 32)
    (tmp_path / "dogs" / "004.png").unlink()
    with pytest.raises(UserError, match=r"3 images of .* can be read, a map needs 4"):
        open_explored(kl, ExploreConfig(data=str(tmp_path), **SMALL))


def test_a_parquet_file_gives_labels(kl: Path, image_folder: Path, tmp_path: Path) -> None:
    files = sorted(image_folder.rglob("*.png"))[:5]
    table = {"image": [file.read_bytes() for file in files], "label": [3, 1, 3, 1, 3]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "some.parquet")
    opened = open_explored(kl, ExploreConfig(data=str(tmp_path / "some.parquet"), **SMALL))
    assert opened.label_names == ("1", "3")
    assert opened.labels.tolist() == [1, 0, 1, 0, 1]


def test_images_that_travel_with_an_autoencoder_come_first_but_for_those_asked_for(vector: Path) -> None:
    opened = open_explored(vector, ExploreConfig(count=5, size=64))
    assert opened.origin == "ten grays"
    assert opened.images.shape == (5, 3, 32, 32)
    assert opened.images[:, 1, 3, 3].tolist() == [0, 2, 4, 7, 9]  # evenly spread
    assert opened.labels.tolist() == [0, 0, 0, 1, 1]
    assert opened.mean.shape == (5, 2, 1, 1)
    assert open_explored(vector, ExploreConfig(data="synthetic", count=5)).origin == "the synthetic set"


def test_a_size_is_taken_before_that_of_the_images_and_its_lack_of_effect_is_said(
    vector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.zeros(4, 32, 32, dtype=torch.uint8)
    folder = saved(tmp_path / "any")
    write_bundled(folder, Bundled(images, torch.zeros(4, dtype=torch.int64), ("black",), "four blacks"))
    sides = [open_explored(folder, ExploreConfig(size=size)).images.shape[-1] for size in (None, 64)]
    assert sides == [32, 64]
    assert caplog.text.count("4 of 4 images are smaller than the crop and enlarged") == 1
    caplog.clear()
    open_explored(vector, ExploreConfig(count=5))
    assert caplog.text == ""
    open_explored(vector, ExploreConfig(count=5, size=64))
    assert "size: 64 has no effect, an autoencoder here knows one size of images, 32" in caplog.text


def test_two_autoencoders_see_the_same_images_of_the_size_that_one_dictates(kl: Path, vector: Path) -> None:
    first, second = open_two(kl, vector, ExploreConfig(count=8, size=64))
    assert first.images is second.images
    assert first.ids == second.ids
    assert (first.origin, first.images.shape[-1]) == ("ten grays", 32)
    assert (first.mean.shape, second.mean.shape) == ((8, 4, 4, 4), (8, 2, 1, 1))


def test_two_autoencoders_of_different_sizes_are_not_compared(vector: Path, tmp_path: Path) -> None:
    AutoencoderVector(encoder_channels=(4, 4), decoder_channels=(4, 4, 4)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"knows images of another size than .*16 and 32 pixels"):
        open_two(vector, tmp_path, ExploreConfig())


def make_run(folder: Path, *settings: str) -> Path:
    saved(folder / "autoencoder")
    write_text(folder / "metrics.jsonl", "")
    config = configuration.load(TrainVaeConfig, None, [f"output={folder}", *settings])
    write_text(folder / "config.yaml", configuration.to_yaml(config))
    return folder


def test_a_run_shows_what_it_was_trained_on(tmp_path: Path, image_folder: Path) -> None:
    run = make_run(tmp_path / "mine", "data.source=folder", f"data.path={image_folder}", "data.held_out=0.5")
    opened = open_explored(run / "autoencoder", ExploreConfig(**SMALL))
    assert (opened.name, opened.run_directory) == ("mine", run)
    assert opened.origin.startswith("held-out images of ")
    assert open_explored(run, ExploreConfig(count=24, size=32)).origin.startswith("images of ")
    assert opened.label_names == ("a", "b")


def test_a_run_without_its_images_shows_the_synthetic_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "mine", "data.source=folder", f"data.path={tmp_path / 'gone'}")
    assert open_explored(run, ExploreConfig(**SMALL)).origin == "the synthetic set"
    assert "cannot be opened" in caplog.text


def test_directions_belong_to_an_encoder(kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = saved(tmp_path / "other", seed=1)
    found = Directions(
        [], open_explored(kl, ExploreConfig(data="synthetic", **SMALL)).autoencoder.encoder_fingerprint(), {}, {}
    )
    monkeypatch.setattr(module, "load_directions", lambda place: found)
    config = ExploreConfig(data="synthetic", directions=str(tmp_path), **SMALL)
    first, second = open_two(kl, other, config)
    assert first.directions is found
    assert second.directions is None
    with pytest.raises(UserError, match="directions were fitted to"):
        open_explored(other, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 3}, "count: 3 is not between 4 and"),
        ({"count": 10**6}, "count: 1000000 is not between"),
        ({"size": 8}, "resolution: 8 is not between 16 and"),
        ({"size": 60}, "resolution: 60 is not a multiple of 8; use resolution=64"),
        ({"count": 40_000, "size": 1024}, "take 146.8 GB, more than 4"),
        ({"data": "nowhere"}, "data: nowhere is neither a folder nor a .parquet file"),
        ({"data": "nowhere.parquet"}, "nowhere.parquet is not a parquet file"),
    ],
)
def test_what_is_refused(settings: dict[str, object], said: str, kl: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_explored(kl, ExploreConfig(**{"data": "synthetic", **settings}))  # type: ignore[arg-type]
    assert said in str(refused.value)


def test_latents_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "broken")
    autoencoder = build_autoencoder(AutoencoderConfig(preset="pico"))
    with torch.no_grad():
        autoencoder.encoder.head.bias[0] = 3e38
        autoencoder.encoder.head.weight[0] = 3e38
    autoencoder.save_pretrained(folder)
    with pytest.raises(UserError, match="latents that are not finite"):
        open_explored(folder, ExploreConfig(data="synthetic", **SMALL))


def test_kinds() -> None:
    assert build_autoencoder(AutoencoderConfig(preset="pico", kind="ae")).kind == "ae"
    assert build_autoencoder(AutoencoderConfig(architecture="sd", preset="tiny")).kind == "kl"
