"""Directions of the latent space that change one thing: finding them, and the folder that keeps them.

    images or latents -> `gather` -> pooled latents (n, c) and attributes -> `METHODS` -> `Directions` -> folder

Directions hold for every autoencoder with the same encoder, as latents do. To add a method, write the function of a
`Method` and give it a line in `METHODS`.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor, nn

from ldm_vae import provenance
from ldm_vae.applications.anomaly.metrics import auroc
from ldm_vae.applications.directions import attributes
from ldm_vae.applications.directions.attributes import LABELS, PIXELS, Attribute
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import check_positive, plain_settings
from ldm_vae.data import open_source
from ldm_vae.data.samples import Enlarged, Rejected, enlarged_record, enlarged_sentences, evenly_spaced, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part, in_part, subset
from ldm_vae.data.survey import describe_images, look_at
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.study import check_resolution, locked_folder, publishing, rejected_images
from ldm_vae.files import (
    checksum_bytes,
    parsing,
    published_directory,
    read_described_folder,
    write_checksums,
    write_json,
    write_text,
)
from ldm_vae.latents.dataset import LatentDataset, read_labels
from ldm_vae.latents.dataset import samples_per_shard as spread_over_shards
from ldm_vae.latents.format import open_set_folder, short
from ldm_vae.paths import DIRECTIONS
from ldm_vae.runtime import compute_device
from ldm_vae.storage.base import is_url
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say, track
from ldm_vae.utils.text import markdown_table, pluralize

FORMAT_VERSION = 1
FOLDER = "directions"
"""Inside the result folder of `directions fit`, whose `run.json` is not listed among the checksums."""
TENSORS, DESCRIPTION = "directions.safetensors", "directions.json"
LEAST_SAMPLES = 20
PENALTY = 1e-2
"""Penalty on the squared weights of a probe on standardized features."""
FOLDS = 5
CONSTANT_SIDE = 9
"""Positions of the constant latents whose middle tells what the first convolution adds."""


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


@dataclass(frozen=True)
class Directions:
    """What `directions fit` found.

    Attributes:
        images: what it was fitted on, see `Samples.record`.
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

    def check_autoencoder(self, autoencoder: Autoencoder, where: str) -> None:
        """Raises: UserError for an autoencoder with another encoder."""
        found = autoencoder.encoder_fingerprint()
        if found != self.encoder_fingerprint:
            raise UserError(
                f"{where}: its encoder has the fingerprint {short(found)}, but the directions were fitted to "
                f"{short(self.encoder_fingerprint)}; give that autoencoder, or fit again with this one"
            )


@dataclass(frozen=True)
class FitDirectionsConfig:
    """`ldm-vae directions fit`: difference of means, linear probe; PCA, SeFa.

    Attributes come from the pixels, from labels, from a table or from the scenes of the synthetic set. Writes
    directions/, results.md and run.json into the output folder.

      ldm-vae directions fit runs/mine data=~/images output=runs/directions
      ldm-vae directions fit runs/mine data=~/images attributes_from=[pixels,labels,~/images/attributes.csv] \\
        output=runs/directions
      ldm-vae directions fit runs/vae latents=runs/latents attributes_from=labels output=runs/directions

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the directions.
        latents: the folder of a finished set, or its URL, instead of images.
        part: the part of the images: train, held_out, its halves validation and test, or all.
        resolution: side of the center crop in pixels, a multiple of the downsampling.
        count: largest number of images, evenly spread; null: all.
        attributes_from: sources of attributes, any of: pixels (brightness, contrast, saturation, red_green,
            yellow_blue, sharpness), labels (each class against the others), scene (the known attributes of the
            synthetic set), or paths of .csv and .jsonl tables with a column `file` or `id`; `[]`: only directions
            without attributes.
        circles: columns of tables that are angles in turns, such as a hue; each becomes a cosine and a sine.
        attributes: the attributes to use; null: all.
        methods: the methods: difference, probe, pca, sefa.
        components: number of directions of pca and of sefa, at most one per channel.
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
    methods: list[str] = field(default_factory=lambda: [*METHODS])
    components: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"methods: {method!r} is not a method; choose among {', '.join(METHODS)}")
        if not self.methods:
            raise UserError(f"methods: none; choose among {', '.join(METHODS)}")
        check_positive(self, "components", "count")
        if not self.attributes_from and all(METHODS[method].labeled for method in self.methods):
            raise UserError("attributes_from: none, and no method works without; add pixels, or the method pca")


def fit_directions(config: FitDirectionsConfig, *, overwrite: bool = False, dry_run: bool = False) -> Directions | None:
    """Fit and write `directions/`, results.md and run.json; prints the table.

    Args:
        overwrite: replace earlier directions there.
        dry_run: open everything and look at some images; write nothing and return None.

    Raises:
        UserError: the output is not empty and not `overwrite`, an attribute that was asked for has no direction, or
            whatever `gather` refuses.
    """
    config = plain_settings(config)
    started = time.time()
    output = Path(config.output)
    if (output / provenance.RUN_RECORD).exists() and not ((output / FOLDER).exists() and overwrite):
        raise UserError(f"{output}: holds another result; give another output, or --overwrite")
    autoencoder = load_autoencoder(config.autoencoder).to(compute_device(config.device))
    check_continuous(autoencoder, f"autoencoder {config.autoencoder}")
    chosen = None if config.latents else select(config.data, config.part, config.count)
    _begin(config, autoencoder, chosen)
    if dry_run:
        if chosen is not None:
            check_resolution(config.resolution, autoencoder)
            for line in look_at(*chosen, config.resolution).lines():
                say(line)
        end_dry_run(output, "the time it takes was not measured")
        return None
    with locked_folder(output):
        samples = gather_samples(config, autoencoder, chosen)
        directions, left_out = find_directions(config, samples, autoencoder)
        found = Directions(directions, autoencoder.encoder_fingerprint(), samples.record, left_out)
        with publishing(output):
            save_directions(found, output)
            write_text(output / "results.md", markdown(found))
            count = int(samples.record["count"])
            provenance.write_run_record(output, None, started, time.time() - started, images=count)
    say(markdown(found).rstrip("\n"))
    end(output, f"{pluralize(len(directions), 'direction')}", _next_words(config, directions[0].name))
    return found


def _begin(config: FitDirectionsConfig, autoencoder: Autoencoder, chosen: Chosen | None) -> None:
    """The first line. `chosen`: the images; None for a set of latents."""
    if chosen is None:
        images = f"the latents in {config.latents}"
    else:
        images = f"{describe_images(chosen[0], len(chosen[1]))}; part {config.part}; {config.resolution} pixels"
    attributes_from = f"attributes from {', '.join(config.attributes_from)}" if config.attributes_from else ""
    methods = f"by {', '.join(config.methods)}"
    place = f"to {config.output}"
    begin("directions fit", images, attributes_from, methods, config.autoencoder, str(autoencoder.device), place)


def _next_words(config: FitDirectionsConfig, name: str) -> list[str]:
    """The words that apply the first direction to the same images, or evaluate it where these are not files."""
    words = ["ldm-vae", "directions", "apply", config.output, name]
    autoencoder = f"autoencoder={config.autoencoder}"
    if config.latents:
        words.append(f"latents={config.latents}")
    elif config.data.source == "folder" and not is_url(str(config.data.path)):
        words += [str(config.data.path), f"resolution={config.resolution}"]
    else:
        data = [*config.data.words(), f"resolution={config.resolution}"]
        place = f"output={beside(config.output, 'evaluation')}"
        return ["ldm-vae", "directions", "evaluate", config.output, autoencoder, *data, place]
    return [*words, autoencoder, f"output={beside(config.output, 'applied')}"]


def find_directions(
    config: FitDirectionsConfig, samples: PooledSamples, autoencoder: Autoencoder
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
            found += labeled(samples.pooled, attribute, [name for name in METHODS if name in config.methods])
    for name, method in METHODS.items():
        if name in config.methods and not method.labeled:
            found += unlabeled(name, autoencoder, samples.pooled, config.components)
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
    small = [image["short_side"] for image in found.images.get("enlarged", [])]
    lines += enlarged_sentences(small, found.images["count"])
    return "# Directions\n\n" + "\n".join(lines) + "\n"


# Images or latents as directions see them: one pooled latent each, and their attributes.


@dataclass(frozen=True)
class PooledSamples:
    """n images.

    Attributes:
        pooled: (n, c) float64, the mean of each latent over its positions.
        attributes: with n values each.
        record: what they were, JSON-able: fingerprint, count, preprocessing.
    """

    pooled: np.ndarray
    attributes: list[Attribute]
    record: dict[str, Any]


def check_continuous(autoencoder: Autoencoder, where: str) -> None:
    """Raises: UserError for an autoencoder that rounds latents, which swallows small edits."""
    if autoencoder.has_codes:
        raise UserError(
            f"{where}: rounds its latents to codes, so that a small edit is lost and a larger one jumps; use one of "
            "kind kl or ae"
        )


Chosen = tuple[ImageSource, list[int]]
"""A source, and the indices of the images that are used."""


def gather_samples(
    config: FitDirectionsConfig, autoencoder: Autoencoder, chosen: Chosen | None = None
) -> PooledSamples:
    """Read, encode and average; one image at a time. `chosen`: the images, where they are open already.

    Raises:
        UserError: too few images, latents that are not finite, one class only, or attributes that are not there.
    """
    if config.latents is not None:
        return _from_latents(config, config.latents, autoencoder)
    source, indices = chosen or select(config.data, config.part, config.count)
    check_resolution(config.resolution, autoencoder)
    rejected, enlarged = Rejected(), Enlarged()
    found, pooled, pixels = [], [], []
    for index in track(indices, "encoding"):
        read, image = read_crops(source, [index], config.resolution, rejected, enlarged)
        if image is None:
            continue
        found += read
        image = image.to(autoencoder.device)
        mean, _ = autoencoder.encode_moments(image)
        pooled.append(pool(mean, source.id(index)))
        pixels.append(attributes.measure_attributes(image))
    ids = [source.id(index) for index in found]
    _check_count(ids, f"{len(rejected)} of {len(indices)} images could not be read" if rejected else "data")
    labels = np.array([source.label(index) for index in found], np.int64)
    known = attributes.collect_attributes(
        config.attributes_from, source, found, ids, labels, source.label_names, pixels, config.circles
    )
    record = {
        "fingerprint": subset(source, config.part, config.data.held_out).fingerprint(),
        "part": config.part,
        "count": len(ids),
        "preprocessing": preprocessing_record(config.resolution),
        "rejected": rejected_images(rejected),
        **enlarged_record(enlarged),
    }
    return PooledSamples(np.concatenate(pooled), known, record)


def _from_latents(config: FitDirectionsConfig, latents: str, autoencoder: Autoencoder) -> PooledSamples:
    """Posterior means of a set; what pixels tell is measured on the decoded images."""
    dataset = posterior_means(latents, autoencoder)
    manifest = dataset.manifest
    numbers = spread_over_shards(manifest.shard_index.counts, config.count or manifest.count)
    ids = [dataset.id(number) for number in numbers]
    _check_count(ids, latents)
    pooled, pixels = [], []
    for number, id in zip(track(numbers, "encoding"), ids):
        latent = dataset[number]["latent"][None]
        pooled.append(pool(latent, id))
        if PIXELS in config.attributes_from:
            pixels.append(attributes.measure_attributes(autoencoder.decode_images(latent.to(autoencoder.device))))
    labels = read_labels(manifest)[numbers] if LABELS in config.attributes_from else np.empty(0, np.int64)
    known = attributes.collect_attributes(
        config.attributes_from, None, numbers, ids, labels, manifest.label_names, pixels, config.circles
    )
    record = {
        "fingerprint": [segment["fingerprint"] for segment in manifest.datasets],
        "part": "latents",
        "count": len(ids),
        "preprocessing": manifest.preprocessing,
        "rejected": [],
    }
    return PooledSamples(np.concatenate(pooled), known, record)


def posterior_means(latents: str, autoencoder: Autoencoder) -> LatentDataset:
    """A set of latents, read without noise and mirror images. Raises: UserError for codes or another autoencoder."""
    open_set_folder(latents)
    manifest = LatentDataset(latents).manifest
    manifest.normalizer  # noqa: B018 - codes have none
    manifest.check_autoencoder(autoencoder.encoder_fingerprint(), "autoencoder")
    return LatentDataset(latents, posterior="mean" if manifest.content == "moments" else None, flip=False)


def select(data: DataConfig, part: Part, count: int | None) -> tuple[ImageSource, list[int]]:
    """A source, and `count` indices of its part, evenly spread. Raises: UserError for an empty part."""
    source = open_source(data)
    subset(source, part, data.held_out)  # refuses an empty one
    indices = [i for i in range(len(source)) if in_part(source.id(i), part, data.held_out)]
    return source, [indices[i] for i in evenly_spaced(len(indices), count)]


def pool(latent: Tensor, id: str) -> np.ndarray:
    """(1, c, h, w) -> the mean over positions (1, c), float64. Raises: UserError when it is not finite."""
    mean = latent.double().mean(dim=(2, 3)).cpu().numpy()
    if not np.isfinite(mean).all():
        raise UserError(
            f"{id}: its latent has values that are not finite; check the autoencoder with `ldm-vae diagnose`"
        )
    return mean


def _check_count(ids: list[str], where: str) -> None:
    if len(ids) < LEAST_SAMPLES:
        raise UserError(
            f"{where}: {pluralize(len(ids), 'image')} left, {LEAST_SAMPLES} are the least for a direction; give more"
        )


# From pooled latents to directions: pure functions of arrays.


def labeled(pooled: np.ndarray, attribute: Attribute, methods: Sequence[str]) -> list[Direction]:
    """The direction of an attribute by each of `methods`; pooled latents (n, c). Needs `attribute.problem()` None."""
    features, y = pooled[attribute.known], attribute.values[attribute.known]
    deviation = pooled.std(axis=0)
    deviation = np.where(deviation > 1e-12, deviation, 1.0)  # a dead channel counts as it is
    standard = (features - features.mean(axis=0)) / deviation
    told = {"measure": "AUROC" if attribute.binary else "R2", "value": cross_validated(standard, y, attribute.binary)}
    return [
        Direction(
            f"{attribute.name}/{name}", scaled(METHODS[name].fit(standard, y, attribute.binary) * deviation, pooled),
            attribute.name, told,
        )
        for name in methods
        if METHODS[name].labeled
    ]  # fmt: skip


def unlabeled(name: str, autoencoder: Autoencoder, pooled: np.ndarray, count: int) -> list[Direction]:
    """The first `count` eigenvectors of a method's matrix, with their share of the eigenvalues; latents (n, c)."""
    values, vectors = np.linalg.eigh(METHODS[name].fit(autoencoder, pooled))
    values, vectors = values[::-1], vectors[:, ::-1]
    shares = values.clip(0) / max(values.clip(0).sum(), 1e-30)
    return [
        Direction(
            f"{name}/{k + 1}", scaled(vectors[:, k], pooled), None,
            {"measure": METHODS[name].measure, "value": float(shares[k])},
        )
        for k in range(min(count, len(values)))
    ]  # fmt: skip


def difference(features: np.ndarray, y: np.ndarray, binary: bool) -> np.ndarray:
    """The difference of the means; for a number the slope of the features over it."""
    return (y - y.mean()) @ features / ((y - y.mean()) @ (y - y.mean()))


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
        return auroc(scores[y == 0], scores[y == 1])
    return float(1 - np.square(y - scores).sum() / np.square(y - y.mean()).sum())


def covariance(autoencoder: Autoencoder, pooled: np.ndarray) -> np.ndarray:
    """Covariance of pooled latents (n, c), for their principal directions."""
    return np.cov(pooled, rowvar=False).reshape(pooled.shape[1], -1)


def first_gram(autoencoder: Autoencoder, pooled: np.ndarray) -> np.ndarray:
    """W^T W of the decoder's first convolution, whose eigenvectors it amplifies most (SeFa, arXiv:2007.06600).

    W (m, c) is the weight summed over its taps: a direction moves every position of the latent by the same vector.
    """
    response = first_response(autoencoder)
    return response.T @ response


def first_response(autoencoder: Autoencoder) -> np.ndarray:
    """(m, c) float64: what a unit in channel k at every position adds to the first convolution that widens the latent.

    It is read in the middle of the map, where no padding is seen. What comes before it, as Stable Diffusion's
    `post_quant_conv`, is linear and included.

    Raises:
        UserError: the decoder has no such convolution.
    """
    channels = autoencoder.latent_channels
    first: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not first:
            first.append(output.double().cpu())

    units = torch.cat([torch.eye(channels), torch.zeros(1, channels)])  # the last one: what biases add
    constants = units[:, :, None, None].expand(-1, -1, CONSTANT_SIDE, CONSTANT_SIDE).to(autoencoder.device)
    widening = [m for m in autoencoder.modules() if isinstance(m, nn.Conv2d) and m.out_channels > channels]
    hooks = [module.register_forward_hook(keep) for module in widening]
    try:
        autoencoder.decode_images(constants)
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        raise UserError("sefa: the decoder has no convolution that widens the latent; leave sefa out of methods")
    middle = first[0][:, :, first[0].shape[2] // 2, first[0].shape[3] // 2]
    return (middle[:-1] - middle[-1:]).T.numpy()


def scaled(vector: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The same direction (c,), one standard deviation of pooled latents (n, c) long; its sign stays."""
    unit = vector / max(float(np.linalg.norm(vector)), 1e-30)
    return unit * float((pooled @ unit).std())


@dataclass(frozen=True)
class Method:
    """A way to find directions.

    Args:
        fit: with labels (standardized features (n, c), values (n,), whether they are yes or no) -> vector (c,); without
            (autoencoder, pooled latents (n, c)) -> a symmetric matrix (c, c) whose eigenvectors are the directions.
        measure: what the share of an eigenvalue is called, for a method without labels.
    """

    fit: Callable[..., np.ndarray]
    measure: str = ""

    @property
    def labeled(self) -> bool:
        return not self.measure


METHODS: dict[str, Method] = {
    "difference": Method(difference),
    "probe": Method(lambda features, y, binary: probe(features, y, binary)[0]),
    "pca": Method(covariance, "share of variance"),
    "sefa": Method(first_gram, "share of squared gain"),
}


# The folder: directions.json, directions.safetensors and checksums.


def save_directions(found: Directions, output: Path) -> None:
    """Publish `output/directions`, complete or not at all."""
    vectors = torch.from_numpy(np.stack([direction.vector for direction in found.directions])).float()
    description = {
        "format_version": FORMAT_VERSION,
        "encoder_fingerprint": found.encoder_fingerprint,
        "images": found.images,
        "directions": [{"name": d.name, "attribute": d.attribute, "told": d.told} for d in found.directions],
        "left_out": found.left_out,
    }
    with published_directory(output / FOLDER) as temporary:
        save_file({"vectors": vectors.contiguous()}, temporary / TENSORS)
        write_json(temporary / DESCRIPTION, description)
        write_checksums(temporary)


def load_directions(path: str | Path) -> Directions:
    """From the result folder of `directions fit`, or the `directions/` in it.

    Raises:
        UserError: nothing there, damaged, of a newer format, or files that do not fit each other.
    """
    folder = DIRECTIONS.find(path, "directions")
    assert folder is not None
    with parsing(folder, "restore it from a copy, or fit again"):
        description, tensors = read_described_folder(folder, DESCRIPTION, TENSORS, FORMAT_VERSION)
        return Directions(
            _described(tensors["vectors"].double().numpy(), description["directions"]),
            str(description["encoder_fingerprint"]), dict(description["images"]), dict(description["left_out"]),
            checksum_bytes((folder / DESCRIPTION).read_bytes() + (folder / TENSORS).read_bytes()),
        )  # fmt: skip


def _described(vectors: np.ndarray, rows: Sequence[dict[str, Any]]) -> list[Direction]:
    if vectors.ndim != 2 or len(vectors) != len(rows) or not len(rows) or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of shape {vectors.shape} for {len(rows)} directions")
    return [
        Direction(str(row["name"]), vector, None if row["attribute"] is None else str(row["attribute"]), row["told"])
        for vector, row in zip(vectors, rows)
    ]
