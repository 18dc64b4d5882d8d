"""How the latent U-Net is trained: its configuration and its `update()`. The autoencoder serves previews and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae import config as configuration
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import changed_keys
from ldm_vae.data import transforms
from ldm_vae.diffusion import flow, validation
from ldm_vae.diffusion.fid import Judge, KidConfig, make_sample_kid
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.posthoc_ema import FOLDER, EmaConfig, EmaSnapshots, PosthocEma, copy_to
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.diffusion.unet import Crops, CropsConfig, UNetConfig, build_unet, draw_crops
from ldm_vae.diffusion.validation import Copies, StopSuggestion, fit_latent_rgb, validation_losses
from ldm_vae.errors import UserError
from ldm_vae.files import publish_directory, temporary_directory
from ldm_vae.latents.dataset import LatentDataset, ShardBlockOrder
from ldm_vae.latents.format import Manifest, check_same, short
from ldm_vae.random import generator
from ldm_vae.training.loader import Batch, InOrder, Plan, Samples, Span
from ldm_vae.training.run_directory import ModelKeys, RunDirectory
from ldm_vae.training.trainer import Engine, TrainingConfig, fit, make_accelerator
from ldm_vae.training.trainer import dry_run as dry_run_of
from ldm_vae.utils.image_grid import labelled_sheet

PREVIEW_STEPS = 20
PREVIEW_IMAGES = 10
HELD_OUT_LATENTS = 64
MEASURED_LATENTS = 256
COLOUR_LATENTS = 16
"""Latents whose decoded images fit the colours of half-finished ones: thousands of positions each."""


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
        shift: of training and sampling times towards noise; null: sqrt(c h w / 4096). Smaller for crops.
        crops: training on crops of latents on a share of the steps.
        ema: power-function averages, from which `ldm-vae ema` makes one of any length afterwards.
        neighbours: training latents among which the nearest to each preview sample is looked for; 0 looks for none.
        patience: share of the run without a better held-out loss after which an alarm suggests to stop.
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
    )

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout: {self.label_dropout} is no share; give 0 to 1")
        if self.shuffle_shards is not None and self.shuffle_shards < 1:
            raise UserError(
                f"shuffle_shards: {self.shuffle_shards} is below 1; give a number of shards, or null for the whole set"
            )
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"shift: {self.shift} is not above 0; 1 leaves the times as they are")
        if self.neighbours < 0 or self.neighbours == 1:
            raise UserError(
                f"neighbours: {self.neighbours} training latents have no second nearest; give 0, or 2 or more"
            )
        if self.patience <= 0:
            raise UserError(
                f"patience: {self.patience} is not above 0; give a share of the run, 1 or more never suggests"
            )
        if self.crops.size is not None and not self.unet.coordinates:
            raise UserError("crops.size: a U-Net cannot tell crops from images; set unet.coordinates=true as well")
        self.kid.check(self.held_out, self.training.validate_every)

    def plan(self, processes: int) -> Plan:
        return Plan((Span(self.steps, self.batch, self.micro_batch or max(1, self.batch // processes)),))


@dataclass(frozen=True)
class StepNoise:
    """What is random in a step, for the whole global batch of n; noise has the shape of the crops."""

    noise: Tensor
    times: Tensor
    dropped: Tensor
    crops: Crops


class DiffusionModel:
    """Stage 3 for `fit()`: rectified flow on normalised latents, minimise |v - (eps - x0)|^2."""

    def __init__(
        self,
        config: TrainDiffusionConfig,
        samples: LatentDataset,
        held_out: LatentDataset | None,
        snapshots: Path | None = None,
        judge: Judge | None = None,
    ) -> None:
        """
        Args:
            config: The run's settings.
            samples: What it is trained on.
            held_out: What it is judged by; None for nothing.
            snapshots: Folder for the averages; None writes none.
            judge: What measures samples when `kid` says so; None measures none.
        """
        self.config, self.judge = config, judge
        self.samples = samples
        self.manifest = manifest = samples.manifest
        self.normalizer = manifest.normalizer
        self.latent_shape = tuple(manifest.latent_shape)
        self.label_names = tuple(manifest.label_names)
        self.shift = config.shift or flow.resolution_shift(*self.latent_shape)
        parts = {"held_out": held_out, "train": samples} if held_out is not None else {}
        self.judges = {name: stack_samples(part, HELD_OUT_LATENTS) for name, part in parts.items() if part is not None}
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
        self.copies: Copies | None = None  # of the last preview, until the next log step
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
            loss = flow.velocity_loss(velocity, flow.velocity_target(clean, noise)).mean()
            engine.backward(loss)
            total = total + loss.detach() / len(batch.parts)
        norm = engine.optimize("unet", step)
        self.snapshots.update(step, engine)
        self.finished, self.steps = step + 1, engine.steps
        return {"loss/flow" if draw.crops.size is None else "loss/flow_crops": total, "optim/grad_norm": norm}

    def draw(self, step: int, count: int, device: torch.device) -> StepNoise:
        """Noise (n, c, h, w), times (n,), which labels are dropped (n,), and where the crops of a crop step lie."""
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
        """Class ids with "no label" where there is none or it is dropped; None for an unconditional network."""
        if not self.label_names:
            return None
        missing = labels < 0 if dropped is None else (labels < 0) | dropped
        return torch.where(missing, self.null_label, labels)

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[Any]:
        """The suggestion to stop, and copies among the samples of the preview before."""
        if "loss/flow" in metrics:
            self.suggestion.see_training(metrics["loss/flow"])
        copies, self.copies = self.copies, None
        found = [self.suggestion.alarm(step, self.steps), copies if copies and copies.copies else None]
        return [alarm for alarm in found if alarm is not None]

    def validate(self, engine: Engine) -> dict[str, float]:
        """Epochs so far, the flow loss of the EMA weights on held-out latents and how much lower it is on training
        latents, the copy rate of the preview just made, and KID when it is due."""
        figures = {"train/epochs": self.finished * self.config.batch / len(self.samples)}
        if self.copies is not None:
            figures["samples/copy_rate"] = self.copies.copies / self.copies.samples
        losses: dict[str, dict[float, float]] = {}
        for part, samples in self.judges.items():
            latents = self.normalizer.normalize(samples["latent"].to(engine.device))
            labels = self.labels(samples["label"].to(engine.device))
            with engine.accelerator.autocast():
                losses[part] = validation.validation_losses(engine.emas["unet"].module, latents, labels, self.shift)
        if losses:
            figures |= validation.validation_metrics(losses["held_out"], losses["train"])
            self.suggestion.see_held_out(self.finished, figures["held_out/flow"])
        if self.judge is not None and self.config.kid.due(self.finished, engine.steps):
            with engine.accelerator.autocast():
                figures |= self.judge(self.sampler(engine))
        return figures

    @torch.no_grad()
    def preview(self, engine: Engine) -> Image.Image | None:
        """A sheet of samples of the EMA weights, one per class, always from the same noise; under each its nearest
        training latent, decoded."""
        labels = list(range(min(len(self.label_names), PREVIEW_IMAGES))) or None
        names = [self.label_names[label] for label in labels or []]
        pipeline = self.sampler(engine)
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
            images = transforms.to_pil(self.decode(latents))
        if min(self.config.neighbours, len(self.samples)) < 2:
            return labelled_sheet(images, names)
        training = self.known_latents()
        found = validation.find_neighbors(self.normalizer.normalize(latents), training)
        self.copies = Copies(found.copies, len(images), len(training))
        nearest = self.normalizer.denormalize(training[found.nearest].float()).to(engine.device)
        with engine.accelerator.autocast():
            below = transforms.to_pil(self.decode(nearest))
        return validation.panel(images, below, found.ratios, names)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1] of the autoencoder's own latents, on the CPU; one at a time through it."""
        return torch.cat([self.autoencoder.decode_images(latent[None]).float().cpu() for latent in latents])

    def known_latents(self) -> Tensor:
        """Normalised training latents for comparison, half precision, evenly spread over the set; read once."""
        if self.training_latents is None:
            latents = stack_samples(self.samples, self.config.neighbours)["latent"]
            self.training_latents = self.normalizer.normalize(latents).half()
        return self.training_latents

    def sampler(self, engine: Engine) -> LatentDiffusionPipeline:
        """The pipeline on the device of the training, without a progress bar."""
        pipeline = self.pipeline(engine).to(engine.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline(self, engine: Engine, **recorded: Any) -> LatentDiffusionPipeline:
        """Of the EMA weights. `recorded`: its `latent_rgb` and `training`."""
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
            **recorded,
        )
        self.rounded_encoders = pipeline.config["rounded_encoders"]  # computed once
        return pipeline

    @torch.no_grad()
    def colours(self, engine: Engine) -> dict[str, Any]:
        """The linear map from latents to RGB that shows half-finished images."""
        latents = stack_samples(self.samples, COLOUR_LATENTS)["latent"]
        self.autoencoder.to(engine.device)
        return fit_latent_rgb(self.normalizer.normalize(latents), self.decode(latents.to(engine.device)))

    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write `pipeline/`: autoencoder, U-Net with EMA weights, scheduler, normaliser, labels and a model card."""
        final = directory / "pipeline"
        temporary = temporary_directory(final)
        training = {"steps": engine.steps, "batch": self.config.batch, "latents": len(self.samples), **metrics}
        self.pipeline(engine, latent_rgb=self.colours(engine), training=training).save_pretrained(temporary)
        publish_directory(temporary, final)
        epochs = f"{metrics['train/epochs']:.1f} epochs of {len(self.samples)} latents"
        print(f"{directory}: {epochs}; {self.suggestion.last_word(engine.steps, self.snapshots.written)}")

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        count = rows.stop - rows.start
        return {
            "latent": torch.randn((count, *self.latent_shape)),
            "label": torch.randint(0, max(1, len(self.label_names)), (count,)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "finished": self.finished,
            "recipe": encoding_record(self.manifest),
            "images": contents_record(self.manifest),
            "snapshots": self.snapshots.state_dict(),
            "suggestion": self.suggestion.state_dict(),
            "copies": asdict(self.copies) if self.copies is not None else None,
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.snapshots.tensors()

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Raises: UserError when the run began on latents that were made in another way."""
        if "recipe" in state:  # a checkpoint of an earlier release has none
            advice = "'here' is the run that is to continue: give the latents that it began with, or another output"
            check_same(state["recipe"], encoding_record(self.manifest), f"latents={self.config.latents}", advice)
            check_contents(state["images"], contents_record(self.manifest), f"latents={self.config.latents}")
        self.finished = state.get("finished", 0)
        self.snapshots.load_state_dict(state.get("snapshots", {}), tensors)
        self.suggestion.load_state_dict(state.get("suggestion", {}))
        self.copies = Copies(**state["copies"]) if state.get("copies") else None


def encoding_record(manifest: Manifest) -> dict[str, Any]:
    """How the latents were made, which must stay the same under a run that continues."""
    values = manifest.to_dict()
    kept = ("preprocessing", "content", "dtype", "latent_shape", "flipped")
    encoder = {"encoder_fingerprint": manifest.autoencoder["encoder_fingerprint"]}
    return {"autoencoder": encoder} | {name: values[name] for name in kept}


def contents_record(manifest: Manifest) -> dict[str, Any]:
    """Which latents there are: the order of the samples and their normalisation follow from it."""
    plans = [dataset["plan"] for dataset in manifest.datasets]
    return {"count": manifest.count, "plans": plans, "statistics": manifest.statistics}


def check_contents(began: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises: UserError when the set is not the one that a run began with, as after `ldm-vae latents append`."""
    for key, (before, after) in changed_keys(began, now).items():
        raise UserError(
            f"{where}: {key} is {short(after)} and was {short(before)} when this run began; give another output to "
            "train on what the set holds now, or a copy of the set as it was"
        )


def load_matching_autoencoder(path: str, manifest: Manifest) -> Any:
    """The autoencoder that made the latents. Raises: UserError when it is another one, or cannot have made them."""
    autoencoder = load_autoencoder(path)
    manifest.check_autoencoder(autoencoder.encoder_fingerprint(), where=f"autoencoder={path}")
    if autoencoder.only_side is not None:
        raise UserError(
            f"autoencoder={path}: its latents are one vector, the U-Net draws maps; use architecture=wavelet"
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


def stack_samples(dataset: LatentDataset, count: int) -> dict[str, Tensor]:
    """At most `count` samples as tensors, evenly spread: a folder is often sorted by class."""
    count = min(count, len(dataset))
    samples = [dataset.sample(index * len(dataset) // count, index) for index in range(count)]
    return {
        "latent": torch.stack([sample["latent"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }


def train_diffusion(config: TrainDiffusionConfig, *, dry_run: bool = False) -> int:
    """`ldm-vae train-diffusion`: train the latent U-Net in `config.output`, or continue there; ends with a pipeline.

    Args:
        dry_run: build everything, do one step on random data, print parameters, GMACs, shapes and memory.

    Returns: 0 when the run is finished, 75 when a signal stopped it after saving (the same call continues).

    Raises:
        UserError: a setting, the latents, the autoencoder or the output folder are not usable.
    """
    samples, held_out = open_latents(config)
    accelerator = make_accelerator(config.training, None if dry_run else Path(config.output))
    plan = config.plan(accelerator.num_processes)
    snapshots = None if dry_run else Path(config.output) / FOLDER
    judge = None
    if config.kid.samples and not dry_run:
        judge = make_sample_kid(config.kid, config.held_out)
    model = DiffusionModel(config, samples, held_out, snapshots, judge)
    if dry_run:
        accelerator.print(dry_run_of(model, plan, config.training, accelerator))
        return 0
    run_directory = RunDirectory(config.output, config, main_process=accelerator.is_main_process)
    return fit(model, ordered_samples(config, samples), plan, config.training, run_directory, accelerator)


def open_latents(config: TrainDiffusionConfig) -> tuple[LatentDataset, LatentDataset | None]:
    """The training part and the held-out part (None when nothing is held out)."""
    seed = config.training.seed
    if config.held_out == 0:
        return LatentDataset(config.latents, seed), None
    train = LatentDataset(config.latents, seed, part="train", held_out=config.held_out)
    return train, LatentDataset(config.latents, seed, part="held_out", held_out=config.held_out)


def ordered_samples(config: TrainDiffusionConfig, samples: LatentDataset) -> Samples:
    """The training part in the order that the config asks for."""
    if config.shuffle_shards is None:
        return samples
    return InOrder(samples, ShardBlockOrder(config.training.seed, samples.shard_counts, config.shuffle_shards))


# After training: an average of another length, its held-out loss, and the pipeline with it. `ldm-vae ema`'s work.


def finished_pipeline(run: str | Path) -> LatentDiffusionPipeline:
    """The pipeline of a run directory, on the CPU. Raises: UserError when the run has not written it yet."""
    directory = Path(run) / "pipeline"
    if not (directory / "model_index.json").is_file():
        raise UserError(f"{run}: holds no pipeline; give the directory of a finished run of `train-diffusion`")
    return LatentDiffusionPipeline.from_pretrained(directory, use_safetensors=True)


class HeldOutLoss:
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
        losses = validation_losses(unet.to(self.latents.device), self.latents, self.labels, self.shift)
        return sum(losses.values()) / len(losses)


def write_pipeline(pipeline: LatentDiffusionPipeline, average: PosthocEma, output: str | Path) -> None:
    """Write the pipeline with the averaged U-Net to `output`. Raises: UserError when something is there."""
    final = Path(output)
    if final.exists():
        raise UserError(f"{output}: exists; give a new folder")
    copy_to(pipeline.unet, average)
    temporary = temporary_directory(final)
    pipeline.to("cpu").save_pretrained(temporary)
    publish_directory(temporary, final)
