"""Pictures of any size through a file and back, and every wrong companion refused; also at the command line."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.applications.codec import compression, format
from ldm_vae.applications.codec.entropy_models import STEP_DENOMINATOR, Grid, channel_units, step_of
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.data import transforms
from ldm_vae.errors import UserError
from tests.applications.codec.conftest import random_model, smooth_picture


def through(codec, image, quality=60.0, parts=()):
    data = codec.compress(codec.analyze(image, "it"), step_of(quality), parts).data
    return data, codec.decompress(data, "it")


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (33, 18), (64, 64), (7, 90)])
def test_any_size_comes_back(plain, fitted, size):
    image = smooth_picture(*size)
    for codec in (plain, fitted):
        data, decoded = through(codec, image)
        assert decoded.shape == image.shape
        assert (decoded == codec.decompress(data, "it")).all()


def test_a_fine_step_gives_what_the_autoencoder_gives(plain):
    image = smooth_picture(40, 48)
    tensor = transforms.from_uint8(torch.from_numpy(image).permute(2, 0, 1)[None])
    mean, _ = plain.autoencoder.encode_moments(tensor)
    exact = transforms.to_uint8(plain.autoencoder.decode_images(mean))[0].permute(1, 2, 0).numpy()
    errors = [np.abs(through(plain, image, quality)[1].astype(int) - exact).mean() for quality in (1.0, 50.0, 100.0)]
    sizes = [len(through(plain, image, quality)[0]) for quality in (1.0, 50.0, 100.0)]
    assert errors[2] < 1.0
    assert errors[0] > errors[2]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


@pytest.mark.parametrize(("quality", "largest"), [(37.0, 0.5), (38.0, 1.0), (80.0, 1.0)])
def test_the_grid_errs_by_less_than_a_step(quality, largest):
    grid = Grid(np.array([0.5, -3.0]), np.array([0.1, 2.0]), step_of(quality))
    latents = np.random.default_rng(0).normal(0, 4, (2, 9, 9))
    levels = grid.quantize(latents, "it")
    error = np.abs(grid.restore(levels) - latents) / grid.width
    assert (error <= largest + 1e-6).all()
    assert (error.max() > 0.5 + 1e-6) == (quality >= 38)  # coarse steps are rounded plainly
    assert np.abs(grid.restore(levels[:1]) - grid.restore(levels)[:1]).max() == 0
    assert (grid.quantize(np.stack([latents, latents]), "it") == levels).all()
    with pytest.raises(UserError, match="span more than 16383 steps"):
        grid.quantize(np.full((2, 1, 1), 1e6), "it")
    with pytest.raises(UserError, match="not finite"):
        grid.quantize(np.full((2, 1, 1), np.nan), "it")


def test_units_are_the_posteriors_or_a_share_of_the_latents():
    mean = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    logvar = torch.full_like(mean, -4.0)
    assert channel_units(mean, logvar) == pytest.approx(np.exp(-2.0) * np.ones(3))
    assert channel_units(12 * mean, None) == pytest.approx(mean.double().std(dim=(0, 2, 3), correction=0).numpy())


def test_a_target_is_met_and_nearly_used_up(plain, fitted):
    image = smooth_picture(128, 128)
    for codec in (plain, fitted):
        picture = codec.analyze(image, "it")
        for target in (0.2, 0.35):
            size = len(codec.compress_within(picture, target).data)
            assert 0.9 * target <= 8 * size / 128**2 <= target
        with pytest.raises(UserError, match=r"its smallest file has .* bits per pixel, more than 0.001"):
            codec.compress_within(picture, 0.001)


def test_a_target_is_met_where_the_finest_steps_have_too_many_levels(plain):
    picture = plain.analyze(smooth_picture(32, 32), "it")
    narrow = dataclasses.replace(picture, unit=picture.unit / 1000)
    with pytest.raises(UserError, match="its latents span more than 16383 steps; take a lower quality"):
        plain.compress(narrow, step_of(100.0))
    assert plain.compress_within(narrow, 90.0).step > step_of(100.0)


def test_a_posterior_that_was_held_to_no_rate_sets_no_unit():
    mean = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    units = channel_units(mean, torch.full_like(mean, -20.0))
    assert units == pytest.approx(float(mean.std(correction=0)) / 128)


def test_qualities_are_from_1_to_100():
    assert step_of(50) == 2 * STEP_DENOMINATOR
    assert step_of(62) == STEP_DENOMINATOR
    for quality in (0.9, 101, float("nan")):
        with pytest.raises(UserError, match="is not between 1 and 100"):
            step_of(quality)


def test_wrong_companions_are_refused(plain, fitted, autoencoder_folder, model_file, tmp_path):
    image = smooth_picture(16, 16)
    data, _ = through(fitted, image)
    with pytest.raises(UserError, match=r"it: needs the entropy model [0-9a-f]{16}; give its file as entropy"):
        plain.decompress(data, "it")
    other = dataclasses.replace(random_model(plain.identity, 3), scales=(36001, 36000, 36000))
    with pytest.raises(UserError, match="it: was compressed with entropy model"):
        dataclasses.replace(plain, model=other).decompress(data, "it")
    stranger = dataclasses.replace(plain, identity="sha256:" + "1" * 64, where="runs/other")
    with pytest.raises(UserError, match=r"it: was compressed with autoencoder [0-9a-f]{16}, and runs/other is 1{16}"):
        stranger.decompress(through(plain, image)[0], "it")
    random_model("sha256:" + "2" * 64, 3).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was fitted to the latents of another autoencoder"):
        compression.open_codec(str(autoencoder_folder), str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="is too large to compress"):
        plain.analyze(np.broadcast_to(np.uint8(0), (70000, 1, 3)), "it")


def test_a_decoder_that_was_trained_further_reads_old_files(plain):
    image = smooth_picture(16, 16)
    data, decoded = through(plain, image)
    again = build_like(plain.autoencoder)
    again.load_state_dict(plain.autoencoder.state_dict())
    with torch.no_grad():
        again.decoder.head.bias += 0.2
    codec = dataclasses.replace(plain, autoencoder=again.eval(), identity=compression.codec_identity(again))
    assert codec.identity == plain.identity
    assert (codec.decompress(data, "it") != decoded).any()
    with torch.no_grad():
        again.encoder.head.bias += 0.2
    assert compression.codec_identity(again) != plain.identity


def build_like(autoencoder):
    return type(autoencoder).from_config(autoencoder.config)


def test_a_preview_is_what_the_narrow_autoencoder_decodes(plain):
    image = smooth_picture(24, 40)
    data, _ = through(plain, image, parts=(2,))
    preview = plain.decompress(data, "it", channels=2)
    picture = plain.analyze(image, "it")
    levels = plain.compress(picture, step_of(60.0)).levels
    own = format.SelfFitted.rounded(picture.mean, picture.unit, (0, 0, 0))
    latents = Grid(own.mean, own.unit, step_of(60.0)).restore(levels[:2])
    narrow = plain.autoencoder.narrow(2)
    expected = transforms.to_uint8(narrow.decode_images(torch.from_numpy(latents)[None]))[0].permute(1, 2, 0).numpy()
    assert np.abs(preview.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["ae", "vq", "fsq"])
def test_other_kinds_of_autoencoders_compress_too(kind):
    if kind != "ae":
        pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(kind=kind, preset="pico", latent_channels=4)).eval()
    codec = compression.Codec(model, None, compression.codec_identity(model), 4, 8, "it")
    image = smooth_picture(16, 24)
    assert through(codec, image)[1].shape == image.shape


def test_the_commands_there_and_back(autoencoder_folder, model_file, tmp_path, capsys):
    for number, size in enumerate(((20, 30), (64, 48))):
        Image.fromarray(smooth_picture(*size, seed=number)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [str(tmp_path / name) for name in ("0.png", "1.png", "broken.png")]
    companions = ["--autoencoder", str(autoencoder_folder), "--entropy", str(model_file), "--device", "cpu"]
    small, back = str(tmp_path / "small"), str(tmp_path / "back")
    assert cli.main(["compress", *pictures, *companions, "--output", small, "--progressive", "1,2"]) == 0
    assert "broken.png: left out (none of JPEG, PNG, " in capsys.readouterr().out
    files = sorted(str(path) for path in (tmp_path / "small").iterdir())
    assert [name[-6:] for name in files] == ["0.ldmz", "1.ldmz"]
    assert cli.main(["decompress", *files, *companions, "--out", back]) == 0  # as other commands call it
    assert [Image.open(tmp_path / "back" / f"{n}.png").size for n in (0, 1)] == [(30, 20), (48, 64)]
    assert cli.main(["decompress", *files, *companions, "--output", back]) == 2
    assert "is there already; give another output, or --overwrite" in capsys.readouterr().err
    again = ["--output", back, "--overwrite", "--channels"]
    assert cli.main(["decompress", *files, *companions, *again, "1"]) == 0
    assert cli.main(["decompress", *files, *companions, *again, "4"]) == 2
    assert "cannot be decoded from 4 channels alone, only from 1, 2, 3" in capsys.readouterr().err


def test_a_folder_goes_there_and_back(autoencoder_folder, tmp_path, capsys):
    for name in ("a.png", "deep/b.c.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_picture(20, 30)).save(tmp_path / "pictures" / name)
    companions = ["--autoencoder", str(autoencoder_folder), "--device", "cpu"]
    small, back = str(tmp_path / "small"), tmp_path / "back"
    assert cli.main(["compress", str(tmp_path / "pictures"), *companions, "--output", small]) == 0
    assert f"next: ldm-vae decompress {small} " in capsys.readouterr().out
    assert cli.main(["decompress", small, *companions, "--output", str(back)]) == 0
    assert sorted(str(path.relative_to(back)) for path in back.rglob("*.png")) == ["a.png", "deep/b.c.png"]
    assert cli.main(["decompress", str(back), *companions]) == 2
    assert "back: holds no .ldmz file; give files that `ldm-vae compress` wrote" in capsys.readouterr().err


def test_a_damaged_file_among_others_is_named(autoencoder_folder, tmp_path, capsys):
    Image.fromarray(smooth_picture(20, 30)).save(tmp_path / "a.png")
    companions = ["--autoencoder", str(autoencoder_folder), "--device", "cpu"]
    assert cli.main(["compress", str(tmp_path / "a.png"), *companions, "--quality", "30"]) == 0
    data = (tmp_path / "a.ldmz").read_bytes()
    (tmp_path / "b.ldmz").write_bytes(data[:-3])
    files = [str(tmp_path / name) for name in ("b.ldmz", "a.ldmz")]
    output = ["--output", str(tmp_path / "back")]
    assert cli.main(["decompress", *files, *companions, *output]) == 2
    assert "b.ldmz: is cut off (3 bytes are missing)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["a.png"]


def test_two_pictures_of_one_name_do_not_overwrite_each_other(autoencoder_folder, tmp_path, capsys):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(smooth_picture(20, 30)).save(tmp_path / name)
    words = ["compress", str(tmp_path), "--autoencoder", str(autoencoder_folder)]
    assert cli.main(words) == 2
    assert "would both become it; give them one by one" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(tmp_path / "small")]) == 0
    assert len(list((tmp_path / "small").iterdir())) == 2


def test_names_that_are_no_utf_8_are_read(autoencoder_folder, tmp_path, capsys):
    folder, small = tmp_path / "pictures", tmp_path / "small"
    folder.mkdir()
    path = folder / os.fsdecode(b"a\xff.png")
    Image.fromarray(smooth_picture(20, 30)).save(path)
    companions = ["--autoencoder", str(autoencoder_folder), "--device", "cpu"]
    for given in (folder, path):
        assert cli.main(["compress", str(given), *companions, "--output", str(small), "--overwrite"]) == 0
        assert cli.main(["compress", str(given), *companions, "--overwrite"]) == 0
    assert [file.name for file in small.iterdir()] == ["a\\xff.ldmz"]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--quality", "0"], "quality: 0 is not between 1 and 100"),
        (["--target-bpp", "-1"], "target_bpp: -1 is not a number of bits per pixel"),
        (["--progressive", "2,1"], "progressive: [2, 1] is not a rising list of channel counts"),
        (["--progressive", "2,4"], "progressive: [2, 4] are more channels than the latents have, 3; give fewer"),
        (["--output", "/proc/version"], "output: /proc/version: is a file; give a folder"),
        (["--entropy", "missing"], "missing: no such file; give a file that `ldm-vae codec fit` wrote"),
    ],
)
def test_wrong_words_are_refused(autoencoder_folder, tmp_path, capsys, words, sentence):
    Image.fromarray(smooth_picture(20, 30)).save(tmp_path / "a.png")
    assert cli.main(["compress", str(tmp_path / "a.png"), "--autoencoder", str(autoencoder_folder), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*.ldmz"))
