"""How the latent U-Net is trained: its configuration and its `update()`. The autoencoder serves previews and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.models import downsampling, latent_channels, load_autoencoder
from ldm_vae.config import changed_keys
from ldm_vae.data.sheets import labelled_sheet
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, flow_scheduler
from ldm_vae.diffusion.unet import UNetConfig, build_unet
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.manifest import Manifest, check_same, short
from ldm_vae.latents.order import ShardBlockOrder
from ldm_vae.random import generator
from ldm_vae.training.engine import Engine, TrainingConfig
from ldm_vae.training.loader import Batch, InOrder, Samples
from ldm_vae.training.schedule import Plan, Span

PREVIEW_STEPS = 20
PREVIEW_IMAGES = 10
HELD_OUT_TIMES = 8
HELD_OUT_LATENTS = 64
MEASURED_LATENTS = 256


def default_training() -> TrainingConfig:
    return TrainingConfig(learning_rate=6e-4, final_learning_rate_fraction=0.0, weight_decay=0.0, warmup_steps=100)


@dataclass(frozen=True)
class TrainDiffusionConfig:
    """`ldm-vae train-diffusion`: everything that a run depends on.

    Args:
        output: the run directory.
        latents: the folder that `ldm-vae encode` wrote.
        autoencoder: the directory of the autoencoder that made them; for previews and for the pipeline.
        steps, batch, micro_batch: optimizer steps; latents per step over all processes; per forward pass (null: all).
        held_out: fraction of the latents kept out of training, by a hash of their ids.
        shuffle_shards: null shuffles the whole set in each epoch; N shuffles the shards, then the latents inside blocks
            of N shards, one block after the other, so that N are read at a time: for sets larger than memory.
        label_dropout: share of labels replaced by "no label", which classifier-free guidance needs.
        shift: of training and sampling times towards noise; null: sqrt(c h w / 4096).
    """

    output: str = "???"
    latents: str = "???"
    autoencoder: str = "???"
    unet: UNetConfig = field(default_factory=UNetConfig)
    steps: int = 10_000
    batch: int = 32
    micro_batch: int | None = None
    held_out: float = 0.1
    shuffle_shards: int | None = None
    label_dropout: float = 0.1
    shift: float | None = None
    training: TrainingConfig = field(default_factory=default_training)

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout: {self.label_dropout} is no share; give 0 to 1")
        if self.shuffle_shards is not None and self.shuffle_shards < 1:
            raise UserError(
                f"shuffle_shards: {self.shuffle_shards} is below 1; give a number of shards, or null for the whole set"
            )
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"shift: {self.shift} is not above 0; 1 leaves the times as they are")

    def plan(self, processes: int) -> Plan:
        return Plan((Span(self.steps, self.batch, self.micro_batch or max(1, self.batch // processes)),))


class DiffusionModel:
    """Stage 3 for `fit()`: rectified flow on normalised latents, minimise |v - (eps - x0)|^2."""

    def __init__(self, config: TrainDiffusionConfig, samples: LatentDataset, held_out: LatentDataset | None) -> None:
        """`samples`: what it is trained on; `held_out`: what it is judged by, None for nothing."""
        self.config = config
        self.manifest = manifest = samples.manifest
        self.normalizer = manifest.normalizer
        self.latent_shape = tuple(manifest.latent_shape)
        self.label_names = tuple(manifest.label_names)
        self.shift = config.shift or flow.resolution_shift(*self.latent_shape)
        self.held_out = stack_samples(held_out, HELD_OUT_LATENTS) if held_out is not None else None
        self.autoencoder = load_matching_autoencoder(config.autoencoder, manifest)
        torch.manual_seed(config.training.seed)
        unet = build_unet(config.unet, self.latent_shape[0], num_classes=len(self.label_names))
        if config.training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.measure_tokens(self.normalizer.normalize(stack_samples(samples, MEASURED_LATENTS)["latent"]))
        self.modules: dict[str, nn.Module] = {"unet": unet.train()}
        self.optimizer_settings: dict[str, dict[str, Any]] = {}
        self.null_label = unet.null_label

    def update(self, step: int, batch: Batch, engine: Engine) -> dict[str, Tensor]:
        noise, times, dropped = self.draw(step, batch.global_size, engine.device)
        total = torch.zeros((), device=engine.device)
        for part in engine.parts(batch):
            clean = self.normalizer.normalize(part["latent"])
            labels = self.labels(part["label"], dropped[part.rows])
            noisy = flow.interpolate(clean, noise[part.rows], times[part.rows])
            velocity = engine.models["unet"](noisy, times[part.rows], labels)
            loss = flow.velocity_loss(velocity, flow.velocity_target(clean, noise[part.rows])).mean()
            engine.backward(loss)
            total = total + loss.detach() / len(batch.parts)
        return {"loss/flow": total, "optim/grad_norm": engine.optimize("unet", step)}

    def draw(self, step: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (n, c, h, w), times (n,), and which labels are dropped (n,), for the whole global batch."""
        rng = generator(self.config.training.seed, "flow", step, device=device)
        noise = torch.randn((count, *self.latent_shape), generator=rng, device=device)
        times = flow.sample_times(count, rng, self.shift, device)
        dropped = torch.rand(count, generator=rng, device=device) < self.config.label_dropout
        return noise, times, dropped

    def labels(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor | None:
        """Class ids with "no label" where there is none or it is dropped; None for an unconditional network."""
        if not self.label_names:
            return None
        missing = labels < 0 if dropped is None else (labels < 0) | dropped
        return torch.where(missing, self.null_label, labels)

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[Any]:
        return []

    @torch.no_grad()
    def validate(self, engine: Engine) -> dict[str, float]:
        """The flow loss of the EMA weights on held-out latents, at fixed times with fixed noise."""
        if self.held_out is None:
            return {}
        unet = engine.emas["unet"].module
        latents = self.normalizer.normalize(self.held_out["latent"].to(engine.device))
        labels = self.labels(self.held_out["label"].to(engine.device))
        rng = generator(0, "held_out", device=engine.device)
        losses = []
        for number in range(HELD_OUT_TIMES):
            time = flow.shift_times(torch.tensor((number + 0.5) / HELD_OUT_TIMES), self.shift)
            times = time.expand(len(latents)).to(engine.device)
            noise = torch.randn(latents.shape, generator=rng, device=engine.device)
            with engine.accelerator.autocast():
                velocity = unet(flow.interpolate(latents, noise, times), times, labels)
            losses.append(flow.velocity_loss(velocity, flow.velocity_target(latents, noise)).mean())
        return {"held_out/flow": float(torch.stack(losses).mean())}

    def preview(self, engine: Engine) -> Image.Image | None:
        """A sheet of samples of the EMA weights, one per class, always from the same noise."""
        labels = list(range(min(len(self.label_names), PREVIEW_IMAGES))) or None
        pipeline = self.pipeline(engine).to(engine.device)
        pipeline.set_progress_bar_config(disable=True)
        with engine.accelerator.autocast():
            images = pipeline(
                labels=labels,
                num_images=PREVIEW_IMAGES if labels is None else None,
                num_inference_steps=PREVIEW_STEPS,
                guidance_scale=2.0 if labels else 1.0,
                seed=0,
            ).images
        return labelled_sheet(images, [self.label_names[label] for label in labels or []])

    def pipeline(self, engine: Engine) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline(
            autoencoder=self.autoencoder,
            unet=engine.emas["unet"].module,
            scheduler=flow_scheduler(self.shift),
            normalizer=self.normalizer.to_dict(),
            label_names=list(self.label_names),
            encoder_fingerprint=self.manifest.autoencoder["encoder_fingerprint"],
            latent_size=list(self.latent_shape[1:]),
            preprocessing=self.manifest.preprocessing,
        )

    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write `pipeline/`: autoencoder, U-Net with EMA weights, scheduler, normaliser and labels."""
        final = directory / "pipeline"
        temporary = temporary_directory(final)
        self.pipeline(engine).save_pretrained(temporary)
        publish_directory(temporary, final)

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        count = rows.stop - rows.start
        return {
            "latent": torch.randn((count, *self.latent_shape)),
            "label": torch.randint(0, max(1, len(self.label_names)), (count,)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": recipe_of(self.manifest), "images": images_of(self.manifest)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Raises: UserError when the run began on latents that were made in another way."""
        if "recipe" in state:  # a checkpoint of an earlier release has none
            advice = "'here' is the run that is to continue: give the latents that it began with, or another output"
            check_same(state["recipe"], recipe_of(self.manifest), f"latents={self.config.latents}", advice)
            check_images(state["images"], images_of(self.manifest), f"latents={self.config.latents}")


def recipe_of(manifest: Manifest) -> dict[str, Any]:
    """How the latents were made, which must stay the same under a run that continues."""
    values = manifest.to_dict()
    kept = ("preprocessing", "content", "dtype", "latent_shape", "flipped")
    encoder = {"encoder_fingerprint": manifest.autoencoder["encoder_fingerprint"]}
    return {"autoencoder": encoder} | {name: values[name] for name in kept}


def images_of(manifest: Manifest) -> dict[str, Any]:
    """Which latents there are: the order of the samples and their normalisation follow from it."""
    plans = [dataset["plan"] for dataset in manifest.datasets]
    return {"count": manifest.count, "plans": plans, "statistics": manifest.statistics}


def check_images(began: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises: UserError when the set is not the one that a run began with, as after `ldm-vae latents append`."""
    for key, (before, after) in changed_keys(began, now).items():
        raise UserError(
            f"{where}: {key} is {short(after)} and was {short(before)} when this run began; give another output to "
            "train on what the set holds now, or a copy of the set as it was"
        )


def load_matching_autoencoder(path: str, manifest: Manifest) -> Any:
    """The autoencoder that made the latents. Raises: UserError when it is another one, or cannot have made them."""
    autoencoder = load_autoencoder(path)
    manifest.check_autoencoder(encoder_fingerprint(autoencoder), where=f"autoencoder={path}")
    factor, (channels, height, width) = downsampling(autoencoder), manifest.latent_shape
    needed = {"channels": latent_channels(autoencoder), "height": factor * height, "width": factor * width}
    found = {"channels": channels, **manifest.preprocessing}
    for name, value in needed.items():
        if found.get(name, value) != value:
            raise UserError(
                f"{manifest.where.location}: {name} is {found[name]}, and {value} would fit latent_shape "
                f"{[channels, height, width]} and autoencoder={path}, which divides sides by {factor}; "
                "give the latents and the autoencoder of one encoding"
            )
    return autoencoder


def stack_samples(dataset: LatentDataset, count: int) -> dict[str, Tensor]:
    """At most `count` samples as tensors, evenly spread: a folder is often sorted by class."""
    count = min(count, len(dataset))
    samples = [dataset.sample(index * len(dataset) // count, index) for index in range(count)]
    return {
        "latent": torch.stack([sample["latent"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }


def open_latents(config: TrainDiffusionConfig) -> tuple[LatentDataset, LatentDataset | None]:
    """The training part and the held-out part (None when nothing is held out)."""
    seed = config.training.seed
    if config.held_out == 0:
        return LatentDataset(config.latents, seed), None
    train = LatentDataset(config.latents, seed, part="train", held_out=config.held_out)
    return train, LatentDataset(config.latents, seed, part="held_out", held_out=config.held_out)


def in_order(config: TrainDiffusionConfig, samples: LatentDataset) -> Samples:
    """The training part in the order that the config asks for."""
    if config.shuffle_shards is None:
        return samples
    return InOrder(samples, ShardBlockOrder(config.training.seed, samples.shard_counts, config.shuffle_shards))
