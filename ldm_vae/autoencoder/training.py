"""How an autoencoder is trained: its configuration and its `update()`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.interface import reconstruct
from ldm_vae.autoencoder.loss import LossConfig, ReconstructionLoss
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, downsampling, latent_channels
from ldm_vae.autoencoder.rate import (
    RateConfig,
    RateController,
    bits_per_dimension,
    bits_per_pixel,
    kl_divergence,
)
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.samples import ImageSamples, to_tensor
from ldm_vae.data.sources import DataConfig, open_source
from ldm_vae.data.split import subset
from ldm_vae.data.stream import StreamSamples, open_stream
from ldm_vae.data.transforms import CropConfig, cover_crop, random_crop
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory, write_json
from ldm_vae.random import generator, numpy_rng
from ldm_vae.training.engine import Engine, TrainingConfig
from ldm_vae.training.loader import Batch
from ldm_vae.training.schedule import Plan, Span


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. Small crops first are cheap; larger ones in the last part teach the context.

    Args:
        steps: optimizer steps.
        crop: side of the square training crops in pixels, divisible by 8.
        batch: images per step over all processes.
        micro_batch: images per forward pass of a process; null: its whole share.
        perceptual: multiplies the weight loss.perceptual in this phase; 0 saves its cost.
    """

    steps: int = 1000
    crop: int = 64
    batch: int = 32
    micro_batch: int | None = None
    perceptual: float = 1.0

    def __post_init__(self) -> None:
        if self.crop < 16 or self.crop % 8:
            raise UserError(f"phases: crop {self.crop} is not a multiple of 8 from 16 on; use 64, 128, 192, 256 ...")
        if self.steps < 1 or self.batch < 1:
            raise UserError("phases: steps and batch are at least 1")


@dataclass(frozen=True)
class TrainVaeConfig:
    """`ldm-vae train-vae`: everything that a run depends on."""

    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    training: TrainingConfig = field(default_factory=TrainingConfig)
    held_out_resolution: int = 256
    held_out_images: int = 16

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("phases: at least one is needed")

    def plan(self, processes: int) -> Plan:
        return Plan(
            tuple(
                Span(phase.steps, phase.batch, phase.micro_batch or max(1, phase.batch // processes), phase.crop)
                for phase in self.phases
            )
        )

    def phase_at(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


class ReparameterizedAutoencoder(nn.Module):
    """Encoder, sampling and decoder in one forward, so that the data-parallel wrapper sees all of it."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, 3, h, w), standard normal noise (n, c, h/8, w/8) -> reconstruction, mean, log-variance."""
        posterior = self.autoencoder.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * noise
        return self.autoencoder.decode(latents).sample, mean, logvar


class VaeModel:
    """Stage 1 for `fit()`: minimise reconstruction terms + beta * KL, all means per element."""

    def __init__(self, config: TrainVaeConfig, held_out: Tensor | None, device: torch.device | str = "cpu") -> None:
        """`held_out`: images (n, 3, h, w) in [-1, 1] for validation and previews, on the CPU."""
        self.config = config
        torch.manual_seed(config.training.seed)
        autoencoder = build_autoencoder(config.autoencoder, logvar_floor=config.rate.logvar_floor)
        if config.training.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        self.channels, self.factor = latent_channels(autoencoder), downsampling(autoencoder)
        self.modules: dict[str, nn.Module] = {"autoencoder": ReparameterizedAutoencoder(autoencoder).train()}
        self.loss = ReconstructionLoss(config.loss).to(device)
        self.rate = RateController(config.rate, config.plan(1).steps, self.channels, device)
        self.held_out = held_out

    def update(self, step: int, batch: Batch, engine: Engine) -> dict[str, Tensor]:
        phase = self.config.phase_at(step)
        noise = self.posterior_noise(step, batch.global_size, phase.crop, engine.device)
        sums: dict[str, Tensor] = {}
        for part in engine.parts(batch):
            images = pixels.from_uint8(part["image"]).contiguous(memory_format=torch.channels_last)
            reconstruction, mean, logvar = engine.models["autoencoder"](images, noise[part.rows])
            loss, terms = self.loss(reconstruction, images, step, perceptual_scale=phase.perceptual)
            kl = kl_divergence(mean, logvar).mean(dim=(0, 2, 3))
            engine.backward(loss + self.rate.penalty(step, kl))
            for name, term in (terms | {"kl": kl}).items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() / len(batch.parts)
        beta = self.rate.beta(step)
        norm = engine.optimize("autoencoder", step)
        self.rate.observe(step, kl := engine.mean(sums.pop("kl")))
        sums["kl"] = kl = kl.mean()
        return {
            **{f"loss/{name}": value for name, value in sums.items()},
            "rate/nats_per_dim": kl,
            "rate/bits_per_dim": bits_per_dimension(1.0) * kl,
            "rate/bits_per_pixel": bits_per_pixel(1.0, self.channels, self.factor) * kl,
            "rate/beta": beta,
            "optim/grad_norm": norm,
        }

    def posterior_noise(self, step: int, count: int, crop: int, device: torch.device) -> Tensor:
        """Drawn for the whole global batch, the same on every process: splitting the batch changes nothing."""
        shape = (count, self.channels, crop // self.factor, crop // self.factor)
        rng = generator(self.config.training.seed, "posterior", step, device=device)
        return torch.randn(shape, generator=rng, device=device)

    def averaged(self, engine: Engine) -> Any:
        """The autoencoder with EMA weights."""
        return engine.emas["autoencoder"].module.autoencoder

    def validate(self, engine: Engine) -> dict[str, float]:
        """PSNR, L1 and rate of decode(mean) on the held-out images, one at a time."""
        if self.held_out is None:
            return {}
        autoencoder = self.averaged(engine)
        squared, absolute, rate = [], [], []
        for image in self.held_out.split(1):
            image = image.to(engine.device)
            with engine.accelerator.autocast():
                difference = reconstruct(autoencoder, image) - image
                posterior = autoencoder.encode(image).latent_dist
            squared.append((difference.square().mean() / 4).clamp(min=1e-10))
            absolute.append(difference.abs().mean())
            rate.append(kl_divergence(posterior.mean, posterior.logvar).mean().detach())
        return {
            "held_out/psnr": float((-10 * torch.stack(squared).log10()).mean()),
            "held_out/l1": float(torch.stack(absolute).mean()),
            "held_out/nats_per_dim": float(torch.stack(rate).mean()),
        }

    def preview(self, engine: Engine) -> Image.Image | None:
        """Rows: inputs, reconstructions, difference times 4 on grey."""
        if self.held_out is None:
            return None
        images = self.held_out[:6].to(engine.device)
        with engine.accelerator.autocast():
            reconstructions = reconstruct(self.averaged(engine), images)
        rows = [images, reconstructions, (4 * (reconstructions - images)).clamp(-1, 1)]
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        return pixels.to_pil(sheet[None].cpu())[0]

    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write `autoencoder/`: a diffusers directory with the EMA weights, and how it was made in training.json."""
        autoencoder = self.averaged(engine)
        final = directory / "autoencoder"
        temporary = temporary_directory(final)
        autoencoder.save_pretrained(temporary)
        record = {
            "fingerprint": fingerprint(autoencoder),
            "rate": {
                "mode": self.config.rate.mode,
                "target_nats": self.config.rate.target_nats,
                "final_beta": float(self.rate.beta(engine.steps)),
            },
            "held_out": dict(metrics),
        }
        write_json(temporary / "training.json", record)
        publish_directory(temporary, final)

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        assert size is not None
        return {"image": torch.randint(0, 256, (rows.stop - rows.start, 3, size, size), dtype=torch.uint8)}

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate.load_state_dict(state["rate"])


def training_samples(config: TrainVaeConfig) -> ImageSamples | StreamSamples:
    """Random crops of the training part of the images."""
    transform, seed, held_out = partial(random_crop, config=config.crop), config.training.seed, config.data.held_out
    if config.data.streaming:
        return StreamSamples(open_stream(config.data), transform, seed, held_out=held_out)
    return ImageSamples(subset(open_source(config.data), "train", held_out), transform, seed)


def held_out_images(config: TrainVaeConfig) -> Tensor | None:
    """A few images of the held-out part, (n, 3, r, r) in [-1, 1]; None when nothing is held out."""
    count, held_out = config.held_out_images, config.data.held_out
    if held_out == 0 or count == 0:
        return None
    if config.data.streaming:
        source = open_stream(config.data).take(count, "held_out", held_out)
    else:
        source = subset(open_source(config.data), "held_out", held_out)
    crops: list[Tensor] = []
    for index in numpy_rng(0, "held_out").permutation(len(source)):
        with contextlib.suppress(ImageRejected):
            crops.append(to_tensor(cover_crop(source.read(int(index)), config.held_out_resolution)))
        if len(crops) == count:
            break
    return pixels.from_uint8(torch.stack(crops)) if crops else None
