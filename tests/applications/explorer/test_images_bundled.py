"""The images that travel with an autoencoder: a round trip, the seal, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm_vae.applications.explorer.explored import BUNDLED_FILE, Bundled, read_bundled, write_bundled
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import UserError
from ldm_vae.files import write_checksums


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    build_autoencoder(AutoencoderConfig(architecture="vector", preset="digits", latent_channels=2)).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


GOOD = {"format_version": 1, "label_names": ["a", "b"], "origin": "made up"}


def write(folder, tensors, record):
    save_file(tensors, folder / BUNDLED_FILE, {"explorer": json.dumps(record)})


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 3, 8, 12)])
def test_what_is_written_is_read_and_the_model_is_the_same(folder, shape):
    before = fingerprint(load_autoencoder(folder))
    write_checksums(folder)
    given = Bundled(images(*shape), torch.tensor([0, 1, -1, 1, 0]), ("zero", "one"), "five pictures")
    assert read_bundled(folder) is None
    for _ in range(2):  # it may be replaced
        write_bundled(folder, given)
    found = read_bundled(folder)
    assert found is not None
    assert torch.equal(found.images, given.images)
    assert torch.equal(found.labels, given.labels)
    assert (found.label_names, found.origin) == (("zero", "one"), "five pictures")
    assert fingerprint(load_autoencoder(folder)) == before
    data = bytearray((folder / BUNDLED_FILE).read_bytes())
    data[-1] ^= 1
    (folder / BUNDLED_FILE).write_bytes(data)
    with pytest.raises(UserError, match=rf"{BUNDLED_FILE} is damaged"):
        load_autoencoder(folder)
    with pytest.raises(UserError, match="is damaged"):
        write_bundled(folder, given)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_directory_without_an_autoencoder_is_left_alone(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        write_bundled(tmp_path, Bundled(images(1, 8, 8), torch.tensor([-1]), (), "nothing"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "labels", "names"),
    [
        ((2, 8), [0, 1], ("a", "b")),
        ((2, 4, 8, 8), [0, 1], ("a", "b")),
        ((0, 8, 8), [], ("a",)),
        ((2, 8, 2000), [0, 1], ("a", "b")),
        ((2, 8, 2), [0, 1], ("a", "b")),
        ((2, 8, 8), [0], ("a", "b")),
        ((2, 8, 8), [0, 2], ("a", "b")),
        ((2, 8, 8), [0, -2], ("a", "b")),
        ((2, 8, 8), [0, 0], ()),
        ((2, 8, 8), [0, 0], (7,)),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(folder, shape, labels, names):
    with pytest.raises(ValueError, match=r"images of|labels of|labels from|label names"):
        Bundled(images(*shape), torch.tensor(labels, dtype=torch.int64), names, "made up")
    write(
        folder,
        {"images": images(*shape), "labels": torch.tensor(labels, dtype=torch.int64)},
        GOOD | {"label_names": names},
    )
    with pytest.raises(UserError, match=rf"{BUNDLED_FILE}: cannot be read .* with data"):
        read_bundled(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (GOOD | {"format_version": 2}, "has format version 2, this program reads 1; update ldm_vae"),
        (GOOD | {"format_version": "1"}, "cannot be read"),
        (GOOD | {"label_names": None}, "cannot be read"),
        (GOOD | {"origin": 5}, "cannot be read"),
        ({"format_version": 1}, "cannot be read"),
        ([1], "cannot be read"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(folder, record, message):
    write(folder, {"images": images(2, 8, 8), "labels": torch.tensor([0, 1])}, record)
    with pytest.raises(UserError, match=message):
        read_bundled(folder)


def test_a_file_that_is_no_safetensors_is_refused(folder):
    for content in (b"", b"\0" * 100, (1 << 40).to_bytes(8, "little"), b"PK" * 40):
        (folder / BUNDLED_FILE).write_bytes(content)
        with pytest.raises(UserError, match=BUNDLED_FILE):
            read_bundled(folder)
    save_file({"images": images(2, 8, 8)}, folder / BUNDLED_FILE)
    with pytest.raises(UserError, match="cannot be read"):
        read_bundled(folder)
    with (folder / BUNDLED_FILE).open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(UserError, match="is larger than"):
        read_bundled(folder)
