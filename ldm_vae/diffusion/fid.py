"""KID and FID: the distance of two sets of images in Inception features; and the KID of samples.

Contains the network, the two estimators and the rules for when they are reported. Reconstructions are measured with the
same functions. The features are those of the TensorFlow Inception of 2015 in torch-fidelity's port, with TensorFlow's
resizing, as in the literature.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm_vae import runtime
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.data import open_source, transforms
from ldm_vae.data.samples import Enlarged, enlarged_sentences, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import subset
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, image_generator
from ldm_vae.errors import UserError
from ldm_vae.files import check_tensor_file
from ldm_vae.random import numpy_rng
from ldm_vae.training import watchdog
from ldm_vae.utils.progress import track
from ldm_vae.utils.text import pluralize

logger = logging.getLogger(__name__)

Distribution = Literal["none", "kid", "fid"]

FEWEST_FOR_FID = 5000
FEATURES = 2048
KID_SUBSETS = 100


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def check_distribution(distribution: Distribution, fid: str, weights: str | None, images: int | None = None) -> None:
    """Raises: UserError for settings without effect, and for a FID of too few `images`."""
    if distribution == "none" and weights is not None:
        raise UserError("inception_weights: has no effect with distribution=none; set distribution=kid or fid")
    if distribution != "fid" and fid == "force":
        raise UserError(f"fid: force has no effect with distribution={distribution}; set distribution=fid")
    if distribution != "none" and images is not None and images < 4:
        raise UserError(
            f"distribution: {pluralize(images, 'image')} are too few; give at least 4, or distribution=none"
        )
    if distribution == "fid" and fid != "force" and images is not None and images < FEWEST_FOR_FID:
        raise UserError(
            f"distribution: FID of {images} images would mislead (its bias falls with 1/N, and its covariance has no "
            f"full rank below {FEATURES}); give {FEWEST_FOR_FID} images or more, use distribution=kid, or set fid=force"
        )


def load_inception(weights: str | None = None) -> Any:
    """The network, frozen. `weights`: a local file, safetensors or torch-fidelity's .pth; None: its download.

    Raises:
        UserError: the weights are not available. They are never replaced by random ones.
    """
    runtime.repair_torchvision()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("distribution: needs torch-fidelity; run `pip install 'ldm_vae[fid]'`") from error
    tensors = _downloaded() if weights is None else _from_file(Path(weights))
    # Its constructor reads any pickle. It gets a pickle that was written here, from safely read tensors.
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", [str(FEATURES)], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"inception_weights={weights}: is not the Inception of FID ({reason}); give torch-fidelity's "
            "weights-inception-2015-12-05, or leave it out to let torch-fidelity download it"
        ) from error
    check_finite(network.state_dict(), f"inception_weights={weights}")
    return network


def _from_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(
            f"inception_weights={path}: no such file; give a local file of torch-fidelity's "
            "weights-inception-2015-12-05 (.pth or safetensors), or leave it out to let torch-fidelity download it"
        )
    try:
        if path.suffix == ".safetensors":
            check_tensor_file(path)
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can cause any error
        raise UserError(
            f"inception_weights={path}: cannot be read as tensors ({str(error).splitlines()[0]}); give a .pth or "
            "safetensors file of weights alone"
        ) from error


def _downloaded() -> dict[str, Tensor]:
    """torch-fidelity's own file. Its name contains the start of its sha256, which is checked."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        return torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", progress=True, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"distribution: the Inception weights could not be downloaded ({error}); give a local file of them as "
            "inception_weights=FILE, or set distribution=none"
        ) from error


@torch.no_grad()
def inception_features(network: Any, images: Tensor) -> np.ndarray:
    """Images (n, 3, h, w) in [-1, 1], rounded to 8 bits -> (n, 2048) float32."""
    return network(transforms.to_uint8(images))[0].float().cpu().numpy()


def squared_mmd(x: np.ndarray, y: np.ndarray, paired: bool = False) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of features (n, d) and (m, d), kernel
    (x·y / d + 1)^3: KID (Bińkowski et al., arXiv:1801.01401, eq. 4). Can be below 0.

    Args:
        paired: y[i] was made from x[i], for example as a reconstruction. The pairs are not independent, so k(x[i],
            y[i]) is left out (Gretton et al. 2012, eq. 4). Otherwise a copy of x would have a negative distance.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    (n, dimensions), m = x.shape, len(y)
    if min(n, m) < 2:
        raise ValueError(f"squared_mmd: {n} and {m} samples; give at least 2 of each")
    if paired and n != m:
        raise ValueError(f"squared_mmd: {n} and {m} samples; give the same number of each for pairs")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / dimensions + 1) ** 3

    def off_diagonal_mean(a: np.ndarray) -> float:
        return (a.sum() - np.trace(a)) / (len(a) * (len(a) - 1))

    across = kernel(x, y)
    within = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
    return float(within - 2 * (off_diagonal_mean(across) if paired else across.mean()))


def kid(
    x: np.ndarray,
    y: np.ndarray,
    subset_size: int,
    subsets: int = KID_SUBSETS,
    seed: int = 0,
    paired: bool = False,
) -> Estimate:
    """KID over random subsets of `subset_size`, drawn without replacement; pairs have the same subset."""
    rng = numpy_rng(seed, "kid")
    values = []
    for _ in range(subsets):
        chosen = rng.permutation(len(x))[:subset_size]
        other = chosen if paired else rng.permutation(len(y))[:subset_size]
        values.append(squared_mmd(x[chosen], y[other], paired))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def frechet_distance(
    mean_x: np.ndarray, covariance_x: np.ndarray, mean_y: np.ndarray, covariance_y: np.ndarray
) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of two Gaussians (Dowson & Landau 1982), >= 0.

    The trace of the root is computed from the symmetric (C_x^(1/2) C_y C_x^(1/2))^(1/2): real, for any rank.
    """
    values, vectors = np.linalg.eigh(covariance_x)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_y @ root).clip(0)).sum()
    distance = np.square(mean_x - mean_y).sum() + np.trace(covariance_x) + np.trace(covariance_y) - 2 * cross
    return float(max(distance, 0.0))


def frechet_of_features(x: np.ndarray, y: np.ndarray) -> float:
    """`frechet_distance` of the sample means and (unbiased) covariances of features (n, d) and (m, d): FID.

    With fewer samples than dimensions, the trace of the root is the sum of the singular values of X Y^T (centered,
    scaled), since C_x C_y and (X Y^T)(X Y^T)^T have the same eigenvalues. These matrices are smaller.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(
            x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)), y.mean(0), np.atleast_2d(np.cov(y, rowvar=False))
        )
    centered_x = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    centered_y = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(centered_x @ centered_y.T, compute_uv=False).sum()
    spread = np.square(centered_x).sum() + np.square(centered_y).sum()
    return float(max(np.square(x.mean(0) - y.mean(0)).sum() + spread - 2 * cross, 0.0))


def compare_sets(
    real: np.ndarray,
    made: np.ndarray,
    distribution: Distribution,
    subset_size: int,
    seed: int,
    paired: bool = False,
) -> dict[str, Any]:
    """The entry `distribution` of results.json. The floor compares one random half of the originals with the other.

    Args:
        real, made: features (n, d) and (m, d).
        paired: made[i] was made from real[i]. Then `kid_halves` is the KID of one half of the originals to the images
            made from the other half, which are independent. Its difference from the floor shows a bias of the paired
            estimate.
    """
    count = len(real)
    order = numpy_rng(seed, "split half").permutation(count)
    first, second = order[: count // 2], order[count // 2 : count // 2 * 2]
    size = max(2, min(subset_size, count // 4))
    measured = kid(real, made, size, seed=seed, paired=paired)
    floor = kid(real[first], real[second], size, seed=seed)
    found: dict[str, Any] = {
        "features": "Inception 2015-12-05 (TensorFlow), pool3, TensorFlow resizing to 299 x 299",
        "images": count,
        "kid": {"mean": measured.mean, "std": measured.std, "subsets": KID_SUBSETS, "subset_size": size},
        "kid_floor": {"mean": floor.mean, "std": floor.std, "images": count // 2},
    }
    if paired:
        halves = kid(real[first], made[second], size, seed=seed)
        found["kid_halves"] = {"mean": halves.mean, "std": halves.std, "images": count // 2}
    if distribution == "fid":
        found["fid"] = {"value": frechet_of_features(real, made), "images": count}
        found["fid_floor"] = {"value": frechet_of_features(real[first], real[second]), "images": count // 2}
    return found


def sentences(found: dict[str, Any]) -> list[str]:
    """The metrics of reconstructions as sentences, each with its N and its floor."""
    measured, floor, halves = found["kid"], found["kid_floor"], found["kid_halves"]
    lines = [
        f"KID of decode(mean) to the originals, N = {found['images']}: {1e3 * measured['mean']:.3f} +- "
        f"{1e3 * measured['std']:.3f} (x 1000, {measured['subsets']} subsets of {measured['subset_size']}, an image "
        f"never against its own reconstruction). Independent halves of {floor['images']}: originals against "
        f"reconstructions {1e3 * halves['mean']:.3f} +- {1e3 * halves['std']:.3f}, against originals "
        f"{1e3 * floor['mean']:.3f} +- {1e3 * floor['std']:.3f}."
    ]
    if "fid" in found:
        lines.append(
            f"rFID@{found['fid']['images']}: {found['fid']['value']:.3f}; originals against originals, halves of "
            f"{found['fid_floor']['images']}: {found['fid_floor']['value']:.3f}, an upper bound of what is noise, "
            "since FID's bias falls with N."
        )
        if found["fid"]["images"] < FEWEST_FOR_FID:
            lines.append(f"FID was forced under {FEWEST_FOR_FID} images: compare it with nothing.")
    return lines


# KID of a pipeline's samples to held-out images: on request in training, and for `ldm-vae model ema`.

BATCH = 16
KID_ENLARGED = "samples/kid_enlarged"
MINIMUM_FOR_KID = 100
"""Number of images on each side; with fewer, the spread over subsets is as large as typical differences."""


@dataclass(frozen=True)
class KidConfig:
    """KID of samples of the EMA weights to held-out images. It is measured on images, so it includes the autoencoder.

    Attributes:
        samples: number of samples for each measurement, the classes in turn; 0: none.
        every: steps between measurements, a multiple of training.validate_every; null: once, at the end.
        data: the images that were encoded. Those with the ids that this run holds out are used.
        steps: steps of the sampler, for each sample.
        subset: images in each of KID's subsets; at most a quarter of the held-out images.
        inception_weights: a local file of torch-fidelity's Inception weights; null: its download.
    """

    samples: int = 0
    every: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 30
    subset: int = 200
    inception_weights: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 0 or 0 < self.samples < MINIMUM_FOR_KID:
            raise UserError(
                f"kid.samples: KID of {pluralize(self.samples, 'image')} would be noise; give {MINIMUM_FOR_KID} or "
                "more (1000 is usual), or 0 for none"
            )
        if self.every is not None and self.every < 1:
            raise UserError(f"kid.every: {self.every} is below 1; give a number of steps, or null for the end alone")
        if self.steps < 1 or self.subset < 2:
            name, value = ("steps", self.steps) if self.steps < 1 else ("subset", self.subset)
            raise UserError(f"kid.{name}: {value} is too few")

    def check(self, held_out: float, validate_every: int) -> None:
        """Raises: UserError for settings under which no measurement would be made."""
        if self.samples and held_out == 0:
            raise UserError("kid.samples: needs held-out images, and held_out=0; hold some out, or set kid.samples=0")
        if self.samples and self.every and self.every % validate_every:
            raise UserError(
                f"kid.every: {self.every} is not a multiple of training.validate_every={validate_every}; give one"
            )

    def due(self, finished: int, steps: int) -> bool:
        """Whether to measure after `finished` of `steps` steps."""
        return finished == steps or (self.every is not None and finished % self.every == 0)


class SampleKid:
    """Measures pipelines. The features of the held-out images are computed once, at the first call."""

    def __init__(self, config: KidConfig, images: ImageSource, network: Any) -> None:
        """
        Args:
            config: The number of samples, and how they are compared.
            images: The images to compare with.
            network: 8-bit images (n, 3, h, w) -> (features (n, d),), such as `load_inception()`.

        Raises:
            UserError: too few images.
        """
        self.config, self.images, self.network = config, images, network
        check_kid_count(len(images), "are held out")
        self.real: np.ndarray | None = None
        self.enlarged: Enlarged = []

    @torch.no_grad()
    def __call__(self, pipeline: LatentDiffusionPipeline) -> dict[str, float]:
        """`samples/kid@N` of N samples with its standard deviation over subsets, and `samples/kid_floor`: one half of
        the images against the other, the value for equal distributions. If held-out images are smaller than the
        samples, `samples/kid_enlarged` is their number."""
        self.network.to(pipeline.device)
        if self.real is None:
            self.real = self._real(pipeline.image_size(), pipeline.device)
        found = compare_sets(self.real, self._generated(pipeline), "kid", self.config.subset, seed=0)
        name = f"samples/kid@{self.config.samples}"
        metrics = {
            name: found["kid"]["mean"],
            f"{name}_std": found["kid"]["std"],
            "samples/kid_floor": found["kid_floor"]["mean"],
        }
        return metrics | ({KID_ENLARGED: float(len(self.enlarged))} if self.enlarged else {})

    def _real(self, size: tuple[int, int], device: torch.device) -> np.ndarray:
        features = []
        for first in range(0, len(self.images), BATCH):
            indices = list(range(first, min(first + BATCH, len(self.images))))
            _, images = read_crops(self.images, indices, size, [], self.enlarged)
            if images is not None:
                features.append(self._features(images.to(device)))
        check_kid_count(sum(map(len, features)), "of those held out can be read")
        for line in enlarged_sentences([short for _, short in self.enlarged], sum(map(len, features)), "kid.data"):
            logger.warning("KID, held-out images: %s", line)
        return np.concatenate(features)

    def _generated(self, pipeline: LatentDiffusionPipeline) -> np.ndarray:
        """Images of the samples: the classes in turn, sample i with the noise of (0, i)."""
        names, count = pipeline.labels, self.config.samples
        features = []
        for first in track(range(0, count, BATCH), "samples for KID", "batch"):
            numbers = range(first, min(first + BATCH, count))
            (images,) = pipeline(
                [names[number % len(names)] for number in numbers] if names else None,
                num_images=len(numbers),
                num_inference_steps=self.config.steps,
                generator=[image_generator(0, number) for number in numbers],
                output_type="pt",
                return_dict=False,
            )
            features.append(self._features(2 * images.to(pipeline.device) - 1))
        return np.concatenate(features)

    def _features(self, images: torch.Tensor) -> np.ndarray:
        """Features in float32 for every training precision. The watchdog is advanced, because this takes long."""
        watchdog.advance()
        with torch.autocast(images.device.type, enabled=False):
            return inception_features(self.network, images.float())


def check_kid_count(count: int, what: str) -> None:
    """Raises: UserError for fewer images than a KID needs."""
    if count < MINIMUM_FOR_KID:
        raise UserError(
            f"kid: {count} images {what}, too few for a KID, which needs {MINIMUM_FOR_KID}; hold more "
            "out, or set kid.samples=0"
        )


def make_sample_kid(config: KidConfig, held_out: float) -> SampleKid:
    """A `SampleKid` for a run that holds out this fraction of the ids. Raises: UserError without images or weights."""
    images = subset(open_source(config.data), "held_out", held_out)
    check_kid_count(len(images), "are held out")
    return SampleKid(config, images, load_inception(config.inception_weights))
