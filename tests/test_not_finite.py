"""Numbers that are not finite are never shown: whatever makes an image says so in one sentence, with the cure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from ldm_vae import cli
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.data import transforms
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, fit_latent_rgb
from ldm_vae.errors import EXIT_USER_ERROR, NotFinite
from tests.diffusion.conftest import pipeline as pipeline  # a fixture
from tests.latents.conftest import autoencoder_directory as autoencoder_directory
from tests.latents.conftest import encode as encode
from tests.latents.conftest import latents as latents
from tests.latents.conftest import settings as settings

SENTENCE = r"{}: holds numbers that are not finite, .* take precision=bf16 or fp32 .* upcast the autoencoder"


@pytest.fixture(params=[math.nan, math.inf, -math.inf])
def overflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel of every decoded image is not finite."""
    decode = Autoencoder.decode

    def broken(self: Autoencoder, z: torch.Tensor, return_dict: bool = True) -> Any:
        image = decode(self, z).sample.clone()
        image[..., 3, 5] = request.param
        return DecoderOutput(sample=image) if return_dict else (image,)

    monkeypatch.setattr(Autoencoder, "decode", broken)


Words = Callable[[str, str, Path], list[str]]

COMMANDS: dict[str, Words] = {
    "evaluate": lambda model, data, out: [
        "evaluate", model, f"data={data}", f"output={out}", "resolution=32", "device=cpu",
    ],
    "demo": lambda model, data, out: ["demo", data, f"autoencoder={model}", f"output={out}", "device=cpu"],
    "interpolate": lambda model, data, out: [
        "interpolate", data, f"autoencoder={model}", f"output={out}", "pairs=1", "frames=3", "device=cpu",
    ],
    "diagnose": lambda model, data, out: [
        "diagnose", model, f"data={data}", f"output={out}", "count=16", "resolution=64", "device=cpu",
    ],
    "codec bench": lambda model, data, out: [
        "codec", "bench", model, f"data={data}", f"output={out}", "count=2", "device=cpu",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_stops_with_one_sentence(
    command: str, overflow: None, autoencoder_directory: Path, image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = COMMANDS[command](str(autoencoder_directory), str(image_folder), tmp_path / "out")
    assert cli.main(words) == EXIT_USER_ERROR
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "decoder: holds numbers that are not finite" in last
    assert "precision=bf16" in last
    assert not list((tmp_path / "out").rglob("*.png"))


def test_compressed_files_and_stored_latents(
    overflow: None, autoencoder_directory: Path, image_folder: Path, latents: Path, tmp_path: Path, capsys: Any
) -> None:
    model = f"autoencoder={autoencoder_directory}"
    assert cli.main(["codec", "compress", str(image_folder / "a/000.png"), model, f"output={tmp_path}/small"]) == 0
    file = next((tmp_path / "small").iterdir())
    assert cli.main(["codec", "decompress", str(file), model, f"output={tmp_path}/out"]) == EXIT_USER_ERROR
    assert "decoder: holds numbers" in capsys.readouterr().err
    assert cli.main(["latents", "decode", str(latents), model, f"output={tmp_path}/out.png"]) == EXIT_USER_ERROR
    assert "decoder: holds numbers" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_pipeline(overflow: None, pipeline: LatentDiffusionPipeline, output_type: Any) -> None:
    with pytest.raises(NotFinite, match=SENTENCE.format("decoder")):
        pipeline("cat", seed=0, num_inference_steps=1, output_type=output_type)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_named(
    pipeline: LatentDiffusionPipeline, output_type: Any, value: float
) -> None:
    broken = torch.randn(1, *pipeline.latent_shape())
    broken[0, 0, 2, 3] = value
    with pytest.raises(NotFinite, match=SENTENCE.format("latents")):
        pipeline("cat", latents=broken, num_inference_steps=1, output_type=output_type)
    with pytest.raises(NotFinite, match=SENTENCE.format("latents")):
        pipeline.autoencoder.decode_images(broken)
    found = fit_latent_rgb(torch.randn(2, *pipeline.latent_shape()), torch.rand(2, 3, 64, 64))
    pipeline.register_to_config(latent_rgb=found)
    with pytest.raises(NotFinite, match=SENTENCE.format("latents")):
        pipeline.preview(broken)


def test_the_cure_cures(pipeline: LatentDiffusionPipeline) -> None:
    """A decoder that overflows in float16 decodes after it was upcast, beside a U-Net that was not."""
    decoder = pipeline.autoencoder.decoder
    with torch.no_grad():
        decoder.tail.weight.mul_(1e5)
    pipeline.to(torch.float16)
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "output_type": "np"}
    with pytest.raises(NotFinite, match=SENTENCE.format("decoder")):
        pipeline("cat", **arguments)
    pipeline.autoencoder.to(torch.float32)
    assert np.isfinite(pipeline("cat", **arguments).images).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_pixel_is_made_of_it(value: float, dtype: torch.dtype) -> None:
    images = torch.full((1, 3, 64, 64), 1.0, dtype=dtype)
    transforms.to_uint8(images)
    images[0, 1, 2, 3] = value
    for convert in (transforms.to_uint8, transforms.to_pil):
        with pytest.raises(NotFinite, match=SENTENCE.format("image")):
            convert(images)
