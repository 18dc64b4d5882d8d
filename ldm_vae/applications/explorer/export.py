"""The explorer as one file that can be mailed: map and comparison, with the decoder running in the page.

Owns what the file holds: the page's own style and scripts, plotly's, and as data the answers of the server, the images
in one sprite, and the weights of the decoder, which `page/decoder.js` runs and `page/exported_source.js` hands to the
page in the place of the server. The file loads nothing, and its policy lets it load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae.applications.explorer import answers
from ldm_vae.applications.explorer.answers import PageModel, PageModels
from ldm_vae.applications.explorer.limits import Question, finite_json
from ldm_vae.applications.explorer.plane import measure_round_trip
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.vector import SMALLEST_SIDE, VectorDecoder
from ldm_vae.data.samples import evenly_spaced
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import WEBP_QUALITY
from ldm_vae.files import system_errors_explained, write_bytes
from ldm_vae.redaction import redacted

MAXIMUM_IMAGES = 2000
"""Largest number of images in the page, evenly spread over the explored ones."""
MAXIMUM_BYTES = 8_000_000
"""Largest size of the file, which most mail servers accept."""
SERVED_ONLY = ("source.js", "architecture.js", "sliders.js", "training.js")
"""Scripts that ask a server; the first gives its place to `REPLACEMENT`."""
REPLACEMENT = ("decoder.js", "exported_source.js")
PLOTLY = "plotly.min.js"

STYLE_TAG = re.compile(r'<link rel="stylesheet" href="static/([\w.]+)">')
SCRIPT_TAG = re.compile(r'<script src="static/([\w.]+)"></script>\n?')
HEAD = '<meta charset="utf-8">\n'
"""What the policy follows: it holds for what comes after it."""


def check_export_file(path: str | Path, overwrite: bool) -> None:
    """To be called before a model is opened. Raises: UserError for a folder, or a file that is there already."""
    if Path(path).is_dir():
        raise UserError(f"export: {path} is a folder; give the name of a file, as page.html")
    if Path(path).exists() and not overwrite:
        raise UserError(f"export: {path} is there already; give another name, or --overwrite")


def export_page(
    models: PageModels, path: str | Path, overwrite: bool = False, advance: Callable[[int], None] | None = None
) -> int:
    """Write the page of one or two vector autoencoders, atomically, and return its size in bytes.

    Args:
        advance: see `measure_round_trip`, which runs for every model that has no round trip yet.

    Raises:
        UserError: another architecture, a file that is there already, a page of more than `MAXIMUM_BYTES`, or what the
            system refuses to write.
    """
    check_export_file(path, overwrite)
    for model in models.all:
        check_exportable(model.explored.autoencoder, model.explored.path)
    for model in models.all:
        if model.round_trip is None:
            model.round_trip = measure_round_trip(model.explored, model.plane, advance=advance)
    page = page_of(exported_data(models)).encode()
    if len(page) > MAXIMUM_BYTES:
        raise UserError(
            f"export: the page would have {len(page) / 1e6:.1f} MB, more than {MAXIMUM_BYTES / 1e6:g}; give a smaller "
            "count, or explore a smaller model"
        )
    with system_errors_explained(path, "free some space or make its folder writable, and run the same command again"):
        write_bytes(Path(path), page)
    return len(page)


def check_exportable(autoencoder: Autoencoder, path: str) -> None:
    """To be called before images are encoded. Raises: UserError for an autoencoder whose decoder a page cannot run."""
    if not isinstance(autoencoder.decoder, VectorDecoder):
        raise UserError(
            f"export: {path} is of class {type(autoencoder).__name__}, and a page can run only the "
            "small decoder of an AutoencoderVector (autoencoder.architecture=vector); leave out export and "
            "explore it with the server, or export checkpoints/digits-vae-2d"
        )


def exported_data(models: PageModels) -> dict[str, Any]:
    """All that the page shows: the server's answers by their names, and for each model its decoder and latents."""
    images = models.images.images
    chosen = evenly_spaced(len(images), MAXIMUM_IMAGES)
    description = _answer(answers.explorer, models)
    description["images"]["count"] = len(chosen)
    description["directions"] = []
    maps = {}
    for model in models.all:
        listed = _answer(answers.latent_map, models, model)
        maps[model.key] = {name: [values[index] for index in chosen] for name, values in listed.items()}
    shared = redacted({"description": description, "maps": maps})
    return {
        **shared,
        "round_trips": {model.key: _answer(answers.round_trip, models, model) for model in models.all},
        "sprite": sprite(images[chosen]),
        "decoders": {model.key: {**described_decoder(model), **_places(model, chosen)} for model in models.all},
    }


def _answer(
    function: Callable[[PageModels, Question], answers.StudyPlan], models: PageModels, model: PageModel | None = None
) -> Any:
    """What the server would answer."""
    query = f"model={model.key}" if model else ""
    return json.loads(function(models, Question(query.encode(), ["model"]))().content)


def _places(model: PageModel, chosen: Any) -> dict[str, Any]:
    """The plane within the latents, `origin` + x * `axes`[0] + y * `axes`[1], and the latents of the images."""
    corners = model.plane.latent_at(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).flatten(1)
    return {
        "origin": corners[0].tolist(),
        "axes": (corners[1:] - corners[0]).tolist(),
        "latents": packed_floats([model.explored.mean[chosen]]),
    }


def described_decoder(model: PageModel) -> dict[str, Any]:
    """The layers in order and their weights as `page/decoder.js` reads them."""
    decoder = model.explored.autoencoder.decoder
    layers, tensors = [], list[Tensor]()

    def add(kind: str, layer: nn.Linear | nn.Conv2d, side: int, doubled: bool, silu: bool) -> None:
        shape = {"inputs": layer.weight.shape[1], "outputs": layer.weight.shape[0], "side": side}
        layers.append({"kind": kind, **shape, "doubled": doubled, "silu": silu})
        tensors.extend(layer.parameters())

    side = SMALLEST_SIDE
    add("linear", decoder.first, 1, False, True)
    add("linear", decoder.second, side, False, True)
    for convolution in decoder.convolutions:
        side *= 2
        add("convolution", convolution, side, True, True)
    add("convolution", decoder.head, side, False, False)
    return {"layers": layers, "weights": packed_floats(tensors)}


def packed_floats(tensors: list[Tensor]) -> str:
    """Base64 of the numbers of all tensors, one after the other, as little-endian 32-bit floats."""
    flat = torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])
    return base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()


def sprite(images: Tensor) -> dict[str, Any]:
    """uint8 (n, 3, h, w) in one WebP, row by row, as a data URI with its measures; without loss where all are gray."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = images.new_zeros(rows * columns, channels, height, width)
    cells[:count] = images
    cells = cells.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    sheet = Image.fromarray(cells.reshape(rows * height, columns * width, channels).numpy())
    gray = bool((images == images[:, :1]).all())
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=WEBP_QUALITY, lossless=gray)
    address = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"address": address, "columns": columns, "width": width, "height": height}


def page_of(data: dict[str, Any]) -> str:
    """The page as one text, with `data` in it."""
    page = page_file("index.html")
    page = STYLE_TAG.sub(lambda tag: f"<style>\n{page_file(tag[1])}</style>", page)
    names = SCRIPT_TAG.findall(page)
    body, _, end = SCRIPT_TAG.sub("", page).rpartition("</body>")
    assert names[0] == PLOTLY, "plotly comes first"
    assert set(SERVED_ONLY) <= set(names), "the scripts that ask a server"
    assert HEAD in body, "where the policy goes"
    scripts = [plotly_script()]
    for name in names[1:]:
        if name == SERVED_ONLY[0]:
            scripts += [page_file(replacement) for replacement in REPLACEMENT]
        elif name not in SERVED_ONLY:
            scripts.append(page_file(name))
    policy = f'<meta http-equiv="Content-Security-Policy" content="{content_policy(scripts)}">\n'
    body = body.replace(HEAD, HEAD + policy, 1)
    written = "".join(f"<script>{script}</script>\n" for script in scripts)
    return f'{body}<script type="application/json" id="exported">{embedded_json(data)}</script>\n{written}</body>{end}'


def content_policy(scripts: list[str]) -> str:
    """Nothing is loaded, and no script runs but these."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever names and labels say."""
    return finite_json(value).decode().replace("<", "\\u003c")


def page_file(name: str) -> str:
    """A file of the page. A script or style that held the end of its own element could not be put into a page."""
    text = (importlib.resources.files("ldm_vae.applications.explorer") / "page" / name).read_text("utf-8")
    assert name.endswith(".html") or not re.search(r"<(/script|/style|!--)", text, re.IGNORECASE), name
    return text


def plotly_script() -> str:
    """plotly's own bundle, as its package brings it."""
    return (importlib.resources.files("plotly") / "package_data" / PLOTLY).read_text("utf-8")
