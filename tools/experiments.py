"""Experiments on autoencoders for latent diffusion that anybody can repeat: trained several times, with intervals.

    python -m tools.experiments beta runs/beta                  # what the KL term buys
    python -m tools.experiments blur runs/blur                  # which loss makes reconstructions soft
    python -m tools.experiments kinds runs/kinds                # KL, VQ, FSQ and plain latents at the same rate
    python -m tools.experiments beta runs/beta --report         # the tables from what is finished so far
    python -m tools.experiments beta runs/beta --page docs/results/kl-term.md    # ... into a page of the docs

Small models on the synthetic set, whose truth is known, on CPU cores. A cell is one variant with one seed: it trains an
autoencoder, for `beta` and `kinds` also a latent U-Net on its latents, and measures both on test images of other
scenes. The same command continues an interrupted run and skips finished cells; all variants of seed 0 come first, so
that partial results can be read. `--time-limit MINUTES` saves and ends (exit code 75). Settings are those of
`ExperimentConfig`, as vae_steps=500; of an experiment that has begun only `seeds` and `variants` may change.

OUTPUT gets CELL/result.json of each cell, and from these results.json, results.md and figure.svg. An interval is
Student's, 95 %, over seeds: it holds for other seeds of the same set of images, not for other images.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.files import write_json, write_text
from ldm_vae.utils.text import markdown_table
from tools.train_in_chunks import stopped_at

PLAN, RESULT = "experiment.json", "result.json"
CODE_BITS = 10.0
"""Bits of a latent position in `kinds`: a codebook of 1024."""
NATS_OF_CODE = CODE_BITS * math.log(2) / 4
"""As many for each of 4 channels."""
LEVEL = 0.95
PANEL_WIDTH, PANEL_HEIGHT = 2.9, 2.6
"""Inches."""


class Stopped(Exception):
    """The time is up, or a signal came; the state is saved."""


@dataclass(frozen=True)
class ExperimentConfig:
    """What all cells of an experiment share.

    Args:
        seeds: trainings of each variant, with the seeds 0, 1 ...
        variants: names of those to make; none: all.
        scenes: seed of the set; those for the reader and for the test follow from it. Choose sizes on another one.
        images: scenes of the set that autoencoders and U-Nets learn from; a tenth of them is held out for validation.
        resolution: side of the images in pixels.
        vae_steps, vae_batch: of the autoencoder's training, with the preset `pico`.
        unet_steps, unet_batch: of the latent U-Net's training.
        unet_widths, unet_patch: of the U-Net: channels of each level, and latent positions of a token's side.
        test_images: real images of other scenes, on which everything is measured.
        generated: images to generate, of each class in turn.
        sampling_steps, guidance: of the sampler.
        reader_images, reader_epochs: real images of yet other scenes from which the reader learns, and how often.
        reader_accuracy: share of the test images that the reader must recognize.
        perceptual_weights: a local safetensors file of torchvision's SqueezeNet for LPIPS; null: its download.
        save_every: steps between checkpoints.
    """

    seeds: int = 3
    variants: list[str] = field(default_factory=list)
    scenes: int = 0
    images: int = 2000
    resolution: int = 64
    vae_steps: int = 1000
    vae_batch: int = 16
    unet_steps: int = 1200
    unet_batch: int = 32
    unet_widths: list[int] = field(default_factory=lambda: [96, 192])
    unet_patch: int = 2
    test_images: int = 400
    generated: int = 400
    sampling_steps: int = 20
    guidance: float = 1.0
    reader_images: int = 3000
    reader_epochs: int = 10
    reader_accuracy: float = 0.95
    perceptual_weights: str | None = None
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds: {self.seeds} is below 1; 3 or more give an interval")
        for name in ("test_images", "generated"):
            if getattr(self, name) < 10 or getattr(self, name) % 10:
                raise UserError(
                    f"{name}: {getattr(self, name)} are not as many of each of ten classes; give 10, 20 ..."
                )


MAY_CHANGE = ("seeds", "variants", "perceptual_weights")


@dataclass(frozen=True)
class Variant:
    """A row of an experiment: its own settings of `train-vae`."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """A figure of `experiment_measures`: its key, how it is called, and digits behind the point."""

    key: str
    title: str
    digits: int = 3


@dataclass(frozen=True)
class Experiment:
    """A question, the variants that answer it, and what is measured.

    Attributes:
        title: The question.
        settings: Of `train-vae`, shared by the variants.
        variants: In the order of the tables.
        baseline: The variant that the others are compared with.
        measures: Rows of the tables.
        panels: Keys of the measures in the figure.
        textured: Share of the objects with a texture.
        generates: Whether a U-Net is trained on the latents.
        bits: Of a latent position, at which reconstructions are compared; None: at no common rate.
    """

    title: str
    settings: tuple[str, ...]
    variants: tuple[Variant, ...]
    baseline: str
    measures: tuple[Measure, ...]
    panels: tuple[str, ...]
    textured: float = 0.0
    generates: bool = True
    bits: float | None = None


RECONSTRUCTION = (
    Measure("psnr_mean", "PSNR, decode(mean), dB", 2),
    Measure("ssim_mean", "SSIM, decode(mean)"),
    Measure("lpips_mean", "LPIPS, decode(mean)"),
    Measure("sharpness_mean", "sharpness ratio, decode(mean)"),
)
GENERATION = (
    Measure("accuracy", "generated: read as the class asked for"),
    Measure("accuracy_decoded", "reconstructions: read as what they show"),
    Measure("kid", "generated: KID x 1000", 1),
    Measure("kid_decoded", "reconstructions: KID x 1000", 1),
    Measure("kid_real", "real images: KID x 1000", 1),
    Measure("attribute_gap", "generated: gap of attributes"),
    Measure("attribute_chance", "real images: gap of attributes by chance"),
)
LATENTS = (
    Measure("psnr_noisy", "PSNR with noise of 0.25 deviations on the latents, dB", 2),
    Measure("cycle_error", "moment-matched draws: error of encode(decode(z)), deviations"),
    Measure("cycle_error_real", "posterior samples: error of encode(decode(z)), deviations"),
    Measure("prior_distance", "moment-matched draws: distance of 8x8 blocks"),
    Measure("prior_distance_real", "posterior samples: distance of 8x8 blocks"),
    Measure("unevenness", "interpolation: largest over mean step"),
    Measure("midpoint_sharpness", "interpolation: contrast half way"),
)

EXPERIMENTS = {
    "beta": Experiment(
        "What does the KL term buy?",
        ("loss.l1=1", "loss.mse=1"),
        (
            Variant("plain", ("autoencoder.kind=ae",)),
            Variant("beta-0", ("rate.mode=fixed", "rate.beta=0")),
            Variant("1.0-nats", ("rate.target_nats=1.0",)),
            Variant("2.5-nats", ("rate.target_nats=2.5",)),
            Variant("4.0-nats", ("rate.target_nats=4.0",)),
        ),
        "plain",
        (
            Measure("nats_per_dim", "KL, nats per latent dimension", 2),
            *RECONSTRUCTION,
            Measure("psnr_sample", "PSNR, decode(sample), dB", 2),
            Measure("posterior_deviation", "posterior deviation over that of the latents"),
            *LATENTS,
            *GENERATION,
        ),
        ("psnr_mean", "psnr_noisy", "midpoint_sharpness", "accuracy", "kid"),
    ),
    "blur": Experiment(
        "Which loss makes reconstructions soft?",
        ("rate.target_nats=2.5", "loss.perceptual_net=squeeze"),
        (
            Variant("l2", ("loss.l1=0", "loss.mse=1")),
            Variant("l1", ("loss.l1=1",)),
            Variant("l1-lpips", ("loss.l1=1", "loss.perceptual=0.5")),
            Variant(
                "l1-lpips-adversarial",
                ("loss.l1=1", "loss.perceptual=0.5", "adversarial.loss=hinge", "adversarial.start=0.2",
                 "adversarial.warmup=0.1", "adversarial.ramp=0.1", "adversarial.width=32",
                 "adversarial.strength=0.1", "adversarial.learning_rate=1.0e-3", "adversarial.r1=0.01",
                 "adversarial.augment=false"),
            ),
        ),
        "l1",
        (
            Measure("nats_per_dim", "KL, nats per latent dimension", 2),
            *RECONSTRUCTION,
            Measure("fine_contrast_db", "power of fine detail over the originals', dB", 2),
            Measure("hatching_db", "largest surplus on rows and columns, dB", 2),
            Measure("grain", "fine contrast on flat surfaces, 8-bit levels"),
            Measure("logit_gap", "discriminator: logit gap in the last fifth"),
            Measure("told_apart", "discriminator: test pairs told apart (chance 0.5)"),
        ),
        ("psnr_mean", "lpips_mean", "sharpness_mean", "fine_contrast_db", "hatching_db"),
        textured=0.6,
        generates=False,
    ),
    "kinds": Experiment(
        "KL, VQ, FSQ and plain latents at the same bits per pixel",
        ("loss.l1=1", "loss.mse=1"),
        (
            Variant("kl", (f"rate.target_nats={NATS_OF_CODE:.4f}",)),
            Variant("vq", ("autoencoder.kind=vq", "autoencoder.codebook_size=1024")),
            Variant("fsq", ("autoencoder.kind=fsq", "autoencoder.fsq_levels=[8,5,5,5]")),
            Variant("plain", ("autoencoder.kind=ae",)),
        ),
        "kl",
        (
            Measure("bits_per_position", "bits per latent position", 2),
            Measure("psnr_at_rate", "PSNR at this rate, dB", 2),
            Measure("ssim_at_rate", "SSIM at this rate"),
            Measure("lpips_at_rate", "LPIPS at this rate"),
            *RECONSTRUCTION,
            *LATENTS,
            *GENERATION,
        ),
        ("bits_per_position", "psnr_at_rate", "psnr_noisy", "accuracy", "kid"),
        bits=CODE_BITS,
    ),
}  # fmt: skip


# Running: one cell after the other.


@dataclass(frozen=True)
class Cell:
    """One variant with one seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}-seed{self.seed}"


def plan_cells(experiment: Experiment, config: ExperimentConfig) -> list[Cell]:
    """All variants of seed 0, then of seed 1 ... Raises: UserError for an unknown variant."""
    known = {variant.name: variant for variant in experiment.variants}
    for name in config.variants:
        if name not in known:
            raise UserError(f"variants: {name!r} is unknown; choose among {', '.join(known)}")
    chosen = [known[name] for name in known if not config.variants or name in config.variants]
    return [Cell(variant, seed) for seed in range(config.seeds) for variant in chosen]


def run(name: str, output: Path, config: ExperimentConfig, deadline: float = math.inf) -> bool:
    """Make what is missing until the deadline, of `time.monotonic()`; then write the report. Whether all is finished.

    Raises:
        UserError: another experiment or other settings are in `output`, or another process works there.
    """
    from ldm_vae.evaluation.study import locked_folder

    experiment = EXPERIMENTS[name]
    cells = plan_cells(experiment, config)
    with locked_folder(output):
        begin(name, output, config)
        missing = [cell for cell in cells if not (output / cell.name / RESULT).is_file()]
        bench = Bench(experiment, config, output, deadline) if missing else None
        for cell in missing:
            assert bench is not None
            try:
                seconds = bench.make(cell)
            except Stopped:
                print(f"{cell.name}: stopped; the same command continues", flush=True)
                report(output, name)
                return False
            print(f"{cell.name}: finished after {seconds:.0f} s of processor time", flush=True)
            report(output, name)
        report(output, name)
    return True


def begin(name: str, output: Path, config: ExperimentConfig) -> None:
    """Write down what is made in `output`. Raises: UserError where something else is made there."""
    output.mkdir(parents=True, exist_ok=True)
    plan = {"experiment": name, "settings": configuration.to_dict(config)}
    if (output / PLAN).is_file():
        found = json.loads((output / PLAN).read_text())
        changes = configuration.changed_keys(decisive(found), decisive(plan))
        for key, (old, new) in changes.items():
            raise UserError(f"{output}: was begun with {key}={old}, not {new}; give that, or another folder")
    write_json(output / PLAN, plan)


def decisive(plan: dict[str, Any]) -> dict[str, Any]:
    """What decides the figures of a cell."""
    settings = {key: value for key, value in plan["settings"].items() if key not in MAY_CHANGE}
    return {"experiment": plan["experiment"], **settings}


class Bench:
    """Makes cells. Test images and reader are those of all cells.

    Args:
        experiment: What is asked.
        config: Its settings.
        output: Folder of the cells.
        deadline: Of `time.monotonic()`; a training that runs then saves and ends.
    """

    def __init__(self, experiment: Experiment, config: ExperimentConfig, output: Path, deadline: float) -> None:
        from ldm_vae.autoencoder.losses import LPIPS
        from tools.experiment_measures import open_test_set

        self.experiment, self.config, self.output, self.deadline = experiment, config, output, deadline
        self.images = SyntheticConfig(
            config.images, config.scenes, resolution=config.resolution, textured=experiment.textured
        )
        self.lpips = LPIPS("squeeze", config.perceptual_weights)
        self.test = open_test_set(
            output / "reader", self.images, config.test_images, config.reader_images, config.reader_epochs
        )
        if self.test.errors["recognised"] < config.reader_accuracy:
            raise UserError(
                f"{output}: the reader recognizes {self.test.errors['recognised']:.1%} of real images, which makes it "
                f"no judge; give more reader_images or reader_epochs, and remove {output / 'reader'}"
            )

    def make(self, cell: Cell) -> float:
        """Train and measure a cell, and write its result; the processor time in seconds that this took.

        Raises: Stopped.
        """
        started = time.process_time()
        folder = self.output / cell.name
        vae = self.train_autoencoder(cell, folder / "vae")
        figures, curves = self.measure_autoencoder(vae, folder)
        if self.experiment.generates:
            pipeline = self.train_unet(cell, vae, folder)
            figures |= self.measure_generation(pipeline, vae, folder)
        gc.collect()
        result = {
            "variant": cell.variant.name,
            "seed": cell.seed,
            "settings": [*self.experiment.settings, *cell.variant.settings],
            "figures": figures,
            "curves": curves,
            "versions": provenance.versions(),
        }
        write_json(folder / RESULT, result)
        return time.process_time() - started

    def train(self, train: Callable[[Any], int], config: Any) -> None:
        """Train, or continue, until the deadline. Raises: Stopped."""
        if time.monotonic() >= self.deadline:
            raise Stopped
        with stopped_at(self.deadline):
            if train(config) == EXIT_INTERRUPTED:
                raise Stopped

    def train_autoencoder(self, cell: Cell, run: Path) -> Path:
        """The finished run."""
        from ldm_vae import TrainVaeConfig, train_vae

        config, side = self.config, self.config.resolution
        words = [
            f"output={run}", "data.source=synthetic", "data.cache_megabytes=200",
            *(f"data.synthetic.{key}={value}" for key, value in configuration.to_dict(self.images).items()),
            "autoencoder.preset=pico", "autoencoder.latent_channels=4",
            f"crop.short_side_min={side}", f"crop.short_side_max={side}",
            f"phases=[{{steps: {config.vae_steps}, crop: {side}, batch: {config.vae_batch}}}]",
            f"held_out_resolution={side}", "training.learning_rate=1.5e-3",
            *self.training(cell.seed, config.vae_steps), *self.experiment.settings, *cell.variant.settings,
        ]  # fmt: skip
        if config.perceptual_weights and any(word.startswith("loss.perceptual=") for word in words):
            words.append(f"loss.perceptual_weights={config.perceptual_weights}")
        self.train(train_vae, configuration.load(TrainVaeConfig, None, words))
        return run

    def training(self, seed: int, steps: int) -> list[str]:
        """Settings of both trainings: on CPU cores in float32, without pictures on the way."""
        never = 1000 * steps
        return [
            f"training.seed={seed}", "training.device=cpu", "training.precision=fp32", "training.workers=0",
            "training.tracker=none", "training.ema_decay=0.99", f"training.warmup_steps={min(50, max(1, steps // 10))}",
            "training.log_every=10", f"training.save_every={self.config.save_every}", "training.keep_checkpoints=2",
            f"training.validate_every={never}", f"training.preview_every={never}",
        ]  # fmt: skip

    def measure_autoencoder(self, vae: Path, folder: Path) -> tuple[dict[str, float | None], dict[str, list[float]]]:
        """Figures and curves on the test images; those of `ldm-vae evaluate` come from it."""
        from ldm_vae import EvaluateConfig, evaluate, load_autoencoder
        from tools import experiment_measures as measures
        from tools.synthetic_reader import held_out_config

        config = self.config
        found = evaluate(
            EvaluateConfig(
                autoencoder=str(vae), output=str(folder / "evaluation"), part="all", resolution=config.resolution,
                data=DataConfig(synthetic=held_out_config(self.images, config.test_images)), codecs=[],
                perceptual_net="squeeze", perceptual_weights=config.perceptual_weights, batch=20, device="cpu",
            )
        )  # fmt: skip
        figures: dict[str, float | None] = {"nats_per_dim": found["rate"]["nats_per_dim"]}
        for row, suffix in (("decode(mean)", "mean"), ("decode(sample)", "sample")):
            for one in found["rows"]:
                if one["name"] == row:
                    figures |= {f"{name}_{suffix}": value["mean"] for name, value in one["metrics"].items()}
        autoencoder, images = load_autoencoder(vae), self.test.images
        decoded = measures.decode(autoencoder, measures.encode(autoencoder, images)[0])
        spectrum, curves = measures.spectrum_figures(decoded, images)
        figures |= spectrum | measures.adversary_figures(vae, decoded, images)
        figures |= measures.latent_figures(autoencoder, images, self.lpips)
        if self.experiment.bits is not None:
            training = self.training_images(config.test_images)
            figures |= measures.rate_figures(autoencoder, images, training, self.lpips, self.experiment.bits)
        return figures, curves

    def training_images(self, count: int) -> Any:
        """Images (n, 3, side, side) in [-1, 1] of the set that the autoencoders learn from."""
        from dataclasses import replace

        from tools.synthetic_reader import render

        return render(replace(self.images, count=min(count, self.images.count)), self.config.resolution, finer=1)[0]

    def train_unet(self, cell: Cell, vae: Path, folder: Path) -> Path:
        """The finished run of a U-Net on the latents of all images of the set."""
        from ldm_vae import EncodeConfig, TrainDiffusionConfig, encode_dataset, train_diffusion

        config = self.config
        encode_dataset(
            EncodeConfig(
                autoencoder=str(vae), output=str(folder / "latents"), data=DataConfig(synthetic=self.images),
                resolution=str(config.resolution), workers=0, threads=1, device="cpu",
            )
        )  # fmt: skip
        words = [
            f"output={folder / 'diffusion'}", f"latents={folder / 'latents'}", f"autoencoder={vae}",
            "unet.preset=tiny", f"unet.widths={list(config.unet_widths)}", f"unet.patch={config.unet_patch}",
            f"steps={config.unet_steps}", f"batch={config.unet_batch}", "neighbours=0", "ema.snapshots=0",
            "training.learning_rate=2.0e-3", *self.training(cell.seed, config.unet_steps),
        ]  # fmt: skip
        self.train(train_diffusion, configuration.load(TrainDiffusionConfig, None, words))
        return folder / "diffusion"

    def measure_generation(self, diffusion: Path, vae: Path, folder: Path) -> dict[str, float | None]:
        """Figures of generated images, of each class in turn; the noise is that of all cells."""
        import numpy as np

        from ldm_vae import GenerateConfig, generate, load_autoencoder
        from ldm_vae.data.synthetic.source import SyntheticSource
        from ldm_vae.diffusion.generation import plan_images
        from tools import experiment_measures as measures

        config, labels = self.config, SyntheticSource.label_names
        request = GenerateConfig(
            str(diffusion), str(folder / "images"), count=config.generated, steps=config.sampling_steps,
            guidance=config.guidance, batch=20, device="cpu",
        )  # fmt: skip
        generate(request)
        images = measures.read_images([image.path for image in plan_images(request, labels)])
        autoencoder = load_autoencoder(vae)
        decoded = measures.decode(autoencoder, measures.encode(autoencoder, self.test.images)[0])
        return measures.generation_figures(self.test, images, np.arange(config.generated) % len(labels), decoded)


# The report: tables and a figure from the cells that are finished.


def report(output: Path, name: str) -> dict[str, Any]:
    """Write results.json, results.md and figure.svg from the finished cells; the content of results.json.

    Raises: UserError where this experiment was not begun.
    """
    if not (output / PLAN).is_file():
        raise UserError(f"{output}: holds no {PLAN}; give the folder of an experiment that was begun")
    plan = json.loads((output / PLAN).read_text())
    if plan["experiment"] != name:
        raise UserError(f"{output}: holds the experiment {plan['experiment']}, not {name}; give that")
    experiment = EXPERIMENTS[name]
    files = [file for variant in experiment.variants for file in sorted(output.glob(f"{variant.name}-seed*/{RESULT}"))]
    cells = [json.loads(file.read_text()) for file in files]
    found = summarize(plan, experiment, cells)
    reader = output / "reader" / "reader.json"
    found["reader"] = json.loads(reader.read_text()) if reader.is_file() else None
    write_json(output / "results.json", found)
    write_text(output / "results.md", markdown(found, experiment))
    if cells:
        draw(found, experiment, output / "figure.svg")
    return found


def summarize(plan: dict[str, Any], experiment: Experiment, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and paired differences to the baseline, measure by measure; seeds in each variant."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        by_variant.setdefault(cell["variant"], {})[cell["seed"]] = cell
    names = [variant.name for variant in experiment.variants if variant.name in by_variant]
    measures: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for measure in experiment.measures:
        values = {name: values_of(by_variant[name], measure.key) for name in names}
        measures[measure.key] = {name: spread(list(values[name].values())) for name in names}
        base = values.get(experiment.baseline, {})
        differences[measure.key] = {
            name: spread([values[name][seed] - base[seed] for seed in values[name] if seed in base])
            for name in names
            if name != experiment.baseline
        }
    settings = plan["settings"]
    planned = len(settings["variants"] or experiment.variants) * settings["seeds"]
    return {
        **plan,
        "title": experiment.title,
        "seeds": {name: sorted(by_variant[name]) for name in names},
        "finished": len(cells),
        "planned": planned,
        "baseline": experiment.baseline,
        "measures": measures,
        "differences": differences,
        "curves": {name: mean_curves(list(by_variant[name].values())) for name in names},
        "versions": [
            json.loads(one) for one in sorted({json.dumps(cell["versions"], sort_keys=True) for cell in cells})
        ],
    }


def values_of(cells: dict[int, dict[str, Any]], key: str) -> dict[int, float]:
    """Seed -> figure, where there is one."""
    found = {seed: cell["figures"].get(key) for seed, cell in sorted(cells.items())}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`n`, `mean` and Student's 95 % interval of the mean (`low`, `high`: None below two values) of `values`."""
    from scipy.stats import t

    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "low": None, "high": None, "values": []}
    mean = sum(values) / n
    if n == 1:
        return {"n": 1, "mean": mean, "low": None, "high": None, "values": list(values)}
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def mean_curves(cells: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Each curve, mean over seeds."""
    names = cells[0]["curves"]
    return {
        name: [sum(each) / len(cells) for each in zip(*(cell["curves"][name] for cell in cells), strict=True)]
        for name in names
    }


def markdown(found: dict[str, Any], experiment: Experiment) -> str:
    """results.md: both tables, how many seeds they stand on, and how it was made."""
    names = list(found["seeds"])
    lines = [f"# {experiment.title}", "", seeds_sentence(found), ""]
    if names:
        rows = list(table_rows(found["measures"], experiment, names, signed=False))
        lines += ["## Means over seeds", "", *markdown_table(["measure", *names], rows), ""]
        others = [name for name in names if name != experiment.baseline]
        if experiment.baseline in names and others:
            rows = list(table_rows(found["differences"], experiment, others, signed=True))
            lines += [f"## Differences to {experiment.baseline}, seed by seed", ""]
            lines += [*markdown_table(["measure", *others], rows), ""]
        lines += ["![The measures by variant: every seed, the mean and its interval](figure.svg)", ""]
    return "\n".join([*lines, *protocol(found, experiment), ""])


def table_rows(
    summary: dict[str, Any], experiment: Experiment, names: Sequence[str], *, signed: bool
) -> Iterator[list[str]]:
    for measure in experiment.measures:
        cells = [cell_text(summary[measure.key][name], measure.digits, signed) for name in names]
        if any(cell != "–" for cell in cells):
            yield [measure.title, *cells]


def cell_text(one: dict[str, Any], digits: int, signed: bool) -> str:
    """A mean with its interval; of one seed, or of fewer seeds than the others have, n."""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    if one["n"] == 0:
        return "–"
    if one["n"] == 1:
        return f"{form.format(one['mean'])} (1 seed)"
    return f"{form.format(one['mean'])} [{form.format(one['low'])}, {form.format(one['high'])}]"


def seeds_sentence(found: dict[str, Any]) -> str:
    counts = {name: len(seeds) for name, seeds in found["seeds"].items()}
    state = f"{found['finished']} of {found['planned']} cells are finished"
    if not counts:
        return f"{state}."
    if len(set(counts.values())) == 1:
        return f"{state}: n = {next(iter(counts.values()))} seeds of each of {len(counts)} variants."
    return f"{state}: " + ", ".join(f"{name} n = {count}" for name, count in counts.items()) + " seeds."


def protocol(found: dict[str, Any], experiment: Experiment) -> list[str]:
    """How the figures were made, in sentences."""
    settings = found["settings"]
    lines = [
        f"Intervals are Student's, 95 %, over seeds of the training (weights, order, noise); all seeds have the same "
        f"{settings['images']:,} synthetic images of {settings['resolution']} x {settings['resolution']} pixels. "
        f"Nothing was chosen on the {settings['test_images']} test images, which are of other scenes. The intervals "
        "are not corrected for the number of measures.",
        f"Autoencoder: `pico`, 8x8 pixels to 4 channels, {settings['vae_steps']:,} steps of {settings['vae_batch']} "
        f"images. LPIPS: SqueezeNet. Moment-matched draws, interpolation and block distance: `ldm-vae compare`.",
    ]
    if experiment.generates:
        reader = found["reader"]
        lines.append(
            f"The same U-Net for all: {settings['unet_steps']:,} steps of {settings['unet_batch']} latents, "
            f"{settings['generated']} images, {settings['sampling_steps']} steps, guidance {settings['guidance']:g}. "
            "KID is in the features of the reader, a small network that learned classes and attributes from "
            f"{settings['reader_images']:,} other real images, not in those of Inception"
            + (f"; it recognizes {reader['recognised']:.1%} of the test images." if reader else ".")
        )
    if experiment.bits is not None:
        lines.append(
            f"The rate: {experiment.bits:g} bits for each latent position. KL: decode(sample). VQ, FSQ: the code; the "
            "bits are the entropy of the codes in use. Plain: rounded to multiples of one step, whose indices have "
            "this first-order entropy on training images. The U-Net learns latents before rounding; the decoder of "
            "VQ and FSQ rounds what it draws."
        )
    return [line for each in lines for line in (each, "")][:-1]


def draw(found: dict[str, Any], experiment: Experiment, path: Path) -> None:
    """figure.svg: every seed as a dot, the mean and its interval; for `blur` also the spectra."""
    from ldm_vae.evaluation import plots

    names = list(found["seeds"])
    titles = {measure.key: measure.title for measure in experiment.measures}
    spectra = not experiment.generates
    figure, axes = plots.new_figure(PANEL_WIDTH, PANEL_HEIGHT, len(experiment.panels) + 2 * spectra)
    for number, (panel, key) in enumerate(zip(axes, experiment.panels)):
        for place, name in enumerate(names):
            one, color = found["measures"][key][name], plots.COLORS[place % len(plots.COLORS)]
            panel.plot(one["values"], [place] * one["n"], "o", color=color, markersize=4, alpha=0.5)
            if one["low"] is not None:
                panel.errorbar(
                    one["mean"], place, xerr=one["high"] - one["mean"], fmt="|", color=color, capsize=3, markersize=11
                )
        panel.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        panel.invert_yaxis()
        panel.set_xlabel(titles[key], fontsize=9)
    for panel, (key, title) in zip(axes[len(experiment.panels) :], (("rows_db", "rows"), ("columns_db", "columns"))):
        for place, name in enumerate(names):
            curve = found["curves"][name][key]
            panel.plot(range(1, len(curve) + 1), curve, color=plots.COLORS[place % len(plots.COLORS)], label=name)
        panel.set_xlabel(f"periods per image side along {title}", fontsize=9)
        panel.set_title("power over the originals', dB", fontsize=9)
    if spectra:
        plots.legend(axes[-1])
    plots.save_svg(figure, path, f"{experiment.title} {seeds_sentence(found)}")


BEGIN, END = "<!-- experiment:start -->", "<!-- experiment:end -->"


def write_page(output: Path, name: str, page: Path) -> None:
    """Put the tables of results.md between the marks of a page, and the figure into `pictures` beside its folder.

    Raises:
        UserError: the page has no such marks.
    """
    text = page.read_text() if page.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{page}: has no {BEGIN} and {END}; write the page and its answer first")
    picture = page.parents[1] / "pictures" / f"experiment-{name}.svg"
    write_text(picture, (output / "figure.svg").read_text())
    found = (output / "results.md").read_text().split("\n", 1)[1].strip()
    found = found.replace("(figure.svg)", f"(../pictures/{picture.name})")
    (before, _), (_, after) = text.split(BEGIN, 1), text.split(END, 1)
    write_text(page, f"{before}{BEGIN}\n{found}\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("output", type=Path, help="folder for cells and results; the same command continues there")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as seeds=5 or vae_steps=500")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="after these, save and end")
    parser.add_argument("--report", action="store_true", help="only write the tables from the finished cells")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the same, and put them into this page of the docs")
    options = parser.parse_intermixed_args(arguments)
    deadline = time.monotonic() + 60 * options.time_limit if options.time_limit is not None else math.inf
    try:
        if options.report or options.page:
            report(options.output, options.experiment)
            if options.page:
                write_page(options.output, options.experiment, options.page)
            finished = True
        else:
            config = configuration.load(ExperimentConfig, None, options.settings)
            finished = run(options.experiment, options.output, config, deadline)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print((options.output / "results.md").read_text())
    return 0 if finished else EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
