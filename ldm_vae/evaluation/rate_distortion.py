"""The rate-distortion frontier of an autoencoder: one training per target rate and channel count, and what to choose.

Owns the grid of points, the theory beside them (a linear code of the same pixels), the rule of the recommendation, and
frontier.json, .md, .svg and .html. Training and measuring a point is `sweep.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_vae import config as configuration
from ldm_vae import metrics
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.config import check_positive
from ldm_vae.errors import UserError
from ldm_vae.evaluation import pages, plots, sweep
from ldm_vae.evaluation.study import Content, Results
from ldm_vae.evaluation.sweep import Point, Run, Sweep
from ldm_vae.random import numpy_rng
from ldm_vae.utils.progress import say
from ldm_vae.utils.text import Table, pluralize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KNEE_DB, KNEE_NATS = 0.1, 0.5
"""More rate is not worth its bits where it brings less than KNEE_DB for every KNEE_NATS nats per dimension."""

FEWEST_POINTS = 3
RESAMPLES = 2000
"""Number of bootstrap samples of the images, for the interval of the recommendation."""
LABEL = "PSNR and perceptual quality against bits per pixel"
CURVE_POINTS = 60
PSNR_BELOW_DB = 4.0
"""How far below the lowest point the drawing reaches; the linear lines start lower."""

TOLERATED = ("rate_miss",)
"""Failing verdicts that leave a point on the frontier: the measured rate is what is drawn, whatever was asked for."""

RULE = (
    f"Rule: for each number of channels, the lowest rate from which on every step to the next rate gains less than "
    f"{KNEE_DB:g} dB of PSNR (decode(mean)) per {KNEE_NATS:g} nats per latent dimension. Points with a failing verdict "
    "do not count (a missed target rate does not fail them: rates are measured), and fewer than "
    f"{FEWEST_POINTS} healthy points give no recommendation. Its interval is a 95 % bootstrap over images, the same "
    "ones for every rate. Every point is one training: how far another seed would move it is not known."
)


@dataclass(frozen=True)
class FrontierConfig:
    """`ldm-vae frontier`: and channel counts; it says which rate is worth it.

    Every point is `ldm-vae train-vae` and `ldm-vae evaluate` in its own folder. The same command continues; several
    launches may share the folder, points that another one works on are left to it. Writes frontier.json, frontier.md,
    frontier.svg and index.html.

      ldm-vae frontier configs/frontier_nano.yaml output=runs/frontier overrides=data=~/images
      ldm-vae frontier vae=configs/vae_quickstart.yaml output=runs/frontier targets_nats=1,2,3,4 steps=300

    Args:
        output: folder for the results; every point is in `points/` below it.
        vae: the YAML of `train-vae` that all points share.
        overrides: settings of `train-vae` for all points, as `data=~/images`.
        targets_nats: the target rates in nats per latent dimension.
        channels: the numbers of latent channels; empty: that of the recipe.
        steps: number of training steps of each point, divided among the phases in the recipe's proportions; null: that
            of the recipe.
        seconds: instead of `steps`: approximate time of each training, from the measured speed of a step.
        parallel: number of points to train in parallel on this machine.
        evaluate: settings of `ldm-vae evaluate`, for example `resolution=256`. The images are those of the training.
    """

    output: str = "???"
    vae: str = "???"
    overrides: list[str] = field(default_factory=list)
    targets_nats: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 2.5, 3.5])
    channels: list[int] = field(default_factory=list)
    steps: int | None = None
    seconds: float | None = None
    parallel: int = 1
    evaluate: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.targets_nats or min(self.targets_nats) <= 0:
            raise UserError(f"targets_nats: {list(self.targets_nats)}; give one rate or more, each above 0")
        for name in ("targets_nats", "channels"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}: {list(values)} names a value twice")
        if self.steps is not None and self.seconds is not None:
            raise UserError("steps, seconds: only one of them can be the budget; leave the other out")
        check_positive(self, "parallel", "steps", "seconds")


def frontier(config: FrontierConfig, run: Run | None = None, *, dry_run: bool = False) -> Results:
    """Make the points that are missing, write the frontier of those that are there, return `frontier.json`.

    Raises:
        UserError: a setting is wrong, another sweep is in the folder, or no point could be finished.
    """
    return Frontier(config, run).run(dry_run)


class Frontier(Sweep):
    """The study of `ldm-vae frontier`."""

    command, marker = "frontier", "frontier.yaml"
    product = "the frontier"
    results_file, markdown_file = "frontier.json", "frontier.md"
    may_change = ("output", "parallel", "targets_nats", "channels", "steps", "seconds", "evaluate")
    config: FrontierConfig

    def plan(self) -> list[Point]:
        """The points of the grid, channels by channels, rising rate."""
        config = self.config
        recipe = configuration.load(TrainVaeConfig, config.vae, [*config.overrides, "output=POINT"])
        points = []
        for count in config.channels or [recipe.autoencoder.latent_channels]:
            for target in sorted(config.targets_nats):
                overrides = [
                    *config.overrides,
                    f"autoencoder.latent_channels={count}",
                    "rate.mode=target",
                    f"rate.target_nats={target}",
                ]
                name = f"c{count}-{target:g}-nats"
                point = sweep.plan_point(self.output, name, config.vae, overrides, config.evaluate, config.steps)
                if config.seconds is not None:
                    say(f"frontier: {name}: the speed of its training is measured")
                    steps = sweep.steps_for(point, config.seconds, keep=not self.dry_run)
                    phases = sweep.scaled_phases(point.train.phases, steps)
                    point = replace(point, train=replace(point.train, phases=phases))
                points.append(point)
        return points

    def gather(self, finished: Sequence[tuple[Point, Results]], missing: list[dict[str, Any]]) -> Results:
        records = [record_of(point, results) for point, results in finished]
        linear = finished[-1][1]["linear"]  # of the images, so any point's will do
        return {
            "points": records,
            "missing": missing,
            "linear": theory(linear["eigenvalues"], linear["block"], records),
            "recommendation": recommend(records, {point.name: psnr_by_image(found) for point, found in finished}),
        }

    def files(self, results: Results) -> dict[str, Content]:
        return {"frontier.svg": lambda path: plots.save_svg(draw(results), path, LABEL)}

    def markdown(self, results: Results) -> str:
        return markdown(results)

    def page(self, results: Results) -> str:
        return pages.plain_page(
            "Rate-distortion frontier",
            "Every point is one autoencoder, trained by ldm-vae train-vae and measured on images it never saw.",
            [*results["recommendation"], RULE],
            [pages.Drawing(plots.to_svg(draw(results), LABEL), caption(results))],
            [table(results)],
        )


def record_of(point: Point, results: dict[str, Any]) -> dict[str, Any]:
    """One point's line."""
    return sweep.common_record(point, results) | {
        "channels": results["autoencoder"]["latent_channels"],
        "target_nats": point.train.rate.target_nats,
        "gain_over_linear_db": results["gain_over_linear_db"],
        "images": results["protocol"]["images"]["count"],
    }


def is_healthy(record: dict[str, Any]) -> bool:
    """No failing verdict, but for those that the frontier tolerates."""
    return all(verdict["severity"] != "fail" or verdict["name"] in TOLERATED for verdict in record["verdicts"])


def psnr_by_image(results: Results) -> dict[str, float]:
    """PSNR of decode(mean) by the image's id, from a point's results.json."""
    return {image["id"]: image["decode(mean)"]["psnr"] for image in results["images"]}


def theory(eigenvalues: Sequence[float], block: int, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The linear lines, [bits per pixel, PSNR of the mean error]: reverse water-filling over all components, and over
    the first c."""
    highest = 1.3 * max(record["rate"]["bits_per_pixel"] for record in records)
    rates = np.linspace(highest / CURVE_POINTS, highest, CURVE_POINTS)
    filled = [metrics.water_filling_at(eigenvalues, block, float(rate)) for rate in rates]
    limited: dict[str, list[list[float]]] = {}
    for channels in sorted({record["channels"] for record in records}):
        nats = rates * block**2 * np.log(2) / channels
        points = [metrics.limited_channels(eigenvalues, block, channels, float(value)) for value in nats]
        limited[str(channels)] = [[point.bits_per_pixel, point.psnr] for point in points]
    for record in records:
        record["linear_components"] = metrics.water_filling_at(
            eigenvalues, block, record["rate"]["bits_per_pixel"]
        ).components
    return {
        "block": block,
        "reverse_water_filling": [[point.bits_per_pixel, point.psnr] for point in filled],
        "limited_channels": limited,
    }


def recommend(records: Sequence[dict[str, Any]], images: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One sentence per number of channels, by `RULE`.

    Args:
        records: of all points.
        images: by the name of a point and the id of an image, the PSNR of decode(mean).
    """
    sentences = []
    for channels in sorted({record["channels"] for record in records}):
        healthy = [record for record in records if record["channels"] == channels and is_healthy(record)]
        if len(healthy) < FEWEST_POINTS:
            sentences.append(
                f"{channels} channels: no recommendation, only {len(healthy)} healthy point(s) of the {FEWEST_POINTS} "
                "needed."
            )
            continue
        healthy.sort(key=lambda record: record["rate"]["nats_per_dim"])
        nats = [record["rate"]["nats_per_dim"] for record in healthy]
        knee = knees_of(nats, np.array([[record["metrics"]["psnr"]["mean"] for record in healthy]]))[0]
        if knee == NO_KNEE:
            words = (
                f"no knee up to {nats[-1]:.2f} nats, PSNR still rises at the highest rate; add a higher one to "
                "targets_nats."
            )
        else:
            chosen = healthy[knee]
            words = (
                f"{chosen['target_nats']:g} nats ({nats[knee]:.2f} measured, "
                f"{chosen['rate']['bits_per_pixel']:.3f} bits per pixel, {chosen['metrics']['psnr']['mean']:.2f} dB); "
                f"a higher rate gains less than {KNEE_DB:g} dB per {KNEE_NATS:g} nats."
            )
        sentences.append(f"{channels} channels: {words} {interval_sentence(healthy, images, knee)}")
    return sentences


NO_KNEE = -1


def knees_of(nats: Sequence[float], psnr: np.ndarray) -> np.ndarray:
    """For each of m curves (m, p) the index of the first point from which on every slope is under the rule's, (m,).

    NO_KNEE where even the last slope is not. `nats` (p,) rise. The last point has no slope after it, so it is never the
    answer.
    """
    slopes = np.diff(psnr, axis=1) / np.maximum(np.diff(nats), 1e-9)
    flat_to_the_end = np.logical_and.accumulate((slopes < KNEE_DB / KNEE_NATS)[:, ::-1], axis=1)[:, ::-1]
    return np.where(flat_to_the_end.any(axis=1), flat_to_the_end.argmax(axis=1), NO_KNEE)


def interval_sentence(healthy: Sequence[dict[str, Any]], images: Mapping[str, Mapping[str, float]], knee: int) -> str:
    """How sure the images make the knee of points with rising rates: the 95 % interval over resampled images."""
    each = [images[record["name"]] for record in healthy]
    shared = [name for name in each[0] if all(name in one for one in each)]
    table = np.array([[one[name] for name in shared] for one in each])  # (points, images)
    picks = numpy_rng(0, "frontier").integers(len(shared), size=(RESAMPLES, len(shared)))
    nats = [record["rate"]["nats_per_dim"] for record in healthy]
    drawn = knees_of(nats, table[:, picks].mean(axis=2).T)
    ordered = np.sort(np.where(drawn == NO_KNEE, len(healthy), drawn))
    low, high = (ordered[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))

    def name(point: int) -> str:
        return "no knee" if point == len(healthy) else f"{healthy[point]['target_nats']:g} nats"

    found = name(len(healthy) if knee == NO_KNEE else knee)
    return (
        f"Over resampled images: {found} in {np.mean(drawn == knee):.0%}, 95 % interval {name(low)} to {name(high)} "
        f"({pluralize(len(shared), 'image')})."
    )


def quality_metric(found: dict[str, Any]) -> tuple[str, str]:
    """What stands beside PSNR: LPIPS, or SSIM where it was not measured."""
    measured = all("lpips" in record["metrics"] for record in found["points"])
    return ("lpips", "LPIPS (lower is better)") if measured else ("ssim", "SSIM")


def draw(found: dict[str, Any]) -> Figure:
    """Two axes over bits per pixel: PSNR with the linear lines, and LPIPS (or SSIM)."""
    figure, axes = plots.new_figure(5.4, 3.8, columns=2)
    metric, title = quality_metric(found)
    linear = np.array(found["linear"]["reverse_water_filling"])
    axes[0].plot(*linear.T, color=plots.INK, linestyle="--", linewidth=1, label="linear, reverse water-filling")
    for number, channels in enumerate(sorted({record["channels"] for record in found["points"]})):
        color = plots.COLORS[number % len(plots.COLORS)]
        limited = np.array(found["linear"]["limited_channels"][str(channels)])
        axes[0].plot(*limited.T, color=color, linestyle=":", linewidth=1.2, label=f"linear, {channels} components")
        records = [record for record in found["points"] if record["channels"] == channels]
        for each, name in zip(axes, ("psnr", metric), strict=True):
            _draw_series(each, sorted(records, key=lambda r: r["rate"]["bits_per_pixel"]), name, color, channels)
    for each, name in zip(axes, ("PSNR (dB)", title), strict=True):
        each.set_title(name)
        each.set_xlabel("bits per pixel")
        each.set_xlim(left=0)
        each.margins(y=0.25)
        plots.style(each)
    lowest = min(record["metrics"]["psnr"]["mean"] for record in found["points"])
    axes[0].set_ylim(bottom=lowest - PSNR_BELOW_DB)
    plots.legend(axes[0])
    return figure


def _draw_series(axes: Axes, records: Sequence[dict[str, Any]], metric: str, color: str, channels: int) -> None:
    """Points with their intervals and labels; one that fails its verdicts has a cross."""
    x = [record["rate"]["bits_per_pixel"] for record in records]
    y = [record["metrics"][metric]["mean"] for record in records]
    axes.plot(x, y, color=color, marker="o", markersize=5, linewidth=1.5, label=f"{channels} channels, trained")
    for a, b, record in zip(x, y, records, strict=True):
        axes.annotate(
            f"{record['target_nats']:g} nats, c{channels}", (a, b), textcoords="offset points", xytext=(1, 6),
            rotation=60, rotation_mode="anchor", fontsize=7, color=plots.INK, alpha=0.8,
        )  # fmt: skip
        if not is_healthy(record):
            axes.plot([a], [b], marker="x", markersize=12, markeredgewidth=2, color=plots.COLORS[5])


def caption(found: dict[str, Any]) -> str:
    first = found["points"][0]
    return (
        f"decode(mean) on {first['images']} images at {first['resolution']} x {first['resolution']}; the rate is the "
        "measured KL. Dashed: the rate-distortion function of Gaussian 8x8 blocks with the images' covariance (reverse "
        "water-filling). Dotted: the same over as many components as there are channels, the best linear code with "
        "that many. Both lines are of the mean error, which lies below the mean of the images' PSNR, and of what the "
        "rate carries; decode(mean) has no noise and gains on both by that. A cross: a verdict failed."
    )


def table(found: dict[str, Any]) -> Table:
    """A row for each point; the notes name those that are missing and what failed."""
    metric, title = quality_metric(found)
    headings = ["channels", "target nats", "measured nats", "bits/pixel", "PSNR (dB)", title.split(" ")[0]]
    headings += ["gain over linear (dB)", "linear would use", "seconds", "verdicts"]
    rows = [
        [
            str(record["channels"]),
            f"{record['target_nats']:g}",
            f"{record['rate']['nats_per_dim']:.3f}",
            f"{record['rate']['bits_per_pixel']:.3f}",
            *(sweep.with_interval(record["metrics"][name]) for name in ("psnr", metric)),
            f"{record['gain_over_linear_db']['mean']:+.2f}",
            f"{record['linear_components']} components",
            "" if record["seconds"] is None else f"{record['seconds']:.0f}",
            sweep.verdict_names(record),
        ]
        for record in found["points"]
    ]
    return Table(headings, rows, sweep.remarks(found["points"], found["missing"]) + sweep.failures(found["points"]))


def markdown(found: dict[str, Any]) -> str:
    """`frontier.md`."""
    rows = table(found)
    lines = ["# Rate-distortion frontier", "", f"![{LABEL}](frontier.svg)", ""]
    lines += [caption(found), "", *rows.markdown(), "", *found["recommendation"], "", RULE]
    return "\n".join([*lines, *(["", *rows.notes] if rows.notes else [])]) + "\n"
