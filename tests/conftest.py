"""Shared fixtures: small images on disk, and a perceptual backbone of random weights (tests only)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import runtime
from tests.s3 import Server, forget_filesystems

runtime.repair_torchvision()
torch.set_num_threads(1)  # two threads on a busy machine wait for each other more than they compute


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promise", action="append", type=int, help="only tests of this promise of docs/results/reliability.md"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The promises that a test proves go into its report, where tools/reliability.py finds them."""
    chosen, others = config.getoption("promise"), []
    for item in items:
        promises = [mark.args[0] for mark in item.iter_markers("promise")]
        item.user_properties += [("promise", promise) for promise in promises]
        if chosen and not set(chosen) & set(promises):
            others.append(item)
    items[:] = [item for item in items if item not in others]
    if others:
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def random_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file in the layout of torchvision's SqueezeNet features, random: shows gradients, not quality."""
    import lpips
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    tensors = {"features." + key.split(".", 1)[1]: value for key, value in network.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "squeeze.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth random PNGs of 96x80 pixels in the folders `a` and `b`."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((80, 96), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def s3_session() -> Iterator[Server]:
    """A server for all tests; it must not be stopped."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as environment:
        server = Server(environment)
        yield server
        server.stop()


@pytest.fixture
def bucket(s3_session: Server) -> str:
    """The URL of an empty bucket on a real S3 server."""
    return s3_session.new_bucket()


@pytest.fixture
def s3_server(s3_session: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that a test may stop."""
    server = Server(monkeypatch)
    yield server
    server.stop()
    monkeypatch.undo()
    forget_filesystems()
