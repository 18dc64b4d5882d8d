"""A `LatentDiffusionPipeline` as a directory that stock diffusers loads and runs where this package is not installed.

Owns which stock parts stand for ours: `AutoencoderKL` with the normaliser folded in, `UNet2DModel` in the place of the
transformer of `DiTPipeline` (the only stock loop with classes, guidance and no text; it asks nothing of its network
that a U-Net lacks), and `FlowMapEulerDiscreteScheduler`, whose times and steps are ours. `LDMPipeline` would need
`init_noise_sigma` of its scheduler, which no flow scheduler with unrounded times has. What these parts cannot express
is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_vae import compat, provenance
from ldm_vae.errors import UserError

compat.repair_torchvision()

import diffusers
from diffusers import AutoencoderKL, DiTPipeline, UNet2DModel

from ldm_vae import random
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.interop.convert import DTYPES, RECORD, Precision, check_target
from ldm_vae.autoencoder.interop.folding import fold_normalizer
from ldm_vae.autoencoder.models import downsampling
from ldm_vae.diffusion.arguments import DEFAULT_GUIDANCE
from ldm_vae.diffusion.generation import pipeline_directory
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.schedulers import shift_of
from ldm_vae.diffusion.unet import TIME_SCALE, LatentUNet
from ldm_vae.files import publish_directory, temporary_directory, write_json, write_text

NULL_CLASS = 1000
"""What `DiTPipeline` takes for "no label" under guidance, whatever the model."""
ANY = "image"
"""The one label of an exported model without classes; it changes nothing."""

CHECKED_TIMES = (0.05, 0.5, 0.95)
CHECK_TOLERANCE = 1e-4
"""Of velocities, whose size is about 1; the two networks run the same operations."""

README = """# {name}

Latent diffusion for stock [diffusers](https://github.com/huggingface/diffusers), 0.39 or newer. Images are
{height}x{width}. {classes}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("DIRECTORY")
labels = pipeline.get_label_ids([{label!r}] * 4)
images = pipeline(labels, guidance_scale={guidance:g}, num_inference_steps=30).images
```

diffusers notes when loading that the part called `transformer` is a U-Net: so it is. The scheduler takes Euler steps;
for fewer steps of second order:

```python
from diffusers import DPMSolverMultistepScheduler

pipeline.scheduler = DPMSolverMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift={shift!r}
)
```
"""


def export_standard(
    source: str, target: str | Path, *, precision: Precision = "fp32", overwrite: bool = False
) -> dict[str, Any]:
    """Write the stock directory, with README.md and conversion.json; completely or not at all.

    Args:
        source: a pipeline directory, or the run directory of `train-diffusion`.
        target: a new directory.
        precision: of the written weights.
        overwrite: replace what an earlier conversion wrote at `target`.

    Returns:
        What is in conversion.json.

    Raises:
        UserError: stock diffusers has no such network or autoencoder, with what to train instead.
    """
    target = Path(target)
    check_target(target, source, overwrite)
    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_directory(source), use_safetensors=True)
    standard = standard_pipeline(pipeline)
    for part in standard.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype=DTYPES[precision])
    record: dict[str, Any] = {
        "format_version": 1,
        "source": {
            "name": source,
            "class": type(pipeline).__name__,
            "fingerprint": fingerprint(pipeline.autoencoder),
        },
        "to": "diffusers-pipeline",
        "class": type(standard).__name__,
        "precision": precision,
        "normalizer": pipeline.normalizer.to_dict(),
        "notes": ["the statistics of the latents are folded into the autoencoder; its scaling_factor is 1"],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_directory(target)
    try:
        standard.save_pretrained(folder, safe_serialization=True)
        write_text(folder / "README.md", readme(pipeline, target.name))
        write_json(folder / RECORD, record | {"versions": provenance.versions()})
        publish_directory(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def standard_pipeline(pipeline: LatentDiffusionPipeline) -> DiTPipeline:
    """The stock pipeline (float32) that draws what `pipeline` does at its training size, from the same noise.

    Raises:
        UserError: see `export_standard`.
    """
    if type(pipeline.autoencoder) is not AutoencoderKL:
        raise UserError(
            f"autoencoder: {type(pipeline.autoencoder).__name__} is no class of stock diffusers that takes the "
            "normaliser in; train on latents of one with autoencoder.architecture=sd"
        )
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        raise UserError(
            f"diffusers {diffusers.__version__} has no FlowMapEulerDiscreteScheduler; install 0.39 or newer"
        )
    unet = standard_unet(pipeline.unet, tuple(pipeline.config["latent_size"]))
    autoencoder = fold_normalizer(pipeline.autoencoder, pipeline.normalizer.mean, pipeline.normalizer.std)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(int(TIME_SCALE), shift_of(pipeline.scheduler))
    names = {str(number): name for number, name in enumerate(pipeline.labels or [ANY])}
    standard = DiTPipeline(unet, autoencoder, scheduler, names)  # type: ignore[arg-type]
    standard.register_to_config(id2label=names)
    return standard


@torch.no_grad()
def standard_unet(unet: LatentUNet, latent_size: tuple[int, int]) -> UNet2DModel:
    """The network inside as a stock one that puts out the velocity, compared with ours before it is returned.

    It has the classes that `DiTPipeline` needs, all after the last label being "no label"; without labels they are 0.

    Raises:
        UserError: it does more than a `UNet2DModel` can, or the stock pipeline cannot run it.
    """
    check_expressible(unet, latent_size)
    classes, state = int(unet.config["num_classes"]), dict(unet.network.state_dict())
    config = {key: value for key, value in unet.network.config.items() if not key.startswith("_")}
    standard = UNet2DModel(**config | {"sample_size": latent_size[0], "num_class_embeds": NULL_CLASS + 1})
    rows = state.get("class_embedding.weight", torch.zeros(1, standard.class_embedding.embedding_dim))
    null = rows[unet.null_label].expand(NULL_CLASS + 1 - classes, -1)
    state["class_embedding.weight"] = torch.cat([rows[:classes], null])
    standard.load_state_dict(state, strict=True)
    standard.eval().requires_grad_(False)
    check_equal(unet.eval(), standard, latent_size)
    return standard


def check_expressible(unet: LatentUNet, latent_size: tuple[int, int]) -> None:
    """Raises: UserError where the U-Net or the size of its latents is beyond the stock classes."""
    config, network = unet.config, unet.network
    instead = "train with unet.patch=1 and unet.prediction=velocity, or use it with `ldm-vae generate`"
    if config["patch"] != 1 or config["prediction"] != "velocity":
        raise UserError(
            f"unet: patch={config['patch']}, prediction={config['prediction']} surround the network with operations "
            f"that stock diffusers has no U-Net for; {instead}"
        )
    if not config["latent_channels"] == network.config["in_channels"] == network.config["out_channels"]:
        raise UserError(
            f"unet: takes {network.config['in_channels']} channels for latents of {config['latent_channels']}, and "
            "the stock pipeline gives the latents alone; train without coordinates"
        )
    if latent_size[0] != latent_size[1] or latent_size[0] % unet.multiple:
        raise UserError(
            f"latents: {latent_size[0]}x{latent_size[1]} is no square with sides divisible by {unet.multiple}, which "
            "the stock pipeline and this U-Net need; train at another size"
        )
    if config["num_classes"] > NULL_CLASS:
        raise UserError(
            f"labels: {config['num_classes']} are more than the {NULL_CLASS} of DiTPipeline; "
            "use the model with `ldm-vae generate`"
        )


def check_equal(unet: LatentUNet, standard: UNet2DModel, latent_size: tuple[int, int]) -> None:
    """Raises: UserError where both networks do not give the same velocities of noise, with the null label too."""
    generator = random.generator(0, "standard export")
    noise = torch.randn(1, int(unet.config["latent_channels"]), *latent_size, generator=generator)
    for time in CHECKED_TIMES:
        for label in (0, NULL_CLASS):
            ids = torch.tensor([min(label, unet.null_label)]) if unet.null_label else None
            ours = unet(noise, torch.tensor(time), ids)
            theirs = standard(noise, torch.tensor(time * TIME_SCALE), torch.tensor([label])).sample
            error = float((ours - theirs).abs().max())
            if not error <= CHECK_TOLERANCE * max(1.0, float(ours.abs().max())):
                raise UserError(
                    f"unet: the stock network differs from it by {error:.2g} at t = {time}, so it does something that "
                    "a UNet2DModel does not; use the model with `ldm-vae generate`"
                )


def readme(pipeline: LatentDiffusionPipeline, name: str) -> str:
    """README.md of the exported directory."""
    height, width = (side * downsampling(pipeline.autoencoder) for side in pipeline.config["latent_size"])
    names = pipeline.labels
    shown = (
        f"Classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}." if names else "There are no classes."
    )
    return README.format(
        name=name,
        height=height,
        width=width,
        classes=shown,
        label=(names or [ANY])[0].split(",")[0].strip(),  # DiTPipeline takes a comma as "or"
        guidance=DEFAULT_GUIDANCE if names else 1.0,
        shift=shift_of(pipeline.scheduler),
    )
