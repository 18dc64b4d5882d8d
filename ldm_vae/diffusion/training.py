"""`ldm-vae train-diffusion`: the settings of the latent U-Net's training, its `update()`, and its monitoring.

    LatentDataset -> normalizer -> crops, noise and times (`StepNoise`) -> LatentUNet -> flow.velocity_loss
                                                      at intervals: validation loss, previews, copies, KID, snapshots

The autoencoder is used for previews and the exported pipeline only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import changed_keys, check_positive, plain_settings
from ldm_vae.data import transforms
from ldm_vae.data.survey import describe_classes
from ldm_vae.diffusion import flow, validation
from ldm_vae.diffusion.fid import KidConfig, SampleKid, make_sample_kid
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, fit_latent_rgb
from ldm_vae.diffusion.power_function_ema import FOLDER, EmaConfig, EmaSnapshots
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.diffusion.unet import Crops, CropsConfig, UNetConfig, build_unet, draw_crops
from ldm_vae.diffusion.validation import Copies, StopSuggestion, stack_samples
from ldm_vae.errors import UserError
from ldm_vae.files import published_directory
from ldm_vae.latents.dataset import LatentDataset, ShardBlockOrder
from ldm_vae.latents.format import Manifest, check_same
from ldm_vae.random import generator
from ldm_vae.training import trainer
from ldm_vae.training.loader import Batch, InOrder, Plan, Samples, Span
from ldm_vae.training.run_directory import ModelKeys, RunDirectory
from ldm_vae.training.trainer import DryRun, Engine, TrainingConfig
from ldm_vae.utils.image_grid import labeled_sheet
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import pluralize

PREVIEW_STEPS = 20
PREVIEW_IMAGES = 10
HELD_OUT_LATENTS = 64
MEASURED_LATENTS = 256
COLOR_LATENTS = 16
"""Number of latents for the fit of the preview colors; each has thousands of positions."""


def default_training() -> TrainingConfig:
    return TrainingConfig(learning_rate=6e-4, final_learning_rate_fraction=0.0, weight_decay=0.0, warmup_steps=100)


@dataclass(frozen=True)
class TrainDiffusionConfig:
    """`ldm-vae train-diffusion`: train a latent U-Net and write a pipeline that generates images.

    The same command resumes an interrupted run. `ldm-vae model ema` can choose another length of the average later.

      ldm-vae train-diffusion configs/diffusion_small.yaml runs/latents autoencoder=runs/vae output=runs/diffusion

    With kid.samples=1000 kid.data=IMAGES, the KID of samples to the held-out images is measured.

    Args:
        output: the run directory.
        latents: the folder of a finished set, or its URL.
        autoencoder: the autoencoder that made the latents: a diffusers directory, a run of `train-vae`, or a hub id. It
            is used for previews and in the pipeline.
        steps: number of training steps.
        batch: latents per step over all processes.
        micro_batch: latents per forward pass of a process; null: all of its latents of a step.
        held_out: fraction of the latents kept out of training, by a hash of their ids.
        shuffle_shards: null shuffles the whole set in each epoch. N shuffles the shards, then the latents inside blocks
            of N shards, so that N shards are read at a time, for sets larger than memory.
        label_dropout: share of labels replaced by "no label", which classifier-free guidance needs.
        shift: shift of training and sampling times toward noise; null: sqrt(c h w / 4096). Smaller for crops.
        crops: training on crops of latents on a share of the steps.
        ema: power-function averages, from which `ldm-vae model ema` makes one of any length afterward.
        neighbours: training images among whose latents the nearest to each preview sample is searched, mirror images
            included where the set holds them; 0 searches none.
        patience: share of the run from the best held-out loss to a worse one after which an alarm suggests to stop.
        kid: KID of samples to held-out images, on request.
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
    crops: CropsConfig = field(default_factory=CropsConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    neighbours: int = 2048
    patience: float = 0.2
    kid: KidConfig = field(default_factory=KidConfig)
    training: TrainingConfig = field(default_factory=default_training)

    KEYS: ClassVar[ModelKeys] = ModelKeys(
        may_change=("steps", "micro_batch", "neighbours", "patience", "kid.*"),
        exports=("pipeline",),
        memory=("micro_batch", "crops.size"),
        command="train-diffusion",
    )

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch", "micro_batch")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout: {self.label_dropout} is not between 0 and 1")
        if self.shuffle_shards is not None and self.shuffle_shards < 1:
            raise UserError(
                f"shuffle_shards: {self.shuffle_shards} is below 1; give a number of shards, or null for the whole set"
            )
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"shift: {self.shift} is not above 0; 1 does not change the times")
        if self.neighbours < 0 or self.neighbours == 1:
            raise UserError(f"neighbours: {self.neighbours} is too few to compare with; give 0, or 2 or more")
        if self.patience <= 0:
            raise UserError(
                f"patience: {self.patience} is not above 0; give a share of the run, 1 or more never suggests to stop"
            )
        if self.crops.size is not None and not self.unet.coordinates:
            raise UserError(
                "crops.size: a U-Net needs coordinates to be trained on crops; set unet.coordinates=true as well"
            )
        self.kid.check(self.held_out, self.training.validate_every)

    def plan(self, processes: int) -> Plan:
        return Plan((Span(self.steps, self.batch, self.micro_batch or max(1, self.batch // processes)),))


@overload
def train_diffusion(config: TrainDiffusionConfig, *, dry_run: Literal[False] = ...) -> int: ...
@overload
def train_diffusion(config: TrainDiffusionConfig, *, dry_run: bool) -> int | DryRun: ...
def train_diffusion(config: TrainDiffusionConfig, *, dry_run: bool = False) -> int | DryRun:
    """Train the latent U-Net in `config.output`, or continue there; ends with a pipeline that generates images.

    Args:
        config: Everything that the run depends on.
        dry_run: Check latents and output, build everything, do one step on random data, print parameters, GMACs,
            shapes, memory and the time of the run; write nothing.

    Returns:
        0 when the run is finished, 75 when a signal stopped it after saving (the same call continues); with
        `dry_run` the printed report.

    Raises:
        UserError: a setting, the latents, the autoencoder or the output folder are not usable.
    """
    config = plain_settings(config)
    samples, held_out = open_latents(config)
    output = Path(config.output)
    accelerator = trainer.make_accelerator(config.training, None if dry_run else output)
    plan = config.plan(accelerator.num_processes)
    device = f"{accelerator.device}, {config.training.precision}"
    sample_kid = make_sample_kid(config.kid, config.held_out) if config.kid.samples else None
    if dry_run:
        state = RunDirectory(output, config, main_process=False).check()
        begin("train-diffusion", *describe_latents(config, samples, held_out), device, f"to {output} ({state})")
        model = DiffusionModel(config, samples, held_out)
        costs = trainer.dry_run(model, plan, config.training, accelerator)
        say(str(costs))
        end_dry_run(output, costs.expected())
        return costs
    begin("train-diffusion", *describe_latents(config, samples, held_out), device, f"to {output}")
    model = DiffusionModel(config, samples, held_out, output / FOLDER, sample_kid)
    run = RunDirectory(output, config, main_process=accelerator.is_main_process)
    code = trainer.fit(model, ordered_samples(config, samples), plan, config.training, run, accelerator)
    if code == 0:
        words = ["ldm-vae", "generate", config.output, f"output={beside(config.output, 'samples')}"]
        end(output / "pipeline", f"the pipeline, after {pluralize(plan.steps, 'step')}", words)
    return code


def describe_latents(config: TrainDiffusionConfig, samples: LatentDataset, held_out: LatentDataset | None) -> list[str]:
    """The training and held-out data, for the first line; warns if a batch is too large."""
    manifest = samples.manifest
    shape = "x".join(map(str, manifest.latent_shape))
    left_out = f", {pluralize(manifest.rejected, 'image')} rejected when it was made" if manifest.rejected else ""
    if config.batch > len(samples):
        say(
            f"batch: {config.batch} is larger than the set of {pluralize(len(samples), 'training latent')}, so that "
            "every step repeats some; lower batch, or encode more images"
        )
    return [
        f"{pluralize(len(samples), 'latent')} of {shape} {describe_classes(manifest.label_names)}{left_out}",
        f"{0 if held_out is None else len(held_out):,} held out",
        f"{pluralize(config.steps, 'step')} of {pluralize(config.batch, 'latent')}",
    ]


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of a step, for the whole global batch of n; noise has the shape of the crops."""

    noise: Tensor
    times: Tensor
    dropped: Tensor
    crops: Crops


class DiffusionModel:
    """Stage 3 for `fit()`: rectified flow on normalized latents, minimize |v - (eps - x0)|^2."""

    def __init__(
        self,
        config: TrainDiffusionConfig,
        samples: LatentDataset,
        held_out: LatentDataset | None,
        snapshots: Path | None = None,
        sample_kid: SampleKid | None = None,
    ) -> None:
        """
        Args:
            config: The run's settings.
            samples: Latents to train on.
            held_out: Latents for the validation loss, or None.
            snapshots: Folder for the averages, or None.
            sample_kid: Measures samples as set in `config.kid`, or None.
        """
        self.config, self.sample_kid = config, sample_kid
        self.samples = samples
        self.manifest = manifest = samples.manifest
        self.normalizer = manifest.normalizer
        self.latent_shape = tuple(manifest.latent_shape)
        self.label_names = tuple(manifest.label_names)
        self.shift = config.shift or flow.resolution_shift(*self.latent_shape)
        self.watched: dict[str, dict[str, Tensor]] = {}  # the same number of held-out and training latents
        if held_out is not None:
            self.watched = {
                "held_out": stack_samples(held_out, HELD_OUT_LATENTS),
                "train": stack_samples(samples, HELD_OUT_LATENTS),
            }
        self.autoencoder = load_matching_autoencoder(config.autoencoder, manifest)
        torch.manual_seed(config.training.seed)
        unet = build_unet(config.unet, self.latent_shape[0], num_classes=len(self.label_names))
        if config.training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        config.crops.check(self.latent_shape, unet.multiple)
        unet.measure_tokens(self.normalizer.normalize(stack_samples(samples, MEASURED_LATENTS)["latent"]))
        self.modules: dict[str, nn.Module] = {"unet": unet.train()}
        self.optimizer_settings: dict[str, dict[str, Any]] = {}
        self.null_label = unet.null_label
        self.snapshots = EmaSnapshots(config.ema, unet, snapshots)
        self.suggestion = StopSuggestion(config.patience)
        self.finished = self.steps = 0
        self.copies: Copies | None = None  # those of the last preview, until the next log step
        self.training_latents: Tensor | None = None
        self.rounded_encoders: dict[str, str] | None = None

    def update(self, step: int, batch: Batch, engine: Engine) -> dict[str, Tensor]:
        draw = self.draw(step, batch.global_size, engine.device)
        total = torch.zeros((), device=engine.device)
        for part in engine.parts(batch):
            noise, times = draw.noise[part.rows], draw.times[part.rows]
            clean, coordinates = draw.crops.cut(self.normalizer.normalize(part["latent"]), part.rows)
            labels = self.labels(part["label"], draw.dropped[part.rows])
            noisy = flow.interpolate(clean, noise, times)
            velocity = engine.models["unet"](noisy, times, labels, coordinates)
            target = engine.modules["unet"].velocity_target(clean, noise, times)  # type: ignore[operator]
            loss = flow.velocity_loss(velocity, target).mean()
            engine.backward(loss)
            total = total + loss.detach() / len(batch.parts)
        norm = engine.optimize("unet", step)
        self.snapshots.update(step, engine)
        self.finished, self.steps = step + 1, engine.steps
        return {"loss/flow" if draw.crops.size is None else "loss/flow_crops": total, "optim/grad_norm": norm}

    def draw(self, step: int, count: int, device: torch.device) -> StepNoise:
        """Noise (n, c, h, w), times (n,), which labels are dropped (n,), and the positions of the crops."""
        seed, (channels, height, width) = self.config.training.seed, self.latent_shape
        crops = draw_crops(self.config.crops, seed, step, count, height, width)
        shape = (channels, crops.size or height, crops.size or width)
        shift = self.shift * flow.resolution_shift(*shape) / flow.resolution_shift(*self.latent_shape)
        rng = generator(seed, "flow", step, device=device)
        noise = torch.randn((count, *shape), generator=rng, device=device)
        times = flow.sample_times(count, rng, shift, device)
        dropped = torch.rand(count, generator=rng, device=device) < self.config.label_dropout
        return StepNoise(noise, times, dropped, crops)

    def labels(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor | None:
        """Class ids, "no label" for missing and dropped labels; None for an unconditional network."""
        if not self.label_names:
            return None
        missing = labels < 0 if dropped is None else (labels < 0) | dropped
        return torch.where(missing, self.null_label, labels)

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[Any]:
        """The suggestion to stop, and copies among the samples of the previous preview."""
        if "loss/flow" in metrics:
            self.suggestion.update_training(metrics["loss/flow"])
        copies, self.copies = self.copies, None
        found = [self.suggestion.alarm(self.steps), copies if copies and copies.copies else None]
        return [alarm for alarm in found if alarm is not None]

    def validate(self, engine: Engine) -> dict[str, float]:
        """Epochs so far, the flow loss of the EMA weights on held-out latents and how much lower it is on training
        latents, the copy rate of the latest preview, and KID if it is due."""
        metrics = {"train/epochs": self.finished * self.config.batch / len(self.samples)}
        if self.copies is not None:
            metrics["samples/copy_rate"] = self.copies.copies / self.copies.samples
        losses: dict[str, dict[float, float]] = {}
        for name, samples in self.watched.items():
            latents = self.normalizer.normalize(samples["latent"].to(engine.device))
            labels = self.labels(samples["label"].to(engine.device))
            with engine.accelerator.autocast():
                losses[name] = validation.validation_losses(engine.emas["unet"].module, latents, labels, self.shift)
        if losses:
            metrics |= validation.validation_metrics(losses["held_out"], losses["train"])
            self.suggestion.update_held_out(self.finished, metrics["held_out/flow"])
        if self.sample_kid is not None and self.config.kid.due(self.finished, engine.steps):
            with engine.accelerator.autocast():
                metrics |= self.sample_kid(self.pipeline(engine))
        return metrics

    @torch.no_grad()
    def preview(self, engine: Engine) -> Image.Image | None:
        """A sheet of samples of the EMA weights, one per class, always from the same noise; under each its nearest
        training latent, decoded."""
        labels = list(range(min(len(self.label_names), PREVIEW_IMAGES))) or None
        names = [self.label_names[label] for label in labels or []]
        pipeline = self.pipeline(engine)
        with engine.accelerator.autocast():
            (latents,) = pipeline(
                labels=labels,
                num_images=PREVIEW_IMAGES if labels is None else None,
                num_inference_steps=PREVIEW_STEPS,
                guidance_scale=2.0 if labels else 1.0,
                seed=0,
                output_type="latent",
                return_dict=False,
            )
            images = transforms.to_pil(pipeline.decode(latents))
        if min(self.config.neighbours, len(self.samples)) < 2:
            return labeled_sheet(images, names)
        training = self.known_latents()
        found = validation.find_neighbors(self.normalizer.normalize(latents), training)
        self.copies = Copies(found.copies, len(images), len(training))
        nearest = self.normalizer.denormalize(training[found.nearest, found.versions].float()).to(engine.device)
        with engine.accelerator.autocast():
            below = transforms.to_pil(pipeline.decode(nearest))
        return validation.neighbor_sheet(images, below, found.ratios, names)

    def known_latents(self) -> Tensor:
        """Normalized training latents (m, v, c, h, w) for comparison; read once, see `validation.known_latents`."""
        if self.training_latents is None:
            self.training_latents = validation.known_latents(self.samples, self.normalizer, self.config.neighbours)
        return self.training_latents

    def pipeline(self, engine: Engine) -> LatentDiffusionPipeline:
        """The pipeline with EMA weights, on the device of the training, without a progress bar."""
        pipeline = LatentDiffusionPipeline(
            autoencoder=self.autoencoder,
            unet=engine.emas["unet"].module,
            scheduler=flow_scheduler(self.shift),
            normalizer=self.normalizer.to_dict(),
            label_names=list(self.label_names),
            encoder_fingerprint=self.manifest.autoencoder["encoder_fingerprint"],
            latent_size=list(self.latent_shape[1:]),
            preprocessing=self.manifest.preprocessing,
            rounded_encoders=self.rounded_encoders,
        )
        self.rounded_encoders = pipeline.config["rounded_encoders"]  # computed once
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(engine.device)

    @torch.no_grad()
    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write `pipeline/`: autoencoder, U-Net with EMA weights, scheduler, normalizer, labels and a model card."""
        pipeline = self.pipeline(engine)
        latents = stack_samples(self.samples, COLOR_LATENTS)["latent"]
        pipeline.register_to_config(
            latent_rgb=fit_latent_rgb(self.normalizer.normalize(latents), pipeline.decode(latents.to(engine.device))),
            training={"steps": engine.steps, "batch": self.config.batch, "latents": len(self.samples), **metrics},
        )
        with published_directory(directory / "pipeline") as folder:
            pipeline.save_pretrained(folder)
        epochs = f"{metrics['train/epochs']:.1f} epochs of {len(self.samples)} latents"
        say(f"{directory}: {epochs}; {self.suggestion.summary(engine.steps, self.snapshots.written)}")

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        count = rows.stop - rows.start
        return {
            "latent": torch.randn((count, *self.latent_shape)),
            "label": torch.randint(0, max(1, len(self.label_names)), (count,)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "recipe": encoding_record(self.manifest),
            "images": contents_record(self.manifest),
            "snapshots": self.snapshots.state_dict(),
            "suggestion": self.suggestion.state_dict(),
            "copies": asdict(self.copies) if self.copies is not None else None,
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.snapshots.tensors()

    def check_state(self, state: dict[str, Any], step: int) -> None:
        """See `Model`. Raises: UserError if the run began with other latents, or latents made in another way."""
        if "recipe" in state:  # a checkpoint of an earlier release has none
            advice = "give the latents that the run in output began with, or another output"
            check_same(state["recipe"], encoding_record(self.manifest), f"latents={self.config.latents}", advice)
            check_contents(state["images"], contents_record(self.manifest), f"latents={self.config.latents}")

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]], step: int) -> None:
        self.finished = step
        self.snapshots.load_state_dict(state.get("snapshots", {}), tensors)
        self.suggestion.load_state_dict(state.get("suggestion", {}))
        self.copies = Copies(**state["copies"]) if state.get("copies") else None


# The inputs of a run, checked before it starts or continues.


def encoding_record(manifest: Manifest) -> dict[str, Any]:
    """How the latents were made, which must not change when a run continues."""
    values = manifest.to_dict()
    kept = ("preprocessing", "content", "dtype", "latent_shape", "flipped")
    encoder = {"encoder_fingerprint": manifest.autoencoder["encoder_fingerprint"]}
    return {"autoencoder": encoder} | {name: values[name] for name in kept}


def contents_record(manifest: Manifest) -> dict[str, Any]:
    """The content of the latent set, which determines the order of the samples and their normalization."""
    plans = [dataset["plan"] for dataset in manifest.datasets]
    return {"count": manifest.count, "plans": plans, "statistics": manifest.statistics}


def check_contents(began: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises: UserError if the set has changed since the run began, for example by `ldm-vae latents append`."""
    if changed_keys(began, now):
        what = f"now holds {now['count']:,} latents" if now["count"] != began["count"] else "now holds other latents"
        raise UserError(
            f"{where}: {what}, and held {began['count']:,} when the run in output began; give another output to train "
            "on the set as it is now, or a copy of the earlier set"
        )


def load_matching_autoencoder(path: str, manifest: Manifest) -> Autoencoder:
    """The autoencoder that made the latents. Raises: UserError for another one, or one that cannot have made them."""
    autoencoder = load_autoencoder(path)
    manifest.check_autoencoder(autoencoder.encoder_fingerprint(), where=f"autoencoder={path}")
    if autoencoder.only_side is not None:
        raise UserError(
            f"autoencoder={path}: its latents are one vector, the U-Net draws maps; use "
            "autoencoder.architecture=wavelet"
        )
    factor, (channels, height, width) = autoencoder.downsampling, manifest.latent_shape
    needed = {"channels": autoencoder.latent_channels, "height": factor * height, "width": factor * width}
    found = {"channels": channels, **manifest.preprocessing}
    for name, value in needed.items():
        if found.get(name, value) != value:
            raise UserError(
                f"{manifest.where.location}: {name} is {found[name]}, and {value} would fit latent_shape "
                f"{[channels, height, width]} and autoencoder={path}, which divides sides by {factor}; "
                "give the latents and the autoencoder of one encoding"
            )
    return autoencoder


def open_latents(config: TrainDiffusionConfig) -> tuple[LatentDataset, LatentDataset | None]:
    """The training part and the held-out part (None if nothing is held out)."""
    seed = config.training.seed
    if config.held_out == 0:
        return LatentDataset(config.latents, seed), None
    train = LatentDataset(config.latents, seed, part="train", held_out=config.held_out)
    return train, LatentDataset(config.latents, seed, part="held_out", held_out=config.held_out)


def ordered_samples(config: TrainDiffusionConfig, samples: LatentDataset) -> Samples:
    """The training part in the configured order."""
    if config.shuffle_shards is None:
        return samples
    return InOrder(samples, ShardBlockOrder(config.training.seed, samples.shard_counts, config.shuffle_shards))
