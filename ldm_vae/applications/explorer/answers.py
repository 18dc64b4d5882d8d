"""What the explorer's server answers: one function for each address, from a `Question` to the work that it takes.

A function checks the question at once, on the event loop, and returns the work, which runs in the worker's thread.
Owns the form of every answer; `server` sends them.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from ldm_vae.applications.directions.apply import edited
from ldm_vae.applications.explorer import stages
from ldm_vae.applications.explorer.explored import Explored, run_directory
from ldm_vae.applications.explorer.limits import LARGEST_WHOLE, Question, Refusal, finite_json
from ldm_vae.applications.explorer.plane import Plane, RoundTrip, fit_plane
from ldm_vae.autoencoder.lineage import RECORD
from ldm_vae.autoencoder.models import model_directory
from ldm_vae.data.decoding import ImageRejected, read_regular_file
from ldm_vae.errors import UserError
from ldm_vae.evaluation.diagnosis import recorded_verdicts
from ldm_vae.evaluation.plots import Curve, autoencoder_panels, bin_means, read_alarms, read_metrics
from ldm_vae.evaluation.study import read_config_yaml, read_json

BEYOND = 10
"""How many widths of the map a point may lie outside of it."""
LARGEST_NOISE = 3.0
LARGEST_AMOUNT = 10.0
"""Largest shift along a channel or direction."""
MAXIMUM_POINTS = 32
MAXIMUM_FRAMES = 24
MAXIMUM_PREVIEW_BYTES = 64_000_000


@dataclass(frozen=True)
class ApiAnswer:
    content: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


StudyPlan = Callable[[], ApiAnswer]


@dataclass(eq=False)
class PageModel:
    """One autoencoder of the page, under its key `a` or `b`. `round_trip` comes when it is measured."""

    key: str
    explored: Explored
    plane: Plane
    round_trip: RoundTrip | None = None

    @functools.cached_property
    def stages(self) -> tuple[stages.NetworkStage, ...]:
        return stages.stages_of(self.explored)

    @functools.cached_property
    def map(self) -> bytes:
        """The JSON of /api/map, made once: there may be 50,000 points."""
        x, y = ([rounded(value) for value in column.tolist()] for column in self.plane.points.T)
        labels = self.explored.labels.tolist()
        return finite_json({"x": x, "y": y, "label": labels, "id": list(self.explored.ids)})

    @property
    def reach(self) -> tuple[float, float, float, float]:
        """(x0, x1, y0, y1) in which points are accepted."""
        x0, x1, y0, y1 = self.plane.bounds
        wide, high = BEYOND * (x1 - x0), BEYOND * (y1 - y0)
        return x0 - wide, x1 + wide, y0 - high, y1 + high


def open_page_model(key: str, explored: Explored) -> PageModel:
    return PageModel(key, explored, fit_plane(explored))


class PageModels:
    """The one or two models of the page, on the same images."""

    def __init__(self, *models: PageModel) -> None:
        self.all = models
        self._by_key = {model.key: model for model in models}

    @property
    def images(self) -> Explored:
        """Any of them: images, labels and ids are the same."""
        return self.all[0].explored

    def select(self, question: Question) -> PageModel:
        return self._by_key[question.choice("model", tuple(self._by_key))]

    def index(self, question: Question) -> int:
        return question.whole("index", 0, len(self.images.images) - 1)


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def json_answer(value: Any) -> ApiAnswer:
    return ApiAnswer(finite_json(value))


def png(picture: Tensor) -> bytes:
    """uint8 (3, h, w), (h, w, 3) or (h, w) -> a PNG file, packed fast rather than small."""
    if picture.ndim == 3 and picture.shape[-1] != 3:
        picture = picture.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(picture.contiguous().numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def png_answer(picture: Tensor, headers: Mapping[str, str] | None = None) -> ApiAnswer:
    return ApiAnswer(png(picture), "image/png", headers or {})


def explorer(models: PageModels, question: Question) -> StudyPlan:
    images, first = models.images, models.all[0].explored
    directions = first.directions.directions if first.directions else []
    return lambda: json_answer(
        {
            "models": [describe_model(model) for model in models.all],
            "images": {
                "count": len(images.images),
                "label_names": list(images.label_names),
                "origin": images.origin,
                "rejected": len(images.rejected),
            },
            "directions": [{"name": direction.name} for direction in directions],
            "channels": int(first.mean.shape[1]),
        }
    )


def describe_model(model: PageModel) -> dict[str, Any]:
    explored, plane, found = model.explored, model.plane, model.round_trip
    return {
        "key": model.key,
        "name": explored.name,
        "kind": explored.kind,
        "deterministic": explored.deterministic,
        "parameters": explored.parameters,
        "latent_channels": int(explored.mean.shape[1]),
        "downsampling": explored.downsampling,
        "latent_shape": list(explored.mean.shape[1:]),
        "image_size": list(explored.images.shape[2:]),
        "fingerprint": explored.fingerprint,
        "plane": {
            "kind": plane.kind,
            "bounds": list(plane.bounds),
            "center": list(plane.center),
            "spread": list(plane.spread),
            "explained": plane.explained,
        },
        "round_trip": None if found is None else _shares(found),
        "training": explored.run_directory is not None,
        "directions": explored.directions is not None,
    }


def _shares(found: RoundTrip) -> dict[str, Any]:
    return {
        "share": found.share,
        "share_in_holes": found.share_in_holes,
        "tolerance": found.tolerance,
        "grid": found.grid,
    }


def latent_map(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)
    return lambda: ApiAnswer(model.map)


def round_trip(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)
    found = model.round_trip
    if found is None:
        sentence = f"{model.explored.name}: the round trip is still being measured; ask again in a few seconds"
        raise Refusal(409, sentence, {"Retry-After": "2"})
    errors = [[rounded(value) for value in row] for row in found.errors.tolist()]
    places = {"bounds": found.bounds, "errors": errors, "inside": found.inside.tolist()}
    return lambda: json_answer({**_shares(found), **places})


def decode(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)
    reach = model.reach
    x, y = question.number("x", *reach[:2]), question.number("y", *reach[2:])
    mode = question.choice("mode", ("inverse", "nearest"), "inverse")

    def work() -> ApiAnswer:
        nearest, _ = model.plane.nearest(x, y)
        if mode == "nearest":
            point = tuple(model.plane.points[nearest].tolist())
            latents = model.explored.mean[nearest : nearest + 1]
        else:
            point = (x, y)
            latents = model.plane.latent_at(torch.tensor([[x, y]]))
        headers = {"X-Nearest": str(nearest), "X-Point": ",".join(repr(value) for value in point)}
        return png_answer(model.explored.decode(latents)[0], headers)

    return work


def original(models: PageModels, question: Question) -> StudyPlan:
    index = models.index(question)
    return lambda: png_answer(models.images.images[index])


def reconstruction(models: PageModels, question: Question) -> StudyPlan:
    model, index = models.select(question), models.index(question)
    explored = model.explored
    channels = [str(channel) for channel in range(explored.mean.shape[1])]
    offsets = question.amounts("channels", channels, LARGEST_AMOUNT)
    names = [direction.name for direction in explored.directions.directions] if explored.directions else []
    directions = question.amounts("directions", names, LARGEST_AMOUNT)
    noise, sample, seed = _noise(question)
    return lambda: png_answer(
        edited_reconstruction(
            explored, index, noise=noise, sample=sample, seed=seed,
            offsets={int(channel): amount for channel, amount in offsets.items()}, directions=directions,
        )
    )  # fmt: skip


def _noise(question: Question) -> tuple[float, bool, int]:
    return (
        question.number("noise", 0.0, LARGEST_NOISE, 1.0),
        question.switch("sample", True),
        question.whole("seed", 0, LARGEST_WHOLE, 0),
    )


def path(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)
    points = torch.tensor(question.points("points", MAXIMUM_POINTS, model.reach))
    frames = question.whole("frames", 2, MAXIMUM_FRAMES, 8)
    return lambda: png_answer(path_strip(model.explored, model.plane, points, frames))


def architecture(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)
    return lambda: json_answer({"stages": [asdict(stage) for stage in model.stages]})


def activation(models: PageModels, question: Question) -> StudyPlan:
    model, index = models.select(question), models.index(question)
    wanted = question.text("stage")
    noise, sample, seed = _noise(question)

    def work() -> ApiAnswer:
        names = [stage.name for stage in model.stages]
        if wanted not in names:  # the stages are known once they were run
            raise Refusal(404, f"stage: {wanted[:40]!a} is not there; there are {', '.join(names)}")
        found = stages.measure_activation(model.explored, index, wanted, noise, seed, sample)
        facts = {key: value for key, value in vars(found).items() if key != "mosaic"}
        picture = base64.b64encode(png(torch.as_tensor(found.mosaic))).decode()
        return json_answer({**facts, "picture": f"data:image/png;base64,{picture}"})

    return work


def training(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)

    def work() -> ApiAnswer:
        found = _training(model)
        panels = [
            {
                "title": title,
                "unit": panel["unit"],
                "caption": panel["caption"],
                "series": [
                    {"name": name, "steps": steps, "values": values}
                    for name, (steps, values) in panel["series"].items()
                ],
            }
            for title, panel in found.curves.items()
        ]
        previews = [{"step": step} for step, _ in found.previews]
        return json_answer({"panels": panels, "alarms": found.alarms, "verdicts": found.verdicts, "previews": previews})

    return work


def preview(models: PageModels, question: Question) -> StudyPlan:
    model = models.select(question)
    step = question.whole("step", 0, LARGEST_WHOLE)

    def work() -> ApiAnswer:
        file = dict(_training(model).previews).get(step)
        if file is None:
            raise Refusal(404, f"step: no preview of step {step}; /api/training lists those that are there")
        try:
            content = read_regular_file(file, MAXIMUM_PREVIEW_BYTES + 1)
        except ImageRejected as error:
            raise Refusal(404, f"step: the preview of step {step} cannot be read ({error.reason})") from error
        if len(content) > MAXIMUM_PREVIEW_BYTES:
            raise Refusal(404, f"step: the preview has more than {MAXIMUM_PREVIEW_BYTES} bytes; open it by itself")
        return ApiAnswer(content, "image/webp" if file.suffix == ".webp" else "image/png")

    return work


def _training(model: PageModel) -> Training:
    folder = model.explored.run_directory
    found = None if folder is None else training_of(folder)
    if found is None:
        raise Refusal(404, f"{model.explored.name}: no run directory is beside it; give a run of `ldm-vae train-vae`")
    return found


# Pictures of latents that were moved: by the posterior's noise, by channel, along directions, along a path.


def edited_reconstruction(
    explored: Explored,
    index: int,
    noise: float = 1.0,
    sample: bool = True,
    seed: int = 0,
    offsets: Mapping[int, float] | None = None,
    directions: Mapping[str, float] | None = None,
) -> Tensor:
    """The decoded latent of image `index`, uint8 (3, H, W); with `sample` off and nothing moved that of its mean.

    Args:
        noise, sample, seed: see `Explored.latent`.
        offsets: channel -> standard deviations of that channel over all images, added at every position.
        directions: name -> strength, see `applications.directions`.

    Raises:
        UserError: an unknown channel or direction.
    """
    latent = explored.latent(index, noise, sample, seed)
    channels = latent.shape[1]
    deviation = explored.channel_deviation
    for channel, amount in (offsets or {}).items():
        if not 0 <= channel < channels:
            raise UserError(f"channels: {channel} is not between 0 and {channels - 1}; give one of these")
        latent = latent.clone()
        latent[:, channel] += amount * deviation[channel]
    for name, amount in (directions or {}).items():
        if explored.directions is None:
            raise UserError("directions: none are open; start `ldm-vae explore` with directions=FOLDER")
        latent = edited(latent, explored.directions.find(name).vector, [amount])
    return explored.decode(latent)[0]


def path_strip(explored: Explored, plane: Plane, points: Tensor, frames: int) -> Tensor:
    """Decoded points along the line through `points` (k, 2), k >= 1, evenly spaced on it, side by side: uint8
    (3, H, W * frames). The first frame is the first point, the last one the last."""
    images = explored.decode(plane.latent_at(along(points, frames)))
    return torch.cat(list(images), dim=2)


def along(points: Tensor, count: int) -> Tensor:
    """`count` points (count, 2), evenly spaced on the line through `points` (k, 2), k >= 1, its ends included."""
    assert len(points) >= 1, "a path needs a point"
    points = points.double()
    lengths = (points[1:] - points[:-1]).norm(dim=1)
    reached = torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
    wanted = torch.linspace(0, 1, count, dtype=torch.float64) * reached[-1]
    before = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, max(0, len(points) - 2))
    after = (before + 1).clamp_max(len(points) - 1)
    share = ((wanted - reached[before]) / (reached[after] - reached[before]).clamp_min(1e-12)).clamp(0, 1)[:, None]
    return (points[before] + share * (points[after] - points[before])).float()


# The training that made an autoencoder, as its run directory tells it: curves, alarms, verdicts, previews.

HEALTH_FOLDERS = ("health", "autoencoder/health", "../health")
"""Folders where `diagnose` may have written, relative to a run: in it, in its autoencoder, beside it."""
PREVIEW = re.compile(r"step-(\d{1,12})\.(?:webp|png)")

Series = tuple[list[int], list[float]]


class Curves(TypedDict):
    """One panel: `series` are `training`, `held out` and `target`, each its steps and its values."""

    unit: str
    caption: str
    series: dict[str, Series]


@dataclass(frozen=True)
class Training:
    """A training up to now.

    Attributes:
        curves: title -> panel, see `plots.autoencoder_panels`; long curves averaged in bins.
        alarms: `step` and `text` of what training warned of.
        verdicts: `name`, `status` (fail, warn, info) and `text` of the health report of these weights, the worst first;
            empty without one.
        previews: step and file of every sheet of held-out images, by step.
    """

    curves: dict[str, Curves]
    alarms: tuple[dict[str, Any], ...]
    verdicts: tuple[dict[str, str], ...]
    previews: tuple[tuple[int, Path], ...]


def training_of(path: str | Path) -> Training | None:
    """The training of a run of `train-vae`, of the autoencoder in one, or of a checkpoint with its own records; None
    for any other place.

    Raises:
        UserError: a record of the run is damaged.
    """
    run = run_directory(path)
    if run is None:
        return None
    alarms = read_alarms(run / "metrics.jsonl")
    rate = read_config_yaml(run / "config.yaml").get("rate")
    target = rate.get("target_nats") if isinstance(rate, dict) and rate.get("mode") == "target" else None
    if not isinstance(target, (int, float)):
        target = None
    curves: dict[str, Curves] = {}
    for panel in autoencoder_panels(read_metrics(run / "metrics.jsonl"), target):
        drawn = {"training": panel.train, "held out": panel.held_out}
        series = {name: _points(curve) for name, curve in drawn.items() if curve is not None}
        if panel.target is not None:
            steps = [step for found, _ in series.values() for step in found]
            series["target"] = ([min(steps), max(steps)], [float(panel.target)] * 2)
        curves[panel.title] = {"unit": panel.unit, "caption": panel.caption, "series": series}
    return Training(
        curves,
        tuple({"step": alarm.step, "text": f"{alarm.verdict}: {alarm.sentence}"} for alarm in alarms),
        tuple(_verdicts(run)),
        tuple(_previews(run / "previews")),
    )


def _points(curve: Curve) -> Series:
    curve = bin_means(curve)
    return [round(step) for step in curve.steps], [float(value) for value in curve.values]


def _verdicts(run: Path) -> list[dict[str, str]]:
    """Verdicts of the first health report about the current weights of the run."""
    identity = read_json((model_directory(run) or run) / RECORD).get("fingerprint")
    for folder in HEALTH_FOLDERS:
        health = read_json(run / folder / "health.json")
        if health and identity is not None and health.get("autoencoder", {}).get("fingerprint") == identity:
            found = recorded_verdicts(health)
            return [{"name": one["name"], "status": one["severity"], "text": one["sentence"]} for one in found]
    return []


def _previews(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := PREVIEW.fullmatch(path.name)) and path.is_file()]
    return sorted((int(match[1]), path) for match, path in found)
