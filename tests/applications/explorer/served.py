"""A small explorer for tests: two tiny autoencoders on real images, and asking a server as a client does."""

from __future__ import annotations

import http.client
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.applications.directions.fitting import Direction, Directions, save_directions
from ldm_vae.applications.explorer.answers import PageModels, open_page_model
from ldm_vae.applications.explorer.explored import ExploreConfig, Explored
from ldm_vae.applications.explorer.limits import Worker
from ldm_vae.applications.explorer.server import make_application, running
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from tests.applications.explorer.models import open_two

DIRECTION = "bright, and b/probe"
PREVIEW_STEP = 10


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def picture(self) -> Tensor:
        """uint8 (3, h, w)."""
        return torch.from_numpy(np.array(Image.open(io.BytesIO(self.body)))).permute(2, 0, 1)


def ask(url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Reply:
    """One request over a connection of its own; the path goes out as it is."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=120)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def small_run(folder: Path, deterministic: bool = False) -> Path:
    """A run directory with an untrained autoencoder of latents (3, h/8, w/8), two logged steps, and a preview."""
    torch.manual_seed(int(deterministic))
    autoencoder = AutoencoderWavelet(
        latent_channels=3, encoder_channels=(8, 16), encoder_blocks=(1, 1), decoder_channels=(16, 8, 8, 8),
        decoder_blocks=(1, 0, 0, 0), deterministic=deterministic,
    )  # fmt: skip
    autoencoder.save_pretrained(folder / "autoencoder")
    (folder / "config.yaml").write_text("rate: {mode: target, target_nats: 2.5}\n")
    lines = [{"step": step, "loss/l1": 0.5 / step, "loss/kl": 2.0} for step in (5, PREVIEW_STEP)]
    lines.append({"step": PREVIEW_STEP, "alarm": "the rate fell", "verdict": "rate_miss"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    (folder / "previews").mkdir()
    Image.new("RGB", (8, 4), (200, 100, 0)).save(folder / "previews" / f"step-{PREVIEW_STEP:09d}.webp", lossless=True)
    return folder


def small_explored(folder: Path, images: Path, size: int = 32) -> tuple[Explored, ...]:
    """A KL autoencoder with a run directory and a direction, and a plain one, on the images of a folder."""
    run, plain = small_run(folder / "digits <i>&\"'"), small_run(folder / "plain", deterministic=True)
    found = Direction(DIRECTION, np.array([0.6, 0.0, -0.8]), None, {})
    save_directions(Directions([found], load_autoencoder(run).encoder_fingerprint(), {}, {}), folder)
    config = ExploreConfig(data=str(images), count=24, size=size, directions=str(folder), device="cpu")
    return open_two(run, plain / "autoencoder", config)


class Server:
    """The server under test and what it serves."""

    def __init__(self, url: str, models: PageModels, worker: Worker) -> None:
        self.url, self.models, self.worker = url, models, worker

    def __call__(self, path: str, **parameters: object) -> Reply:
        return ask(self.url, f"/api/{path}?{urlencode(parameters)}" if parameters else f"/api/{path}")

    @property
    def explored(self) -> Explored:
        return self.models.all[0].explored


@contextmanager
def small_server(folder: Path, images: Path) -> Iterator[Server]:
    """Both autoencoders of `small_explored`, served."""
    models = PageModels(*(open_page_model(key, one) for key, one in zip("ab", small_explored(folder, images))))
    worker = Worker()
    with running(make_application(models, worker)) as url:
        yield Server(url, models, worker)
    assert worker.close(60)


def decode_path(x: float = 0.5, y: float = -0.5, **more: object) -> str:
    return f"/api/decode?{urlencode({'model': 'a', 'x': x, 'y': y, **more})}"
