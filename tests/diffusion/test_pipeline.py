"""The pipeline: closed-form sampling, exact saving, whose autoencoder it is, labels, sizes, seeds, guidance."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ldm_vae.diffusion.pipeline import (
    LatentDiffusionPipeline,
    find_label,
    flow_scheduler,
    image_generator,
)
from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json
from ldm_vae.latents.manifest import Manifest, read_manifest
from tests.diffusion.conftest import NAMES, make_pipeline

MEANS, STDS = (0.5, -1.0), (0.3, 1.2)


class GaussianVelocity(ModelMixin, ConfigMixin):
    """The optimal velocity for latents that are N(mean, std²) per channel: E[eps - x0 | x_t] in closed form."""

    @register_to_config
    def __init__(self, latent_channels: int = 2, num_classes: int = 0) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEANS, STDS))
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return -mean + slope * (noisy - (1 - t) * mean)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_sampling_recovers_a_gaussian(shift: float) -> None:
    autoencoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    pipeline = LatentDiffusionPipeline(
        autoencoder,
        GaussianVelocity(),
        flow_scheduler(shift),
        normalizer={"mean": [10.0, 20.0], "std": [2.0, 3.0]},
        latent_size=(64, 64),
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(num_images=8, seed=0, num_inference_steps=200, output_type="latent").images
    for channel, (mean, std, centre, scale) in enumerate(zip(MEANS, STDS, (10, 20), (2, 3))):
        values = latents[:, channel]
        assert values.mean().item() == pytest.approx(centre + scale * mean, abs=0.03 * scale)
        assert values.std().item() == pytest.approx(scale * std, rel=0.03)


def test_times_are_shifted_once(pipeline: LatentDiffusionPipeline) -> None:
    """The scheduler's own times shift the last one twice; and larger latents get a larger shift."""
    times: list[float] = []

    def record(_: Any, __: int, timestep: Tensor, ___: Any) -> dict[str, Tensor]:
        times.append(timestep.item() / 1000)
        return {}

    pipeline(num_inference_steps=4, seed=0, output_type="latent", callback_on_step_end=record)
    assert times == pytest.approx([1.5 * t / (1 + 0.5 * t) for t in (1, 0.75, 0.5, 0.25)])
    times.clear()
    pipeline(num_inference_steps=2, seed=0, height=128, width=128, output_type="latent", callback_on_step_end=record)
    assert times == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.5)])


@pytest.mark.parametrize("architecture", ["wavelet", "sd"])
def test_saving_is_exact(tmp_path: Path, architecture: str) -> None:
    pipeline = make_pipeline(NAMES, architecture)
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = [p(["dog", 0], seed=3, num_inference_steps=3, output_type="pt").images for p in (pipeline, loaded)]
    assert torch.equal(*images)
    for key in ("normalizer", "latent_size", "label_names", "encoder_fingerprint"):
        assert canonical_json(loaded.config[key]) == canonical_json(pipeline.config[key])
    assert loaded.scheduler.config["shift"] == 1.5
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


def test_another_autoencoder_is_refused(saved: Path) -> None:
    other = make_pipeline(NAMES).autoencoder
    LatentDiffusionPipeline.from_pretrained(saved, autoencoder=other)  # equal weights are the same autoencoder
    with torch.no_grad():
        next(other.decoder.parameters())[0, 0, 0, 0] += 1e-6  # a decoder that was trained further decodes them as well
        LatentDiffusionPipeline.from_pretrained(saved, autoencoder=other)
        next(other.encoder.parameters())[0, 0, 0, 0] += 1e-6
    with pytest.raises(UserError, match=r"fingerprint.*latents came from"):
        LatentDiffusionPipeline.from_pretrained(saved, autoencoder=other)


def test_half_precision_is_checked_before_it_is_cast(saved: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.autoencoder.dtype == torch.bfloat16
    pipeline.set_progress_bar_config(disable=True)
    half = pipeline("cat", seed=0, num_inference_steps=4, output_type="pt").images
    mixed = LatentDiffusionPipeline.from_pretrained(saved, torch_dtype={"unet": torch.bfloat16})
    assert (mixed.unet.dtype, mixed.autoencoder.dtype) == (torch.bfloat16, torch.float32)
    full = make_pipeline(NAMES)("cat", seed=0, num_inference_steps=4, output_type="pt").images
    assert (half - full).abs().mean() < 0.02


def test_parts_that_do_not_fit_are_refused(pipeline: LatentDiffusionPipeline) -> None:
    parts = pipeline.components
    with pytest.raises(UserError, match="U-Net has 4 latent channels, the latent statistics have 2"):
        LatentDiffusionPipeline(**parts, normalizer={"mean": [0, 0], "std": [1, 1]}, label_names=NAMES)
    with pytest.raises(UserError, match="2 label names for a U-Net of 3 classes"):
        LatentDiffusionPipeline(**parts, normalizer=pipeline.config["normalizer"], label_names=["a", "b"])
    with pytest.raises(UserError, match="no normaliser"):
        LatentDiffusionPipeline(**parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": [1.0, 0.5, float("nan"), 1.5]}, "channel 2 has mean 0.3 and std nan"),
        (
            {"std": [1.0, 0.0, 2.0, 1.5]},
            "channel 1 has mean -0.2 and std 0.0, which must be finite and the std above 0",
        ),
        ({"mean": [float("inf"), 0, 0, 0]}, "channel 0 has mean inf"),
        ({"mean": [0.1, -0.2, 0.3]}, "3 means for 4 standard deviations"),
        ({"mean": [0.1] * 5, "std": [1.0] * 5}, "U-Net has 4 latent channels, the latent statistics have 5"),
        ({"mean": None}, "mean is None and std is .*, which must be a number for each channel"),
        ({"std": [1.0, None, 2.0, 1.5]}, "must be a number for each channel"),
    ],
)
def test_a_damaged_normaliser_is_refused(saved: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    copy = shutil.copytree(saved, tmp_path / "pipeline")
    index = json.loads((copy / "model_index.json").read_text())
    index["normalizer"] |= changes
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        LatentDiffusionPipeline.from_pretrained(copy)


@pytest.fixture
def manifest(latents: Path, pipeline: LatentDiffusionPipeline) -> Manifest:
    """Of latents that the pipeline's encoder made."""
    manifest = read_manifest(latents)
    encoder = {"encoder_fingerprint": pipeline.config["encoder_fingerprint"]}
    return dataclasses.replace(manifest, autoencoder=manifest.autoencoder | encoder)


def test_latents_meet_the_pipeline_that_was_trained_on_their_like(
    pipeline: LatentDiffusionPipeline, manifest: Manifest, tmp_path: Path
) -> None:
    pipeline.check_latents(manifest)  # without a record of its own, any preprocessing
    again = LatentDiffusionPipeline(
        **pipeline.components, **pipeline.parameters | {"preprocessing": manifest.preprocessing}
    )
    again.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.check_latents(manifest)
    other = dataclasses.replace(manifest, preprocessing=manifest.preprocessing | {"filter": "bicubic", "width": 48})
    with pytest.raises(UserError) as caught:
        loaded.check_latents(other)
    for words in (
        "preprocessing.filter is bicubic there and lanczos, antialiased, 8-bit here",
        "preprocessing.width is 48 there and 32 here",
        "give it latents that were made like those",
    ):
        assert words in str(caught.value)


def test_latents_of_another_encoder_and_codes_do_not(
    pipeline: LatentDiffusionPipeline,
    manifest: Manifest,
    latents: Path,
) -> None:
    with pytest.raises(
        UserError, match=r"encoder_fingerprint is sha256:\w{12}\.\.\. there and sha256:\w{12}\.\.\. here"
    ):
        pipeline.check_latents(read_manifest(latents))
    with pytest.raises(UserError, match="content is indices"):
        pipeline.check_latents(dataclasses.replace(manifest, content="indices"))


def test_a_pipeline_of_an_earlier_release_has_no_preprocessing(saved: Path, tmp_path: Path, manifest: Manifest) -> None:
    copy = shutil.copytree(saved, tmp_path / "pipeline")
    index = json.loads((copy / "model_index.json").read_text())
    del index["preprocessing"]
    (copy / "model_index.json").write_text(json.dumps(index))
    loaded = LatentDiffusionPipeline.from_pretrained(copy)
    assert loaded.config["preprocessing"] is None
    loaded.check_latents(manifest)


def test_components_build_an_equal_pipeline(pipeline: LatentDiffusionPipeline) -> None:
    again = LatentDiffusionPipeline(**pipeline.components, **pipeline.parameters)
    again.set_progress_bar_config(disable=True)
    latents = [p("cat", seed=1, num_inference_steps=2, output_type="latent").images for p in (pipeline, again)]
    assert torch.equal(*latents)


def test_an_image_does_not_depend_on_its_batch(pipeline: LatentDiffusionPipeline) -> None:
    def sample(labels: list[str | int], **arguments: Any) -> Tensor:
        return pipeline(labels, num_inference_steps=4, output_type="latent", **arguments).images

    together = sample(["cat", "dog", "red ball", "cat"], seed=7)
    torch.testing.assert_close(sample(["cat", "dog"], seed=7), together[:2], atol=1e-4, rtol=1e-4)
    alone = sample(["red ball"], generator=[image_generator(7, 2)])
    torch.testing.assert_close(alone, together[2:3], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[3], atol=0.1)
    assert not torch.allclose(sample(["cat"], seed=8)[0], together[0], atol=0.1)
    one = sample(["cat", "dog"], generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, sample(["cat", "dog"], generator=torch.Generator().manual_seed(1)))


def test_outputs(pipeline: LatentDiffusionPipeline) -> None:
    def images(output_type: str) -> Any:
        return pipeline(["cat", 1], seed=0, num_inference_steps=2, output_type=output_type).images

    tensor, array, pictures = images("pt"), images("np"), images("pil")
    assert tensor.shape == (2, 3, 64, 64)
    assert 0 <= tensor.min() < tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in pictures]), array * 255, atol=0.51)
    assert images("latent").shape == (2, 4, 8, 8)
    as_tuple = pipeline("cat", seed=0, num_inference_steps=1, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0][0].size == (64, 64)


def test_any_size_that_the_autoencoder_divides(pipeline: LatentDiffusionPipeline) -> None:
    image = pipeline("cat", height=40, width=104, seed=0, num_inference_steps=2).images[0]
    assert image.size == (104, 40)
    with pytest.raises(UserError, match="height: 50 is not a multiple of 8; 48 is the nearest"):
        pipeline("cat", height=50)


def test_guidance_is_a_line_through_two_velocities(pipeline: LatentDiffusionPipeline) -> None:
    noise, time, ids = torch.randn(2, 4, 8, 8), torch.tensor(0.6), torch.tensor([0, 2])
    with torch.no_grad():
        none, plain = pipeline.unet(noise, time), pipeline.unet(noise, time, ids)
        guided = pipeline._velocity(noise, time, ids, 3.0)
    torch.testing.assert_close(guided, none + 3 * (plain - none), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipeline._velocity(noise, time, ids, 1.0), plain)


def test_unconditional(tmp_path: Path) -> None:
    pipeline = make_pipeline([])
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert len(loaded(num_images=2, seed=0, num_inference_steps=1).images) == 2
    with pytest.raises(UserError, match="unconditional"):
        loaded("cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "cta"}, "did you mean 'cat'"),
        ({"labels": 3}, "known labels: cat, dog, red ball; or an id from 0 to 2"),
        ({"labels": ["cat", "dog"], "num_images": 1}, "2 of them for 1 images"),
        ({"guidance_scale": 4.0}, "no effect without a label"),
        ({"seed": 1, "generator": torch.Generator()}, "together with a generator"),
        ({"num_images": 3, "generator": [torch.Generator()]}, "1 of them for 3 images"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"num_inference_steps": 0}, "below 1"),
    ],
)
def test_wrong_arguments_are_refused(
    pipeline: LatentDiffusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**arguments)


def test_labels_by_name_and_id() -> None:
    names = ["cat", "Dog", "0"]
    assert [find_label(label, names) for label in ("cat", "dog", "DOG", 0, 2, "1")] == [0, 1, 1, 0, 2, 1]
    assert find_label("0", names) == 2  # a name wins over an id


def test_callback_sees_and_replaces_the_latents(pipeline: LatentDiffusionPipeline) -> None:
    seen: list[int] = []

    def zero(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(index)
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline("cat", seed=0, num_inference_steps=3, output_type="latent", callback_on_step_end=zero).images
    assert seen == [0, 1, 2]
    expected = torch.tensor(pipeline.config["normalizer"]["mean"]).view(1, 4, 1, 1).expand_as(latents)
    torch.testing.assert_close(latents, expected)
