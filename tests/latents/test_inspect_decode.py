"""Samples as pictures again: which ones, from which autoencoder, and that they are those of the images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data import transforms
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.samples import channels_first
from ldm_vae.data.transforms import resize_center_crop
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.inspect import DecodedSample, check_autoencoder, choose, contact_sheet, decode_samples
from ldm_vae.utils.image_grid import labeled_sheet


@pytest.fixture(scope="module")
def flipped_set(encode, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flipped") / "set"
    encode(path, "flip=true", "dtype=float32")
    return path


def picture(image_folder: Path, number: int) -> torch.Tensor:
    return transforms.from_uint8(channels_first(resize_center_crop(FolderSource(image_folder).read(number), 32))[None])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_sample_is_decoded_as_its_image_would_be(flipped_set, autoencoder_directory, image_folder, mirrored):
    dataset, autoencoder = LatentDataset(flipped_set), load_autoencoder(autoencoder_directory)
    numbers = [17, 3]
    found = decode_samples(dataset, autoencoder, numbers, flipped=mirrored)
    assert [sample.number for sample in found] == numbers
    assert [sample.id for sample in found] == [dataset.id(number) for number in numbers]
    assert [sample.label for sample in found] == ["b", "a"]
    for sample in found:
        image = picture(image_folder, sample.number)
        mean = autoencoder.encode_moments(image.flip(-1) if mirrored else image)[0]
        expected = np.asarray(transforms.to_pil(autoencoder.decode_images(mean))[0]).astype(int)
        assert np.abs(np.asarray(sample.image).astype(int) - expected).max() <= 1


def test_posterior_samples_differ_and_repeat(latents, autoencoder_directory):
    dataset, autoencoder = LatentDataset(latents), load_autoencoder(autoencoder_directory)
    mean, sample, again = (
        np.asarray(decode_samples(dataset, autoencoder, [5], posterior=posterior)[0].image)
        for posterior in ("mean", "sample", "sample")
    )
    assert (sample == again).all()
    assert (sample != mean).any()


def test_what_is_not_stored_is_refused(latents, encode, autoencoder_directory, tmp_path):
    autoencoder = load_autoencoder(autoencoder_directory)
    with pytest.raises(UserError, match=r"flipped: .* holds no mirror images"):
        decode_samples(LatentDataset(latents), autoencoder, [0], flipped=True)
    encode(tmp_path / "set", "store=mean")
    with pytest.raises(UserError, match=r"posterior: .* holds mean and no moments"):
        decode_samples(LatentDataset(tmp_path / "set"), autoencoder, [0], posterior="sample")
    assert len(decode_samples(LatentDataset(tmp_path / "set"), autoencoder, [0])) == 1


def test_choosing(latents):
    manifest = LatentDataset(latents).manifest
    assert choose(manifest, 4) == [3, 9, 15, 21]
    assert choose(manifest, 100) == list(range(24))
    assert choose(manifest, 4, samples=[7, 0, 7]) == [7, 0, 7]
    assert choose(manifest, 3, label="b") == [14, 18, 22]
    for arguments, message in (
        ({"samples": [24]}, "there is no sample 24; numbers go from 0 to 23"),
        ({"label": "c"}, "'c' is not a class of .*; there are: a, b"),
        ({"label": "bb"}, "did you mean 'b'"),
    ):
        with pytest.raises(UserError, match=message):
            choose(manifest, 4, **arguments)
    with pytest.raises(UserError, match="count: 0 is below 1"):
        choose(manifest, 0)


def test_codes_are_decoded_by_their_own_codebook_only(encode, image_folder, tmp_path):
    pytest.importorskip("vector_quantize_pytorch")
    from ldm_vae.autoencoder.quantized import AutoencoderQuantized

    torch.manual_seed(0)
    AutoencoderQuantized(
        latent_channels=3, codebook_size=20, encoder_channels=(8, 16), encoder_blocks=(1, 1),
        decoder_channels=(16, 8, 8, 8), decoder_blocks=(1, 0, 0, 0),
    ).save_pretrained(tmp_path / "vq")  # fmt: skip
    encode(tmp_path / "codes", f"autoencoder={tmp_path / 'vq'}", "store=indices")
    dataset, autoencoder = LatentDataset(tmp_path / "codes"), load_autoencoder(tmp_path / "vq")
    check_autoencoder(dataset.manifest, autoencoder, "here")
    found = decode_samples(dataset, autoencoder, [9])[0]
    expected = transforms.to_pil(autoencoder(picture(image_folder, 9)).sample)[0]
    assert np.abs(np.asarray(found.image).astype(int) - np.asarray(expected)).max() <= 1
    with torch.no_grad():  # the encoder stays the same
        autoencoder.quantizer._codebook.embed += 1e-3
    with pytest.raises(
        UserError, match=r"here: its quantizer has the fingerprint sha256:.* made by sha256:.*; give the"
    ):
        check_autoencoder(dataset.manifest, autoencoder, "here")


def test_the_command_writes_a_sheet(latents, autoencoder_directory, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    words = ["latents", "decode", str(latents), "--autoencoder", str(autoencoder_directory), "--device", "cpu"]
    assert cli.main([*words, "--output", str(sheet), "--samples", "3,17"]) == 0
    first, *shown, last = capsys.readouterr().out.splitlines()
    assert first.startswith("latents decode: 2 of 24 samples of ")
    assert shown == ["3  a  a/006.png", "17  b  b/011.png"]
    assert last.startswith(f"{sheet}: 2 of 24 samples; next: ldm-vae train-diffusion {latents} ")
    assert Image.open(sheet).width > 2 * 128
    for more, message in (
        (["--output", str(sheet)], "exists already; give another name, or --overwrite"),
        (["--output", "sheet.txt"], "sheet.txt is not the name of an image"),
        (["--output", str(latents / "x.png")], "holds latents; give a path outside of it"),
        (["--output", "x.png", "--samples", "3", "--count", "2"], "label, count: have no effect with samples"),
        (["--output", "x.png", "--samples", "3,-1"], "'3,-1' is not a list of numbers"),
    ):
        assert cli.main([*words, *more]) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
    assert cli.main([*words, "--output", str(sheet), "--count", "1", "--overwrite"]) == 0


def test_another_autoencoder_is_refused_by_the_command(latents, autoencoder_directory, tmp_path, capsys):
    other = load_autoencoder(autoencoder_directory)
    with torch.no_grad():
        next(other.encoder.parameters())[0, 0, 0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    words = ["--autoencoder", str(tmp_path / "other"), "--output", str(tmp_path / "sheet.png")]
    assert cli.main(["latents", "decode", str(latents), *words]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "its encoder has the fingerprint sha256:" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sheet.png").exists()


def test_a_damaged_shard_is_not_shown(latents, autoencoder_directory, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "set")
    path = copy / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    autoencoder = load_autoencoder(autoencoder_directory)
    assert decode_samples(LatentDataset(copy), autoencoder, [3])
    with pytest.raises(UserError, match=r"shard-000001.safetensors: damaged"):
        decode_samples(LatentDataset(copy), autoencoder, [4])


def test_small_pictures_are_enlarged_and_captions_have_two_lines():
    samples = [
        DecodedSample(number, "cat", f"cats/{number:03d}.png", Image.new("RGB", (16, 32))) for number in range(3)
    ]
    assert samples[2].caption == "2 cat\n002.png"
    one_line = labeled_sheet([Image.new("RGB", (64, 128))] * 3, ["0 cat", "1 cat", "2 cat"], maximum_columns=2)
    two_lines = contact_sheet(samples)
    assert two_lines.width == one_line.width
    assert two_lines.height > one_line.height


def test_a_dozen_pictures_make_a_grid_and_not_one_row():
    pictures = [DecodedSample(number, "", f"{number}.png", Image.new("RGB", (128, 128))) for number in range(12)]
    sheet = contact_sheet(pictures)
    assert sheet.width < 2 * sheet.height
