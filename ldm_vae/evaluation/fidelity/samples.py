"""KID of a pipeline's samples to images that its training never saw.

Owns drawing the samples and the features of both sets; the estimator and the network are `distribution`'s. There is no
FID here: under some thousand samples it misleads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldm_vae.data.sources import ImageSource, open_source
from ldm_vae.data.split import subset
from ldm_vae.diffusion.arguments import image_generator
from ldm_vae.diffusion.kid import FEWEST, KidConfig
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.distribution import compare_sets, inception_features, load_inception
from ldm_vae.evaluation.fidelity.measurement import read_crops
from ldm_vae.training import watchdog

BATCH = 16


class SampleJudge:
    """Figures of a pipeline. The features of the held-out images are computed once, at the first call."""

    def __init__(self, config: KidConfig, images: ImageSource, network: Any) -> None:
        """
        Args:
            config: How many samples, and how they are compared.
            images: What they are compared with.
            network: 8-bit images (n, 3, h, w) -> (features (n, d),), such as `load_inception()`.

        Raises:
            UserError: too few images.
        """
        self.config, self.images, self.network = config, images, network
        check_count(len(images), "are held out")
        self.real: np.ndarray | None = None

    @torch.no_grad()
    def __call__(self, pipeline: Any) -> dict[str, float]:
        """`samples/kid@N` of N samples with its standard deviation over subsets, and `samples/kid_floor`: one half of
        the images against the other, which is what cannot be told from no difference."""
        self.network.to(pipeline.device)
        if self.real is None:
            self.real = self._real(pipeline.image_size(), pipeline.device)
        found = compare_sets(self.real, self._generated(pipeline), "kid", self.config.subset, seed=0)
        name = f"samples/kid@{self.config.samples}"
        return {
            name: found["kid"]["mean"],
            f"{name}_std": found["kid"]["std"],
            "samples/kid_floor": found["kid_floor"]["mean"],
        }

    def _real(self, size: tuple[int, int], device: torch.device) -> np.ndarray:
        features = []
        for first in range(0, len(self.images), BATCH):
            indices = list(range(first, min(first + BATCH, len(self.images))))
            _, images = read_crops(self.images, indices, size, [])
            if images is not None:
                features.append(self._features(images.to(device)))
        check_count(sum(map(len, features)), "of those held out can be read")
        return np.concatenate(features)

    def _generated(self, pipeline: Any) -> np.ndarray:
        """Sample i has class i in turn and the noise of (0, i)."""
        from tqdm import tqdm

        names, count = pipeline.labels, self.config.samples
        features = []
        for first in tqdm(range(0, count, BATCH), desc="samples for KID", dynamic_ncols=True, leave=False):
            numbers = range(first, min(first + BATCH, count))
            images = pipeline(
                [names[number % len(names)] for number in numbers] if names else None,
                num_images=len(numbers),
                num_inference_steps=self.config.steps,
                generator=[image_generator(0, number) for number in numbers],
                output_type="pt",
            ).images
            features.append(self._features(2 * images.to(pipeline.device) - 1))
        return np.concatenate(features)

    def _features(self, images: torch.Tensor) -> np.ndarray:
        """In float32 whatever the precision of the training around it, which may stand still for long meanwhile."""
        watchdog.advance()
        with torch.autocast(images.device.type, enabled=False):
            return inception_features(self.network, images.float())


def check_count(count: int, what: str) -> None:
    """Raises: UserError for fewer images than a KID needs."""
    if count < FEWEST:
        raise UserError(
            f"kid: {count} images {what}, and a KID to fewer than {FEWEST} would be noise; hold more out, or set "
            "kid.samples=0"
        )


def make_judge(config: KidConfig, held_out: float) -> SampleJudge:
    """The judge of a run that holds this fraction of the ids out. Raises: UserError for missing images or weights."""
    images = subset(open_source(config.data), "held_out", held_out)
    check_count(len(images), "are held out")
    return SampleJudge(config, images, load_inception(config.inception_weights))
