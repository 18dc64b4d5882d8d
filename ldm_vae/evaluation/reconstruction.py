"""How well an autoencoder reconstructs: the settings, the protocol and the result folder.

Every figure is of images after an 8-bit round trip, averaged over images, beside baselines on the same pixels.
Measuring is `measurement`'s, means and tables are `summary`'s, the pictures to look at `examples`'.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features

from ldm_vae import provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel
from ldm_vae.data import open_source
from ldm_vae.data.samples import evenly_spaced, none_readable
from ldm_vae.data.sources import ImageSource
from ldm_vae.data.split import subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.diffusion import fid
from ldm_vae.diffusion.fid import KID_SUBSETS, check_distribution, compare_sets, load_inception
from ldm_vae.evaluation import measurement, metrics
from ldm_vae.evaluation.measurement import (
    EvaluateConfig,
    Measurer,
    Unit,
    example_records,
    fit_baseline,
    grid,
    measure_images,
)
from ldm_vae.evaluation.study import Content, Results, Study, check_resolution, rejected_images
from ldm_vae.training.distributed import Processes, joined_processes
from ldm_vae.utils.markdown import markdown_table
from ldm_vae.utils.text import pluralize

RESULTS = "results.json"


def evaluate(config: EvaluateConfig, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Measure, write the result folder, return the content of `results.json`, the same for any number of processes.

    A folder that holds the finished result of these settings is read, not redone. Started by torchrun, all processes
    measure together.

    Raises:
        UserError: the folder holds a result of other settings or of another autoencoder, and not `overwrite`.
    """
    with joined_processes(config.processes) as processes:
        return Evaluation(config, overwrite, processes).run(dry_run)


class Evaluation(Study):
    """The study of `ldm-vae evaluate`."""

    replaced = ("examples/[0-9][0-9]_*.png",)
    config: EvaluateConfig

    def __init__(self, config: EvaluateConfig, overwrite: bool, processes: Processes) -> None:
        self.device = processes.compute_device(config.device)
        autoencoder = load_autoencoder(config.autoencoder).to(self.device)
        super().__init__(config, autoencoder, overwrite=overwrite, processes=processes)
        check_resolution(config.resolution, autoencoder)

    def prepare(self) -> None:
        config = self.config
        self.evaluated, self.fitted = _parts(config)
        self.indices = evenly_spaced(len(self.evaluated), config.count)
        check_distribution(config.distribution, config.fid, config.inception_weights, len(self.indices))

    def collect(self) -> None:
        config = self.config
        chosen = evenly_spaced(len(self.fitted), config.baseline_images)
        klt = fit_baseline(self.fitted, chosen, config.resolution, self.autoencoder.downsampling, self.processes)
        self.measurer = _measurer(config, self.autoencoder, klt, self.device)
        self.measured = measure_images(self.measurer, self.evaluated, self.indices, self.processes)

    def measure(self) -> Results:
        config, measured = self.config, self.measured
        if not measured.ids:
            raise none_readable(config.output, len(self.evaluated), measured.rejected)
        check_distribution(config.distribution, config.fid, config.inception_weights, len(measured.ids))
        distribution = None
        if config.distribution != "none":
            real, decoded = np.stack(measured.real_features), np.stack(measured.decoded_features)
            distribution = compare_sets(real, decoded, config.distribution, config.kid_subset, config.seed)
        return {
            "protocol": _protocol(config, self.evaluated, self.fitted, measured),
            **summary(measured, self.measurer),
            "distribution": distribution,
            "examples": example_records(measured.examples),
            "rejected": rejected_images(measured.rejected),
            "images": per_image(measured, self.measurer),
        }

    def files(self, results: Results) -> dict[str, Content]:
        found: dict[str, Content] = {}
        for record, example in zip(results["examples"], self.measured.examples, strict=True):
            found |= {f"examples/{file}": example.pictures[name] for name, file in record["files"].items()}
        if found:  # none where exactly those images could not be read
            found["grid.png"] = grid(self.measured.examples)
        return found

    def markdown(self, results: Results) -> str:
        return markdown(results)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": results["protocol"]["images"]["count"]}


def _measurer(config: EvaluateConfig, autoencoder: Autoencoder, klt: Any, device: torch.device) -> Measurer:
    """The networks beside the autoencoder, and what is known about its rate."""
    lpips = inception = None
    if config.perceptual_net:
        lpips = LPIPS(config.perceptual_net, config.perceptual_weights).to(device)
    if config.distribution != "none":
        inception = load_inception(config.inception_weights).to(device)
    codes = autoencoder.codebook_size
    bits = None if codes is None else math.log2(codes) / autoencoder.downsampling**2
    return Measurer(autoencoder, klt, lpips, inception, config, device, bits, rate_known=not autoencoder.deterministic)


def _parts(config: EvaluateConfig) -> tuple[ImageSource, ImageSource]:
    """The images to measure, and those that fit the baseline: the training part, or everything for `all`."""
    source = open_source(config.data)
    evaluated = subset(source, config.part, config.data.held_out)
    return evaluated, evaluated if config.part == "all" else subset(source, "train", config.data.held_out)


def _protocol(config: EvaluateConfig, evaluated: ImageSource, fitted: ImageSource, measured: Unit) -> dict[str, Any]:
    """What has to be equal for two results to be comparable."""
    return {
        "images": {"fingerprint": evaluated.fingerprint(), "part": config.part, "count": len(measured.ids)},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "range": "8-bit round trip of every reconstruction",
        "average": "per image, then mean over images; intervals are 95 % bootstrap over images",
        "ssim": "gaussian window 11, sigma 1.5, borders left out; ssim: mean over RGB, ssim_luma: BT.601 luma",
        "lpips": config.perceptual_net,
        "baseline": {
            "name": "block KLT, coefficients not quantised",
            "fitted_on": {
                "fingerprint": fitted.fingerprint(),
                "count": min(len(fitted), config.baseline_images),
            },
        },
        "codecs": {
            "settings": {codec: measurement.CODEC_SETTINGS[codec] for codec in config.codecs},
            "versions": {"pillow": PIL.__version__, **{codec: _codec_version(codec) for codec in config.codecs}},
        },
        "kid": {"subset_size_at_most": config.kid_subset, "subsets": KID_SUBSETS, "kernel": "(x·y / 2048 + 1)^3"},
        "seed": config.seed,
        "precision": "float32",
        "versions": provenance.versions(),
    }


def _codec_version(codec: str) -> str | None:
    return features.version({"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}[codec])


# From values per image to what they say together: means, intervals, paired differences, the rate, and the table.


def summary(measured: Unit, measurer: Measurer) -> dict[str, Any]:
    """Rows with means and 95 % bootstrap intervals, decode(mean) minus each other row, the rate, the budget."""
    first, *others = measured.rows
    rate = rate_of(measured, measurer)
    linear = np.subtract(measured.rows[first]["psnr"], measured.rows[others[-1]]["psnr"])
    return {
        "rows": [row_of(name, measured, rate["bits_per_pixel"], measurer) for name in measured.rows],
        "gain_over_linear_db": interval(linear),
        "differences": [
            {
                "row": first,
                "baseline": other,
                "metrics": {
                    metric: metrics.paired_difference(np.array(values), np.array(measured.rows[other][metric]))
                    for metric, values in measured.rows[first].items()
                },
            }
            for other in others
        ],
        "rate": rate,
        "equal_bytes": budget_sentence(measurer),
        "linear": {"block": measurer.klt.block, "eigenvalues": measurer.klt.eigenvalues.tolist()},
    }


def row_of(name: str, measured: Unit, rate_bits_per_pixel: float | None, measurer: Measurer) -> dict[str, Any]:
    """`bits_per_pixel`: mean over images; of files, the actual ones. None: nothing was coded."""
    row: dict[str, Any] = {
        "name": name,
        "metrics": {metric: interval(values) for metric, values in measured.rows[name].items()},
        "bits_per_pixel": rate_bits_per_pixel if name.startswith("decode(") else None,
    }
    if name in measured.files:
        files = measured.files[name]
        pixel_count = measurer.config.resolution**2
        row["bits_per_pixel"] = float(np.mean([8 * file["bytes"] / pixel_count for file in files]))
        row["over_budget"] = sum(not file["within_budget"] for file in files)
    return row


def rate_of(measured: Unit, measurer: Measurer) -> dict[str, Any]:
    """The mean KL in three units, of a deterministic code its indices' bits, of a code without a rate None."""
    channels, factor = measurer.autoencoder.latent_channels, measurer.autoencoder.downsampling
    if measurer.code_bits_per_pixel is not None:
        bits = measurer.code_bits_per_pixel * factor**2 / channels
        return {
            "kind": "indices of a codebook, every code equally likely",
            "nats_per_dim": bits * float(np.log(2)),
            "bits_per_dim": bits,
            "bits_per_pixel": measurer.code_bits_per_pixel,
        }
    if not measurer.rate_known:
        kind = "none: a deterministic latent of real numbers has no rate"
        return {"kind": kind, "nats_per_dim": None, "bits_per_dim": None, "bits_per_pixel": None}
    nats = float(np.mean(measured.nats))
    return {
        "kind": "KL to N(0, 1)",
        "nats_per_dim": nats,
        "bits_per_dim": bits_per_dimension(nats),
        "bits_per_pixel": bits_per_pixel(nats, channels, factor),
    }


def budget_sentence(measurer: Measurer) -> str:
    """What the codecs' bytes are equal to."""
    given = measurer.config.equal_bytes_bits_per_pixel
    if not measurer.config.codecs:
        return "no codecs were asked for"
    if given is not None:
        return f"each image's file has at most {given:g} bits per pixel, as equal_bytes_bits_per_pixel says"
    if measurer.code_bits_per_pixel is not None:
        return (
            f"each image's file has at most the {measurer.code_bits_per_pixel:.4f} bits per pixel of the code's indices"
        )
    if not measurer.rate_known:
        return (
            "no codec rows: this deterministic autoencoder has no rate to be equal to; give equal_bytes_bits_per_pixel"
        )
    return "each image's file has at most the bytes of that image's own rate (its KL)"


def per_image(measured: Unit, measurer: Measurer) -> list[dict[str, Any]]:
    """One record an image: every value, and the file of every codec. `nats_per_dim` only where it is a rate."""
    has_rate = measurer.rate_known and measurer.code_bits_per_pixel is None
    return [
        {
            "id": name,
            "nats_per_dim": measured.nats[i] if has_rate else None,
            **{
                row: {metric: values[i] for metric, values in named.items()}
                | (measured.files[row][i] if row in measured.files else {})
                for row, named in measured.rows.items()
            },
        }
        for i, name in enumerate(measured.ids)
    ]


def interval(values: Any) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    low, high = metrics.bootstrap_interval(array)
    return {"mean": float(array.mean()), "low": low, "high": high}


def markdown(results: dict[str, Any]) -> str:
    """`results.md`: the table, the differences and the protocol in words."""
    protocol, gain = results["protocol"], results["gain_over_linear_db"]
    lines = [
        table(results),
        "",
        f"Gain of decode(mean) over the linear baseline on the same pixels: {gain['mean']:+.2f} dB "
        f"[{gain['low']:+.2f}, {gain['high']:+.2f}].",
        *difference_lines(results),
        rate_line(results["rate"]),
        *codec_lines(results),
        *(fid.sentences(results["distribution"]) if results.get("distribution") else []),
        f"{pluralize(protocol['images']['count'], 'image')} ({protocol['images']['part']}), {protocol['resolution']} x "
        f"{protocol['resolution']}, {protocol['range']}, {protocol['average']}.",
        f"Autoencoder {results['autoencoder']['class']}, {results['autoencoder']['fingerprint']}.",
    ]
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> str:
    """Markdown: each row's rate, and its metrics with their intervals."""
    names = list(results["rows"][0]["metrics"])
    rows = []
    for row in results["rows"]:
        rate, values = row.get("bits_per_pixel"), [row["metrics"].get(name) for name in names]
        cells = [row_title(row, results), "not coded" if rate is None else f"{rate:.3f}"]
        cells += [f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" if v else "not measured" for v in values]
        rows.append(cells)
    titles = [metrics.METRIC_TITLES.get(name, name) for name in names]
    return "\n".join(markdown_table(["reconstruction", "bits/pixel", *titles], rows))


def row_title(row: dict[str, Any], results: dict[str, Any]) -> str:
    """The row's name, with a warning where its files are not of equal bytes after all."""
    if not row.get("over_budget"):
        return str(row["name"])
    return f"{row['name']} ({row['over_budget']} of {results['protocol']['images']['count']} over)"


def rate_line(rate: dict[str, Any]) -> str:
    if rate["bits_per_pixel"] is None:
        return f"Rate: {rate['kind']}."
    return (
        f"Rate: {rate['nats_per_dim']:.3f} nats = {rate['bits_per_dim']:.3f} bits per latent dimension = "
        f"{rate['bits_per_pixel']:.3f} bits per pixel ({rate['kind']})."
    )


def difference_lines(results: dict[str, Any]) -> list[str]:
    """Paired differences of PSNR and LPIPS (or SSIM) to each baseline, with Wilcoxon's p."""
    lines = []
    titles = {row["name"]: row_title(row, results) for row in results["rows"]}
    for difference in results.get("differences", []):
        second = "lpips" if "lpips" in difference["metrics"] else "ssim"
        parts = []
        for metric, unit in (("psnr", " dB"), (second, f" {metrics.METRIC_TITLES[second]}")):
            value = difference["metrics"][metric]
            p = value["wilcoxon_p"]
            tested = "not tested" if p is None else f"p = {p:.2g}"
            parts.append(f"{value['mean']:+.3f}{unit} [{value['low']:+.3f}, {value['high']:+.3f}], {tested}")
        lines.append(f"{difference['row']} minus {titles[difference['baseline']]}: {'; '.join(parts)}.")
    if lines:
        lines.append("Differences are paired over images; p is Wilcoxon's signed-rank test, two-sided, not corrected.")
    return lines


def codec_lines(results: dict[str, Any]) -> list[str]:
    if "equal_bytes" not in results:
        return []
    lines = [f"Codecs: {results['equal_bytes']}; header bytes count; JPEG 4:2:0 and optimized."]
    for row in results["rows"]:
        if row.get("over_budget"):
            lines.append(
                f"{row['name']}: {row['over_budget']} of {results['protocol']['images']['count']} images over the "
                "budget even at the lowest quality, which was taken."
            )
    return lines
