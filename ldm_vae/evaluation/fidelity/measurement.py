"""Measuring images: read, encode, decode, put the baselines beside it, and one value per image and metric.

A unit of work is a fixed stretch of the chosen images and is one batch, so nothing depends on the number of processes.
What the values are worth together (means, intervals, tables) is `summary`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.autoencoder.interface import decode, encode_moments
from ldm_vae.autoencoder.klt import BlockKLT, Moments, block_moments, solve_klt
from ldm_vae.autoencoder.models import downsampling, latent_channels
from ldm_vae.autoencoder.perceptual import LPIPS
from ldm_vae.autoencoder.rate import bits_per_pixel, kl_divergence
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.sources import ImageSource
from ldm_vae.data.transforms import cover_crop
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.evaluation.fidelity import baselines
from ldm_vae.evaluation.fidelity.distribution import inception_features
from ldm_vae.evaluation.fidelity.examples import Example, make_example
from ldm_vae.evaluation.fidelity.processes import Processes
from ldm_vae.random import generator

if TYPE_CHECKING:
    from ldm_vae.evaluation.fidelity.reconstruction import EvaluateConfig

BASELINE_UNIT = 8
"""Images whose block moments are summed before they travel."""

Rejected = list[tuple[str, str]]


@dataclass
class Unit:
    """One batch measured: one entry per image in `ids`, `nats`, each `rows[row][metric]` and each `files[row]`."""

    ids: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    real_features: list[np.ndarray] = field(default_factory=list)
    decoded_features: list[np.ndarray] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    rejected: Rejected = field(default_factory=list)

    def extend(self, other: Unit) -> None:
        for name in ("ids", "nats", "real_features", "decoded_features", "examples", "rejected"):
            getattr(self, name).extend(getattr(other, name))
        for row, named in other.rows.items():
            for metric, values in named.items():
                self.rows.setdefault(row, {}).setdefault(metric, []).extend(values)
        for row, records in other.files.items():
            self.files.setdefault(row, []).extend(records)


@dataclass(frozen=True)
class Measurer:
    """What every batch needs. `code_bits_per_pixel`: of a deterministic code, whose rate is not a divergence.

    `rate_known` is False for a deterministic autoencoder: its KL is no rate and a sample is its mean. Without
    a codebook the codecs then have no budget.
    """

    autoencoder: Any
    klt: BlockKLT
    lpips: LPIPS | None
    inception: Any
    config: EvaluateConfig
    device: torch.device
    code_bits_per_pixel: float | None = None
    rate_known: bool = True

    def budgets(self, nats: list[float]) -> list[float] | None:
        """Bytes that a codec may use for each image; None where there is nothing to be equal to."""
        pixel_count = self.config.resolution**2
        given = self.config.equal_bytes_bits_per_pixel
        if given is None and self.code_bits_per_pixel is not None:
            given = self.code_bits_per_pixel
        if given is not None:
            return [given * pixel_count / 8] * len(nats)
        if not self.rate_known:
            return None
        channels, factor = latent_channels(self.autoencoder), downsampling(self.autoencoder)
        return [bits_per_pixel(value, channels, factor) * pixel_count / 8 for value in nats]

    @torch.no_grad()
    def measure(self, source: ImageSource, indices: list[int], shown: set[int]) -> Unit:
        """Reconstruct and measure the images at `indices`. The posterior noise of an image depends on its id only."""
        unit = Unit()
        found, batch = read_crops(source, indices, self.config.resolution, unit.rejected)
        if batch is None:
            return unit
        images = batch.to(self.device)
        unit.ids = [source.id(index) for index in found]
        mean, logvar = encode_moments(self.autoencoder, images)
        unit.nats = kl_divergence(mean, logvar).mean(dim=(1, 2, 3)).tolist()
        noise = torch.stack([_noise(self.config.seed, name, mean.shape[1:]) for name in unit.ids]).to(self.device)
        rows = {"decode(mean)": decode(self.autoencoder, mean)}
        if self.rate_known:
            rows["decode(sample)"] = decode(self.autoencoder, mean + torch.exp(0.5 * logvar) * noise)
        rows |= self._untrained(images, unit)
        rows = {name: pixels.from_uint8(pixels.to_uint8(row)) for name, row in rows.items()}
        for name, row in rows.items():
            measured = all_metrics(row, images, self.lpips)
            unit.rows[name] = {metric: values.tolist() for metric, values in measured.items()}
        decoded, *_, linear = rows.values()
        if self.inception is not None:
            unit.real_features = list(inception_features(self.inception, images))
            unit.decoded_features = list(inception_features(self.inception, decoded))
        for i, index in enumerate(found):
            if index in shown:
                label = source.label_names[source.label(index)] if source.label(index) >= 0 else ""
                unit.examples.append(make_example(unit.ids[i], label, images[i], decoded[i], linear[i], mean[i]))
        return unit

    def _untrained(self, images: Tensor, unit: Unit) -> dict[str, Tensor]:
        """The rows of the baselines; the linear one is the last."""
        factor, components = self.klt.block, min(latent_channels(self.autoencoder), len(self.klt.eigenvalues))
        rows = {f"bicubic {factor}x": baselines.bicubic_round_trip(images, factor)}
        budgets = self.budgets(unit.nats)
        for codec in self.config.codecs if budgets is not None else ():
            name = f"{codec}, equal bytes"
            rows[name], coded = baselines.code_images(images, codec, budgets or [])
            unit.files[name] = [
                {"bytes": one.size_bytes, "quality": one.quality, "within_budget": one.fits} for one in coded
            ]
        rows[f"block KLT, {components} components"] = self.klt.reconstruct(images, components).clamp(-1, 1)
        return rows


def measure_images(measurer: Measurer, source: ImageSource, indices: list[int], processes: Processes) -> Unit:
    """All images at `indices` together, on every process, in their order."""
    batch = measurer.config.batch
    units = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    shown = {indices[i] for i in spread(len(indices), measurer.config.examples)}
    share = _progress(processes, units, "evaluating")
    found = [(number, measurer.measure(source, unit, shown)) for number, unit in share]
    whole = Unit()
    for unit in processes.gather(found):
        whole.extend(unit)
    return whole


def fit_baseline(
    source: ImageSource, indices: list[int], resolution: int, block: int, processes: Processes
) -> BlockKLT:
    """The linear baseline, its images shared among the processes; the sums are added in a fixed order."""
    units = [indices[start : start + BASELINE_UNIT] for start in range(0, len(indices), BASELINE_UNIT)]
    found: list[tuple[int, Moments | None]] = []
    for number, unit in _progress(processes, units, "linear baseline"):
        _, images = read_crops(source, unit, resolution, [])
        found.append((number, None if images is None else block_moments(images, block)))
    return solve_klt((moments for moments in processes.gather(found) if moments is not None), block)


def _progress(processes: Processes, units: list[list[int]], task: str) -> Any:
    """This process's share of the units with a progress bar on the main process."""
    from tqdm import tqdm

    return tqdm(
        processes.share(units), desc=task, unit="batch", dynamic_ncols=True, leave=False, disable=not processes.is_main
    )


def read_crops(
    source: ImageSource, indices: list[int], resolution: int | tuple[int, int], rejected: Rejected
) -> tuple[list[int], Tensor | None]:
    """The indices that could be read, and their centre crops (n, 3, h, w) in [-1, 1], of a side or of (h, w).

    The others are appended to `rejected` as (id, reason). None where none is left.
    """
    found: list[int] = []
    images: list[Tensor] = []
    for index in indices:
        try:
            crop = cover_crop(source.read(index), resolution)
        except ImageRejected as error:
            rejected.append((source.id(index), error.reason))
        else:
            found.append(index)
            images.append(pixels.from_uint8(torch.from_numpy(crop.copy()).permute(2, 0, 1)))
    return found, torch.stack(images) if images else None


def none_readable(where: str, count: int, rejected: Rejected) -> UserError:
    """What to say where all of `count` images were rejected."""
    reasons = ", ".join(sorted({reason for _, reason in rejected}))
    return UserError(f"{where}: no image of {count} could be read ({reasons})")


def crops(source: ImageSource, indices: list[int], resolution: int) -> Iterator[Tensor]:
    """One readable image (1, 3, resolution, resolution) in [-1, 1] after another."""
    for index in indices:
        _, image = read_crops(source, [index], resolution, [])
        if image is not None:
            yield image


def spread(count: int, wanted: int | None) -> list[int]:
    """`wanted` indices evenly spread over range(count); all of them for None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, wanted).round()]


def codebook_size(autoencoder: Any) -> int | None:
    """Number of codes of a quantizing autoencoder (ours, or diffusers' VQModel); None for the others."""
    size = getattr(autoencoder, "codebook_size", None) or getattr(autoencoder.config, "num_vq_embeddings", None)
    return None if size is None else int(size)


@torch.no_grad()
def all_metrics(images: Tensor, references: Tensor, lpips: LPIPS | None) -> dict[str, Tensor]:
    """Every metric of images (n, 3, h, w) in [-1, 1], each (n,). MS-SSIM where the sides allow it."""
    values = {
        "psnr": metrics.psnr(images, references),
        "ssim": metrics.ssim(images, references),
        "ssim_luma": metrics.ssim_luma(images, references),
    }
    if min(images.shape[-2:]) >= metrics.MS_SSIM_SMALLEST_SIDE:
        values["ms_ssim"] = metrics.ms_ssim(images, references)
    if lpips is not None:
        values["lpips"] = lpips(images, references)
    return values | {"sharpness": metrics.sharpness_ratio(images, references)}


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "evaluation", name))
