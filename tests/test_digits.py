"""`tools/digits.py`: MNIST's files become a data set that training reads, or images that travel with a model."""

from __future__ import annotations

import gzip
import importlib.util
import re
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ldm_vae.applications.explorer.explored import read_bundled
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.data import open_source
from ldm_vae.data.sources import DataConfig, DatasetsConfig

SCRIPT = Path(__file__).parents[1] / "tools" / "digits.py"
COUNT = 12


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("digits", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """Twelve training and twelve test pictures, one part packed."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, pack in (("train", gzip.compress), ("t10k", bytes)):
        images = rng.integers(0, 256, (COUNT, 28, 28), dtype=np.uint8)
        suffix = ".gz" if part == "train" else ""
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        labels = (np.arange(COUNT) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    return folder


@pytest.mark.parametrize("part", ["train", "test"])
def test_mnist_becomes_a_data_set_with_every_pixel_and_label(script, mnist, tmp_path, part):
    output = tmp_path / "digits.parquet"
    assert script.main([str(mnist), str(output), "--part", part]) == 0
    source = open_source(DataConfig(source="datasets", datasets=DatasetsConfig(name=str(output), label_column="label")))
    images, labels = script.read_mnist(mnist, part)
    assert len(source) == COUNT
    assert source.label_names == tuple("0123456789")
    for i in (0, COUNT - 1):
        picture = source.read(i)
        assert picture.shape == (32, 32, 3)
        assert np.array_equal(picture[2:-2, 2:-2, 1], images[i])
        assert not picture[:2].any()
        assert not picture[:, -2:].any()
        assert source.label(i) == labels[i]


def test_digits_travel_with_an_autoencoder(script, mnist, tmp_path):
    config = AutoencoderConfig(architecture="vector", preset="digits", latent_channels=2)
    build_autoencoder(config).save_pretrained(tmp_path / "model")
    assert script.main([str(mnist), str(tmp_path / "model"), "--part", "test", "--count", "5"]) == 0
    bundled = read_bundled(tmp_path / "model")
    assert bundled is not None
    assert tuple(bundled.images.shape) == (5, 32, 32)
    assert np.array_equal(bundled.images[4, 2:-2, 2:-2].numpy(), script.read_mnist(mnist, "test")[0][4])
    assert bundled.labels.tolist() == [0, 1, 2, 3, 4]
    assert bundled.origin == "MNIST, test part"


def test_digits_of_scikit_learn_are_enlarged(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert script.main(["sklearn", str(tmp_path / "digits.parquet")]) == 2
    assert "sklearn: is not installed; pip install scikit-learn" in capsys.readouterr().err
    pictures = np.zeros((3, 8, 8))
    pictures[:, 2:6, 2:6] = 16.0
    datasets = ModuleType("sklearn.datasets")
    datasets.load_digits = lambda: SimpleNamespace(images=pictures, target=np.array([3, 1, 2]))
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    images, labels = script.read_sklearn()
    assert images.shape == (3, 28, 28)
    assert (images[0, 14, 14], images[0, 0, 0], labels.tolist()) == (255, 0, [3, 1, 2])
    assert script.main(["sklearn", str(tmp_path / "digits.parquet"), "--part", "test"]) == 2
    assert "one part only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t10k-labels-idx1-ubyte", None, "no such file"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(3, np.uint8)), "has 12 images and 3 labels"),
        ("t10k-labels-idx1-ubyte", idx(np.full(COUNT, 10, np.uint8)), "label 10, which is not a digit"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros((COUNT, 1, 1), np.uint8)), "not an idx file of 1 dimensions"),
        ("t10k-images-idx3-ubyte", b"", "not an idx file of 3 dimensions"),
        ("t10k-images-idx3-ubyte", struct.pack(">I", 0x803) + b"12", "not an idx file of 3 dimensions"),
        ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x803, COUNT, 28, 28) + b"1234", "does not hold the 9408 bytes"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((COUNT, 28, 28), np.uint8)) + b"1", "does not hold the 9408 bytes"),
        ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), "announces .* more than"),
        ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x803, 1, 2**31, 28), "announces .* more than"),
    ],
)
def test_damaged_files_are_refused_in_one_line(script, mnist, tmp_path, capsys, file, content, message):
    (mnist / file).unlink()
    if content is not None:
        (mnist / file).write_bytes(content)
    assert script.main([str(mnist), str(tmp_path / "digits.parquet"), "--part", "test"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "digits.parquet").exists()


def test_a_damaged_archive_is_refused(script, mnist, tmp_path, capsys):
    packed = mnist / "train-images-idx3-ubyte.gz"
    content = packed.read_bytes()
    for damaged in (content[: len(content) // 2], b"no gzip at all", content[:100] + bytes(50) + content[150:]):
        packed.write_bytes(damaged)
        assert script.main([str(mnist), str(tmp_path / "digits.parquet")]) == 2
        assert "fetch it again" in capsys.readouterr().err


def test_no_file_is_replaced_and_no_other_name_taken(script, mnist, tmp_path, capsys):
    (tmp_path / "digits.parquet").write_bytes(b"mine")
    for output, message in (("digits.parquet", "exists"), ("digits.csv", "neither ends in .parquet")):
        assert script.main([str(mnist), str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "digits.parquet").read_bytes() == b"mine"
