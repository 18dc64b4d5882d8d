"""`ldm-vae latents stats`: the distribution of the latents, codes and labels of a set, as numbers.

Mean and std are exact, from the sums of all shards. The shape of the distribution is measured on samples spread evenly
over the set. Latents are measured as a trainer gets them: posterior samples if moments are stored, mirror images half
of the time, normalized with the manifest's constants. `evaluation.latent_set_page` draws the plots.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import (
    MOST_SHARDS,
    LatentDataset,
    Posterior,
    evenly,
    label_text,
    read_labels,
    samples_per_shard,
)
from ldm_vae.latents.format import (
    MAKE_AGAIN,
    MANIFEST,
    RESTORE,
    STORED_DTYPES,
    Manifest,
    open_set_folder,
    read_manifest,
)
from ldm_vae.latents.normalizer import channel_sums, combine
from ldm_vae.latents.shard import open_shard
from ldm_vae.provenance import RUN_RECORD
from ldm_vae.random import generator
from ldm_vae.utils.text import pluralize

BATCH = 64
AGREEMENT = 1e-9
"""Tolerance of recomputed statistics, relative to the deviation; sums of float64 differ less between machines."""

COLUMNS = {
    "mean": "mean",
    "std": "std",
    "std_of_means": "std of μ",
    "posterior_deviation": "mean σ",
    "noise_share": "noise",
    "nats": "KL nats",
    "minimum": "min",
    "maximum": "max",
    "skewness": "skew",
    "excess_kurtosis": "kurtosis",
    "tail_share": "> 4 std",
    "neighbour_correlation": "next ρ",
}
"""Columns of the table, with one row per channel."""

LEGEND = {
    "posterior_deviation": "mean σ: posterior",
    "noise_share": "noise: E σ² / Var z",
    "nats": "KL nats: a position",
    "neighbour_correlation": "next ρ: of neighbors",
    "minimum": "from min on: normalized",
}
"""Explanations of the column titles, below the table."""


@dataclass(frozen=True)
class StatsConfig:
    """`ldm-vae latents stats`.

    Prints a table; with `output` it also writes a page of plots. Mean and std are exact and recomputed from the shards;
    the exit code is 1 if they differ. All other figures are measured on samples spread evenly over the set.

      ldm-vae latents stats runs/latents
      ldm-vae latents stats s3://bucket/latents count=20000 output=runs/latents-stats

    Args:
        latents: the folder of a finished set, or its URL.
        samples: number of samples on which the distribution is measured.
        output: a folder for stats.json and index.html, a page of plots; earlier files are replaced.
        json: print everything as JSON instead of a table.
    """

    latents: str = "???"
    samples: int = 4096
    output: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples: {self.samples} is below 1; a few thousand show the distribution")


class Disagreement(UserError):
    """The values, the index and the manifest of a set do not agree. The command ends with exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class Statistics:
    """The statistics of a set.

    Attributes:
        report: all figures, JSON-able.
        mean_map, std_map: (c, h, w) over samples, normalized latents; None for codes.
    """

    report: dict[str, Any]
    mean_map: np.ndarray | None = None
    std_map: np.ndarray | None = None


def open_set(location: str) -> LatentDataset:
    """A set whose samples are moments if moments are stored. Raises: UserError without a finished set."""
    posterior: Posterior | None = "moments" if read_manifest(open_set_folder(location)).content == "moments" else None
    return LatentDataset(location, posterior=posterior, verify=False)


def measure_set(dataset: LatentDataset, samples: int = 4096) -> Statistics:
    """Measure a set from `open_set`, with the shape of its distribution on at most `samples` samples.

    Raises:
        UserError: damaged shards, a channel that cannot be normalized, or values that are not finite.
        Disagreement: mean or std differ between the manifest and the shards.
    """
    manifest = dataset.manifest
    numbers = samples_per_shard(manifest.shard_index.counts, samples)
    report: dict[str, Any] = {
        "set": str(manifest.where.location),
        "content": manifest.content,
        "dtype": manifest.dtype,
        "latent_shape": list(manifest.latent_shape),
        "flipped": manifest.flipped,
        "samples": manifest.count,
        "shards": manifest.shards,
        "measured_samples": len(numbers),
    }
    if not numbers:
        raise UserError(f"{dataset.where}: holds no samples; encode some images")
    if enlarged := images_enlarged(manifest):
        report["images_enlarged"] = enlarged
    report["labels"] = measure_labels(manifest)
    if manifest.content == "indices":
        return Statistics(report | {"codes": measure_codes(dataset, numbers)})
    report["recomputed"] = recompute(manifest, samples)
    shape = Shape(manifest.latent_shape, manifest.content == "moments")
    for batch in latent_batches(dataset, numbers):
        shape.add(*batch)
    exact = exact_figures(manifest)
    report["channels"] = [{**first, **second} for first, second in zip(exact, shape.channels(), strict=True)]
    report |= {"correlation": shape.correlation(), "histograms": shape.histograms()}
    return Statistics(report, *shape.maps())


def images_enlarged(manifest: Manifest) -> int:
    """The number of images smaller than their crop, in the record of the job that finished the set."""
    with contextlib.suppress(FileNotFoundError, ValueError, AttributeError):
        return int(json.loads(manifest.where.read(RUN_RECORD)).get("images_enlarged", 0))
    return 0


def latent_batches(dataset: LatentDataset, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(latents normalized (n, c, h, w), stored moments (n, 2c, h, w) or None), float32.

    Raises: UserError that names a sample with a value that is not finite.
    """
    normalizer = dataset.normalizer
    name = "moments" if dataset.manifest.content == "moments" else "latent"
    for start in range(0, len(numbers), BATCH):
        chosen = numbers[start : start + BATCH]
        stored = dataset[chosen][name].float()
        finite = stored.isfinite().flatten(1).all(1)
        if not finite.all():
            wrong = chosen[int((~finite).nonzero()[0])]
            raise UserError(f"{dataset.where}: sample {wrong} holds values that are not finite; {MAKE_AGAIN}")
        if name == "latent":
            yield normalizer.normalize(stored), None
            continue
        mean, logvar = stored.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator(0, "stats", start))
        yield normalizer.normalize(mean + torch.exp(0.5 * logvar) * noise), stored


def exact_figures(manifest: Manifest) -> list[dict[str, Any]]:
    """For each channel the manifest's `mean` and `std`, and from the sums of all shards `std_of_means` and
    `noise_share`, both None if no moments are stored."""
    latents = manifest.count * len(manifest.layout.names)
    values = latents * manifest.latent_shape[1] * manifest.latent_shape[2]
    mean, squared, variance = manifest.shard_index.sums.sum(axis=0) / values
    spread_of_means = np.maximum(squared - mean * mean, 0.0)
    noise = variance / np.maximum(spread_of_means + variance, 1e-300)
    has_moments = manifest.content == "moments"
    return [
        {
            "mean": manifest.statistics["mean"][channel],
            "std": manifest.statistics["std"][channel],
            "std_of_means": math.sqrt(spread_of_means[channel]) if has_moments else None,
            "noise_share": float(noise[channel]) if has_moments else None,
        }
        for channel in range(len(mean))
    ]


def recompute(manifest: Manifest, samples: int) -> dict[str, Any]:
    """Recompute `mean` and `std` from the values of `shards_read` shards, evenly spread and with about `samples`
    samples, and from the index for the others.

    Raises:
        UserError: a shard is missing or differs from the index.
        Disagreement: these values, the index and the manifest do not agree.
    """
    index, layout = manifest.shard_index, manifest.layout
    mean_count = max(1.0, index.count / max(1, len(index)))
    chosen = evenly(len(index), max(1, min(MOST_SHARDS, math.ceil(samples / mean_count))))
    sums = index.sums.copy()
    for number in map(int, chosen):
        shard = open_shard(manifest.where, number, index[number], layout, verify=False)
        stored = [torch.from_numpy(shard[name].copy()).view(STORED_DTYPES[manifest.dtype]) for name in layout.names]
        sums[number] = channel_sums(stored, manifest.latent_shape[0])
        if index[number].count:
            stated, values = (_constants(manifest, each[None], index[number].count)
                              for each in (index.sums[number], sums[number]))  # fmt: skip
            where = f"{manifest.where.location}: shard {number}"
            _compare(stated, values, where, "in the index", "in its values", MAKE_AGAIN)
    found = _constants(manifest, sums, manifest.count)
    _compare(manifest.statistics, found, str(manifest.where.location), f"in {MANIFEST}", "in the shards", RESTORE)
    return {"mean": found["mean"], "std": found["std"], "shards_read": len(chosen)}


def _constants(manifest: Manifest, sums: np.ndarray, samples: int) -> dict[str, Any]:
    latents = samples * len(manifest.layout.names)
    return combine(sums, latents, latents * manifest.latent_shape[1] * manifest.latent_shape[2])


def _compare(stated: dict[str, Any], found: dict[str, Any], where: str, there: str, here: str, advice: str) -> None:
    """Raises: Disagreement for the first channel whose constants differ by more than rounding, or are NaN."""
    for channel, scales in enumerate(zip(stated["mean"], stated["std"])):
        for name in ("mean", "std"):
            first, second = stated[name][channel], found[name][channel]
            if not abs(first - second) <= AGREEMENT * sum(map(abs, scales)):
                raise Disagreement(
                    f"{where}: channel {channel} has {name} {first} {there} and {second} {here}; {advice}"
                )


def measure_labels(manifest: Manifest) -> dict[str, Any]:
    """Number of samples of each class: `counts` by name, `unlabeled`, `smallest`, `largest`, `imbalance`."""
    labels = read_labels(manifest)
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.label_names))
    found: dict[str, Any] = {
        "classes": len(counts),
        "unlabelled": int((labels < 0).sum()),
        "counts": {label_text(manifest, number): int(count) for number, count in enumerate(counts)},
        "smallest": None, "largest": None, "imbalance": None,
    }  # fmt: skip
    if len(counts):
        for name, place in (("smallest", int(counts.argmin())), ("largest", int(counts.argmax()))):
            found[name] = {"name": label_text(manifest, place), "samples": int(counts[place])}
        if counts.min():
            found["imbalance"] = float(counts.max() / counts.min())
    return found


def measure_codes(dataset: LatentDataset, numbers: Sequence[int]) -> dict[str, Any]:
    """The use of the codebook, see `metrics.codebook_usage`; `shares` of the used codes, decreasing."""
    from ldm_vae.metrics import codebook_usage

    size = int(dataset.manifest.statistics["codebook_size"])
    parts = (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))
    codes = torch.cat([dataset[part]["indices"].flatten().int() for part in parts])
    if int(codes.max()) >= size or int(codes.min()) < 0:
        raise UserError(f"{dataset.where}: holds code {int(codes.max())}, codebook_size is {size}; {MAKE_AGAIN}")
    counts = torch.bincount(codes).sort(descending=True).values.double()
    shares = (counts[counts > 0] / len(codes)).tolist()
    preprocessing, (_, height, width) = dataset.manifest.preprocessing, dataset.manifest.latent_shape
    usage = codebook_usage(codes, size)
    pixels = preprocessing.get("height", 0) * preprocessing.get("width", 0)
    return {
        "codebook_size": size, "positions": len(codes), **usage, "most_common_share": shares[0],
        "bits_per_pixel": usage["entropy_bits"] * height * width / pixels if pixels else None, "shares": shares,
    }  # fmt: skip


def short_number(value: float | None) -> str:
    """Three digits; a dash for None."""
    return "–" if value is None else f"{value:.3g}"


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything that does not belong to one channel."""
    measured, samples = report["measured_samples"], report["samples"]
    of = "of all samples" if measured == samples else f"of {measured} of {samples} samples, evenly spread"
    rows = [("distribution", of)]
    if small := report.get("images_enlarged"):
        rows.append(("enlarged", f"{pluralize(small, 'image')} smaller than the crop, which blurs and hides errors"))
    if (codes := report.get("codes")) is not None:
        rows += [
            ("entropy", f"{codes['entropy_bits']:.2f} of {math.log2(codes['codebook_size']):.2f} bits a code"
                        + (f", {codes['bits_per_pixel']:.3g} bits per pixel" if codes["bits_per_pixel"] else "")),
            ("perplexity", f"{codes['perplexity']:.1f} of {codes['codebook_size']} codes"),
            ("dead codes", f"{100 * codes['dead_share']:.3g} %, over {codes['positions']} positions"),
            ("most common code", f"{100 * codes['most_common_share']:.3g} % of the positions"),
        ]  # fmt: skip
    else:
        read, shards = report["recomputed"]["shards_read"], report["shards"]
        rows.append(
            ("mean and std", f"agree with the sums of {pluralize(shards, 'shard')}, {read} of them summed again")
        )
        if (correlation := report["correlation"])["channels"]:
            first, second = correlation["channels"]
            rows.append(("largest correlation", f"{correlation['largest']:.3f}, channels {first} and {second}"))
    return [*rows, *_label_rows(report["labels"])]


def _label_rows(labels: dict[str, Any]) -> list[tuple[str, str]]:
    if not labels["classes"]:
        return [("labels", "none")]
    smallest, largest = labels["smallest"], labels["largest"]
    text = f"{labels['classes']}, {largest['samples']} samples each"
    if smallest != largest:
        ratio = f"{labels['imbalance']:.3g} times" if labels["imbalance"] else "some are empty"
        text = (f"{labels['classes']}, from {smallest['samples']} samples ({smallest['name']}) to "
                f"{largest['samples']} ({largest['name']}): {ratio}")  # fmt: skip
    rows = [("classes", text)]
    return [*rows, *([("without a label", str(labels["unlabelled"]))] if labels["unlabelled"] else [])]


def text_table(report: dict[str, Any]) -> str:
    """The report for a terminal: one row per channel, then the rest."""
    shape = "x".join(map(str, report["latent_shape"]))
    things = pluralize(report["samples"], "token map" if report["content"] == "indices" else "latent")
    lines = [f"{report['set']}: {things} of {shape} ({report['content']}, {report['dtype']})", ""]
    if "channels" in report:
        used = {key: title for key, title in COLUMNS.items() if report["channels"][0][key] is not None}
        rows = [["channel", *used.values()]]
        rows += [
            [str(n), *(short_number(channel[key]) for key in used)] for n, channel in enumerate(report["channels"])
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows]
        lines += ["; ".join(LEGEND[key] for key in LEGEND if key in used), ""]
    names = summary_rows(report)
    width = max(len(name) for name, _ in names)
    return "\n".join([*lines, *(f"{name.ljust(width)}  {value}" for name, value in names)])


# The shape of a set's distribution, accumulated batch by batch from latents as a trainer gets them.

HISTOGRAM_LIMIT, HISTOGRAM_BINS = 6.0, 120
TAIL = 4.0
"""In standard deviations; a Gaussian has 6.3e-5 of its values beyond this."""


class Shape:
    """The distribution of normalized latents, batch by batch, as sums in float64, in bounded memory."""

    def __init__(self, latent_shape: tuple[int, int, int], has_moments: bool) -> None:
        channels, height, width = latent_shape
        self.count = 0
        self.powers = torch.zeros(4, channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)
        self.neighbors = torch.zeros(2, channels, dtype=torch.float64)
        self.pairs = torch.tensor([(height - 1) * width, height * (width - 1)])
        self.counts = torch.zeros(channels, HISTOGRAM_BINS, dtype=torch.float64)
        self.beyond = torch.zeros(channels, dtype=torch.int64)
        self.minimum = torch.full((channels,), math.inf)
        self.maximum = torch.full((channels,), -math.inf)
        self.positions = torch.zeros(2, channels, height, width, dtype=torch.float64)
        self.posterior = torch.zeros(2, channels, dtype=torch.float64)
        self.has_moments = has_moments

    def add(self, latents: Tensor, moments: Tensor | None) -> None:
        """Add normalized latents (n, c, h, w), and their stored moments (n, 2c, h, w) if there are any."""
        self.count += len(latents)
        rows = latents.transpose(0, 1).flatten(1).double()
        power = rows
        for sums in self.powers:
            sums += power.sum(1)
            power = power * rows
        self.products += rows @ rows.T
        self.neighbors[0] += (latents[:, :, 1:] * latents[:, :, :-1]).double().sum((0, 2, 3))
        self.neighbors[1] += (latents[..., 1:] * latents[..., :-1]).double().sum((0, 2, 3))
        for channel, row in enumerate(rows):
            self.counts[channel] += torch.histc(row, HISTOGRAM_BINS, -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
        self.beyond += (rows.abs() > TAIL).sum(1)
        self.minimum = torch.minimum(self.minimum, latents.amin((0, 2, 3)))
        self.maximum = torch.maximum(self.maximum, latents.amax((0, 2, 3)))
        self.positions += torch.stack([latents.double().sum(0), latents.double().square().sum(0)])
        if moments is not None:
            mean, logvar = moments.chunk(2, dim=1)
            self.posterior[0] += torch.exp(0.5 * logvar).double().sum((0, 2, 3))
            self.posterior[1] += kl_divergence(mean, logvar).double().sum((0, 2, 3))

    @property
    def values(self) -> int:
        """Number of values of each channel."""
        return self.count * self.positions[0, 0].numel()

    def channels(self) -> list[dict[str, Any]]:
        """For each channel the figures of the table."""
        first, second, third, fourth = self.powers / self.values
        variance = (second - first.square()).clamp_min(1e-30)
        skewness = (third - 3 * first * second + 2 * first**3) / variance**1.5
        kurtosis = (fourth - 4 * first * third + 6 * first.square() * second - 3 * first**4) / variance.square() - 3
        pairs = self.pairs[:, None] * self.count
        neighbors = (self.neighbors.sum(0) / pairs.sum() - first.square()) / variance if pairs.sum() else None
        deviation, nats = self.posterior / self.values
        return [
            {
                "posterior_deviation": float(deviation[channel]) if self.has_moments else None,
                "nats": float(nats[channel]) if self.has_moments else None,
                "minimum": float(self.minimum[channel]),
                "maximum": float(self.maximum[channel]),
                "skewness": float(skewness[channel]),
                "excess_kurtosis": float(kurtosis[channel]),
                "tail_share": float(self.beyond[channel]) / self.values,
                "neighbour_correlation": float(neighbors[channel]) if neighbors is not None else None,
            }
            for channel in range(len(first))
        ]

    def correlation(self) -> dict[str, Any]:
        """`matrix` (c, c), and the `largest` correlation of two channels with its sign; None for a single channel."""
        first, second = self.powers[:2] / self.values
        deviation = (second - first.square()).clamp_min(1e-30).sqrt()
        matrix = (self.products / self.values - torch.outer(first, first)) / torch.outer(deviation, deviation)
        found: dict[str, Any] = {"matrix": matrix.tolist(), "largest": None, "channels": None}
        if len(matrix) > 1:
            rows, columns = torch.triu_indices(len(matrix), len(matrix), 1)
            place = int(matrix[rows, columns].abs().argmax())
            found["channels"] = [int(rows[place]), int(columns[place])]
            found["largest"] = float(matrix[rows[place], columns[place]])
        return found

    def histograms(self) -> dict[str, Any]:
        """Density of each channel between `edges`, which has one more entry."""
        edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1)
        density = self.counts / self.values / (edges[1] - edges[0])
        return {"edges": edges.round(6).tolist(), "density": [[float(f"{d:.4g}") for d in row] for row in density]}

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over samples at each position, (c, h, w)."""
        first, second = self.positions / self.count
        return first.numpy(), (second - first.square()).clamp_min(0).sqrt().numpy()
