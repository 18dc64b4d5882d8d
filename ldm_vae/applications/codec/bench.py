"""This codec's files against those of JPEG, WebP and AVIF, on the same pixels.

    images -> every codec at every quality -> `Measurements` -> curves -> differences of rate -> results.json, page

Every byte is one of an actual file, header included, and every picture was decoded from it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from ldm_vae import metrics, provenance
from ldm_vae.applications.codec.compression import Codec, open_codec
from ldm_vae.applications.codec.entropy_models import step_of
from ldm_vae.autoencoder.losses import LPIPS, Backbone
from ldm_vae.autoencoder.rate import bits_per_pixel, kl_divergence
from ldm_vae.data import open_source, transforms
from ldm_vae.data.samples import Enlarged, Rejected, evenly_spaced, none_readable, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part, subset
from ldm_vae.data.survey import describe_images
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation import baselines, plots
from ldm_vae.evaluation.baselines import code_within
from ldm_vae.evaluation.pages import Picture, embed_image, template_environment
from ldm_vae.evaluation.study import (
    Content,
    Results,
    Study,
    StudyPlan,
    check_resolution,
    enlarged_lines,
    rejected_images,
)
from ldm_vae.metrics import METRIC_TITLES
from ldm_vae.random import generator, numpy_rng
from ldm_vae.runtime import compute_device
from ldm_vae.storage.base import is_url
from ldm_vae.utils.image_grid import labeled_sheet
from ldm_vae.utils.progress import beside, track
from ldm_vae.utils.text import markdown_table, pluralize

OURS = "ldm-vae"
SELF_FITTED = f"{OURS}, self-fitted"
SHOWN_QUALITY = 50.0
RESAMPLES = 100
LOWER_IS_BETTER = ("lpips",)
METRICS = ("psnr", "ms_ssim", "ssim", "lpips")
SHEET_SIDE = 256
SAMPLE = "decode(sample)"
LEAST_POINTS = 3
"""Least number of points of each curve, without those that bend back."""
LEAST_OVERLAP = 0.05
"""Least overlap, as a share of the shorter curve's range of quality."""


@dataclass(frozen=True)
class CodecBenchConfig:
    """`ldm-vae codec bench`: bytes of whole files, PSNR, MS-SSIM, LPIPS, BD-rate, curves.

    Writes results.json, results.md, index.html and the curves as SVG into the output folder. A finished result is not
    redone. Give the entropy models that `codec fit` made for this autoencoder to see what they gain.

      ldm-vae codec bench runs/mine data=~/images output=runs/mine/codec
      ldm-vae codec bench runs/mine data=~/images entropy=runs/codec.safetensors output=runs/mine/codec

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the results.
        entropy: entropy models of `ldm-vae codec fit` for this autoencoder; files that need none are always measured.
        part: held_out (what training never saw), its halves validation and test, train or all.
        resolution: side of the center crop in pixels, a multiple of the downsampling.
        count: largest number of images, evenly spread over the part; null: all.
        qualities: qualities of this codec, 1 to 100.
        codecs: image codecs to compare with: JPEG, WebP, AVIF.
        codec_qualities: qualities of these codecs, 1 to 95.
        perceptual_net: the LPIPS network; null: no LPIPS.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        examples: largest number of example images to save.
        seed: seed of the posterior samples that the KL's code would decode to.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    entropy: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 512
    count: int | None = None
    qualities: list[float] = field(default_factory=lambda: [1.0, 10.0, 20.0, 30.0, 45.0, 65.0])
    codecs: list[str] = field(default_factory=lambda: list(baselines.available_codecs()))
    codec_qualities: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 35, 55, 75, 90])
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    examples: int = 4
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.resolution < 8 or (self.count is not None and self.count < 1) or self.examples < 0:
            raise UserError("codec-bench: resolution is below 8, count below 1 or examples below 0; give larger ones")
        for name in ("qualities", "codec_qualities"):
            if len(set(getattr(self, name))) < 3:
                raise UserError(f"{name}: {list(getattr(self, name))} is not a curve; give three or more")
        for name in ("qualities", "codec_qualities", "codecs", "entropy"):
            values = list(getattr(self, name))
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise UserError(f"{name}: {twice} is there twice; leave one out")
        for quality in self.qualities:
            step_of(quality)
        if not all(1 <= quality <= 95 for quality in self.codec_qualities):
            raise UserError(f"codec_qualities: {list(self.codec_qualities)} are not all between 1 and 95")
        for codec in self.codecs:
            if codec not in baselines.available_codecs():
                available = ", ".join(baselines.available_codecs())
                raise UserError(f"codecs: {codec!r} cannot be written here; choose among {available}")
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")


@dataclass
class CodecMeasurements:
    """What was found: `rows[codec][quality]` holds lists over images of bytes, ideal bits and each metric.

    `latent[...]`: the KL in bits per pixel and the metrics of the decoded posterior sample and mean, over images.
    """

    ids: list[str] = field(default_factory=list)
    rows: dict[str, dict[float, dict[str, list[float]]]] = field(default_factory=dict)
    latent: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    examples: list[CodecExample] = field(default_factory=list)
    rejected: Rejected = field(default_factory=list)
    enlarged: Enlarged = field(default_factory=list)

    def add(self, codec: str, quality: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.rows.setdefault(codec, {}).setdefault(quality, {}).setdefault(name, []).append(value)


def bench_codec(config: CodecBenchConfig, *, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Measure, write the result folder, return the content of `results.json`.

    A folder that holds the finished result of these settings is read, not redone.

    Raises:
        UserError: the folder holds another result and not `overwrite`; an entropy model is of another autoencoder; no
            image could be read.
    """
    return CodecBench(config, overwrite).run(dry_run)


class CodecBench(Study):
    """The study of `ldm-vae codec bench`."""

    format_version = 2  # 1 took brightness on [-1, 1] in SSIM
    command, product = "codec bench", "the comparison of codecs"
    config: CodecBenchConfig

    def __init__(self, config: CodecBenchConfig, overwrite: bool) -> None:
        plain = open_codec(config.autoencoder, None, compute_device(config.device))
        check_resolution(config.resolution, plain.autoencoder)
        self.codecs = {SELF_FITTED: plain}
        for path in config.entropy:
            codec = plain.with_model(path)
            assert codec.model is not None, "it was just loaded"
            name = f"{OURS}, {codec.model.kind}"
            self.codecs[name if name not in self.codecs else f"{name} ({path})"] = codec
        self.models = {name: one.model.fingerprint for name, one in self.codecs.items() if one.model is not None}
        super().__init__(config, plain.autoencoder, overwrite=overwrite)

    def inputs(self, results: Results) -> dict[str, tuple[Any, Any]]:
        return {"other entropy models": (results["entropy"], self.models)}

    def prepare(self) -> None:
        self.source = subset(open_source(self.config.data), self.config.part, self.config.data.held_out)

    def work(self) -> StudyPlan:
        config, chosen = self.config, evenly_spaced(len(self.source), self.config.count)
        codecs = ", ".join([*self.codecs, *config.codecs])
        images, device = describe_images(self.source, len(chosen)), str(self.autoencoder.device)
        what = (images, f"part {config.part}", f"{config.resolution} pixels", codecs, config.autoencoder, device)
        return StudyPlan(what, self.source, chosen, config.resolution)

    def then(self, results: Results) -> list[str]:
        config = self.config
        if config.data.source != "folder" or is_url(str(config.data.path)):
            return []
        words = ["ldm-vae", "compress", str(config.data.path), f"autoencoder={config.autoencoder}"]
        words += [f"entropy={path}" for path in config.entropy[:1]]
        return [*words, f"output={beside(config.output, 'compressed')}"]

    def measure(self) -> Results:
        config, measured = self.config, measure_codecs(self.config, self.codecs, self.source)
        self.enlarged = measured.enlarged
        self.examples = measured.examples
        rows = {codec: {f"{q:g}": values for q, values in found.items()} for codec, found in measured.rows.items()}
        images = {"fingerprint": self.source.fingerprint(), "part": config.part, "count": len(measured.ids)}
        return {
            "entropy": self.models,
            "protocol": {
                "images": images,
                "preprocessing": preprocessing_record(config.resolution),
                "resolution": config.resolution,
                "bytes": "whole files, headers counted; entropy models and autoencoders not",
                "average": "per image, then mean over images, rates and qualities alike",
                "lpips": config.perceptual_net,
                "codecs": {codec: baselines.CODEC_SETTINGS[codec] for codec in config.codecs},
                "versions": {"pillow": PIL.__version__, **provenance.versions()},
            },
            **summarize(measured, config.resolution),
            "rejected": rejected_images(measured.rejected),
            "images": {"ids": measured.ids, "rows": rows, "latent": measured.latent},
        }

    def files(self, results: Results) -> dict[str, Content]:
        start = '<?xml version="1.0" encoding="utf-8"?>\n<svg style="background: #fff"'
        found: dict[str, Content] = {
            f"rate_{name}.svg": plot(results, name).replace("<svg", start, 1) for name in measured_metrics(results)
        }
        if self.examples:
            found["examples.png"] = sheet(self.examples)
        return found

    def markdown(self, results: Results) -> str:
        return markdown(results)

    def page(self, results: Results) -> str:
        from markupsafe import Markup

        names = measured_metrics(results)
        captions = {name: "Lower is better." if name in LOWER_IS_BETTER else "Higher is better." for name in names}
        context = {
            "results": results,
            "enlarged": enlarged_lines(results),
            "metrics": [METRIC_TITLES[name] for name in names],
            "plots": [
                (METRIC_TITLES[name], "over bits per pixel of whole files", captions[name], Markup(plot(results, name)))
                for name in names
            ],
            "differences": difference_rows(results),
            "sentences": codec_sentences(results),
            "examples": [_shown(one) for one in self.examples],
        }
        return template_environment().get_template("codec.html").render(context)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": results["protocol"]["images"]["count"]}


@torch.no_grad()
def measure_codecs(config: CodecBenchConfig, codecs: dict[str, Codec], source: ImageSource) -> CodecMeasurements:
    """Every codec at every quality on every image. Raises: UserError when none can be read."""
    plain = codecs[SELF_FITTED]
    device = plain.autoencoder.device
    lpips = LPIPS(config.perceptual_net, config.perceptual_weights).to(device) if config.perceptual_net else None
    measured, chosen = CodecMeasurements(), evenly_spaced(len(source), config.count)
    shown = {chosen[i] for i in evenly_spaced(len(chosen), config.examples)} if config.examples else set()
    for index in track(chosen, "coding"):
        _, crop = read_crops(source, [index], config.resolution, measured.rejected, measured.enlarged)
        if crop is None:
            continue
        compare, name = DecodedMetrics(crop.to(device), lpips), source.id(index)
        measured.ids.append(name)
        _measure_latent(measured, config, plain, compare, name)
        ours = _measure_ours(measured, config, codecs, compare, name)
        for codec in config.codecs:
            for quality in config.codec_qualities:
                data = baselines.encode_picture(compare.picture, codec, quality)
                with Image.open(io.BytesIO(data)) as file:
                    values = compare(np.array(file.convert("RGB")))
                measured.add(codec, float(quality), {"bytes": float(len(data)), **values})
        if index in shown:
            measured.examples.append(example(compare.picture, ours, config.codecs))
    if not measured.ids:
        raise none_readable(config.output, len(source), measured.rejected)
    return measured


class DecodedMetrics:
    """Metrics of decoded pictures against one original, (1, 3, h, w) in [-1, 1]."""

    def __init__(self, original: Tensor, lpips: LPIPS | None) -> None:
        self.original, self.lpips = original, lpips
        self.picture = transforms.to_pil(original.cpu())[0]

    def __call__(self, decoded: np.ndarray) -> dict[str, float]:
        """Metrics of a decoded image, uint8 (h, w, 3). MS-SSIM if the sides allow it."""
        image = transforms.to_batch(decoded).to(self.original.device)
        values = {"psnr": metrics.psnr(image, self.original)}
        if min(image.shape[-2:]) >= metrics.MS_SSIM_SMALLEST_SIDE:
            values["ms_ssim"] = metrics.ms_ssim(image, self.original)
        else:
            values["ssim"] = metrics.ssim(image, self.original)
        if self.lpips is not None:
            values["lpips"] = self.lpips(image, self.original)
        return {name: float(value) for name, value in values.items()}


def _measure_latent(
    measured: CodecMeasurements, config: CodecBenchConfig, codec: Codec, compare: DecodedMetrics, name: str
) -> None:
    """Without a file: decode(mean), and where there is a posterior what a code as long as the KL would decode to."""
    mean, logvar = codec.autoencoder.encode_moments(compare.original)
    rows: dict[str, tuple[Tensor, float | None]] = {"decode(mean)": (mean, None)}
    if not codec.autoencoder.deterministic:
        noise = torch.randn(mean.shape, generator=generator(config.seed, "codec-bench", name)).to(mean.device)
        nats = float(kl_divergence(mean, logvar).mean())
        rows["decode(sample)"] = (
            mean + torch.exp(0.5 * logvar) * noise,
            bits_per_pixel(nats, codec.channels, codec.factor),
        )
    for row, (latents, rate) in rows.items():
        decoded = transforms.to_uint8(codec.autoencoder.decode_images(latents))[0].permute(1, 2, 0).cpu().numpy()
        values = compare(decoded) | ({} if rate is None else {"kl_bits_per_pixel": rate})
        for metric, value in values.items():
            measured.latent.setdefault(row, {}).setdefault(metric, []).append(value)


def _measure_ours(
    measured: CodecMeasurements, config: CodecBenchConfig, codecs: dict[str, Codec], compare: DecodedMetrics, name: str
) -> tuple[int, np.ndarray]:
    """Every entropy model at every quality, decoded from the file. Returns the size and picture to show."""
    original = np.array(compare.picture)
    shown = min(config.qualities, key=lambda quality: abs(quality - SHOWN_QUALITY))
    sized: tuple[int, np.ndarray] | None = None
    compared: dict[bytes, tuple[np.ndarray, dict[str, float]]] = {}
    for label, codec in codecs.items():
        picture = codec.analyze(original, name)
        for quality in config.qualities:
            start = time.perf_counter()
            compressed = codec.compress(picture, step_of(quality))
            middle = time.perf_counter()
            latents = codec.latents_of(compressed.data, name)
            measured.seconds.setdefault(f"{label}: latents to file", []).append(middle - start)
            measured.seconds.setdefault(f"{label}: file to latents", []).append(time.perf_counter() - middle)
            key = latents.tobytes()
            if key not in compared:  # entropy models of one grid give files of other lengths for the same picture
                decoded = codec.picture_of(latents, picture.height, picture.width)
                compared[key] = decoded, compare(decoded)
            decoded, values = compared[key]
            sizes = {"bytes": float(len(compressed.data)), "ideal_bits": compressed.ideal_bits}
            measured.add(label, quality, values | sizes)
            if quality == shown:
                sized = len(compressed.data), decoded
    assert sized is not None, "there are codecs and qualities"
    return sized


@dataclass(frozen=True)
class CodecExample:
    """Pictures of one image, each with its name and bytes; the original has none."""

    pictures: list[tuple[str, int | None, Image.Image]]


def example(original: Image.Image, mine: tuple[int, np.ndarray], codecs: Sequence[str]) -> CodecExample:
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
    return CodecExample(pictures)


# Curves of quality over rate, and how far one lies from another: the Bjøntegaard rate difference.


def monotone(rates: Sequence[float], qualities: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both by rising rate, without points that cost more and are not better."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(zip(rates, qualities)):
        if not kept or (quality > kept[-1][1] and rate > kept[-1][0]):
            kept.append((rate, quality))
    found = np.array(kept, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def bd_rate(
    rates: Sequence[float], qualities: Sequence[float], other_rates: Sequence[float], other_qualities: Sequence[float]
) -> float | None:
    """Mean difference of rate at equal quality in percent of the other curve's; below 0 the first one is smaller.

    The logarithms of the rates are joined by monotone piecewise cubics and averaged over the qualities that both
    curves reach (Bjøntegaard, VCEG-M33; piecewise as in VCEG-AI11). None where they share too few.

    Args:
        rates: any unit above 0; qualities: higher is better.
    """
    from scipy.interpolate import PchipInterpolator

    first, second = monotone(rates, qualities), monotone(other_rates, other_qualities)
    if min(len(first[0]), len(second[0])) < LEAST_POINTS:
        return None
    low, high = (f(first[1][end], second[1][end]) for f, end in ((max, 0), (min, -1)))
    shorter = min(curve[1][-1] - curve[1][0] for curve in (first, second))
    if high - low < LEAST_OVERLAP * shorter:
        return None
    means = [
        float(PchipInterpolator(quality, np.log(rate)).integrate(low, high)) / (high - low)
        for rate, quality in (first, second)
    ]
    return 100.0 * float(np.expm1(means[0] - means[1]))


def rate_at(rates: Sequence[float], qualities: Sequence[float], quality: float) -> float | None:
    """The rate at which a curve reaches a quality; None outside of it."""
    from scipy.interpolate import PchipInterpolator

    x, y = monotone(rates, qualities)
    if len(x) < LEAST_POINTS or not y[0] <= quality <= y[-1]:
        return None
    return float(np.exp(PchipInterpolator(y, np.log(x))(quality)))


# Curves, differences and words from what was measured.


def summarize(measured: CodecMeasurements, resolution: int) -> dict[str, Any]:
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


def _differences(measured: CodecMeasurements) -> list[dict[str, Any]]:
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


def _difference(measured: CodecMeasurements, test: str, anchor: str, metric: str) -> dict[str, float | None]:
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
    titles = [METRIC_TITLES[name] for name in names]
    points = []
    for codec, curve in results["curves"].items():
        for point in curve:
            ideal = point.get("ideal_bits_per_pixel")
            cells = [f"{point['quality']:g}", f"{point['bits_per_pixel']:.4f}", "" if ideal is None else f"{ideal:.4f}"]
            points.append([codec, *cells, *(f"{point[name]:.4g}" for name in names)])
    lines = [
        *markdown_table(
            ["rate at equal quality", *titles], [[pair, *cells] for pair, cells in difference_rows(results)]
        ),
        "",
        "Bjøntegaard difference of rate over the range of quality that both curves reach, with its 95 % bootstrap "
        "interval over images; below 0 the first needs fewer bytes; none: the curves share no range.",
        "",
        *markdown_table(["codec", "quality", "bits/pixel", "ideal", *titles], points),
        "",
        *codec_sentences(results),
    ]
    images = protocol["images"]
    lines += [
        f"{pluralize(images['count'], 'image')} ({images['part']}), "
        f"{protocol['resolution']} x {protocol['resolution']}; "
        f"{protocol['bytes']}; {protocol['average']}. JPEG 4:2:0, optimized, "
        "progressive where that is smaller; WebP method 6; AVIF 4:2:0, speed 6."
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


def codec_sentences(results: Results) -> list[str]:
    """What stands between a file and the ideal, and what a perfect file would be limited by."""
    lines, mean = [], results["latent"]["decode(mean)"]
    lines.append(f"Without quantization the autoencoder gives {mean['psnr']:.2f} dB: no quality goes beyond.")
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
            position = "outside of the curve" if rate is None else (
                f"{rate:.4f} bits per pixel, {100 * (rate / gap['kl_bits_per_pixel'] - 1):+.1f} %"
            )  # fmt: skip
            lines.append(f"{name}: {position}.")
    return [line + "\n" for line in lines]


def plot(results: Results, metric: str) -> str:
    """The curves of one metric over the rate, as an `<svg>` element."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (axes,) = plots.new_figure(width=6.4, height=4.0)
    for number, (codec, points) in enumerate(results["curves"].items()):
        ordered = sorted(points, key=lambda point: point["bits_per_pixel"])
        ours = codec.startswith(OURS)
        axes.plot(
            [point["bits_per_pixel"] for point in ordered], [point[metric] for point in ordered],
            color=plots.COLORS[number % len(plots.COLORS)], marker="o", markersize=3.5,
            linewidth=1.9 if ours else 1.2, linestyle="-" if ours else (0, (4, 2)),
            label=codec.replace("$", r"\$"),  # no formula
        )  # fmt: skip
    sample = results["latent"].get(SAMPLE)
    if sample is not None:
        axes.plot(
            [sample["kl_bits_per_pixel"]], [sample[metric]], color=plots.INK, marker="D", markersize=5,
            linestyle="none", label="KL, posterior sample",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(METRIC_TITLES[metric])
    plots.style(axes)
    plots.legend(axes)
    return plots.page_svg(figure, f"{METRIC_TITLES[metric]} over bits per pixel")


def sheet(examples: Sequence[CodecExample]) -> Image.Image:
    """The middle of every example picture, a row an image, each with its name and bytes."""
    images, labels = [], []
    for one in examples:
        for name, size, picture in one.pictures:
            left, top = picture.width // 4, picture.height // 4
            images.append(picture.crop((left, top, picture.width - left, picture.height - top)))
            labels.append(name + "\n" + ("" if size is None else f"{size:,} bytes"))
    return labeled_sheet(images, labels, side=SHEET_SIDE, columns=len(examples[0].pictures))


def _shown(one: CodecExample) -> list[tuple[str, Picture]]:
    return [
        (name if size is None else f"{name}, {size:,} bytes", embed_image(picture, name))
        for name, size, picture in one.pictures
    ]
