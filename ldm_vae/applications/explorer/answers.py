"""What the explorer's server answers: one function for each address, from a `Question` to the work that it takes.

A function checks the question at once, on the event loop, and returns the work, which runs in the worker's thread.
Owns the form of every answer; how they travel is the business of `server`.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm_vae.applications.explorer import edits, runs, stages
from ldm_vae.applications.explorer.explored import Explored
from ldm_vae.applications.explorer.limits import LARGEST_WHOLE, Question, Refusal, finite_json
from ldm_vae.applications.explorer.plane import Plane, fit_plane
from ldm_vae.applications.explorer.round_trip import RoundTrip
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.local_file import read_regular_file

BEYOND = 10
"""How many widths of the map a point may lie outside of it."""
LARGEST_NOISE = 3.0
LARGEST_AMOUNT = 10.0
"""Of a channel's or direction's shift."""
MAXIMUM_POINTS = 32
MAXIMUM_FRAMES = 24
MAXIMUM_PREVIEW_BYTES = 64_000_000


@dataclass(frozen=True)
class Answer:
    content: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


Work = Callable[[], Answer]


@dataclass(eq=False)
class Model:
    """One autoencoder of the page, under its key `a` or `b`. `round_trip` comes when it is measured."""

    key: str
    explored: Explored
    plane: Plane
    round_trip: RoundTrip | None = None

    @functools.cached_property
    def stages(self) -> tuple[stages.Stage, ...]:
        return stages.stages_of(self.explored)

    @functools.cached_property
    def map(self) -> bytes:
        """The JSON of /api/map, made once: there may be 50,000 points."""
        x, y = ([rounded(value) for value in column.tolist()] for column in self.plane.points.T)
        labels = self.explored.labels.tolist()
        return finite_json({"x": x, "y": y, "label": labels, "id": list(self.explored.ids)})

    @property
    def reach(self) -> tuple[float, float, float, float]:
        """(x0, x1, y0, y1) that points may be asked for in."""
        x0, x1, y0, y1 = self.plane.bounds
        wide, high = BEYOND * (x1 - x0), BEYOND * (y1 - y0)
        return x0 - wide, x1 + wide, y0 - high, y1 + high


def open_model(key: str, explored: Explored) -> Model:
    return Model(key, explored, fit_plane(explored))


class Models:
    """The one or two models of the page, on the same images."""

    def __init__(self, *models: Model) -> None:
        self.all = models
        self._by_key = {model.key: model for model in models}

    @property
    def images(self) -> Explored:
        """Any of them: images, labels and ids are the same."""
        return self.all[0].explored

    def asked(self, question: Question) -> Model:
        return self._by_key[question.choice("model", tuple(self._by_key))]

    def index(self, question: Question) -> int:
        return question.whole("index", 0, len(self.images.images) - 1)


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def json_answer(value: Any) -> Answer:
    return Answer(finite_json(value))


def png(picture: Tensor) -> bytes:
    """uint8 (3, h, w), (h, w, 3) or (h, w) -> a PNG file, packed fast rather than small."""
    if picture.ndim == 3 and picture.shape[-1] != 3:
        picture = picture.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(picture.contiguous().numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def png_answer(picture: Tensor, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(png(picture), "image/png", headers or {})


def explorer(models: Models, question: Question) -> Work:
    images, first = models.images, models.all[0].explored
    directions = first.directions.directions if first.directions else []
    return lambda: json_answer(
        {
            "models": [described(model) for model in models.all],
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


def described(model: Model) -> dict[str, Any]:
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
            "centre": list(plane.centre),
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


def latent_map(models: Models, question: Question) -> Work:
    model = models.asked(question)
    return lambda: Answer(model.map)


def round_trip(models: Models, question: Question) -> Work:
    model = models.asked(question)
    found = model.round_trip
    if found is None:
        sentence = f"{model.explored.name}: the round trip is still being measured; ask again in a few seconds"
        raise Refusal(409, sentence, {"Retry-After": "2"})
    errors = [[rounded(value) for value in row] for row in found.errors.tolist()]
    places = {"bounds": found.bounds, "errors": errors, "inside": found.inside.tolist()}
    return lambda: json_answer({**_shares(found), **places})


def decode(models: Models, question: Question) -> Work:
    model = models.asked(question)
    reach = model.reach
    x, y = question.number("x", *reach[:2]), question.number("y", *reach[2:])
    mode = question.choice("mode", ("inverse", "nearest"), "inverse")

    def work() -> Answer:
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


def original(models: Models, question: Question) -> Work:
    index = models.index(question)
    return lambda: png_answer(models.images.images[index])


def reconstruction(models: Models, question: Question) -> Work:
    model, index = models.asked(question), models.index(question)
    explored = model.explored
    channels = [str(channel) for channel in range(explored.mean.shape[1])]
    offsets = question.amounts("channels", channels, LARGEST_AMOUNT)
    names = [direction.name for direction in explored.directions.directions] if explored.directions else []
    directions = question.amounts("directions", names, LARGEST_AMOUNT)
    noise, sample, seed = _noise(question)
    return lambda: png_answer(
        edits.reconstruction(
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


def path(models: Models, question: Question) -> Work:
    model = models.asked(question)
    points = torch.tensor(question.points("points", MAXIMUM_POINTS, model.reach))
    frames = question.whole("frames", 2, MAXIMUM_FRAMES, 8)
    return lambda: png_answer(edits.path_strip(model.explored, model.plane, points, frames))


def architecture(models: Models, question: Question) -> Work:
    model = models.asked(question)
    return lambda: json_answer({"stages": [asdict(stage) for stage in model.stages]})


def activation(models: Models, question: Question) -> Work:
    model, index = models.asked(question), models.index(question)
    wanted = question.text("stage")
    noise, sample, seed = _noise(question)

    def work() -> Answer:
        names = [stage.name for stage in model.stages]
        if wanted not in names:  # the stages are known once they were run
            raise Refusal(404, f"stage: {wanted[:40]!a} is not there; there are {', '.join(names)}")
        found = stages.activation(model.explored, index, wanted, noise, seed, sample)
        facts = {key: value for key, value in vars(found).items() if key != "mosaic"}
        picture = base64.b64encode(png(torch.as_tensor(found.mosaic))).decode()
        return json_answer({**facts, "picture": f"data:image/png;base64,{picture}"})

    return work


def training(models: Models, question: Question) -> Work:
    model = models.asked(question)

    def work() -> Answer:
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


def preview(models: Models, question: Question) -> Work:
    model = models.asked(question)
    step = question.whole("step", 0, LARGEST_WHOLE)

    def work() -> Answer:
        file = dict(_training(model).previews).get(step)
        if file is None:
            raise Refusal(404, f"step: no preview of step {step}; /api/training lists those that are there")
        try:
            content = read_regular_file(file, MAXIMUM_PREVIEW_BYTES + 1)
        except ImageRejected as error:
            raise Refusal(404, f"step: the preview of step {step} cannot be read ({error.reason})") from error
        if len(content) > MAXIMUM_PREVIEW_BYTES:
            raise Refusal(404, f"step: the preview has more than {MAXIMUM_PREVIEW_BYTES} bytes; open it by itself")
        return Answer(content, "image/webp" if file.suffix == ".webp" else "image/png")

    return work


def _training(model: Model) -> runs.Training:
    folder = model.explored.run_directory
    found = None if folder is None else runs.training_of(folder)
    if found is None:
        raise Refusal(404, f"{model.explored.name}: no run directory is beside it; give a run of `ldm-vae train-vae`")
    return found
