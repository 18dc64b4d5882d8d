"""What directions change: held-out images are edited by every direction, and all attributes measured again.

    images -> latents -> moved by each strength -> pictures -> attributes (n, s, k) -> `assess` -> a row with a verdict

What pixels tell is measured on the edited pictures; classes, tables and scenes are read off them by a small network
that is trained on unedited images, where it can read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ldm_vae import metrics, provenance
from ldm_vae.applications.directions import attributes, fitting
from ldm_vae.applications.directions.apply import edited
from ldm_vae.applications.directions.attributes import (
    LABELS,
    PIXELS,
    Attribute,
    AttributeReader,
    distinct,
    reduced,
    train_reader,
)
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import check_positive
from ldm_vae.data import transforms
from ldm_vae.data.samples import Rejected, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import NEVER_TRAINED_ON, Part
from ldm_vae.data.survey import describe_images
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation import plots
from ldm_vae.evaluation.pages import Drawing, embed_image, plain_page
from ldm_vae.evaluation.study import Results, Study, StudyPlan, check_resolution, enlarged_lines, rejected_images
from ldm_vae.metrics import bootstrap_interval
from ldm_vae.random import numpy_rng
from ldm_vae.runtime import compute_device
from ldm_vae.utils.image_grid import side_by_side
from ldm_vae.utils.progress import track
from ldm_vae.utils.text import Table, markdown_table, pluralize

READABLE = 0.7
"""Correlation of reading and truth on reconstructions of images that the reader never saw."""
LEAST_IMAGES = 8
CONTROLS = 8
STRIP_SIDE = 900
LEAST_CHANGE = 0.1
"""Standard deviations for a strength of 1; what is below is not an edit."""
STEADY = 0.9
"""Spearman correlation of strength and attribute, mean over images."""
TOGETHER = 0.5
"""Correlation over unedited images from which two attributes are called the same thing, not drift."""
PREDICTABLE = {"AUROC": 0.75, "R2": 0.2}
"""From here on pooled latents are said to predict an attribute."""


@dataclass(frozen=True)
class EvaluateDirectionsConfig:
    """`ldm-vae directions evaluate`: on images that the fit never saw.

    Writes results.json, results.md, index.html and run.json. Classes, tables and scenes are read off the edited
    pictures by a small network that is trained first; what it cannot read is named.

      ldm-vae directions evaluate runs/directions autoencoder=runs/mine data=~/images output=runs/directions-results
      ldm-vae directions evaluate runs/directions autoencoder=runs/vae attributes_from=scene output=results

    Args:
        directions: the folder that `directions fit` wrote.
        autoencoder: an autoencoder with the encoder of the fit.
        output: the folder for the results.
        part: held_out (used neither in training nor in the fit), its halves validation and test, train or all.
        resolution: side of the center crop in pixels; use that of the fit.
        count: number of images to edit.
        strengths: strengths of the edits, in standard deviations of the pooled latents; must include 0.
        names: the directions to measure; null: all.
        attributes_from: sources of attributes besides pixels, which are always measured: labels, scene, or paths of
            tables. A network that is trained on the train part reads them.
        circles: columns of tables that are angles in turns.
        reader_images: largest number of images for training the network that reads attributes.
        reader_epochs: number of epochs of its training.
        seed: seed of that network and of the random directions for comparison.
        examples: number of example images on the page.
        device: auto, cpu, cuda, cuda:1 ...
    """

    directions: str = "???"
    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 256
    count: int = 32
    strengths: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])
    names: list[str] | None = None
    attributes_from: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)
    reader_images: int = 2000
    reader_epochs: int = 15
    seed: int = 0
    examples: int = 2
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "resolution", "reader_images", "reader_epochs", "examples")
        if self.count < LEAST_IMAGES:
            raise UserError(f"count: {self.count} is below {LEAST_IMAGES} images, the least that say anything")
        if len(set(self.strengths)) < 3 or 0.0 not in self.strengths:
            raise UserError(f"strengths: {self.strengths} needs three different numbers, 0 among them; try -2,-1,0,1,2")
        if PIXELS in self.attributes_from:
            raise UserError("attributes_from: pixels are measured anyway; leave it out")


@dataclass(frozen=True)
class AttributeMeasurer:
    """Attributes of pictures: `names` of measured, then of read ones."""

    names: list[str]
    reader: AttributeReader | None
    columns: list[int]

    def measure(self, images: Tensor) -> np.ndarray:
        """Images (n, 3, h, w) in [-1, 1] -> (n, k) float64, after an 8-bit round trip."""
        images = transforms.from_uint8(transforms.to_uint8(images))
        found = [value.double()[:, None] for value in attributes.measure_attributes(images).values()]
        if self.reader is not None:
            found.append(self.reader(reduced(images).cpu())[:, self.columns].double())
        return torch.cat([one.cpu() for one in found], dim=1).numpy()


def evaluate_directions(config: EvaluateDirectionsConfig, *, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Measure, write results.json, results.md, index.html and run.json; return the first.

    A folder that holds the finished result of these settings is read, not redone. Raises: UserError.
    """
    return DirectionsEvaluation(config, overwrite).run(dry_run)


class DirectionsEvaluation(Study):
    """The study of `ldm-vae directions evaluate`."""

    command, product = "directions evaluate", "the evaluation of the directions"
    config: EvaluateDirectionsConfig

    def __init__(self, config: EvaluateDirectionsConfig, overwrite: bool) -> None:
        autoencoder = load_autoencoder(config.autoencoder).to(compute_device(config.device))
        fitting.check_continuous(autoencoder, f"autoencoder {config.autoencoder}")
        check_resolution(config.resolution, autoencoder)
        self.found = fitting.load_directions(config.directions)
        self.found.check_autoencoder(autoencoder, f"autoencoder {config.autoencoder}")
        names = config.names
        self.chosen = self.found.directions if names is None else [self.found.find(name) for name in names]
        super().__init__(config, autoencoder, overwrite=overwrite)

    def inputs(self, results: Results) -> dict[str, tuple[Any, Any]]:
        return {"other directions": (results["directions"], self.found.digest)}

    def prepare(self) -> None:
        self.source, self.indices = fitting.select(self.config.data, self.config.part, self.config.count)

    def work(self) -> StudyPlan:
        config = self.config
        images = describe_images(self.source, len(self.indices))
        directions = f"{pluralize(len(self.chosen), 'direction')} at {pluralize(len(config.strengths), 'strength')}"
        what = (images, f"part {config.part}", f"{config.resolution} pixels", directions, config.autoencoder)
        return StudyPlan((*what, str(self.autoencoder.device)), self.source, self.indices, config.resolution)

    def then(self, results: Results) -> list[str]:
        config = self.config
        words = ["ldm-vae", "explore", config.autoencoder, f"directions={config.directions}"]
        return [*words, *([f"data={config.data.path}"] if config.data.source == "folder" else [])]

    def measure(self) -> Results:
        config, rejected = self.config, Rejected()
        source, indices = self.source, self.indices
        indices, images = read_crops(source, indices, config.resolution, rejected, self.enlarged)
        if images is None or len(indices) < LEAST_IMAGES:
            raise UserError(
                f"data: {pluralize(len(indices), 'image')} can be read, {LEAST_IMAGES} are the least; give more"
            )
        device = self.autoencoder.device
        self.latents = [self.autoencoder.encode_moments(image[None].to(device))[0] for image in images]
        pooled = np.concatenate([fitting.pool(z, source.id(i)) for z, i in zip(self.latents, indices)])
        unedited = self._decode(self.latents)[..., : images.shape[-2], : images.shape[-1]]
        self.measurer, readable = make_measurer(config, source, indices, unedited)
        self.base = self.measurer.measure(unedited)
        deviations, correlations = spread_of(self.measurer.measure(images))
        self.rows: list[DirectionRow] = []
        changes: dict[str, list[float]] = {}
        for direction in track(self.chosen, "editing", "direction"):
            values = self._values(direction, len(images), config.strengths)
            self.rows.append(assess(direction, self.measurer.names, values, config.strengths, deviations, correlations))
            changes[direction.name] = slopes(values, config.strengths, deviations).mean(axis=0).tolist()
        identity = metrics.psnr(transforms.from_uint8(transforms.to_uint8(unedited)), images)
        return {
            "directions": self.found.digest,
            "protocol": {
                "images": {"fingerprint": source.fingerprint(), "part": config.part, "count": len(indices)},
                "preprocessing": preprocessing_record(config.resolution),
                "fitted_to": self.found.images,
                "versions": provenance.versions(),
            },
            "identity_psnr_db": float(identity.mean()),
            "attributes": self.measurer.names,
            "readable": readable,
            "rows": [asdict(row) for row in self.rows],
            "changes": changes,
            "random_direction": dict(zip(self.measurer.names, self._control(pooled, deviations).tolist())),
            "rejected": rejected_images(rejected),
        }

    def _decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents (1, c, h, w), one by one, on the CPU."""
        return torch.cat([self.autoencoder.decode_images(latent).cpu() for latent in latents])

    def _moved(self, latent: Tensor, direction: fitting.Direction, strengths: Sequence[float]) -> Tensor:
        """The pictures (s, 3, h, w) of a latent moved by each strength."""
        return self._decode(edited(latent, direction.vector, strengths).split(1))

    def _values(self, direction: fitting.Direction, count: int, strengths: Sequence[float]) -> np.ndarray:
        """Attributes (n, s, k) of the first `count` images at every strength."""
        moving = [s for s in strengths if s != 0]
        found = np.empty((count, len(strengths), self.base.shape[1]))
        for number, latent in enumerate(self.latents[:count]):
            found[number, [s != 0 for s in strengths]] = self.measurer.measure(self._moved(latent, direction, moving))
            found[number, [s == 0 for s in strengths]] = self.base[number]
        return found

    def _control(self, pooled: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Rms change (k,) by random directions of the same length: what an edit does that knows nothing."""
        rng = numpy_rng(self.config.seed, "random directions")
        squares = []
        for number in range(CONTROLS):
            vector = fitting.scaled(rng.standard_normal(pooled.shape[1]) * pooled.std(axis=0), pooled)
            values = self._values(
                fitting.Direction(f"random/{number}", vector, None, {}), LEAST_IMAGES, [-1.0, 0.0, 1.0]
            )
            squares.append(np.square(slopes(values, [-1.0, 0.0, 1.0], deviations)).mean(axis=0))
        return np.sqrt(np.mean(squares, axis=0))

    def markdown(self, results: Results) -> str:
        table = markdown_table(HEADINGS, [row_cells(row) for row in self._rows(results)])
        lines = ["# Directions", "", *table, "", *[f"{note}\n" for note in table_notes(results)]]
        return "\n".join([*lines, *[f"- {sentence}" for sentence in verdict_sentences(self._rows(results))]]) + "\n"

    def _rows(self, results: Results) -> list[DirectionRow]:
        return [DirectionRow(**row) for row in results["rows"]]

    def page(self, results: Results) -> str:
        drawing = Drawing(
            matrix_svg(results),
            "Change of every attribute (across) by every direction (down) for a strength of 1, in standard deviations "
            "of the attribute over unedited images; orange up, blue down. One dark cell a row is ideal.",
        )
        pictures = []
        examples = self.latents[: self.config.examples]
        for direction, row in zip(self.chosen, self.rows):
            for number, latent in enumerate(examples):
                text = f"{row.name}: {row.verdict}" + (f", image {number + 1}" if len(examples) > 1 else "")
                images = transforms.to_pil(self._moved(latent, direction, self.config.strengths))
                pictures.append(embed_image(side_by_side(images), text, STRIP_SIDE))
        table = Table(HEADINGS, [row_cells(row) for row in self.rows], table_notes(results))
        count = results["protocol"]["images"]["count"]
        lead = f"What each direction changes, on {count} images."
        sentences = [*verdict_sentences(self.rows), *enlarged_lines(results)]
        return plain_page("Directions", lead, sentences, [drawing], [table], pictures)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": results["protocol"]["images"]["count"], "directions": len(results["rows"])}


def make_measurer(
    config: EvaluateDirectionsConfig, source: ImageSource, indices: Sequence[int], unedited: Tensor
) -> tuple[AttributeMeasurer, dict[str, float]]:
    """And for every attribute that is read: the correlation of reading and truth on reconstructions."""
    if not config.attributes_from:
        return AttributeMeasurer(list(attributes.MEASURED), None, []), {}
    _, training = fitting.select(
        config.data, "train" if config.part in NEVER_TRAINED_ON else "all", config.reader_images
    )
    overlap = set(indices)
    training, pictures = read_small(source, [i for i in training if i not in overlap], config.resolution)
    varied_attributes = [a for a in attributes_of(config, source, training) if a.problem() is None]
    if not varied_attributes:
        raise UserError(
            "attributes_from: none of these attributes varies enough in the images to train a reader; give more"
        )
    reader = train_reader(pictures, varied_attributes, config.reader_epochs, config.seed)
    truth = {a.name: a for a in attributes_of(config, source, indices, least=False)}
    readings = reader(reduced(transforms.from_uint8(transforms.to_uint8(unedited)))).double().numpy()
    readable: dict[str, float] = {}
    for k, attribute in enumerate(varied_attributes):
        values = truth[attribute.name].values if attribute.name in truth else np.zeros(len(indices))
        rows = np.isfinite(values)
        varied = rows.sum() >= LEAST_IMAGES and values[rows].std() > 0 and readings[rows, k].std() > 0
        readable[attribute.name] = float(np.corrcoef(values[rows], readings[rows, k])[0, 1]) if varied else 0.0
    columns = [k for k, a in enumerate(varied_attributes) if readable[a.name] >= READABLE]
    names = distinct(
        [Attribute(name, np.empty(0), False) for name in attributes.MEASURED] + [varied_attributes[k] for k in columns]
    )
    return AttributeMeasurer([a.name for a in names], reader, columns), readable


def attributes_of(
    config: EvaluateDirectionsConfig, source: ImageSource, indices: Sequence[int], least: bool = True
) -> list[Attribute]:
    """What is known of these images. `least`: refuse when they are of one class only."""
    labels = np.array([source.label(index) for index in indices], np.int64)
    one_class = len(set(labels.tolist()) - {-1}) < 2
    origins = [name for name in config.attributes_from if least or name != LABELS or not one_class]
    ids = [source.id(index) for index in indices]
    return attributes.collect_attributes(
        origins, source, indices, ids, labels, source.label_names, circles=config.circles
    )


def read_small(source: ImageSource, indices: Sequence[int], resolution: int) -> tuple[list[int], Tensor]:
    """The readable ones of these images and their pictures (n, 3, 64, 64). Raises: UserError for too few."""
    found, pictures = [], []
    for index in indices:
        read, image = read_crops(source, [index], resolution, [], [])
        if image is not None:
            found += read
            pictures.append(reduced(image))
    if len(found) < attributes.LEAST_IMAGES:
        raise UserError(
            f"reader_images: {pluralize(len(found), 'image')} to train the reader on; "
            f"{attributes.LEAST_IMAGES} are the least"
        )
    return found, torch.cat(pictures)


def spread_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations (k,) and correlations (k, k) of the attributes (n, k) of unedited images."""
    deviations = np.maximum(values.std(axis=0), 1e-9)
    standard = (values - values.mean(axis=0)) / deviations
    return deviations, standard.T @ standard / len(values)


# What the edits changed: change of the target, drift of the others, monotonicity, a verdict.


@dataclass(frozen=True)
class DirectionRow:
    """One direction.

    Attributes:
        target: its attribute; without labels the one that it changes most; None where that one cannot be measured.
        change: of the target, mean over images, with its 95 % interval.
        monotonicity: Spearman correlation of strength and target, mean over images.
        drift: attribute -> rms change over images, for those that do not go together with the target.
        along: attributes that do.
        verdict: one of the keys of VERDICTS.
    """

    name: str
    target: str | None
    told: dict[str, Any]
    change: float | None
    interval: tuple[float, float] | None
    monotonicity: float | None
    drift: dict[str, float]
    along: list[str]
    verdict: str

    @property
    def worst(self) -> tuple[str, float] | None:
        """The attribute that drifts most."""
        name = max(self.drift, key=self.drift.__getitem__, default=None)
        return None if name is None else (name, self.drift[name])


VERDICTS = {
    "works": "moves its attribute steadily, and more than any other",
    "entangled": "moves its attribute steadily, but another one at least as much",
    "unsteady": "moves its attribute, but not in every image the same way: up in one, down in another",
    "not told": "does not move it: pooled latents do not tell it, it lies in the arrangement of positions",
    "not moved": (
        "does not move it, although pooled latents tell it: by what goes along with it, or because one shift "
        "raises it here and lowers it there"
    ),
    "wrong way": "moves its attribute the wrong way",
    "unread": "cannot be judged: nobody reads this attribute off edited images well enough",
    "unnamed": "was fitted without labels; the target is what it changes most",
}


def slopes(values: np.ndarray, strengths: Sequence[float], deviations: np.ndarray) -> np.ndarray:
    """Values (n, s, k) of n images at s strengths -> change for a strength of 1 (n, k), least squares over strengths,
    in `deviations` (k,)."""
    s = np.asarray(strengths) - np.mean(strengths)
    return np.einsum("s,nsk->nk", s, values) / (s @ s) / deviations


def monotonicity(values: np.ndarray, strengths: Sequence[float]) -> float:
    """Mean over images of Spearman's correlation of strengths (s,) and values (n, s); a constant row counts 0."""
    x = rankdata(strengths)
    x = x - x.mean()
    found = []
    for row in values:
        y = rankdata(row)
        y = y - y.mean()
        found.append(float(x @ y / np.sqrt((x @ x) * (y @ y))) if y.any() else 0.0)
    return float(np.mean(found))


def assess(
    direction: fitting.Direction,
    names: Sequence[str],
    values: np.ndarray,
    strengths: Sequence[float],
    deviations: np.ndarray,
    correlations: np.ndarray,
) -> DirectionRow:
    """Values (n, s, k) of the attributes `names` at s strengths; `correlations` (k, k) over unedited images."""
    change = slopes(values, strengths, deviations)
    means, sizes = change.mean(axis=0), np.sqrt(np.square(change).mean(axis=0))
    if direction.attribute is not None and direction.attribute not in names:
        return DirectionRow(direction.name, direction.attribute, direction.told, None, None, None, {}, [], "unread")
    target = int(np.abs(means).argmax()) if direction.attribute is None else list(names).index(direction.attribute)
    along = [name for k, name in enumerate(names) if k != target and abs(correlations[target, k]) >= TOGETHER]
    drift = {name: float(sizes[k]) for k, name in enumerate(names) if k != target and name not in along}
    row = DirectionRow(
        direction.name, names[target], direction.told, float(means[target]), bootstrap_interval(change[:, target]),
        monotonicity(values[:, :, target], strengths), drift, along, "",
    )  # fmt: skip
    return replace(row, verdict=_verdict(row, direction.attribute is not None))


def _verdict(row: DirectionRow, labeled: bool) -> str:
    assert row.change is not None
    assert row.monotonicity is not None
    if not labeled:
        return "unnamed"
    if abs(row.change) < LEAST_CHANGE:
        return "not moved" if row.told["value"] >= PREDICTABLE[row.told["measure"]] else "not told"
    if row.change < 0:
        return "wrong way"
    if row.monotonicity < STEADY:
        return "unsteady"
    return "entangled" if row.worst is not None and row.worst[1] >= row.change else "works"


HEADINGS = [
    "direction", "target", "told by pooled latents", "change of target", "monotonicity", "largest drift", "verdict",
]  # fmt: skip


def row_cells(row: DirectionRow) -> list[str]:
    """The row of a table, as text."""
    told = f"{row.told['measure']} {row.told['value']:.2f}"
    if row.change is None or row.interval is None:
        return [row.name, row.target or "", told, "", "", "", row.verdict]
    low, high = row.interval
    change = f"{row.change:+.2f} ({low:+.2f} to {high:+.2f})"
    worst = "" if row.worst is None else f"{row.worst[0]} {row.worst[1]:.2f}"
    return [row.name, row.target or "", told, change, f"{row.monotonicity:+.2f}", worst, row.verdict]


def verdict_sentences(rows: Sequence[DirectionRow]) -> list[str]:
    """Each verdict that occurs, what it means, and the directions that have it."""
    found = []
    for verdict, meaning in VERDICTS.items():
        having = [row.name for row in rows if row.verdict == verdict]
        if having:
            found.append(f"{verdict}: {meaning}. {', '.join(having)}.")
    return found


def table_notes(results: dict[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    config = results["config"]
    found = [
        f"Change: standard deviations of the attribute for a strength of 1, mean over "
        f"{results['protocol']['images']['count']} images with its 95 % interval; strengths {config['strengths']}. "
        "Monotonicity: Spearman's correlation of strength and attribute, mean over images. Drift: rms change of "
        "another attribute that does not go together with the target in unedited images.",
        f"At strength 0 the pictures are reconstructions, {results['identity_psnr_db']:.2f} dB PSNR to the originals.",
    ]
    random = ", ".join(f"{name} {value:.2f}" for name, value in results["random_direction"].items())
    found.append(f"Random directions of the same length change: {random} (rms).")
    if results["readable"]:
        read = ", ".join(f"{name} {value:.2f}" for name, value in results["readable"].items())
        found.append(f"Attributes read by a network, correlation with the truth on reconstructions: {read}.")
    return found


def matrix_svg(results: dict[str, Any]) -> str:
    """The matrix of changes as a drawing."""
    from matplotlib.colors import LinearSegmentedColormap

    names, attributes = list(results["changes"]), results["attributes"]
    values = np.array([results["changes"][name] for name in names])
    figure, (axes,) = plots.new_figure(width=2.6 + 0.42 * len(attributes), height=1.6 + 0.24 * len(names))
    axes.grid(False)
    blue, orange = plots.COLORS[2], plots.COLORS[1]
    colors = LinearSegmentedColormap.from_list("changes", [blue, "#ffffff", orange])
    axes.imshow(values, cmap=colors, vmin=-1, vmax=1, aspect="auto")
    across, down = ([name.replace("$", r"\$") for name in those] for those in (attributes, names))  # no formulas
    axes.set_xticks(range(len(attributes)), across, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), down)
    return plots.to_svg(figure, "Change of every attribute by every direction")
