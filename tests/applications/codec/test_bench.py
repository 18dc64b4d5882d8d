"""The result folder of `codec-bench`: figures of actual files, on a few small images."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.applications.codec.bench import SELF_FITTED, CodecBenchConfig
from ldm_vae.errors import UserError
from ldm_vae.evaluation.baselines import encode_picture


@pytest.fixture(scope="module")
def result(autoencoder_folder, model_file, image_folder, random_backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "codec"
    words = [f"autoencoder={autoencoder_folder}", f"entropy=[{model_file}]", f"output={output}", "device=cpu"]
    words += ["data.source=folder", f"data.path={image_folder}", "part=all", "resolution=64", "count=2"]
    words += ["qualities=[20,50,80]", "codecs=[JPEG]", "codec_qualities=[10,50,90]", "examples=1"]
    words += ["perceptual_net=squeeze", f"perceptual_weights={random_backbone}"]
    assert cli.main(["codec-bench", *words]) == 0
    return output, words


def test_bytes_are_those_of_files(result, image_folder):
    output, _ = result
    found = json.loads((output / "results.json").read_text())
    assert list(found["curves"]) == [SELF_FITTED, "ldm-vae, context", "JPEG"]
    rows = found["images"]["rows"]["JPEG"]["50"]
    name = found["images"]["ids"][0]
    image = Image.open(image_folder / name).convert("RGB")
    assert image.size == (80, 96)
    crop = image.resize((64, 77), Image.Resampling.LANCZOS)  # of about the same bytes
    assert rows["bytes"][0] == pytest.approx(len(encode_picture(crop, "JPEG", 50)), rel=0.3)
    for points in found["curves"].values():
        assert [point["quality"] for point in points] == sorted(point["quality"] for point in points)
        assert all(point["bits_per_pixel"] > point.get("ideal_bits_per_pixel", 0) > -1 for point in points)
        assert set(points[0]) >= {"psnr", "ssim", "lpips"}
    pairs = {(entry["codec"], entry["anchor"]) for entry in found["bd_rate"]}
    assert ("ldm-vae, context", "JPEG") in pairs
    assert found["kl_gap"]["kl_bits_per_pixel"] > 0
    assert found["protocol"]["images"]["count"] == 2


def test_the_folder_has_words_plots_and_a_page(result):
    output, _ = result
    text = (output / "results.md").read_text()
    assert text.startswith("| rate at equal quality |")
    assert "ldm-vae, context against JPEG" in text
    page = (output / "index.html").read_text()
    assert page.count("<svg") == 3
    assert "At equal bytes" in page
    assert "nan" not in text
    assert (output / "rate_psnr.svg").read_text().startswith("<?xml")
    with Image.open(output / "examples.png") as sheet:
        assert sheet.width > 3 * 32
    assert json.loads((output / "run.json").read_text())["images"] == 2


def test_a_finished_result_is_read_and_another_refused(result, capsys):
    output, words = result
    before = (output / "results.json").read_bytes()
    assert cli.main(["codec-bench", *words]) == 0
    assert (output / "results.json").read_bytes() == before
    assert cli.main(["codec-bench", *words, "count=1"]) == 2
    assert "holds the result of count (2 -> 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"qualities": [50.0, 60.0]}, "qualities: [50.0, 60.0] is not a curve; give three or more"),
        ({"qualities": [0.0, 50.0, 60.0]}, "quality: 0 is not between 1 and 100"),
        ({"codec_qualities": [0, 1, 2]}, "codec_qualities: [0, 1, 2] are not all between 1 and 95"),
        ({"qualities": [20.0, 50.0, 50.0, 60.0]}, "qualities: 50.0 is there twice; leave one out"),
        ({"codecs": ["JPEG", "JPEG"]}, "codecs: JPEG is there twice; leave one out"),
        ({"codecs": ["GIF"]}, "codecs: 'GIF' cannot be written here"),
        ({"perceptual_weights": "x"}, "perceptual_weights: has no effect without perceptual_net"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(UserError) as error:
        CodecBenchConfig(**settings)
    assert str(error.value).startswith(sentence)


def test_the_files_are_pictures():
    with Image.open(io.BytesIO(encode_picture(Image.new("RGB", (8, 8)), "JPEG", 50))) as file:
        assert file.size == (8, 8)
