"""The page of `ldm-vae latents stats`: what a set of latents, codes and labels looks like, as one file.

Owns plots, maps and captions; the numbers come from `latents.stats`, only spectra are measured here. Words and
look are in `templates/latent_set.html`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.errors import UserError
from ldm_vae.evaluation.health_metrics import power_spectrum
from ldm_vae.evaluation.pages import Picture, embed_image, template_environment
from ldm_vae.evaluation.plots import COLORS, INK, RULE, legend, new_figure, number, page_svg
from ldm_vae.files import readable_json, write_json, write_text
from ldm_vae.latents.dataset import LatentDataset, samples_per_shard
from ldm_vae.latents.stats import (
    COLUMNS,
    Statistics,
    StatsConfig,
    latent_batches,
    measure_set,
    open_set,
    short_number,
    summary_rows,
    text_table,
)
from ldm_vae.utils.progress import begin, end, end_dry_run, open_page, say
from ldm_vae.utils.text import pluralize

Report = dict[str, Any]
Plot = tuple[str, str, str, str]
"""Title, unit, caption and SVG."""

SPECTRUM_SAMPLES = 256
NAMED_CHANNELS = 8
"""Largest number of channels with their own color and a name in the legend."""
NAMED_CLASSES = 40
"""Largest number of classes with a named bar; more are drawn by rank."""
NUMBERED_CHANNELS = 12
"""Largest number of channels whose correlations are written into the matrix."""
LEAST_MAP_RANGE = 0.1
"""Deviations that black and white of a mean map are at least away from gray: less is noise of the sampling."""


def show_statistics(config: StatsConfig, *, dry_run: bool = False) -> Statistics:
    """`ldm-vae latents stats`: measure a set, print a table or JSON, and write the page.

    Args:
        dry_run: open the set and look at the output only.

    Raises:
        UserError: no finished set, damaged shards, or values that are not finite.
        Disagreement: mean or std are others in the manifest than in the shards.
    """
    dataset = open_set(config.latents)
    manifest, output = dataset.manifest, config.output
    count = f"{min(config.samples, manifest.count):,} of {pluralize(manifest.count, 'sample')} of {config.latents}"
    place = f"to {output}" if output else "shown here"
    begin("latents stats", count, f"{pluralize(manifest.shards, 'shard')} read", place, error=config.json)
    if output:
        check_page_folder(Path(output))
    if dry_run:
        end_dry_run(output or config.latents, "the time it takes was not measured")
        return Statistics({})
    statistics = measure_set(dataset, config.samples)
    if config.output:
        write_page(statistics, dataset, config.output)
    if config.json:
        say(readable_json(statistics.report).rstrip("\n"))
    else:
        say(text_table(statistics.report))
    words = open_page(Path(output) / "index.html") if output else ["ldm-vae", "latents", "verify", config.latents]
    measured = pluralize(statistics.report["measured_samples"], "sample")
    end(f"{output}/index.html" if output else config.latents, f"statistics of {measured}", words, error=config.json)
    return statistics


def write_page(statistics: Statistics, dataset: LatentDataset, output: str | Path) -> None:
    """`index.html` and `stats.json` in the folder `output`; those of an earlier call are replaced.

    Args:
        statistics: of `dataset`, which `latents.stats.open_set` opened.

    Raises:
        UserError: `output` is the set itself, or a file.
    """
    folder = Path(output)
    check_page_folder(folder)
    report = dict(statistics.report)
    if "channels" in report and (spectra := measure_spectra(dataset)) is not None:
        report["spectra"] = spectra
    write_json(folder / "stats.json", report)
    write_text(folder / "index.html", render(report, statistics))


def check_page_folder(folder: Path) -> None:
    """Raises: UserError for a set of latents, or a file."""
    if (folder / "manifest.json").exists() or folder.is_file():
        raise UserError(f"--output: {folder} holds latents or is a file; give another folder")


def measure_spectra(dataset: LatentDataset) -> dict[str, Any] | None:
    """Mean radial power of each channel of the normalized latents over `frequency`, cycles per position; None for
    latents of a single position."""
    numbers = samples_per_shard(dataset.index.counts, SPECTRUM_SAMPLES)
    latents = torch.cat([latents for latents, _ in latent_batches(dataset, numbers)])
    if min(latents.shape[-2:]) < 2:
        return None
    found = [power_spectrum(latents[:, channel : channel + 1]) for channel in range(latents.shape[1])]
    return {
        "frequency": found[0][0].tolist(), "power": [power.tolist() for _, power in found], "samples": len(numbers),
    }  # fmt: skip


def render(report: Report, statistics: Statistics) -> str:
    """The page as HTML text."""
    from markupsafe import Markup

    used = {
        key: title for key, title in COLUMNS.items() if "channels" in report and report["channels"][0][key] is not None
    }
    context = {
        "report": report,
        "title": Path(report["set"]).name or report["set"],
        "facts": facts(report),
        "plots": [(title, unit, caption, Markup(svg)) for title, unit, caption, svg in plots(report)],
        "maps": maps(statistics),
        "columns": used,
        "rows": summary_rows(report),
        "number": lambda value: short_number(value).replace("-", "−"),
    }
    return template_environment().get_template("latent_set.html").render(context)


def facts(report: Report) -> list[tuple[str, str, str]]:
    """Number, unit and meaning of what the page opens with."""
    found = []
    if (codes := report.get("codes")) is not None:
        found += [
            (f"{codes['entropy_bits']:.2f}", "bits", "entropy of a code"),
            (f"{codes['perplexity']:.0f}", f"of {codes['codebook_size']}", "codes in use, as perplexity"),
            (f"{100 * codes['dead_share']:.3g}", "%", "of the codes never occur"),
        ]
    else:
        channels = report["channels"]
        if channels[0]["nats"] is not None:
            nats = sum(channel["nats"] for channel in channels) / len(channels)
            noise = max(channel["noise_share"] for channel in channels)
            found += [
                (f"{nats:.2f}", "nats", "KL to N(0, 1) per latent dimension"),
                (f"{100 * noise:.3g}", "%", "noise in the noisiest channel"),
            ]
        kurtosis = max((channel["excess_kurtosis"] for channel in channels), key=abs)
        found.append((f"{kurtosis:+.2f}".replace("-", "−"), "", "excess kurtosis farthest from a Gaussian's 0"))
        if (largest := report["correlation"]["largest"]) is not None:
            found.append((f"{largest:+.2f}".replace("-", "−"), "", "largest correlation of two channels"))
    return found


def plots(report: Report) -> list[Plot]:
    """Everything that is drawn as a curve, bars or a matrix."""
    found: list[Plot] = []
    if "channels" in report:
        found += [
            ("Values", "density of normalized latents", "The dotted line is N(0, 1), where diffusion starts from.",
             plot_histograms(report, logarithmic=False)),
            ("Tails", "the same, logarithmic", "What lies far above the dotted line at the sides is rare and extreme.",
             plot_histograms(report, logarithmic=True)),
        ]  # fmt: skip
        if "spectra" in report:
            found.append(
                ("Power spectra", f"of normalized latents, {report['spectra']['samples']} samples",
                 "Power at a spatial frequency; white noise would be the dotted line.", plot_spectra(report))
            )  # fmt: skip
        if len(report["channels"]) > 1:
            found.append(
                ("Channels together", "correlation of two channels at one position",
                 "Green is positive, orange negative; independent channels leave all but the diagonal empty.",
                 plot_correlations(report))
            )  # fmt: skip
    else:
        found.append(
            ("Use of the codes", "share of the positions, from the most common code on",
             "The dotted line is a codebook in equal use.", plot_code_shares(report))
        )  # fmt: skip
    if report["labels"]["classes"]:
        found.append(("Classes", "samples", "All samples of the set are counted.", plot_class_counts(report)))
    return found


def plot_histograms(report: Report, logarithmic: bool) -> str:
    """The outline of each channel's distribution over N(0, 1)."""
    edges, density = report["histograms"]["edges"], np.array(report["histograms"]["density"])
    figure, (axes,) = new_figure(height=2.6)
    few = len(density) <= NAMED_CHANNELS
    centers = (np.array(edges[1:]) + edges[:-1]) / 2
    for channel, values in enumerate(density):
        axes.plot(
            centers, np.where(values > 0, values, np.nan) if logarithmic else values, drawstyle="steps-mid",
            linewidth=1.4 if few else 0.8, alpha=1.0 if few else 0.5, color=COLORS[channel % len(COLORS)],
            label=f"channel {channel}" if few else None,
        )  # fmt: skip
    x = np.linspace(edges[0], edges[-1], 241)
    axes.plot(x, np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi), color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.set_xlabel("standard deviations")
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(density[density > 0].min() / 2, 2)
    else:
        axes.set_xlim(-4.5, 4.5)
        axes.set_yticks([])
        legend(axes)
    return page_svg(figure, "Tails of the channels" if logarithmic else "Distribution of the channels")


def plot_spectra(report: Report) -> str:
    """Radial power of each channel, over that of white noise."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    found = report["spectra"]
    figure, (axes,) = new_figure(height=2.6)
    few = len(found["power"]) <= NAMED_CHANNELS
    frequency = 2 * np.array(found["frequency"])
    for channel, power in enumerate(found["power"]):
        axes.plot(
            frequency, power, color=COLORS[channel % len(COLORS)], linewidth=1.4 if few else 0.8,
            alpha=1.0 if few else 0.5, label=f"channel {channel}" if few else None,
        )  # fmt: skip
    # latents are multiplied by a Hann window first, whose mean square is 3/8 (n + 1) / n along each side
    level = math.prod(3 / 8 * (side + 1) / side for side in report["latent_shape"][1:])
    axes.axhline(level, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xlabel("frequency, relative to Nyquist")
    legend(axes)
    return page_svg(figure, "Power spectra of the channels")


def plot_correlations(report: Report) -> str:
    """The matrix as a map, with its numbers where they fit."""
    from matplotlib.colors import LinearSegmentedColormap

    matrix = np.array(report["correlation"]["matrix"])
    count = len(matrix)
    figure, (axes,) = new_figure(width=3.6, height=3.4)
    positive, negative = COLORS[0], COLORS[1]
    # transparent at 0: the page behind it is light or dark
    nodes = [(0.0, negative), (0.5, negative + "00"), (0.5, positive + "00"), (1.0, positive)]
    colors = LinearSegmentedColormap.from_list("correlation", nodes)
    axes.pcolormesh(matrix, cmap=colors, vmin=-1, vmax=1, edgecolor=RULE, linewidth=0.4)
    if count <= NUMBERED_CHANNELS:
        for (row, column), value in np.ndenumerate(matrix):
            text = "" if row == column else f"{round(value, 2) + 0.0:.2f}".replace("-", "−").replace("0.", ".")
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=INK, fontsize=9)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    step = max(1, count // 8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(0, count, step) + 0.5, [str(n) for n in range(0, count, step)])
    return page_svg(figure, "Correlation of the channels")


def plot_code_shares(report: Report) -> str:
    """Share of each code by rank, against equal use."""
    codes = report["codes"]
    figure, (axes,) = new_figure(height=2.6)
    axes.plot(np.arange(1, len(codes["shares"]) + 1), codes["shares"], linewidth=1.7)
    axes.axhline(1 / codes["codebook_size"], color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, codes["codebook_size"])
    axes.set_xlabel("rank of the code")
    return page_svg(figure, "Use of the codes")


def plot_class_counts(report: Report) -> str:
    """A bar for each class, or the counts by rank where there are many."""
    counts: dict[str, int] = report["labels"]["counts"]
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    if len(ordered) > NAMED_CLASSES:
        figure, (axes,) = new_figure(height=2.6)
        axes.fill_between(range(1, len(ordered) + 1), [count for _, count in ordered], color=COLORS[0], linewidth=0)
        axes.set_xlim(1, len(ordered))
        axes.set_ylim(0)
        axes.set_xlabel("classes, the largest first")
        return page_svg(figure, "Samples of each class")
    figure, (axes,) = new_figure(height=max(1.2, 0.45 + 0.24 * len(ordered)))
    places = range(len(ordered))
    axes.barh(places, [count for _, count in ordered], color=COLORS[0], height=0.7)
    axes.set_yticks(places, [_shortened(name) for name, _ in ordered])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return page_svg(figure, "Samples of each class")


def _shortened(name: str, letters: int = 24) -> str:
    """matplotlib takes what stands between two dollar signs for a formula."""
    return (name if len(name) <= letters else name[: letters - 1] + "…").replace("$", r"\$")


def maps(statistics: Statistics) -> list[tuple[str, Sequence[tuple[Picture, str]]]]:
    """For mean and deviation over samples a title and, channel by channel, a map over positions with its caption."""
    if statistics.mean_map is None or statistics.std_map is None:
        return []
    found: list[tuple[str, Sequence[tuple[Picture, str]]]] = []
    for title, values, center in (("Mean", statistics.mean_map, 0.0), ("Deviation", statistics.std_map, 1.0)):
        reach = max(LEAST_MAP_RANGE, float(np.abs(values - center).max()))
        pictures = [(_gray((channel - center) / reach, f"{title.lower()} of channel {number} over positions"),
                     f"channel {number}: {channel.min():.2f} to {channel.max():.2f}".replace("-", "−"))
                    for number, channel in enumerate(values)]  # fmt: skip
        found.append((f"{title}, black {center - reach:.2f} to white {center + reach:.2f}".replace("-", "−"), pictures))
    return found


def _gray(values: np.ndarray, text: str) -> Picture:
    """(h, w) in [-1, 1] as a picture from black to white."""
    from PIL import Image

    gray = np.round((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return embed_image(Image.fromarray(gray).convert("RGB"), text)
