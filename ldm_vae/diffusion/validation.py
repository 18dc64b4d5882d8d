"""Validation in training: the flow loss on held-out latents, and whether samples repeat training latents.

The loss is always measured at the same times with the same noise. Both measurements can raise alarms; nothing here
stops a run. `fid` compares samples with held-out images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data import transforms
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.random import generator
from ldm_vae.utils.image_grid import GAP, PAPER, labeled_sheet

TIMES = 8
SMOOTHING = 0.1
"""Weight of a new log step in the running training loss."""
RISE = 0.01
"""A later held-out loss counts as worse if it is above the best one by this share, more than its usual variation."""


@torch.no_grad()
def validation_losses(unet: Any, latents: Tensor, labels: Tensor | None, shift: float) -> dict[float, float]:
    """Time -> mean squared velocity error, at the middles of eight equal parts of [0, 1], shifted.

    Args:
        unet: A `LatentUNet`, or a module with its call and its `velocity_target`.
        latents: Normalized, (n, c, h, w); the noise follows from their number and shape.
        labels: (n,), or None for an unconditional network.
        shift: Shift of the times toward noise.
    """
    rng = generator(0, "held_out", device=latents.device)
    losses = {}
    for number in range(TIMES):
        time = flow.shift_times(torch.tensor((number + 0.5) / TIMES), shift)
        times = time.expand(len(latents)).to(latents.device)
        noise = torch.randn(latents.shape, generator=rng, device=latents.device)
        velocity = unet(flow.interpolate(latents, noise, times), times, labels)
        losses[float(time)] = flow.velocity_loss(velocity, unet.velocity_target(latents, noise, times)).mean()
    return {time: float(loss) for time, loss in losses.items()}


def validation_metrics(losses: dict[float, float], of_training: dict[float, float]) -> dict[str, float]:
    """The logged metrics: the mean over the times, the loss at each time, and the difference of the mean from that of
    training latents, measured in the same way."""
    by_time = {f"held_out/flow_t{time:.3g}": loss for time, loss in losses.items()}
    mean, trained = (sum(values.values()) / len(values) for values in (losses, of_training))
    return {"held_out/flow": mean, "held_out/gap": mean - trained} | by_time


@dataclass(frozen=True)
class Overfitting:
    """The alarm: the held-out loss has risen since `step`, and the training loss fell."""

    step: int
    held_out: tuple[float, float]
    train: tuple[float, float]
    name: str = "overfitting"

    def sentence(self) -> str:
        return (
            f"overfitting: the held-out loss was best at step {self.step} ({self.held_out[0]:.4g}, now "
            f"{self.held_out[1]:.4g}) while the training loss fell from {self.train[0]:.4g} to {self.train[1]:.4g}; "
            "from here on the network memorizes its images: stop, use more images, or raise unet.dropout"
        )


class StopSuggestion:
    """Keeps the best held-out loss, and the training loss at that time."""

    def __init__(self, patience: float) -> None:
        """`patience`: largest share of the run without a better held-out loss."""
        self.patience = patience
        self.train = math.inf
        self.train_then = math.inf
        self.best = self.previous = self.last = math.inf
        self.best_step = self.last_step = 0
        self.reported = False

    def update_training(self, loss: float) -> None:
        """Call at each log step."""
        known = math.isfinite(self.train)
        self.train = self.train + SMOOTHING * (loss - self.train) if known else loss

    def update_held_out(self, step: int, loss: float) -> None:
        """Call at each validation, after `step` finished steps."""
        self.previous, self.last, self.last_step = self.last, loss, step
        if loss < self.best:
            self.best, self.best_step, self.train_then, self.reported = loss, step, self.train, False

    def alarm(self, steps: int) -> Overfitting | None:
        """The alarm if the last two losses are worse than a much earlier one; once until the loss improves again."""
        waited = self.last_step - self.best_step >= self.patience * steps
        risen = min(self.previous, self.last) > (1 + RISE) * self.best
        if self.reported or not waited or not risen or self.train >= self.train_then:
            return None
        self.reported = True
        return Overfitting(self.best_step, (self.best, self.last), (self.train_then, self.train))

    def summary(self, step: int, snapshots: Sequence[int]) -> str:
        """For a finished run: the best step for held-out latents, and how to get its weights."""
        if not math.isfinite(self.best):
            return "no latents were held out"
        if self.best_step == step:
            return f"the held-out loss was best at the end ({self.best:.4g}): a longer run may be better"
        words = f"the held-out loss was best at step {self.best_step} ({self.best:.4g}, now {self.last:.4g})"
        if not snapshots:
            return words
        near = min(snapshots, key=lambda number: abs(number - self.best_step))
        return f"{words}: `ldm-vae model ema RUN lengths=0.05 step={near} output=DIR` writes the pipeline of that time"

    def state_dict(self) -> dict[str, Any]:
        """The exact state; floats in hexadecimal, since JSON has no infinity. `reported` is saved as `said`."""
        values = {name: value for name, value in vars(self).items() if name not in ("patience", "reported")}
        values = {name: value.hex() if isinstance(value, float) else value for name, value in values.items()}
        return values | {"said": self.reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            name = "reported" if key == "said" else key
            setattr(self, name, float.fromhex(value) if isinstance(value, str) else value)


# Memorization: whether samples are copies of training latents; nearest neighbors, the copy rate, a sheet of pairs.

COPY_RATIO = 1 / 3
CHUNK = 256


@dataclass(frozen=True)
class Neighbors:
    """For each of n samples, all (n,): the number of the nearest training image, the number of its latent that is
    nearest (1: that of its mirror image), and |x - x1| / |x - x2| for the nearest image and the next."""

    nearest: Tensor
    versions: Tensor
    ratios: Tensor

    @property
    def copies(self) -> int:
        return int((self.ratios < COPY_RATIO).sum())


@dataclass(frozen=True)
class Copies:
    """The number of samples that are copies of a training latent; the alarm of a preview."""

    copies: int
    samples: int
    compared: int
    name: str = "copies"

    def sentence(self) -> str:
        return (
            f"copies: {self.copies} of {self.samples} preview samples have less than a third of the distance to one "
            f"of {self.compared} training latents that they have to any other: the network repeats its images; view "
            "the preview, stop earlier, use more images, or raise unet.dropout"
        )


def find_neighbors(samples: Tensor, training: Tensor) -> Neighbors:
    """Euclidean neighbors of normalized latents among those of training images.

    The distance of an image is that of its nearest latent, so its mirror image is never the second neighbor.

    Args:
        samples: (n, c, h, w).
        training: (m, v, c, h, w) of any precision, v latents of each of m images, m at least 2: `known_latents`.
    """
    assert len(training) >= 2, "find_neighbors: fewer than two training images"
    flat = samples.float().flatten(1).cpu()
    parts, versions = [], []
    for chunk in training.cpu().split(CHUNK):
        rows = chunk.float().flatten(2).flatten(0, 1)
        distances = torch.cdist(flat, rows, compute_mode="donot_use_mm_for_euclid_dist")  # exact near 0
        closest = distances.unflatten(1, chunk.shape[:2]).min(2)
        parts.append(closest.values)
        versions.append(closest.indices)
    (first, second), (nearest, _) = (found.unbind(1) for found in torch.cat(parts, 1).topk(2, largest=False))
    version = torch.cat(versions, 1).gather(1, nearest[:, None])[:, 0]
    return Neighbors(nearest, version, first / second.clamp(min=torch.finfo(torch.float32).tiny))


def known_latents(dataset: LatentDataset, normalizer: LatentNormalizer, count: int) -> Tensor:
    """Latents of at most `count` images, evenly spread, normalized, half precision: (m, v, c, h, w).

    Posterior means of the images and, if they are stored (v = 2), of their mirror images: encoding does not commute
    with mirroring, and a network trained on both can repeat both.
    """
    count = min(count, len(dataset))
    chosen = (index * len(dataset) // count for index in range(count))
    return torch.stack([normalizer.normalize(dataset.versions(index)).half() for index in chosen])


@torch.no_grad()
def compare_with_training(
    pipeline: LatentDiffusionPipeline,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    training: LatentDataset,
    compared: int,
) -> tuple[Image.Image, Copies]:
    """A sheet of finished images, encoded again, beside their neighbors, and the number of copies.

    Args:
        pipeline: The pipeline of the images.
        images: Of the size of the training images.
        captions: One per image, or none.
        training: The training latents of the pipeline.
        compared: Largest number of training images to compare with, evenly spread, with stored mirror images.
    """
    known = known_latents(training, pipeline.normalizer, compared)
    neighbors = find_neighbors(torch.cat([_encode(pipeline, image) for image in images]), known)
    nearest = pipeline.normalizer.denormalize(known[neighbors.nearest, neighbors.versions].float())
    below = [transforms.to_pil(pipeline.decode(latent.to(pipeline.device)))[0] for latent in nearest.split(1)]
    return neighbor_sheet(images, below, neighbors.ratios, captions), Copies(neighbors.copies, len(images), len(known))


def _encode(pipeline: LatentDiffusionPipeline, image: Image.Image) -> Tensor:
    """Normalized posterior mean (1, c, h, w), on the CPU."""
    tensor = transforms.from_uint8(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None])
    return pipeline.normalizer.normalize(pipeline.autoencoder.encode_moments(tensor.to(pipeline.device))[0]).cpu()


def neighbor_sheet(
    samples: Sequence[Image.Image], nearest: Sequence[Image.Image], ratios: Tensor, labels: Sequence[str] = ()
) -> Image.Image:
    """A sheet of pairs: the generated image above, its nearest training latent decoded below, the ratio as text."""
    pairs, captions = [], []
    names = labels or [f"sample {number}" for number in range(1, len(samples) + 1)]
    for above, below, name, ratio in zip(samples, nearest, names, ratios.tolist(), strict=True):
        pair = Image.new("RGB", (above.width, 2 * above.height + GAP), PAPER)
        pair.paste(above, (0, 0))
        pair.paste(below.resize(above.size), (0, above.height + GAP))
        pairs.append(pair)
        captions.append(f"{name}\n" + ("copy " if ratio < COPY_RATIO else "nearest ") + f"{ratio:.2f}")
    return labeled_sheet(pairs, captions, side=2 * 192 + GAP)


def stack_samples(dataset: LatentDataset, count: int) -> dict[str, Tensor]:
    """At most `count` samples as tensors, evenly spread, since folders are often sorted by class."""
    count = min(count, len(dataset))
    samples = [dataset.sample(index * len(dataset) // count, index) for index in range(count)]
    return {
        "latent": torch.stack([sample["latent"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }
