"""Several kinds of autoencoder on the same images with the same budget: one table, one picture grid.

A kind is a point of a `Sweep`, which trains and measures it. On top of that `latent_space` measures what its latent
space is like to work in, and this file the use of codes and the cost of its networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import check_positive
from ldm_vae.data import open_source
from ldm_vae.data.samples import Rejected, evenly_spaced, none_readable, read_crops
from ldm_vae.data.split import subset
from ldm_vae.errors import UserError
from ldm_vae.evaluation import sweep
from ldm_vae.evaluation.latent_space import Interpolation, PriorSamples, interpolation, prior_samples
from ldm_vae.evaluation.pages import embed_image, plain_page
from ldm_vae.evaluation.reconstruction import FORMAT_VERSION, fit_baseline
from ldm_vae.evaluation.study import Content, Results, read_json
from ldm_vae.evaluation.sweep import Point, Run, Sweep
from ldm_vae.files import write_json
from ldm_vae.metrics import codebook_usage
from ldm_vae.runtime import compute_device, gigamacs
from ldm_vae.training.distributed import Processes
from ldm_vae.utils.image_grid import plain_grid
from ldm_vae.utils.text import Table

GRID_IMAGES = 4

PROTOCOL = (
    "Interpolation: straight lines between the latent means of pairs of measured images, 8 steps; unevenness is the "
    "largest step over the mean step (1: even, 8: one jump), midpoint sharpness the fine contrast half way over the "
    "mean of both ends. Prior samples: every latent number drawn from N(channel mean, channel deviation of the "
    "aggregate posterior), decoded and encoded again; the cycle error is in channel deviations (in brackets that of "
    "posterior samples of real images), the distance is Fréchet's between 8x8-block statistics in 16 KLT components, "
    "relative to the real images' variance (in brackets that of reconstructions). These figures compare the rows of "
    "this table; they are not comparable to the literature."
)


@dataclass(frozen=True)
class ComparedKind:
    """A row of the comparison: a name, and the settings of `train-vae` that make it."""

    name: str = "???"
    overrides: list[str] = field(default_factory=list)


def default_kinds() -> list[ComparedKind]:
    return [
        ComparedKind("kl", ["autoencoder.kind=kl"]),
        ComparedKind("ae", ["autoencoder.kind=ae"]),
        ComparedKind("vq", ["autoencoder.kind=vq"]),
        ComparedKind("fsq", ["autoencoder.kind=fsq"]),
    ]


@dataclass(frozen=True)
class CompareConfig:
    """`ldm-vae compare`: KL, plain, VQ, FSQ ... on the same images and budget, side by side.

    Every kind is `ldm-vae train-vae` and `ldm-vae evaluate` in its own folder. The same command continues; several
    launches may share the folder. Writes comparison.json, comparison.md, grid.png and index.html.

      ldm-vae compare configs/compare_kinds.yaml output=runs/compare overrides=data=~/images

    Args:
        output: folder for the results; every kind is in `points/` below it.
        vae: the YAML of `train-vae` that all kinds share.
        overrides: settings of `train-vae` for all kinds, as `data=~/images`.
        kinds: what is compared: a name and its own settings each.
        steps: number of training steps of each kind; null: the recipe's.
        parallel: kinds that are trained at once on this machine; their seconds are then not comparable.
        evaluate: settings of `ldm-vae evaluate`, as `resolution=256`; the images are those of the training.
        latent_images: measured images for interpolation, prior samples and the use of codes.
        macs_resolution: side of the image for which multiply-accumulates are counted.
    """

    output: str = "???"
    vae: str = "???"
    overrides: list[str] = field(default_factory=list)
    kinds: list[ComparedKind] = field(default_factory=default_kinds)
    steps: int | None = None
    parallel: int = 1
    evaluate: list[str] = field(default_factory=list)
    latent_images: int = 16
    macs_resolution: int = 512

    def __post_init__(self) -> None:
        names = [kind.name for kind in self.kinds]
        if not names or len(set(names)) < len(names):
            raise UserError(f"kinds: {names}; give at least one, each with a name of its own")
        for name in names:
            if not name or name.startswith(".") or not all(c.isalnum() or c in "-_." for c in name):
                raise UserError(f"kinds: {name!r} cannot be the name of a folder; use letters, digits, - and _")
        check_positive(self, "steps", "parallel")
        if self.latent_images < 2:
            raise UserError(f"latent_images: {self.latent_images} is below 2; an interpolation needs a pair")
        if self.macs_resolution < 64 or self.macs_resolution % 64:
            raise UserError(f"macs_resolution: {self.macs_resolution} is not a multiple of 64; 512 is usual")


def compare(config: CompareConfig, run: Run | None = None, *, dry_run: bool = False) -> Results:
    """Make the kinds that are missing, measure their latents, write the comparison, return `comparison.json`.

    Raises:
        UserError: a setting is wrong, another sweep is in the folder, or no kind could be finished.
    """
    return Comparison(config, run).run(dry_run)


class Comparison(Sweep):
    """The study of `ldm-vae compare`."""

    command, noun, marker = "compare", "kind", "compare.yaml"
    product = "the comparison"
    results_file, markdown_file = "comparison.json", "comparison.md"
    may_change = ("output", "parallel", "kinds", "steps", "evaluate", "latent_images", "macs_resolution")
    config: CompareConfig

    def plan(self) -> list[Point]:
        config = self.config
        return [
            sweep.plan_point(
                self.output, kind.name, config.vae, [*config.overrides, *kind.overrides], config.evaluate, config.steps
            )
            for kind in config.kinds
        ]

    def gather(self, finished: Sequence[tuple[Point, Results]], missing: list[dict[str, Any]]) -> Results:
        names = ("class", "parameters", "latent_channels", "downsampling")
        records = [
            sweep.common_record(point, results)
            | {name: results["autoencoder"][name] for name in names}
            | {
                "images": results["protocol"]["images"],
                "latents": measure_latents(point, self.config, results["autoencoder"]["fingerprint"]),
            }
            for point, results in finished
        ]
        self.sheet, self.columns = picture_grid([point for point, _ in finished])
        return {"kinds": records, "missing": missing, "protocol": PROTOCOL}

    def files(self, results: Results) -> dict[str, Content]:
        return {} if self.sheet is None else {"grid.png": self.sheet}

    def markdown(self, results: Results) -> str:
        return markdown(results, self.columns)

    def page(self, results: Results) -> str:
        pictures = []
        if self.sheet is not None:
            text = f"The same images through every kind: {', '.join(self.columns)}."
            pictures.append(embed_image(self.sheet, text, maximum_side=None))
        title = "Kinds of autoencoder side by side"
        return plain_page(title, lead(results), [results["protocol"]], tables=[table(results)], pictures=pictures)

    def summary(self, results: Results) -> str:
        return "\n".join(table(results).markdown())


def measure_latents(point: Point, config: CompareConfig, fingerprint: str) -> dict[str, Any]:
    """Cost, interpolation, prior samples and codes of one kind; read from `latents.json` where that is of these
    weights and settings."""
    settings = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "images": config.latent_images,
        "macs_resolution": config.macs_resolution,
        "evaluate": configuration.digest(configuration.to_dict(point.evaluate) | {"output": None, "autoencoder": None}),
    }
    kept = read_json(point.folder / "latents.json")
    if kept.get("settings") == settings:
        return kept
    evaluate = point.evaluate
    device = compute_device(evaluate.device)
    autoencoder = load_autoencoder(point.autoencoder).to(device)
    source = open_source(evaluate.data)
    chosen = subset(source, evaluate.part, evaluate.data.held_out)
    shown = evenly_spaced(len(chosen), config.latent_images)
    rejected: Rejected = []
    _, shown_images = read_crops(chosen, shown, evaluate.resolution, rejected, [])
    if shown_images is None:
        raise none_readable("data", len(shown), rejected)
    images = shown_images.to(device)
    fitted = chosen if evaluate.part == "all" else subset(source, "train", evaluate.data.held_out)
    indices = evenly_spaced(len(fitted), evaluate.baseline_images)
    klt = fit_baseline(fitted, indices, evaluate.resolution, 8, Processes())
    lpips = None
    if evaluate.perceptual_net:
        lpips = LPIPS(evaluate.perceptual_net, evaluate.perceptual_weights, "evaluate.").to(device)
    encode_gigamacs, decode_gigamacs = coding_gigamacs(autoencoder, config.macs_resolution, device)
    found = {
        "settings": settings,
        "encode_gigamacs": encode_gigamacs,
        "decode_gigamacs": decode_gigamacs,
        "interpolation": plain(interpolation(autoencoder, images, lpips)),
        "prior_samples": plain(prior_samples(autoencoder, images, klt, evaluate.seed)),
        "codes": code_use(autoencoder, images),
        "downsampling": autoencoder.downsampling,
    }
    write_json(point.folder / "latents.json", found)
    return found


def picture_grid(points: Sequence[Point]) -> tuple[Image.Image | None, list[str]]:
    """One row per image: the original, then each kind's decode(mean), from the evaluations' own pictures."""
    examples: list[dict[str, Path]] = []
    for point in points:
        results = read_json(point.folder / "evaluation" / "results.json")
        folder = point.folder / "evaluation" / "examples"
        files = {example["id"]: example["files"] for example in results["examples"]}
        examples.append({name: folder / file["decoded"] for name, file in files.items()})
        if len(examples) == 1:
            originals = {name: folder / file["original"] for name, file in files.items()}
    if not examples:
        return None, []
    shared = [name for name in originals if all(name in each for each in examples)][:GRID_IMAGES]
    if not shared:
        return None, []
    rows = [[originals[name], *(each[name] for each in examples)] for name in shared]
    sheet = plain_grid([[_opened(path) for path in row] for row in rows])
    return sheet, ["original", *(point.name for point in points)]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def table(found: dict[str, Any]) -> Table:
    """A row for each kind; what it does not have is a dash."""
    with_lpips = all("lpips" in record["metrics"] for record in found["kinds"])
    names = ["psnr", "ssim", *(["lpips"] if with_lpips else [])]
    size = found["config"]["macs_resolution"]
    headings = ["kind", "PSNR (dB)", "SSIM", *(["LPIPS"] if with_lpips else []), "bits/pixel"]
    headings += ["code perplexity", "unused codes", f"GMAC encode + decode at {size}", "unevenness"]
    headings += ["midpoint sharpness", "prior: cycle error", "prior: block distance", "steps", "seconds", "verdicts"]
    rows = []
    for record in found["kinds"]:
        latents, values = record["latents"], [record["metrics"][name] for name in names]
        codes, prior, line = latents["codes"], latents["prior_samples"], latents["interpolation"]
        rate, seconds = record["rate"]["bits_per_pixel"], record["seconds"]
        rows.append(
            [
                record["name"],
                *(sweep.with_interval(value) for value in values),
                "–" if rate is None else f"{rate:.3f}",
                "–" if codes is None else f"{codes['perplexity']:.1f} of {codes['codes']:.0f}",
                "–" if codes is None else f"{100 * codes['dead_share']:.1f} %",
                f"{latents['encode_gigamacs']:.2f} + {latents['decode_gigamacs']:.2f}",
                f"{line['unevenness']:.2f}",
                f"{line['midpoint_sharpness']:.2f}",
                f"{prior['cycle_error']:.2f} ({prior['cycle_error_real']:.2f})",
                f"{prior['frechet']:.3f} ({prior['frechet_reconstructions']:.3f})",
                str(record["steps"]),
                "–" if seconds is None else f"{seconds:.0f}",
                sweep.verdict_names(record),
            ]
        )
    return Table(headings, rows, notes(found))


def lead(found: dict[str, Any]) -> str:
    first = found["kinds"][0]
    return (
        f"Trained on the same images for the same number of steps, measured on the same {first['images']['count']} "
        f"images ({first['images']['part']}) at {first['resolution']} x {first['resolution']}."
    )


def notes(found: dict[str, Any]) -> list[str]:
    """What else must be said: kinds that are missing, unequal steps, failing verdicts, what the rates are."""
    lines = sweep.remarks(found["kinds"], found["missing"])
    if len({record["steps"] for record in found["kinds"]}) > 1:
        lines.append("The kinds were not trained for the same number of steps, so this is not a fair comparison.")
    for kind in sorted({record["rate"]["kind"] for record in found["kinds"]}):
        names = ", ".join(record["name"] for record in found["kinds"] if record["rate"]["kind"] == kind)
        lines.append(f"Rate of {names}: {kind}.")
    counted = [record for record in found["kinds"] if record["latents"]["codes"]]
    for record in counted:
        codes = record["latents"]["codes"]
        lines.append(f"Codes of {record['name']} were counted over {codes['positions']:.0f} positions.")
    lines += sweep.failures(found["kinds"])
    distances = {record["latents"]["interpolation"]["distance"] for record in found["kinds"]}
    lines.append(f"Steps of an interpolation are measured by {', '.join(sorted(distances))}.")
    return lines


def markdown(found: dict[str, Any], columns: Sequence[str]) -> str:
    """`comparison.md`."""
    rows = table(found)
    lines = ["# Kinds of autoencoder side by side", "", lead(found), "", *rows.markdown(), ""]
    lines += [found["protocol"], "", *rows.notes]
    if columns:
        lines += ["", f"![The same images: {', '.join(columns)}](grid.png)"]
    return "\n".join(lines) + "\n"


# The cost of the networks and the use of codes.


def coding_gigamacs(autoencoder: Autoencoder, resolution: int, device: torch.device) -> tuple[float, float]:
    """Multiply-accumulates of encode and of decode for one image, in 10^9."""
    image = torch.zeros(1, 3, resolution, resolution, device=device)
    mean, _ = autoencoder.encode_moments(image)
    return gigamacs(lambda: autoencoder.encode_moments(image)), gigamacs(lambda: autoencoder.decode_images(mean))


@torch.no_grad()
def code_use(autoencoder: Autoencoder, images: Tensor) -> dict[str, float] | None:
    """Perplexity, share of unused codes, entropy in bits and the number of codes over images (n, 3, h, w).

    None for an autoencoder without a codebook of this package. The share of unused codes is only meaningful where there
    are many more positions than codes; `positions` says how many there were.
    """
    size = autoencoder.codebook_size
    if size is None or not autoencoder.has_codes:
        return None
    indices = torch.cat([autoencoder.token_indices(image[None]).flatten() for image in images])
    usage = codebook_usage(indices, size)
    return {name: float(value) for name, value in usage.items()} | {"codes": size, "positions": len(indices)}


def plain(value: Interpolation | PriorSamples) -> dict[str, Any]:
    """JSON-able."""
    return asdict(value)
