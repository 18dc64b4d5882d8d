"""Measuring images: read, encode, decode, put the baselines beside it, and one value per image and metric.

A unit of work is a fixed stretch of the chosen images and is one batch, so nothing depends on the number of processes.
What the values are worth together (means, intervals, tables) is `summary`'s.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.klt import BlockKLT, Moments, block_moments, solve_klt
from ldm_vae.autoencoder.losses import LPIPS, Backbone
from ldm_vae.autoencoder.rate import bits_per_pixel, kl_divergence
from ldm_vae.data import transforms
from ldm_vae.data.samples import Rejected, evenly_spaced, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part
from ldm_vae.diffusion.fid import Distribution, check_distribution, inception_features
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.random import generator
from ldm_vae.training.distributed import Processes
from ldm_vae.utils.image_grid import plain_grid

BASELINE_UNIT = 8
"""Images whose block moments are summed before they travel."""


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

    `rate_known` is False for a deterministic autoencoder: its KL is not a rate and a sample is its mean. Without
    a codebook the codecs then have no budget.
    """

    autoencoder: Autoencoder
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
        channels, factor = self.autoencoder.latent_channels, self.autoencoder.downsampling
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
        mean, logvar = self.autoencoder.encode_moments(images)
        unit.nats = kl_divergence(mean, logvar).mean(dim=(1, 2, 3)).tolist()
        noise = torch.stack([_noise(self.config.seed, name, mean.shape[1:]) for name in unit.ids]).to(self.device)
        rows = {"decode(mean)": self.autoencoder.decode_images(mean)}
        if self.rate_known:
            rows["decode(sample)"] = self.autoencoder.decode_images(mean + torch.exp(0.5 * logvar) * noise)
        rows |= self._untrained(images, unit)
        rows = {name: transforms.from_uint8(transforms.to_uint8(row)) for name, row in rows.items()}
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
        factor, components = self.klt.block, min(self.autoencoder.latent_channels, len(self.klt.eigenvalues))
        rows = {f"bicubic {factor}x": bicubic_round_trip(images, factor)}
        budgets = self.budgets(unit.nats)
        for codec in self.config.codecs if budgets is not None else ():
            name = f"{codec}, equal bytes"
            rows[name], coded = code_images(images, codec, budgets or [])
            unit.files[name] = [
                {"bytes": one.size_bytes, "quality": one.quality, "within_budget": one.fits} for one in coded
            ]
        rows[f"block KLT, {components} components"] = self.klt.reconstruct(images, components).clamp(-1, 1)
        return rows


def measure_images(measurer: Measurer, source: ImageSource, indices: list[int], processes: Processes) -> Unit:
    """All images at `indices` together, on every process, in their order."""
    batch = measurer.config.batch
    units = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    shown = {indices[i] for i in evenly_spaced(len(indices), measurer.config.examples)}
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
        processes.share(units),
        desc=task,
        unit="batch",
        dynamic_ncols=True,
        leave=False,
        disable=not processes.is_main_process,
    )


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


# Baselines without training: image codecs at an equal number of bytes, and bicubic scaling.

CODEC_SETTINGS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"},
    "WebP": {"format": "WEBP", "method": 4},
    "AVIF": {"format": "AVIF", "speed": 6, "subsampling": "4:2:0", "max_threads": 1},
}
QUALITIES = {"JPEG": (1, 95), "WebP": (0, 100), "AVIF": (0, 100)}
"""Lowest and highest; Pillow discourages JPEG above 95."""

NEIGHBORS = 3
"""Sizes rise with the quality but for small exceptions: so many qualities above the answer are tried too."""


@dataclass(frozen=True)
class CodedImage:
    """An image through a codec: `picture` decoded, `size_bytes` of the file, `fits`: whether within the budget."""

    picture: Image.Image
    size_bytes: int
    quality: int
    fits: bool


def available_codecs() -> tuple[str, ...]:
    """Those of JPEG, WebP and AVIF that this Pillow can write."""
    supported = {"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}
    return tuple(name for name, feature in supported.items() if features.check(feature))


def encode_picture(picture: Image.Image, codec: str, quality: int) -> bytes:
    """The file of an RGB picture."""
    buffer = io.BytesIO()
    picture.save(buffer, quality=quality, **CODEC_SETTINGS[codec])
    return buffer.getvalue()


def code_within(picture: Image.Image, codec: str, budget_bytes: float) -> CodedImage:
    """The largest file of at most `budget_bytes`, or that of the lowest quality where none is small enough."""
    lowest, highest = QUALITIES[codec]
    files: dict[int, bytes] = {}

    def size(quality: int) -> int:
        if quality not in files:
            files[quality] = encode_picture(picture, codec, quality)
        return len(files[quality])

    best = largest_within(size, lowest, highest, budget_bytes)
    quality = lowest if best is None else best
    length = size(quality)
    decoded = Image.open(io.BytesIO(files[quality])).convert("RGB")
    return CodedImage(decoded, length, quality, best is not None)


def largest_within(size: Callable[[int], int], lowest: int, highest: int, budget: float) -> int | None:
    """The quality of the largest size within the budget, by bisection and a look at its upper neighbors."""
    low, high = lowest - 1, highest + 1  # low fits (or is below the lowest), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    candidates = range(max(lowest, low), min(highest, low + NEIGHBORS) + 1)
    fitting = [quality for quality in candidates if size(quality) <= budget]
    return max(fitting, key=lambda quality: (size(quality), quality)) if fitting else None


def code_images(images: Tensor, codec: str, budgets_bytes: list[float]) -> tuple[Tensor, list[CodedImage]]:
    """Images (n, 3, h, w) in [-1, 1] through the codec -> decoded, the same shape and range, and each file's record."""
    coded = [
        code_within(picture, codec, budget)
        for picture, budget in zip(transforms.to_pil(images.cpu()), budgets_bytes, strict=True)
    ]
    rows = [torch.from_numpy(np.array(one.picture)).permute(2, 0, 1) for one in coded]
    return transforms.from_uint8(torch.stack(rows)).to(images.device), coded


def bicubic_round_trip(images: Tensor, factor: int) -> Tensor:
    """Images (n, 3, h, w) scaled down by `factor` and up again, bicubic, antialiased, rounded to 8 bits in between.

    The small picture has 3 numbers per factor**2 pixels, its bytes are not counted.
    """
    scaled = []
    for picture in transforms.to_pil(images.cpu()):
        small = picture.resize(
            (max(1, picture.width // factor), max(1, picture.height // factor)), Image.Resampling.BICUBIC
        )
        restored = small.resize(picture.size, Image.Resampling.BICUBIC)
        scaled.append(torch.from_numpy(np.array(restored)).permute(2, 0, 1))
    return transforms.from_uint8(torch.stack(scaled)).to(images.device)


# Pictures to look at: an image, its latent, its reconstructions and what is lost; PNG files and one grid.

DIFFERENCE_GAIN = 8
GRID_COLUMNS = ("original", "decoded", "difference")


@dataclass(frozen=True)
class Example:
    """One evaluated image; `pictures`: original, decoded, linear, difference and latent."""

    id: str
    label: str
    pictures: dict[str, Image.Image]


def make_example(id: str, label: str, original: Tensor, decoded: Tensor, linear: Tensor, mean: Tensor) -> Example:
    """Images (3, h, w) in [-1, 1] and the latent mean (c, h/f, w/f) -> an example."""
    difference = (DIFFERENCE_GAIN * (decoded - original)).clamp(-1, 1)
    images = {"original": original, "decoded": decoded, "linear": linear, "difference": difference}
    pictures = {name: transforms.to_pil(image[None].cpu())[0] for name, image in images.items()}
    pictures["latent"] = transforms.to_pil(latent_colors(mean)[None].cpu())[0]
    return Example(id, label, pictures)


def latent_colors(latent: Tensor) -> Tensor:
    """A latent (c, h, w) as a false-color image (3, h, w) in [-1, 1].

    Red, green and blue are its three strongest directions over the channels, each stretched between its 2nd
    and 98th percentile. Fewer than three channels repeat the last one.
    """
    channels = latent.float().flatten(1)
    channels = channels - channels.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(channels @ channels.T)
    directions = vectors.flip(1).T[:3]
    directions = torch.where(directions.sum(dim=1, keepdim=True) < 0, -directions, directions)
    projected = directions @ channels
    projected = projected[[min(row, len(projected) - 1) for row in range(3)]]
    low, high = projected.quantile(torch.tensor([0.02, 0.98], device=latent.device), dim=1, keepdim=True)
    stretched = (projected - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return stretched.clamp(-1, 1).view(3, *latent.shape[1:])


def example_records(found: list[Example]) -> list[dict[str, Any]]:
    """What results say of the examples; `files`: the picture's name -> its file."""
    return [
        {
            "id": example.id,
            "label": example.label,
            "files": {name: f"{number:02d}_{name}.png" for name in example.pictures},
        }
        for number, example in enumerate(found)
    ]


def grid(found: list[Example]) -> Image.Image:
    """One row per example: original, reconstruction, difference times 8 on gray."""
    return plain_grid([[example.pictures[name] for name in GRID_COLUMNS] for example in found])


@dataclass(frozen=True)
class EvaluateConfig:
    """`ldm-vae evaluate`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the results.
        part: held_out (what training never saw), train or all.
        resolution: side of the center crop in pixels, a multiple of the downsampling.
        count: at most so many images, evenly spread over the part; null: all.
        baseline_images: at most so many training images fit the linear baseline.
        codecs: image codecs at equal bytes: JPEG, WebP, AVIF; `[]` for none.
        equal_bytes_bits_per_pixel: the codecs' budget; null: the rate of the autoencoder, image by image.
        perceptual_net: the LPIPS network; null: no LPIPS.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        distribution: kid or fid (with KID) of the reconstructions; none.
        fid: `force` prints a FID of fewer than 5,000 images, which misleads.
        inception_weights: a local file of torch-fidelity's Inception weights; null: its download.
        kid_subset: images in each of KID's subsets; a quarter of the images where that is less.
        batch: images per forward pass.
        examples: images kept to look at.
        seed: of the posterior samples and of KID's subsets.
        device: auto, cpu, cuda, cuda:1 ... Under torchrun, auto and cuda give each process its own GPU.
        processes: how many processes must have been launched; null: any number.
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 512
    count: int | None = None
    baseline_images: int = 128
    codecs: list[str] = field(default_factory=lambda: ["JPEG", "WebP"])
    equal_bytes_bits_per_pixel: float | None = None
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    distribution: Distribution = "none"
    fid: Literal["refuse", "force"] = "refuse"
    inception_weights: str | None = None
    kid_subset: int = 200
    batch: int = 4
    examples: int = 6
    seed: int = 0
    device: str = "auto"
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "baseline_images", "examples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")
        if self.count is not None and self.count < 1:
            raise UserError(f"count: {self.count} is not above 0; leave it out for all images")
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")
        if self.kid_subset < 2:
            raise UserError(f"kid_subset: {self.kid_subset} is below 2; 100 to 1000 is usual")
        for codec in self.codecs:
            if codec not in available_codecs():
                available = ", ".join(available_codecs())
                raise UserError(f"codecs: {codec!r} cannot be written here; choose among {available}")
        bits = self.equal_bytes_bits_per_pixel
        if bits is not None and bits <= 0:
            raise UserError(f"equal_bytes_bits_per_pixel: {bits} is not above 0")
        if bits is not None and not self.codecs:
            raise UserError("equal_bytes_bits_per_pixel: has no effect without codecs; leave it out")
        check_distribution(self.distribution, self.fid, self.inception_weights)
