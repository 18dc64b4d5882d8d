"""The results of `codec-bench` in figures, words (`results.md`), plots and one page (`index.html`).

Owns means over images, tables and pictures; the look is `evaluation`'s templates'. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm_vae.applications.codec.rate_curves import bd_rate, rate_at
from ldm_vae.data.sheets import labelled_sheet
from ldm_vae.evaluation import figures, plots
from ldm_vae.evaluation.fidelity.baselines import code_within
from ldm_vae.evaluation.html_pages import Picture, embed_image, template_environment
from ldm_vae.evaluation.metrics import METRIC_TITLES
from ldm_vae.latents.words import counted
from ldm_vae.random import numpy_rng

if TYPE_CHECKING:
    from ldm_vae.applications.codec.bench import Measured

Results = dict[str, Any]

RESAMPLES = 100
LOWER_IS_BETTER = ("lpips",)
METRICS = ("psnr", "ms_ssim", "ssim", "lpips")
OURS = "ldm-vae"
SHEET_SIDE = 256
SAMPLE = "decode(sample)"


@dataclass(frozen=True)
class Example:
    """Pictures of one image, each with its name and bytes; the original has none."""

    pictures: list[tuple[str, int | None, Image.Image]]


def example(original: Image.Image, mine: tuple[int, np.ndarray], codecs: Sequence[str]) -> Example:
    """The original, this codec's picture, and each codec's largest file of at most as many bytes."""
    size_bytes, decoded = mine
    pictures: list[tuple[str, int | None, Image.Image]] = [
        ("original", None, original),
        (OURS, size_bytes, Image.fromarray(decoded)),
    ]
    for codec in codecs:
        coded = code_within(original, codec, size_bytes)
        name = codec if coded.fits else f"{codec}, its smallest file"
        pictures.append((name, coded.size_bytes, coded.picture))
    return Example(pictures)


def summary(measured: Measured, resolution: int) -> Results:
    """Mean curves, their differences of rate, the gap to the ideal code length, and seconds."""
    per_byte = 8 / resolution**2
    curves: dict[str, list[dict[str, float]]] = {}
    for codec, rows in measured.rows.items():
        curves[codec] = []
        for quality, values in rows.items():
            point = {"quality": quality, "bits_per_pixel": per_byte * float(np.mean(values["bytes"]))}
            if "ideal_bits" in values:
                point["ideal_bits_per_pixel"] = float(np.mean(values["ideal_bits"])) / resolution**2
            point |= {name: float(np.mean(values[name])) for name in METRICS if name in values}
            curves[codec].append(point)
    latent = {
        row: {metric: float(np.mean(values)) for metric, values in named.items()}
        for row, named in measured.latent.items()
    }
    return {
        "curves": curves,
        "bd_rate": _differences(measured),
        "latent": latent,
        "kl_gap": _kl_gap(curves, latent),
        "seconds": {name: float(np.median(values)) for name, values in measured.seconds.items()},
    }


def _signed(metric: str, values: Any) -> Any:
    return -np.asarray(values) if metric in LOWER_IS_BETTER else np.asarray(values)


def _differences(measured: Measured) -> list[dict[str, Any]]:
    """BD-rates of this codec's curves to the others and to its own before, with 95 % bootstrap intervals."""
    names = list(measured.rows)
    found = []
    for number, test in enumerate(names):
        if not test.startswith(OURS):
            continue
        for anchor in (name for name in names if name in names[:number] or not name.startswith(OURS)):
            first = next(iter(measured.rows[test].values()))
            for metric in (name for name in METRICS if name in first):
                found.append(
                    {"codec": test, "anchor": anchor, "metric": metric, **_difference(measured, test, anchor, metric)}
                )
    return found


def _difference(measured: Measured, test: str, anchor: str, metric: str) -> dict[str, float | None]:
    def table(codec: str, key: str) -> np.ndarray:
        return np.array([values[key] for values in measured.rows[codec].values()])  # (qualities, images)

    tables = [table(test, "bytes"), _signed(metric, table(test, metric))]
    tables += [table(anchor, "bytes"), _signed(metric, table(anchor, metric))]

    def at(images: Any) -> float | None:
        return bd_rate(*(values[:, images].mean(axis=1) for values in tables))

    count = tables[0].shape[1]
    percent = at(slice(None))
    if percent is None:
        return {"percent": None, "low": None, "high": None}
    picks = numpy_rng(0, "codec-bench").integers(count, size=(RESAMPLES, count))
    drawn = [value for pick in picks if (value := at(pick)) is not None]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (percent, percent)
    return {"percent": percent, "low": float(low), "high": float(high)}


def _kl_gap(curves: dict[str, list[dict[str, float]]], latent: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Rate of each of this codec's curves at the PSNR that a posterior sample decodes to, beside the KL's."""
    sample = latent.get(SAMPLE)
    if sample is None:
        return {}
    rates = {
        name: rate_at([p["bits_per_pixel"] for p in points], [p["psnr"] for p in points], sample["psnr"])
        for name, points in curves.items()
        if name.startswith(OURS)
    }
    return {"kl_bits_per_pixel": sample["kl_bits_per_pixel"], "psnr": sample["psnr"], "file_bits_per_pixel": rates}


def measured_metrics(results: Results) -> list[str]:
    """The metrics that every point has."""
    return [name for name in METRICS if name in next(iter(results["curves"].values()))[0]]


def markdown(results: Results) -> str:
    """`results.md`: differences of rate, every point, the gaps and the protocol."""
    names, protocol = measured_metrics(results), results["protocol"]
    lines = ["| rate at equal quality | " + " | ".join(METRIC_TITLES[name] for name in names) + " |"]
    lines += ["|---|" + "---|" * len(names)]
    lines += [f"| {pair} | " + " | ".join(cells) + " |" for pair, cells in difference_rows(results)]
    lines += [
        "",
        "Bjøntegaard difference of rate over the range of quality that both curves reach, with its 95 % bootstrap "
        "interval over images; below 0 the first needs fewer bytes; none: the curves share no range.",
        "",
        "| codec | quality | bits/pixel | ideal | " + " | ".join(METRIC_TITLES[name] for name in names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for codec, points in results["curves"].items():
        for point in points:
            ideal = point.get("ideal_bits_per_pixel")
            cells = [f"{point['quality']:g}", f"{point['bits_per_pixel']:.4f}", "" if ideal is None else f"{ideal:.4f}"]
            lines.append(f"| {codec} | " + " | ".join([*cells, *(f"{point[name]:.4g}" for name in names)]) + " |")
    lines += ["", *sentences(results)]
    images = protocol["images"]
    lines += [
        f"{counted(images['count'], 'image')} ({images['part']}), {protocol['resolution']} x {protocol['resolution']}; "
        f"{protocol['bytes']}; {protocol['average']}. JPEG 4:2:0 and optimised."
        + (f" LPIPS with {net}: it flatters what was trained with it." if (net := protocol["lpips"]) else ""),
        f"Autoencoder {results['autoencoder']['class']}, {results['autoencoder']['fingerprint']}.",
    ]
    return "\n".join(lines) + "\n"


def difference_rows(results: Results) -> list[tuple[str, list[str]]]:
    """`A against B` and a cell for each metric."""
    names = measured_metrics(results)
    found: dict[str, dict[str, str]] = {}
    for entry in results["bd_rate"]:
        row = found.setdefault(f"{entry['codec']} against {entry['anchor']}", dict.fromkeys(names, "none"))
        if entry["percent"] is not None:
            row[entry["metric"]] = f"{entry['percent']:+.1f} % [{entry['low']:+.1f}, {entry['high']:+.1f}]"
    return [(pair, list(row.values())) for pair, row in found.items()]


def sentences(results: Results) -> list[str]:
    """What stands between a file and the ideal, and what a perfect file would be limited by."""
    lines, mean = [], results["latent"]["decode(mean)"]
    lines.append(f"Without quantisation the autoencoder gives {mean['psnr']:.2f} dB: no quality goes beyond.")
    for name, points in results["curves"].items():
        if name.startswith(OURS):
            excess = [p["bits_per_pixel"] / p["ideal_bits_per_pixel"] - 1 for p in points]
            lines.append(
                f"{name}: files are {100 * min(excess):.1f} to {100 * max(excess):.1f} % longer than the code length "
                "of their own entropy model (header and rounding)."
            )
    gap = results["kl_gap"]
    if gap:
        lines.append(
            f"The KL is {gap['kl_bits_per_pixel']:.4f} bits per pixel, the ideal code length of a posterior sample, "
            f"which decodes to {gap['psnr']:.2f} dB. Files of that PSNR:"
        )
        for name, rate in gap["file_bits_per_pixel"].items():
            told = "outside of the curve" if rate is None else (
                f"{rate:.4f} bits per pixel, {100 * (rate / gap['kl_bits_per_pixel'] - 1):+.1f} %"
            )  # fmt: skip
            lines.append(f"{name}: {told}.")
    return [line + "\n" for line in lines]


def plot(results: Results, metric: str) -> str:
    """The curves of one metric over the rate, as an `<svg>` element."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (axes,) = figures.new_figure(width=6.4, height=4.0)
    for number, (codec, points) in enumerate(results["curves"].items()):
        ordered = sorted(points, key=lambda point: point["bits_per_pixel"])
        ours = codec.startswith(OURS)
        axes.plot(
            [point["bits_per_pixel"] for point in ordered], [point[metric] for point in ordered],
            color=figures.COLOURS[number % len(figures.COLOURS)], marker="o", markersize=3.5,
            linewidth=1.9 if ours else 1.2, linestyle="-" if ours else (0, (4, 2)),
            label=codec.replace("$", r"\$"),  # no formula
        )  # fmt: skip
    sample = results["latent"].get(SAMPLE)
    if sample is not None:
        axes.plot(
            [sample["kl_bits_per_pixel"]], [sample[metric]], color=figures.INK, marker="D", markersize=5,
            linestyle="none", label="KL, posterior sample",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(METRIC_TITLES[metric])
    figures.style(axes)
    figures.legend(axes)
    return plots.page_svg(figure, f"{METRIC_TITLES[metric]} over bits per pixel")


def plot_files(results: Results) -> dict[str, str]:
    """File name -> a stand-alone SVG on white."""
    start = '<?xml version="1.0" encoding="utf-8"?>\n<svg style="background: #fff"'
    return {f"rate_{name}.svg": plot(results, name).replace("<svg", start, 1) for name in measured_metrics(results)}


def sheet(examples: Sequence[Example]) -> Image.Image:
    """The middle of every example picture, a row an image, each with its name and bytes."""
    images, labels = [], []
    for one in examples:
        for name, size, picture in one.pictures:
            left, top = picture.width // 4, picture.height // 4
            images.append(picture.crop((left, top, picture.width - left, picture.height - top)))
            labels.append(name + "\n" + ("" if size is None else f"{size:,} bytes"))
    return labelled_sheet(images, labels, side=SHEET_SIDE, columns=len(examples[0].pictures))


def render(results: Results, examples: Sequence[Example]) -> str:
    """The page as HTML text."""
    from markupsafe import Markup

    names = measured_metrics(results)
    captions = {name: "Lower is better." if name in LOWER_IS_BETTER else "Higher is better." for name in names}
    context = {
        "results": results,
        "metrics": [METRIC_TITLES[name] for name in names],
        "plots": [
            (METRIC_TITLES[name], "over bits per pixel of whole files", captions[name], Markup(plot(results, name)))
            for name in names
        ],
        "differences": difference_rows(results),
        "sentences": sentences(results),
        "examples": [_shown(one) for one in examples],
    }
    return template_environment().get_template("codec.html").render(context)


def _shown(one: Example) -> list[tuple[str, Picture]]:
    return [
        (name if size is None else f"{name}, {size:,} bytes", embed_image(picture, name))
        for name, size, picture in one.pictures
    ]
