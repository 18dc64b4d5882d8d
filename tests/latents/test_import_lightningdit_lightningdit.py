"""A folder as LightningDiT's extract_features.py leaves it becomes a set like any other."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_vae import cli
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import read_manifest
from ldm_vae.latents.import_lightningdit import ImportConfig, import_set, natural_key
from ldm_vae.latents.verify import verify
from tests.latents.damaged_sets import flip

NAME = "latents_rank{:02d}_shard{:03d}.safetensors"
FILES = {(0, 0): 10, (0, 1): 3, (1, 0): 10, (1, 1): 3}
"""(rank, shard) -> rows. Two ranks, 26 images."""

Change = Callable[[dict[str, Tensor]], object]


def extract(folder: Path, change: Change = lambda tensors: None, **statistics: Tensor) -> dict[str, Tensor]:
    """Write the files; returns all rows in order. The scale and place of a channel are those of a normal VAE."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    scale, place = (torch.tensor(values).view(1, 3, 1, 1) for values in ((1.0, 2.0, 0.5), (0.3, -4.0, 0.0)))
    parts = []
    for (rank, shard), rows in FILES.items():
        latents, mirrored = (torch.randn(rows, 3, 4, 4, generator=rng) * scale + place for _ in range(2))
        labels = torch.randint(0, 3, (rows,), generator=rng)
        tensors = {"latents": latents, "latents_flip": mirrored, "labels": labels}
        change(tensors)
        metadata = {"total_size": str(rows), "dtype": str(latents.dtype), "device": "cpu"}
        save_file(tensors, folder / NAME.format(rank, shard), metadata)
        parts.append(tensors)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    latents = whole.get("latents", torch.zeros(1, 3, 4, 4)).float()
    found = {"mean": latents.mean((0, 2, 3), keepdim=True), "std": latents.std((0, 2, 3), keepdim=True)}
    torch.save(found | statistics, folder / "latents_stats.pt")
    return whole


@pytest.fixture
def source(tmp_path) -> Path:
    extract(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def settings(source, tmp_path, autoencoder_directory) -> ImportConfig:
    return ImportConfig(str(source), str(tmp_path / "set"), str(autoencoder_directory), resolution="32", shard_size=7)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("run.json", "encode.lock")}


def test_every_row_is_a_sample(source, settings, autoencoder_directory, capsys):
    manifest = import_set(settings)
    assert "agrees with the data" in capsys.readouterr().out
    autoencoder = load_autoencoder(autoencoder_directory)
    assert manifest.autoencoder["asserted"] is True
    assert manifest.preprocessing["asserted"] is True
    assert (manifest.content, manifest.dtype, manifest.flipped) == ("sample", "float32", True)
    assert (manifest.count, manifest.shards, manifest.label_names) == (26, 4, ("0", "1", "2"))
    (record,) = manifest.datasets
    assert (record["source"], len(record["fingerprint"])) == ("lightningdit", 64)
    read_manifest(settings.output).check_autoencoder(autoencoder.encoder_fingerprint(), "here")
    files = [load_file(source / NAME.format(*key)) for key in FILES]
    whole = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    dataset = LatentDataset(settings.output, flip=False)
    for i in range(26):
        item = dataset[i]
        assert torch.equal(item["latent"], whole["latents"][i])
        assert (item["label"], item["index"]) == (int(whole["labels"][i]), i)
    mirrored = [load_file(path)["sample_flipped"] for path in sorted(Path(settings.output).glob("shard-*.safetensors"))]
    assert torch.equal(torch.cat(mirrored), whole["latents_flip"])
    names = [f"{NAME.format(*key)}:{row}" for key, rows in FILES.items() for row in range(rows)]
    assert [dataset.id(i) for i in range(26)] == names
    both = torch.cat([whole["latents"], whole["latents_flip"]]).double()
    torch.testing.assert_close(torch.tensor(manifest.statistics["mean"]), both.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(manifest.statistics["std"]), both.std((0, 2, 3), correction=0).float())


def test_an_interrupted_import_goes_on_and_a_finished_one_is_left(settings, tmp_path, capsys):
    import_set(replace(settings, output=str(tmp_path / "expected")))
    import_set(settings)
    output = Path(settings.output)
    assert contents(output) == contents(tmp_path / "expected")
    for name in ("manifest.json", "shard-000002.jsonl", "shard-000003.safetensors"):
        (output / name).unlink()
    kept = (output / "shard-000001.safetensors").stat().st_mtime_ns
    import_set(settings)
    assert contents(output) == contents(tmp_path / "expected")
    assert (output / "shard-000001.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    import_set(settings)
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["shard-000001.safetensors", "shard-000002.jsonl", "manifest.json", "plan.json", "index"]
)
@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_damaged_set_is_mended_by_the_same_command(settings, name, harm, capsys):
    import_set(settings)
    output = Path(settings.output)
    before = contents(output)
    path = next(output.glob(f"{name}*"))
    if harm == "delete":
        path.unlink()
    else:
        flip(path, 8 * (path.stat().st_size // 2))
    assert "`ldm-vae latents import`" in verify(output).lines()[-1]
    if name.startswith("shard-"):
        command = [
            "latents",
            "repair",
            f"autoencoder={settings.autoencoder}",
            "data.source=folder",
            f"data.path={settings.source}",
        ]
        assert cli.main([*command, f"output={output}"]) == EXIT_USER_ERROR
        assert "run the same `ldm-vae latents import` command again" in capsys.readouterr().err
    import_set(settings)
    assert contents(output) == before
    assert verify(output).whole


def test_other_files_are_another_set(settings, source):
    import_set(settings)
    file = source / NAME.format(1, 0)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"was made with images with the fingerprint"):
        import_set(settings)


def test_precision_and_names(settings, source, tmp_path):
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nwhite shark\ntiger shark\n")
    manifest = import_set(replace(settings, dtype="float16", labels=str(tmp_path / "names.txt")))
    assert (manifest.dtype, manifest.label_names[1]) == ("float16", "goldfish")
    stored = LatentDataset(settings.output, flip=False)[0]["latent"]
    assert torch.equal(stored, load_file(source / NAME.format(0, 0))["latents"][0].half().float())


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("tench\ngoldfish\n", r"names\.txt: has 2 names, the labels go to 2; give 3 lines"),
        ("crane\ngoldfish\ncrane\n", r"names\.txt: has the name 'crane' twice"),
        (None, r"names\.txt: cannot be read"),
    ],
)
def test_names_that_do_not_fit(settings, tmp_path, names, sentence):
    if names:
        (tmp_path / "names.txt").write_text(names)
    with pytest.raises(UserError, match=sentence):
        import_set(replace(settings, labels=str(tmp_path / "names.txt")))
    assert not Path(settings.output).exists()


def test_an_autoencoder_that_cannot_have_made_them_is_refused(settings, tmp_path):
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=4)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"its latents are 3x4x4, .*other makes 4x4x4 of images of 32x32"):
        import_set(replace(settings, autoencoder=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"its latents are 3x4x4, .* makes 3x32x32 of images of 256x256"):
        import_set(replace(settings, resolution="256"))
    with pytest.raises(UserError, match="are several sizes"):
        replace(settings, resolution="256,512")
    with pytest.raises(UserError, match="shard_size: 0 is not positive"):
        replace(settings, shard_size=0)


def test_a_deterministic_autoencoder_has_no_samples(settings, tmp_path):
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=3, kind="ae"))
    model.save_pretrained(tmp_path / "plain")
    assert import_set(replace(settings, autoencoder=str(tmp_path / "plain"))).content == "mean"


@pytest.mark.parametrize(
    ("statistics", "sentence"),
    [
        ({"mean": torch.tensor([0.3, 0.0, 0.0])}, r"its mean of channel 1 is 0, the latents have -(3\.9|4\.0)"),
        ({"std": torch.tensor([5.5, 11.0, 2.75])}, r"latents_stats\.pt: its std of channel \d is .*, the latents have"),
        ({"mean": torch.full((3,), float("nan"))}, r"latents_stats\.pt: its mean of channel 0 is nan"),
    ],
)
def test_statistics_of_other_latents_stop_it(settings, tmp_path, statistics, sentence):
    shutil.rmtree(settings.source)
    extract(Path(settings.source), **statistics)
    with pytest.raises(UserError, match=sentence):
        import_set(settings)
    assert not (Path(settings.output) / "manifest.json").exists()
    found = verify(settings.output)
    assert (found.finished, found.whole) == (False, True)
    assert "run the same `ldm-vae latents import` command again" in found.lines()[-1]
    command = [
        "latents",
        "repair",
        f"autoencoder={settings.autoencoder}",
        "data.source=folder",
        f"data.path={settings.source}",
    ]
    assert cli.main([*command, f"output={settings.output}"]) == EXIT_USER_ERROR
    assert not (Path(settings.output) / "manifest.json").exists()
    (Path(settings.source) / "latents_stats.pt").unlink()
    assert import_set(settings).count == 26


def test_statistics_that_cannot_be_read_run_no_code(settings, source):
    import pathlib

    torch.save({"mean": torch.zeros(3), "std": pathlib.PurePosixPath("x")}, source / "latents_stats.pt")
    with pytest.raises(UserError, match=r"latents_stats\.pt: holds no mean and std of 3 channels"):
        import_set(settings)
    torch.save({"mean": torch.zeros(5), "std": torch.ones(5)}, source / "latents_stats.pt")
    with pytest.raises(UserError, match=r"latents_stats\.pt: holds no mean and std of 3 channels"):
        import_set(settings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop("latents"),
            r"rank00_shard000\.safetensors: holds no float `latents`.* labels I64",
        ),
        (lambda tensors: tensors.pop("labels"), r"rank00_shard000\.safetensors: holds no `labels` \(n\) of integers"),
        (
            lambda tensors: tensors.update(labels=torch.zeros(len(tensors["labels"]), 77)),
            r"holds no `labels` \(n\) of integers, but labels F32 \(10, 77\)",
        ),
        (lambda tensors: tensors["labels"].fill_(-2), "holds the label -2; labels count from 0"),
        (
            lambda tensors: tensors.update(latents_flip=tensors["latents"][:, :, :2].clone()),
            "latents_flip does not fit latents",
        ),
        (
            lambda tensors: tensors.update(latents=torch.zeros(len(tensors["labels"]), 3, 4, 4, dtype=torch.int32)),
            "holds no float `latents`",
        ),
    ],
)
def test_other_layouts_are_refused(settings, source, change, sentence):
    shutil.rmtree(source)
    extract(source, change)
    with pytest.raises(UserError, match=sentence):
        import_set(settings)
    assert not Path(settings.output).exists()


def test_files_of_two_kinds_are_refused(settings, source):
    file = source / NAME.format(1, 1)
    tensors = load_file(file)
    save_file({"latents": tensors["latents"], "labels": tensors["labels"]}, file)
    with pytest.raises(UserError, match=r"rank01_shard001.*: its flipped is False, that of latents_rank00_shard000"):
        import_set(settings)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"rank01_shard001\.safetensors: cannot be read .*; copy it again"):
        import_set(settings)


def test_a_value_that_is_not_finite_is_named(settings, source):
    file = source / NAME.format(1, 0)
    tensors = load_file(file)
    tensors["latents_flip"][4, 0, 0, 0] = 1e5
    save_file(tensors, file)
    (source / "latents_stats.pt").unlink()
    with pytest.raises(UserError, match=r"rank01_shard000\.safetensors:4: latents_flip is not finite in float16"):
        import_set(replace(settings, dtype="float16"))
    assert import_set(replace(settings, output=settings.output + "-wide")).count == 26


def test_without_mirror_images_and_statistics_and_with_more_tensors(settings, source):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["features"] = tensors.pop("latents_flip")
        tensors["latents"] = tensors["latents"].bfloat16()

    shutil.rmtree(source)
    whole = extract(source, change)
    (source / "latents_stats.pt").unlink()
    manifest = import_set(settings)
    assert (manifest.flipped, manifest.dtype) == (False, "bfloat16")
    assert torch.equal(LatentDataset(settings.output)[12]["latent"], whole["latents"][12].float())


def test_missing_files_are_reported(settings, source, capsys):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["features"] = tensors["latents"].clone()

    shutil.rmtree(source)
    extract(source, change)
    (source / NAME.format(0, 0)).unlink()
    import_set(settings)
    said = capsys.readouterr().out
    assert "left out: features" in said
    assert "latents_rank00_shard000.safetensors is missing; is the copy complete?" in said
    assert "the ranks have 3 to 13 rows" in said


def test_folders_that_hold_nothing(settings, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        import_set(replace(settings, source=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.safetensors files"):
        import_set(replace(settings, source=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="is a URL; copy the folder"):
        import_set(replace(settings, source="s3://bucket/latents"))


def test_shards_are_counted_as_numbers():
    names = ["latents_rank00_shard1000", "latents_rank00_shard999", "latents_rank01_shard000"]
    assert sorted(names, key=natural_key) == [names[1], names[0], names[2]]


def test_the_command(settings, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["latents", "import", str(source), settings.output, "--from", "lightningdit"]
    assert cli.main([*command, "--autoencoder", settings.autoencoder]) == EXIT_USER_ERROR
    assert "makes 3x32x32 of images of 256x256" in capsys.readouterr().err
    assert cli.main([*command, "--autoencoder", settings.autoencoder, "--resolution", "32"]) == 0
    said = capsys.readouterr().out
    assert "26 latent samples of 3x4x4 in 1 shard" in said
    (shown,) = re.findall(r"made them, look at some; next: ldm-vae (latents decode .*)", said)
    assert cli.main(shlex.split(shown)) == 0
    assert Path(f"{settings.output}-sheet.png").exists()
    record = json.loads((Path(settings.output) / "run.json").read_text())
    assert (record["finished"], record["images"]) == (True, 26)
