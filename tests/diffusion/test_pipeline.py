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

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.diffusion import editing
from ldm_vae.diffusion import pipeline as diffusion_pipeline
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, image_generator
from ldm_vae.diffusion.samplers import SAMPLERS, flow_scheduler
from ldm_vae.errors import UserError
from ldm_vae.files import MANIFEST, canonical_json, write_checksums
from ldm_vae.latents.format import Manifest, read_manifest
from ldm_vae.latents.normalizer import LatentNormalizer
from tests.diffusion.conftest import NAMES, make_pipeline
from tests.diffusion.fields import Gaussian
from tests.test_structure import imported

GAUSSIAN = Gaussian(torch.tensor([0.5, -1.0]).view(2, 1, 1), torch.tensor([0.3, 1.2]).view(2, 1, 1))


class GaussianVelocity(ModelMixin, ConfigMixin):
    """The optimal velocity for latents that are independent Gaussians."""

    @register_to_config
    def __init__(self, latent_channels: int = 2, num_classes: int = 0) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return GAUSSIAN.velocity(noisy, t)


def gaussian_pipeline(scheduler: Any) -> LatentDiffusionPipeline:
    autoencoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    pipeline = LatentDiffusionPipeline(
        autoencoder,
        GaussianVelocity(),
        scheduler,
        normalizer={"mean": [10.0, 20.0], "std": [2.0, 3.0]},
        latent_size=(16, 16),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_recovers_a_gaussian(sampler: str, shift: float) -> None:
    """Noise by noise; by name and by the scheduler, which is the same to the last bit."""
    noise = torch.randn(2, 2, 16, 16, generator=image_generator(0, 0))
    settings = {"latents": noise, "num_inference_steps": 100, "output_type": "latent"}
    latents = gaussian_pipeline(flow_scheduler(shift, sampler))(**settings).images
    expected = LatentNormalizer([10, 20], [2, 3]).denormalize(GAUSSIAN.solution(noise))
    torch.testing.assert_close(latents, expected, atol=0.18, rtol=0)
    assert torch.equal(gaussian_pipeline(flow_scheduler(shift))(**settings, sampler=sampler).images, latents)


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


def test_a_new_process_can_load_it() -> None:
    """diffusers looks for the parts' modules among the imported ones; here they all are, so look at the source."""
    assert {"ldm_vae.diffusion.unet", "ldm_vae.autoencoder.models"} <= imported(Path(diffusion_pipeline.__file__))


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
    with pytest.raises(UserError, match="no normalizer"):
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
def test_a_damaged_normalizer_is_refused(saved: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    copy = shutil.copytree(saved, tmp_path / "pipeline")
    index = json.loads((copy / "model_index.json").read_text())
    index["normalizer"] |= changes
    (copy / "model_index.json").write_text(json.dumps(index))
    write_checksums(copy)
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
        "preprocessing filter bicubic instead of lanczos, antialiased, 8-bit",
        "images of 48 pixels in width instead of 32",
        "give latents that were made like those",
    ):
        assert words in str(caught.value)


def test_latents_of_another_encoder_and_codes_do_not(
    pipeline: LatentDiffusionPipeline,
    manifest: Manifest,
    latents: Path,
) -> None:
    with pytest.raises(UserError, match=r"the encoder sha256:\w{12}\.\.\. instead of sha256:\w{12}\.\.\."):
        pipeline.check_latents(read_manifest(latents))
    with pytest.raises(UserError, match="content is indices"):
        pipeline.check_latents(dataclasses.replace(manifest, content="indices"))


def test_a_pipeline_of_an_earlier_release_is_loaded(saved: Path, tmp_path: Path, manifest: Manifest) -> None:
    copy = shutil.copytree(saved, tmp_path / "pipeline")
    index = json.loads((copy / "model_index.json").read_text())
    for key in ("preprocessing", "latent_rgb", "autoguidance_unet"):
        del index[key]
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / MANIFEST).unlink()
    loaded = LatentDiffusionPipeline.from_pretrained(copy)
    assert loaded.config["preprocessing"] is loaded.config["latent_rgb"] is loaded.autoguidance_unet is None
    loaded.check_latents(manifest)


def test_components_build_an_equal_pipeline(pipeline: LatentDiffusionPipeline) -> None:
    again = LatentDiffusionPipeline(**pipeline.components, **pipeline.parameters)
    again.set_progress_bar_config(disable=True)
    latents = [p("cat", seed=1, num_inference_steps=2, output_type="latent").images for p in (pipeline, again)]
    assert torch.equal(*latents)


@pytest.mark.parametrize("settings", [{}, {"sampler": "heun", "guidance_scale": 1.0}, {"sampler": "dpm++"}])
def test_an_image_does_not_depend_on_its_batch(pipeline: LatentDiffusionPipeline, settings: dict[str, Any]) -> None:
    """To the last bit, at sizes that are no multiple of a vector register too."""

    def sample(labels: list[str | int], **arguments: Any) -> Tensor:
        return pipeline(
            labels, num_inference_steps=3, height=40, width=40, output_type="pt", **arguments, **settings
        ).images

    together = sample(["cat", "dog", "red ball"], num_images=7, seed=7)
    for count in (1, 2, 3):
        assert torch.equal(sample(["cat", "dog", "red ball"][:count], seed=7), together[:count])
    assert torch.equal(sample(["red ball"], generator=[image_generator(7, 5)]), together[5:6])
    assert not torch.allclose(together[0], together[3], atol=0.01)
    assert not torch.allclose(sample(["cat"], seed=8)[0], together[0], atol=0.01)
    one = sample(["cat", "dog"], generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, sample(["cat", "dog"], generator=torch.Generator().manual_seed(1)))


def test_all_images_at_once(pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: equal up to rounding."""
    arguments: dict[str, Any] = {"num_images": 3, "seed": 0, "num_inference_steps": 3, "output_type": "latent"}
    wanted = ["cat", {"dog": 1, "cat": 2}]
    alone = pipeline(wanted, **arguments).images
    monkeypatch.setattr(LatentDiffusionPipeline, "_groups", lambda _, count: [slice(0, count)])
    torch.testing.assert_close(pipeline(wanted, **arguments).images, alone, atol=1e-3, rtol=1e-3)


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
        ({"labels": "cta"}, r"did you mean 'cat'\? known labels: cat, dog, red ball; or an id from 0 to 2"),
        ({"labels": 3}, "known labels: cat, dog, red ball; or an id from 0 to 2"),
        ({"labels": ["cat", "dog"], "num_images": 1}, "2 of them for 1 image;"),
        ({"guidance_scale": 4.0}, "no effect without a label"),
        ({"guidance_interval": (0.9, 0.1)}, "give the lower time first"),
        ({"autoguidance_scale": 2.0}, "needs a second U-Net"),
        ({"sampler": "ddim"}, "choose one of euler, heun"),
        ({"strength": 0.5}, "strength: has no effect without an image"),
        ({"mask": torch.ones(1, 64, 64)}, "mask: has no effect without an image"),
        ({"image": torch.zeros(3, 64, 64), "strength": 2}, "strength: 2 is not a share"),
        ({"image": torch.zeros(3, 64, 64), "strength": 0}, "strength: 0 is not a share"),
        ({"image": torch.zeros(3, 64, 64), "height": 72}, "image: of 64 x 64 pixels for 72 x 64"),
        ({"latents": torch.zeros(1, 4, 8, 8), "seed": 0}, "noise already"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"give \(n, 4, h, w\)"),
        ({"latents": torch.zeros(2, 4, 8, 8), "num_images": 3}, "latents: 2 of them for 3 images"),
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


def test_callback_sees_and_replaces_the_latents(pipeline: LatentDiffusionPipeline) -> None:
    seen: list[int] = []

    def zero(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(index)
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline("cat", seed=0, num_inference_steps=3, output_type="latent", callback_on_step_end=zero).images
    assert seen == [0, 1, 2]
    expected = torch.tensor(pipeline.config["normalizer"]["mean"]).view(1, 4, 1, 1).expand_as(latents)
    torch.testing.assert_close(latents, expected)


PICTURE = torch.rand(1, 3, 48, 64, generator=image_generator(3, 0)).mul(255).round() / 255


def test_image_to_image(pipeline: LatentDiffusionPipeline) -> None:
    """A little strength stays near the image, full strength forgets it, and seeds make variations."""

    def sample(**arguments: Any) -> Tensor:
        return pipeline("cat", num_inference_steps=10, output_type="latent", **arguments).images

    kept = pipeline.autoencoder.encode_moments(2 * PICTURE - 1)[0]
    weak, strong = (sample(image=PICTURE, strength=strength, seed=0) for strength in (0.1, 0.9))
    assert weak.shape == (1, 4, 6, 8)
    assert (weak - kept).abs().mean() < 0.5 * (strong - kept).abs().mean()
    assert torch.equal(sample(image=PICTURE, strength=1.0, seed=0), sample(height=48, width=64, seed=0))
    variations = sample(image=PICTURE, strength=0.5, num_images=3, seed=0)
    assert torch.equal(variations[:1], sample(image=PICTURE, strength=0.5, seed=0))
    assert not torch.allclose(variations[1], variations[2], atol=0.01)
    assert len(sample(image=[PICTURE[0], PICTURE[0].flip(-1)], seed=0)) == 2
    steps: list[int] = []
    sample(image=PICTURE, seed=0, callback_on_step_end=lambda _, index, *__: steps.append(index))
    assert steps == list(range(6))  # strength 0.6 unless told


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_inpainting_changes_nothing_else(pipeline: LatentDiffusionPipeline, output_type: str) -> None:
    mask = torch.zeros(1, 48, 64)
    mask[:, 10:30, 20:50] = 1
    arguments: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": output_type}
    images = pipeline("cat", image=PICTURE, mask=mask, num_images=2, **arguments).images
    for image in images:
        pixels = torch.from_numpy(np.array(image)) if output_type != "pt" else image.movedim(0, -1)
        original = PICTURE[0].movedim(0, -1)
        if output_type == "pil":
            original = (255 * original).round().to(torch.uint8)
        assert torch.equal(pixels[mask[0] == 0], original[mask[0] == 0])
        assert not torch.equal(pixels[mask[0] == 1], original[mask[0] == 1])


def test_inpainting_knows_what_is_around() -> None:
    """At each step the known part is on the path from its own noise to the image."""
    pipeline = gaussian_pipeline(flow_scheduler(1.0))
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    noise = torch.randn(1, 2, 16, 16)
    clean = pipeline.normalizer.normalize(pipeline.autoencoder.encode_moments(2 * image - 1)[0])

    def look(_: Any, index: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        time = 1 - (index + 1) / 4
        torch.testing.assert_close(tensors["latents"][..., 8:, :], ((1 - time) * clean + time * noise)[..., 8:, :])
        return {}

    arguments: dict[str, Any] = {"num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    found = pipeline(image=image, mask=mask, callback_on_step_end=look, **arguments).images
    free = pipeline(**arguments).images
    torch.testing.assert_close(found[..., :8, :], free[..., :8, :])  # these positions do not look at their neighbours
    torch.testing.assert_close(found[..., 8:, :], pipeline.normalizer.denormalize(clean)[..., 8:, :])


def test_large_images_are_decoded_in_tiles(pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"height": 8 * 60, "width": 64, "seed": 0, "num_inference_steps": 1}
    whole = pipeline("cat", output_type="pt", **arguments).images
    monkeypatch.setattr(editing, "TILE", 48)
    calls: list[int] = []
    decode = Autoencoder.decode_images
    monkeypatch.setattr(Autoencoder, "decode_images", lambda model, z: calls.append(z.shape[-2]) or decode(model, z))
    tiled = pipeline("cat", output_type="pt", **arguments).images
    assert len(calls) > 1
    assert max(calls) < 60
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


def test_a_mixture_of_classes(pipeline: LatentDiffusionPipeline) -> None:
    noise = torch.randn(2, 4, 8, 8)

    def sample(label: Any) -> Tensor:
        return pipeline([label], seed=0, num_inference_steps=2, output_type="latent").images

    assert torch.equal(sample({"cat": 2}), sample("cat"))
    assert torch.equal(sample({"cat": 1, "dog": 0}), sample("cat"))
    half = sample({"cat": 0.5, 1: 0.5})
    assert all((half - sample(label)).abs().max() > 0.01 for label in ("cat", "dog"))
    both = pipeline(["cat", {"cat": 1, "dog": 1}], latents=noise, num_inference_steps=2, output_type="latent").images
    alone = pipeline("cat", latents=noise[:1], num_inference_steps=2, output_type="latent").images
    assert torch.equal(both[:1], alone)


def with_parts(pipeline: LatentDiffusionPipeline, **parts: Any) -> LatentDiffusionPipeline:
    changed = LatentDiffusionPipeline(**pipeline.components | pipeline.parameters | parts)
    changed.set_progress_bar_config(disable=True)
    return changed


@pytest.mark.parametrize("names", [NAMES, []])
def test_autoguidance_is_saved_and_works_without_labels(tmp_path: Path, names: list[str]) -> None:
    plain = make_pipeline(names)
    weak = make_pipeline(names).unet
    with torch.no_grad():
        weak.network.conv_out.weight.mul_(0.5)
    pipeline = with_parts(plain, autoguidance_unet=weak)
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"labels": names[:1] or None, "seed": 0, "num_inference_steps": 2, "output_type": "pt"}
    guided = loaded(**arguments, autoguidance_scale=2.0).images
    assert torch.equal(guided, pipeline(**arguments, autoguidance_scale=2.0).images)
    assert torch.equal(loaded(**arguments).images, plain(**arguments).images)
    assert not torch.allclose(guided, plain(**arguments).images, atol=1e-3)
    assert loaded.to(torch.bfloat16).autoguidance_unet.dtype == torch.bfloat16
    with pytest.raises(UserError, match="label names for a U-Net of"):
        with_parts(plain, autoguidance_unet=make_pipeline(["another"]).unet)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedulers_are_saved(tmp_path: Path, sampler: str) -> None:
    pipeline = with_parts(make_pipeline([]), scheduler=flow_scheduler(1.5, sampler))
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = [p(seed=0, num_inference_steps=3, output_type="pt").images for p in (pipeline, loaded)]
    assert torch.equal(*images)


def test_previews(pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="latent_rgb=fit_latent_rgb"):
        pipeline.preview(torch.zeros(1, 4, 8, 8))
    red = {"weights": [[0.5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], "bias": [0.0, -1.0, -1.0]}
    with_parts(pipeline, latent_rgb=red).save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    seen: list[Any] = []

    def look(running: LatentDiffusionPipeline, _: int, __: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append((running.preview(tensors["clean"])[0], tensors))

    latents = loaded("cat", seed=0, num_inference_steps=3, output_type="latent", callback_on_step_end=look).images
    assert [picture.size for picture, _ in seen] == [(8, 8)] * 3
    assert np.asarray(seen[0][0])[..., 1:].max() == 0
    final = seen[-1][1]["latents"]
    torch.testing.assert_close(loaded.normalizer.denormalize(final), latents)
    torch.testing.assert_close(seen[-1][1]["clean"], final)  # the last Euler step goes to its estimate


def test_offloading_runs_the_same(saved: Path) -> None:
    """With hooks on every part, here from CPU to CPU."""
    plain, offloaded = (LatentDiffusionPipeline.from_pretrained(saved) for _ in range(2))
    offloaded.enable_model_cpu_offload(device="cpu")
    for pipeline in (plain, offloaded):
        pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "pt", "image": PICTURE}
    assert torch.equal(*(pipeline("cat", **arguments).images for pipeline in (plain, offloaded)))
