"""After training: an average of another length, its held-out loss, and the pipeline with it. `ldm-vae ema`'s work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_vae import config as configuration
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.held_out import held_out_losses
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.snapshots import Average, put_into
from ldm_vae.diffusion.training import HELD_OUT_LATENTS, TrainDiffusionConfig, open_latents, stack_samples
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory


def finished_pipeline(run: str | Path) -> LatentDiffusionPipeline:
    """The pipeline of a run directory, on the CPU. Raises: UserError when the run has not written it yet."""
    directory = Path(run) / "pipeline"
    if not (directory / "model_index.json").is_file():
        raise UserError(f"{run}: holds no pipeline; give the directory of a finished run of `train-diffusion`")
    return LatentDiffusionPipeline.from_pretrained(directory, use_safetensors=True)


class HeldOut:
    """The held-out latents of a run, read once, to compare averages by."""

    def __init__(self, run: str | Path, pipeline: LatentDiffusionPipeline, device: torch.device) -> None:
        """Raises: UserError when the run held nothing out, or its latents are gone."""
        config = configuration.load(TrainDiffusionConfig, Path(run) / "config.yaml")
        _, held_out = open_latents(config)
        if held_out is None:
            raise UserError(f"{run}: held no latents out, so there is nothing to compare by; give one length and --out")
        samples = stack_samples(held_out, HELD_OUT_LATENTS)
        self.latents: Tensor = pipeline.normalizer.normalize(samples["latent"].to(device))
        null = len(pipeline.labels)
        labels = torch.where(samples["label"] < 0, null, samples["label"]).to(device)
        self.labels = labels if null else None
        self.shift = config.shift or flow.resolution_shift(*self.latents.shape[1:])

    def loss(self, unet: nn.Module) -> float:
        """Mean over times and latents, as `train-diffusion` logs it."""
        losses = held_out_losses(unet.to(self.latents.device), self.latents, self.labels, self.shift)
        return sum(losses.values()) / len(losses)


def write_pipeline(pipeline: LatentDiffusionPipeline, average: Average, output: str | Path) -> None:
    """Write the pipeline with the averaged U-Net to `output`. Raises: UserError when something is there."""
    final = Path(output)
    if final.exists():
        raise UserError(f"{output}: exists; give a new folder")
    put_into(pipeline.unet, average)
    temporary = temporary_directory(final)
    pipeline.to("cpu").save_pretrained(temporary)
    publish_directory(temporary, final)
