"""A directions file: `directions.safetensors` and `directions.json` in a sealed folder, bound to its encoder.

Directions hold for every autoencoder with the same encoder, as latents do. Owns the format and what it refuses.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor, nn

from ldm_vae import provenance
from ldm_vae.applications.directions import attributes as attributes_module
from ldm_vae.applications.directions.attributes import Attribute
from ldm_vae.autoencoder.base import decode, encode_moments
from ldm_vae.autoencoder.models import latent_channels, load_autoencoder
from ldm_vae.autoencoder.quantized import AutoencoderQuantized
from ldm_vae.autoencoder.weights import encoder_fingerprint
from ldm_vae.data.open import open_source
from ldm_vae.data.samples import evenly_spaced, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part, part_of, subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.study import alone_in, check_resolution, publishing
from ldm_vae.evaluation.sweep import markdown_table
from ldm_vae.files import (
    MAXIMUM_JSON_BYTES,
    check_checksums,
    check_tensor_file,
    checksum_bytes,
    publish_directory,
    temporary_directory,
    write_checksums,
    write_json,
    write_text,
)
from ldm_vae.latents.dataset import LatentDataset, read_labels
from ldm_vae.latents.dataset import samples_per_shard as spread_over_shards
from ldm_vae.latents.format import open_set_folder, short
from ldm_vae.training.distributed import compute_device
from ldm_vae.utils.text import pluralize

FORMAT_VERSION = 1
FOLDER = "directions"
"""Inside the result folder of `directions fit`, whose `run.json` is nobody's to seal."""
TENSORS, DESCRIPTION = "directions.safetensors", "directions.json"


@dataclass(frozen=True)
class Directions:
    """What `directions fit` found.

    Attributes:
        images: what it was fitted on, see `samples.Samples`.
        left_out: attribute -> why no direction was fitted to it.
        digest: of their files, where they were read from some.
    """

    directions: list[Direction]
    encoder_fingerprint: str
    images: dict[str, Any]
    left_out: dict[str, str]
    digest: str | None = None

    def find(self, name: str) -> Direction:
        """By its whole name, or by its attribute (then the difference of the means). Raises: UserError."""
        for wanted in (name, f"{name}/difference", f"{name}/1"):
            for direction in self.directions:
                if direction.name == wanted:
                    return direction
        known = [direction.name for direction in self.directions]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known[:12])}"
        raise UserError(f"direction: {name!r} is unknown; {hint}")

    def check_autoencoder(self, autoencoder: Any, where: str) -> None:
        """Raises: UserError for an autoencoder with another encoder."""
        found = encoder_fingerprint(autoencoder)
        if found != self.encoder_fingerprint:
            raise UserError(
                f"{where}: its encoder_fingerprint is {short(found)}, but the directions were fitted to "
                f"{short(self.encoder_fingerprint)}; give that autoencoder, or fit again with this one"
            )


def save_directions(found: Directions, output: Path) -> None:
    """Publish `output/directions`, complete or not at all."""
    temporary = temporary_directory(output / FOLDER)
    vectors = torch.from_numpy(np.stack([direction.vector for direction in found.directions])).float()
    save_file({"vectors": vectors.contiguous()}, temporary / TENSORS)
    description = {
        "format_version": FORMAT_VERSION,
        "encoder_fingerprint": found.encoder_fingerprint,
        "images": found.images,
        "directions": [{"name": d.name, "attribute": d.attribute, "told": d.told} for d in found.directions],
        "left_out": found.left_out,
    }
    write_json(temporary / DESCRIPTION, description)
    write_checksums(temporary)
    publish_directory(temporary, output / FOLDER)


def load_directions(path: str | Path) -> Directions:
    """From the result folder of `directions fit`, or the `directions/` in it.

    Raises:
        UserError: nothing there, damaged, of a newer format, or files that do not fit each other.
    """
    folder = next((f for f in (Path(path), Path(path) / FOLDER) if (f / DESCRIPTION).is_file()), None)
    if folder is None:
        raise UserError(f"{path}: holds no {DESCRIPTION}; give the folder that `ldm-vae directions fit` wrote")
    check_checksums(folder)
    try:
        if (folder / DESCRIPTION).stat().st_size > MAXIMUM_JSON_BYTES:
            raise UserError(
                f"{folder}/{DESCRIPTION}: is larger than {MAXIMUM_JSON_BYTES} bytes; this is no description"
            )
        description = json.loads((folder / DESCRIPTION).read_text())
        version = description["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{folder}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
            )
        check_tensor_file(folder / TENSORS)
        vectors = load_file(folder / TENSORS)["vectors"].double().numpy()
        found = _described(vectors, description["directions"])
        return Directions(
            found, str(description["encoder_fingerprint"]), dict(description["images"]), dict(description["left_out"]),
            checksum_bytes((folder / DESCRIPTION).read_bytes() + (folder / TENSORS).read_bytes()),
        )  # fmt: skip
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{folder}: is no directions file ({type(error).__name__}: {error}); restore it, or fit again"
        ) from error


def _described(vectors: np.ndarray, rows: Sequence[dict[str, Any]]) -> list[Direction]:
    if vectors.ndim != 2 or len(vectors) != len(rows) or not len(rows) or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of shape {vectors.shape} for {len(rows)} directions")
    return [
        Direction(str(row["name"]), vector, None if row["attribute"] is None else str(row["attribute"]), row["told"])
        for vector, row in zip(vectors, rows)
    ]


# Images or latents as directions see them: one pooled latent each, and their attributes.

PIXELS, LABELS, SCENE = "pixels", "labels", "scene"
"""Where attributes come from, besides tables."""
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Samples:
    """n images.

    Attributes:
        pooled: (n, c) float64, the mean of each latent over its positions.
        attributes: with n values each.
        record: what they were, JSON-able: fingerprint, count, preprocessing.
    """

    ids: list[str]
    pooled: np.ndarray
    attributes: list[Attribute]
    record: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Which images, and which of their attributes.

    Attributes:
        attributes_from: `pixels`, `labels`, `scene`, or the path of a table, any number of them.
        circles: columns of tables that are in turns.
        latents: a set of latents instead of `data`.
    """

    data: DataConfig
    part: Part
    resolution: int
    count: int | None
    attributes_from: Sequence[str]
    circles: Sequence[str] = field(default_factory=tuple)
    latents: str | None = None


def check_continuous(autoencoder: Any, where: str) -> None:
    """Raises: UserError for an autoencoder that rounds latents, which swallows small edits."""
    if isinstance(autoencoder, AutoencoderQuantized):
        raise UserError(
            f"{where}: rounds its latents to codes, so that a small edit is lost and a larger one jumps; use one of "
            "kind kl or ae"
        )


def gather(wanted: Wanted, autoencoder: Any) -> Samples:
    """Read, encode and average; one image at a time.

    Raises:
        UserError: too few images, latents that are not finite, one class only, or attributes that are not there.
    """
    if wanted.latents is not None:
        return _from_latents(wanted, autoencoder)
    source, indices = select(wanted.data, wanted.part, wanted.count)
    check_resolution(wanted.resolution, autoencoder)
    rejected: list[tuple[str, str]] = []
    found, pooled, colors = [], [], []
    for index in _shown(indices):
        read, image = read_crops(source, [index], wanted.resolution, rejected)
        if image is None:
            continue
        found += read
        image = image.to(autoencoder.device)
        mean, _ = encode_moments(autoencoder, image)
        pooled.append(pool(mean, source.id(index)))
        colors.append(attributes_module.measure(image))
    ids = [source.id(index) for index in found]
    _check_count(ids, f"{len(rejected)} of {len(indices)} images could not be read" if rejected else "data")
    labels = np.array([source.label(index) for index in found], np.int64)
    attributes: list[Attribute] = []
    for origin in wanted.attributes_from:
        if origin == SCENE:
            attributes += attributes_module.of_scenes(attributes_module.scene_source(source), found)
        elif origin == LABELS:
            attributes += attributes_module.of_classes(labels, source.label_names, "labels")
        elif origin == PIXELS:
            attributes += _measured(colors)
        else:
            attributes += attributes_module.of_table(origin, ids, wanted.circles)
    record = {
        "fingerprint": subset(source, wanted.part, wanted.data.held_out).fingerprint(),
        "part": wanted.part,
        "count": len(ids),
        "preprocessing": preprocessing_record(wanted.resolution),
        "rejected": [{"id": name, "reason": reason} for name, reason in rejected],
    }
    return Samples(ids, np.concatenate(pooled), distinct(attributes), record)


def _from_latents(wanted: Wanted, autoencoder: Any) -> Samples:
    """Posterior means of a set; what pixels tell is measured on the decoded images."""
    open_set_folder(str(wanted.latents))
    dataset = LatentDataset(str(wanted.latents))
    manifest = dataset.manifest
    manifest.normalizer  # noqa: B018 - codes have none
    if manifest.content == "moments":
        dataset = LatentDataset(str(wanted.latents), posterior="mean", flip=False)
    else:
        dataset = LatentDataset(str(wanted.latents), flip=False)
    manifest.check_autoencoder(encoder_fingerprint(autoencoder), "autoencoder")
    numbers = spread_over_shards(manifest.shard_index.counts, wanted.count or manifest.count)
    ids = [dataset.id(number) for number in numbers]
    _check_count(ids, str(wanted.latents))
    pooled, colors = [], []
    for number, id in zip(_shown(numbers), ids):
        latent = dataset[number]["latent"][None]
        pooled.append(pool(latent, id))
        if PIXELS in wanted.attributes_from:
            colors.append(attributes_module.measure(decode(autoencoder, latent.to(autoencoder.device))))
    attributes: list[Attribute] = []
    for origin in wanted.attributes_from:
        if origin == SCENE:
            raise UserError("attributes_from: scene needs the images; give data.source=synthetic and no latents")
        if origin == LABELS:
            attributes += attributes_module.of_classes(
                read_labels(manifest)[numbers], manifest.label_names, str(wanted.latents)
            )
        elif origin == PIXELS:
            attributes += _measured(colors)
        else:
            attributes += attributes_module.of_table(origin, ids, wanted.circles)
    record = {
        "fingerprint": [segment["fingerprint"] for segment in manifest.datasets],
        "part": "latents",
        "count": len(ids),
        "preprocessing": manifest.preprocessing,
        "rejected": [],
    }
    return Samples(ids, np.concatenate(pooled), distinct(attributes), record)


def select(data: DataConfig, part: Part, count: int | None) -> tuple[ImageSource, list[int]]:
    """A source, and `count` indices of its part, evenly spread. Raises: UserError for an empty part."""
    source = open_source(data)
    subset(source, part, data.held_out)  # refuses an empty one
    indices = [i for i in range(len(source)) if part == "all" or part_of(source.id(i), data.held_out) == part]
    return source, [indices[i] for i in evenly_spaced(len(indices), count)]


def pool(latent: Tensor, id: str) -> np.ndarray:
    """(1, c, h, w) -> the mean over positions (1, c), float64. Raises: UserError when it is not finite."""
    mean = latent.double().mean(dim=(2, 3)).cpu().numpy()
    if not np.isfinite(mean).all():
        raise UserError(
            f"{id}: its latent has values that are not finite; check the autoencoder with `ldm-vae diagnose`"
        )
    return mean


def distinct(attributes: list[Attribute]) -> list[Attribute]:
    """Raises: UserError when two have one name, or there is none."""
    names = [attribute.name for attribute in attributes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attributes_from: {name!r} comes from two places; rename a column, or leave one out")
    return attributes


def _measured(found: list[dict[str, Tensor]]) -> list[Attribute]:
    return [
        Attribute(name, torch.cat([one[name] for one in found]).double().cpu().numpy(), False)
        for name in attributes_module.MEASURED
    ]


def _check_count(ids: list[str], where: str) -> None:
    if len(ids) < LEAST_SAMPLES:
        raise UserError(
            f"{where}: {pluralize(len(ids), 'image')} left, {LEAST_SAMPLES} are the least for a direction; give more"
        )


def _shown(indices: Sequence[int]) -> Iterator[int]:
    from tqdm import tqdm

    yield from tqdm(indices, desc="encoding", unit="image", dynamic_ncols=True, leave=False)


# From pooled latents to directions: pure functions of arrays.

LABELED = ("difference", "probe")
UNLABELED = ("pca", "sefa")
PENALTY = 1e-2
"""Of the squared weights of a probe on standardized features."""
FOLDS = 5
IMPULSE_SIDE = 9
"""Positions of the latent that the first convolution is probed with."""


@dataclass(frozen=True)
class Direction:
    """One direction.

    Attributes:
        name: as `brightness/probe` or `pca/1`.
        vector: (c,) float64, latent units for a strength of 1.
        attribute: what it is for; None without labels.
        told: of `attribute`: how well a linear probe tells it from pooled latents of images it was not fitted to,
            AUROC for yes or no (0.5: not at all), R2 for a number (0: not at all). Without labels: the share of the
            variance (pca) or of the squared gain (sefa).
    """

    name: str
    vector: np.ndarray
    attribute: str | None
    told: dict[str, Any]

    @property
    def method(self) -> str:
        return self.name.rsplit("/", 1)[1] if self.attribute else self.name.split("/")[0]


def labeled(pooled: np.ndarray, attribute: Attribute) -> list[Direction]:
    """The difference of the means (for a number: the slope of the latents over it), and the normal of a linear probe,
    logistic for yes or no, ridge for a number. Pooled latents (n, c). Needs `attribute.problem()` None."""
    features, y = pooled[attribute.known], attribute.values[attribute.known]
    deviation = _deviation(pooled)
    standard = (features - features.mean(axis=0)) / deviation
    told = {"measure": "AUROC" if attribute.binary else "R2", "value": cross_validated(standard, y, attribute.binary)}
    difference = (y - y.mean()) @ standard / ((y - y.mean()) @ (y - y.mean()))
    vectors = {"difference": difference, "probe": probe(standard, y, attribute.binary)[0]}
    return [
        Direction(f"{attribute.name}/{method}", scaled(vector * deviation, pooled), attribute.name, told)
        for method, vector in vectors.items()
    ]


def probe(features: np.ndarray, y: np.ndarray, binary: bool) -> tuple[np.ndarray, float]:
    """Weights (c,) and offset of a penalized logistic (0 and 1) or linear regression of y (n,) on features (n, c)."""
    if not binary:
        center, spread = y.mean(), y.std()
        mean = features.mean(axis=0)
        centered = features - mean
        gram = centered.T @ centered / len(y) + PENALTY * np.eye(features.shape[1])
        weights = spread * np.linalg.solve(gram, centered.T @ ((y - center) / spread) / len(y))
        return weights, float(center - mean @ weights)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, offset = parameters[:-1], parameters[-1]
        scores = features @ weights + offset
        value = np.mean(np.logaddexp(0, scores) - y * scores) + PENALTY * weights @ weights / 2
        error = (expit(scores) - y) / len(y)
        return float(value), np.append(features.T @ error + PENALTY * weights, error.sum())

    found = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def cross_validated(features: np.ndarray, y: np.ndarray, binary: bool) -> float:
    """AUROC or R2 of five probes, each on the fifth that it was not fitted to."""
    rows = np.arange(len(y))
    order = np.argsort(y, kind="stable") if binary else rows  # every fold gets its share of both
    fold = np.empty(len(y), int)
    fold[order] = rows % FOLDS
    scores = np.empty(len(y))
    for number in range(FOLDS):
        apart = fold == number
        weights, offset = probe(features[~apart], y[~apart], binary)
        scores[apart] = features[apart] @ weights + offset
    if binary:
        return auroc(scores, y)
    return float(1 - np.square(y - scores).sum() / np.square(y - y.mean()).sum())


def auroc(scores: np.ndarray, y: np.ndarray) -> float:
    """The chance that an image with y = 1 scores above one with y = 0 (Mann and Whitney 1947)."""
    yes = y == 1
    ranks = rankdata(scores)[yes].sum() - yes.sum() * (yes.sum() + 1) / 2
    return float(ranks / (yes.sum() * (~yes).sum()))


def principal(pooled: np.ndarray, count: int) -> list[Direction]:
    """The first principal directions of pooled latents (n, c), with their share of the variance."""
    values, vectors = np.linalg.eigh(np.cov(pooled, rowvar=False).reshape(pooled.shape[1], -1))
    return _numbered("pca", pooled, values[::-1], vectors[:, ::-1], "share of variance", count)


def closed_form(autoencoder: Any, pooled: np.ndarray, count: int) -> list[Direction]:
    """SeFa: what the decoder's first convolution W amplifies most, the eigenvectors of W^T W (arXiv:2007.06600)."""
    response = first_response(autoencoder)
    values, vectors = np.linalg.eigh(response.T @ response)
    return _numbered("sefa", pooled, values[::-1], vectors[:, ::-1], "share of squared gain", count)


def _numbered(
    method: str, pooled: np.ndarray, values: np.ndarray, vectors: np.ndarray, measure: str, count: int
) -> list[Direction]:
    shares = values.clip(0) / max(values.clip(0).sum(), 1e-30)
    return [
        Direction(
            f"{method}/{k + 1}", scaled(vectors[:, k], pooled), None, {"measure": measure, "value": float(shares[k])}
        )
        for k in range(min(count, len(values)))
    ]


def first_response(autoencoder: Any) -> np.ndarray:
    """(m, c) float64: what a unit in channel k adds to the first convolution that widens the latent. What comes before
    it, as Stable Diffusion's `post_quant_conv`, is linear and included.

    Raises:
        UserError: the decoder has no such convolution.
    """
    channels = latent_channels(autoencoder)
    first: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not first:
            first.append(output.double().cpu())

    impulses = torch.zeros(channels + 1, channels, IMPULSE_SIDE, IMPULSE_SIDE, device=autoencoder.device)
    impulses[torch.arange(channels), torch.arange(channels), IMPULSE_SIDE // 2, IMPULSE_SIDE // 2] = 1
    widening = [m for m in autoencoder.modules() if isinstance(m, nn.Conv2d) and m.out_channels > channels]
    hooks = [module.register_forward_hook(keep) for module in widening]
    try:
        decode(autoencoder, impulses)
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        raise UserError("sefa: the decoder has no convolution that widens the latent; leave sefa out of methods")
    response = first[0]
    return (response[:-1] - response[-1:]).flatten(1).T.numpy()


def scaled(vector: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The same direction (c,), one standard deviation of pooled latents (n, c) long; its sign stays."""
    unit = vector / max(float(np.linalg.norm(vector)), 1e-30)
    return unit * float((pooled @ unit).std())


def _deviation(pooled: np.ndarray) -> np.ndarray:
    """Per channel; a dead one counts as it is."""
    deviation = pooled.std(axis=0)
    return np.where(deviation > 1e-12, deviation, 1.0)


# `ldm-vae directions fit`: the settings, and the folder with directions for every attribute that has one.


@dataclass(frozen=True)
class FitDirectionsConfig:
    """`ldm-vae directions fit`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the directions.
        latents: a set that `ldm-vae encode` wrote, instead of images.
        part: train, held_out or all, of the images.
        resolution: side of the center crop in pixels, a multiple of the downsampling.
        count: at most so many images, evenly spread; null: all.
        attributes_from: any of pixels (brightness, contrast, saturation, red_green, yellow_blue, sharpness), labels
            (each class against the others), scene (what is known of the synthetic set), or paths of .csv and .jsonl
            tables with a column `file` or `id`; `[]` for directions without labels only.
        circles: columns of tables that are in turns, as a hue: each becomes a cosine and a sine.
        attributes: only these; null: every one that has a direction.
        methods: difference, probe, pca, sefa.
        components: so many directions of pca and of sefa, at most one a channel.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    latents: str | None = None
    part: Part = "train"
    resolution: int = 256
    count: int | None = 1000
    attributes_from: list[str] = field(default_factory=lambda: [PIXELS])
    circles: list[str] = field(default_factory=list)
    attributes: list[str] | None = None
    methods: list[str] = field(default_factory=lambda: [*LABELED, *UNLABELED])
    components: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        known = (*LABELED, *UNLABELED)
        for method in self.methods:
            if method not in known:
                raise UserError(f"methods: {method!r} is no method; choose among {', '.join(known)}")
        if not self.methods:
            raise UserError(f"methods: none; choose among {', '.join(known)}")
        if self.components < 1:
            raise UserError(f"components: {self.components} is below 1")
        if self.count is not None and self.count < 1:
            raise UserError(f"count: {self.count} is not above 0; leave it out for all images")
        if not self.attributes_from and not set(self.methods) & set(UNLABELED):
            raise UserError("attributes_from: none, and no method works without; add pixels, or the method pca")


def fit(config: FitDirectionsConfig, overwrite: bool = False) -> Directions:
    """Fit and write `directions/`, results.md and run.json.

    Raises:
        UserError: the output is not empty and not `overwrite`, an attribute that was asked for has no direction, or
            whatever `samples.gather` refuses.
    """
    started = time.time()
    output = Path(config.output)
    if (output / provenance.RUN_RECORD).exists() and not ((output / FOLDER).exists() and overwrite):
        raise UserError(f"{output}: holds another result; give another output, or --overwrite")
    autoencoder = load_autoencoder(config.autoencoder).to(compute_device(config.device))
    check_continuous(autoencoder, f"autoencoder {config.autoencoder}")
    with alone_in(output):
        wanted = Wanted(
            config.data, config.part, config.resolution, config.count, config.attributes_from, config.circles,
            config.latents,
        )  # fmt: skip
        samples = gather(wanted, autoencoder)
        directions, left_out = find_directions(config, samples, autoencoder)
        found = Directions(directions, encoder_fingerprint(autoencoder), samples.record, left_out)
        with publishing(output):
            save_directions(found, output)
            write_text(output / "results.md", markdown(found))
            provenance.write_run_record(output, None, started, time.time() - started, images=len(samples.ids))
    return found


def find_directions(
    config: FitDirectionsConfig, samples: Samples, autoencoder: Any
) -> tuple[list[Direction], dict[str, str]]:
    """The directions, and why attributes have none. Raises: UserError."""
    chosen = {attribute.name: attribute for attribute in samples.attributes}
    if config.attributes is not None:
        for name in config.attributes:
            if name not in chosen:
                raise UserError(f"attributes: {name!r} is unknown; there are: {', '.join(chosen) or 'none'}")
        chosen = {name: chosen[name] for name in config.attributes}
    found: list[Direction] = []
    left_out = {name: problem for name, attribute in chosen.items() if (problem := attribute.problem())}
    for name, problem in left_out.items():
        if config.attributes is not None or len(left_out) == len(chosen):
            raise UserError(f"attributes: {name!r} {problem}; give other images, or leave it out")
    for name, attribute in chosen.items():
        if name not in left_out:
            fitted = labeled(samples.pooled, attribute)
            found += [direction for direction in fitted if direction.method in config.methods]
    if "pca" in config.methods:
        found += principal(samples.pooled, config.components)
    if "sefa" in config.methods:
        found += closed_form(autoencoder, samples.pooled, config.components)
    return found, left_out


def markdown(found: Directions) -> str:
    """The table of results.md."""
    rows = []
    for direction in found.directions:
        told = direction.told
        rows.append([direction.name, direction.attribute or "none", f"{told['measure']} {told['value']:.2f}"])
    lines = markdown_table(["direction", "attribute", "told by pooled latents"], rows)
    lines += [
        "",
        f"Fitted to {found.images['count']} images. AUROC and R2 are of images that the probe was not fitted to.",
    ]
    lines += [f"Left out: `{name}` {problem}." for name, problem in found.left_out.items()]
    return "# Directions\n\n" + "\n".join(lines) + "\n"
