"""`tools/train_in_chunks.py`: a run in pieces, on two machines, is the run in one; packs stay in their folder."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest

from ldm_vae import cli
from ldm_vae.autoencoder.lineage import read_record
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.files import check_checksums

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "train_in_chunks.py"))
TRAINING = [
    "data.source=synthetic", "data.synthetic.count=40", "data.synthetic.resolution=64",
    "phases=[{steps: 40, crop: 32, batch: 2}]", "autoencoder.preset=pico", "autoencoder.latent_channels=2",
    "held_out_images=1", "held_out_resolution=64", "training.device=cpu", "training.workers=0",
    "training.tracker=none", "training.log_every=1", "crop.short_side_min=32", "training.precision=fp32",
]  # fmt: skip


def chunk(work: Path, out: Path, *options: str, minutes: float = 0) -> tuple[int, dict]:
    words = ["--minutes", str(minutes), "--work", str(work), "--out", str(out), *options, "train-vae", *TRAINING]
    code = SCRIPT["main"](words)
    return code, json.loads((out / "chunk.json").read_text())


def test_a_run_in_chunks_on_two_machines_is_the_run_in_one(tmp_path):
    code, first = chunk(tmp_path / "first", tmp_path / "back", "--peak-tflops", "0.1")
    done = first["steps_done"]
    assert (code, first["first_step"], first["finished"]) == (EXIT_INTERRUPTED, 0, False)
    assert 1 <= done < 40  # the reminder looks every few milliseconds whether the training listens
    assert first["speed"][0]["model_flops_utilisation"] > 0
    assert first["memory_gib"] > 0
    assert first["returned"] == ["state.tar.00", "state.tar.01"]
    code, second = chunk(tmp_path / "second", tmp_path / "again", "--state", str(tmp_path / "back"), minutes=10)
    assert (code, second["first_step"], second["steps_done"], second["finished"]) == (0, done, 40, True)
    assert second["returned"] == ["model.tar.00"]
    with tarfile.open(tmp_path / "again" / "model.tar.00") as archive:
        archive.extractall(tmp_path, filter="data")
    check_checksums(tmp_path / "model")
    assert cli.main(["train-vae", *TRAINING, f"output={tmp_path / 'whole'}"]) == 0
    whole = fingerprint(load_autoencoder(tmp_path / "whole"))
    assert fingerprint(load_autoencoder(tmp_path / "second" / "run")) == whole
    assert read_record(tmp_path / "model")["rounded_from"]["fingerprint"] == whole


def pack_of(path: Path, names: list[str]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, name.encode())
        return path
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            archive.addfile(member, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_images_are_unpacked_once_and_nothing_else(tmp_path, suffix):
    pack = pack_of(tmp_path / f"images{suffix}", ["a/one.png", "two.JPG", "run.py", "labels.csv"])
    SCRIPT["unpack"](pack, tmp_path / "out")
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["a/one.png", "labels.csv", "two.JPG"]
    assert (tmp_path / "out" / "a" / "one.png").read_text() == "a/one.png"
    words = ["--minutes", "1", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--packs", str(pack)]
    assert SCRIPT["main"](words) == 0  # without a command it only unpacks
    assert (tmp_path / "w" / "packs" / "images" / "labels.csv").is_file()
    pack.unlink()
    SCRIPT["unpack"](pack, tmp_path / "out")  # they are there


def test_two_packs_of_one_folder_are_refused_before_anything_is_unpacked(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    packs = [pack_of(tmp_path / place, [f"{place[0]}.png"]) for place in ("a/images.tar", "b/images.zip")]
    words = ["--minutes", "1", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--packs"]
    assert SCRIPT["main"]([*words, *map(str, packs)]) == EXIT_USER_ERROR
    assert f"{packs[0]} and {packs[1]} would both be unpacked into images; rename one" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_another_pack_of_a_name_is_refused_and_the_same_one_may_come_again(tmp_path, capsys):
    words = ["--minutes", "1", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--packs"]
    for place, names in (("a", ["one.png"]), ("b", ["two.png"]), ("c", ["one.png"])):
        (tmp_path / place).mkdir()
        pack_of(tmp_path / place / "images.tar", names)
    assert SCRIPT["main"]([*words, str(tmp_path / "a" / "images.tar")]) == 0
    assert SCRIPT["main"]([*words, str(tmp_path / "b" / "images.tar")]) == EXIT_USER_ERROR
    folder = tmp_path / "w" / "packs" / "images"
    assert f"{folder} was unpacked from another pack; rename this one" in capsys.readouterr().err
    assert SCRIPT["main"]([*words, str(tmp_path / "c" / "images.tar")]) == 0
    assert [path.name for path in folder.iterdir()] == ["one.png"]


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("name", ["../one.png", "/tmp/one.png", "a/../../one.png"])
def test_a_pack_that_leads_outside_is_refused(tmp_path, suffix, name):
    pack = pack_of(tmp_path / f"images{suffix}", ["good.png", name])
    with pytest.raises(UserError, match="leads outside"):
        SCRIPT["unpack"](pack, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
    assert list(tmp_path.rglob("*.png")) == []


def test_what_is_no_pack_and_no_state_is_said(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"nothing")
    words = ["--minutes", "1", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    assert SCRIPT["main"]([*words, "--packs", str(tmp_path / "a.tar"), "train-vae"]) == EXIT_USER_ERROR
    assert "a.tar: cannot be unpacked" in capsys.readouterr().err
    assert SCRIPT["main"]([*words, "--state", str(tmp_path), "train-vae"]) == EXIT_USER_ERROR
    assert "holds no state.tar.00" in capsys.readouterr().err


def test_a_pack_that_cannot_be_read_is_said(tmp_path):
    pack = pack_of(tmp_path / "images.zip", ["one.png"])
    content = bytearray(pack.read_bytes())
    entry = content.find(b"PK\1\2")
    for place, value in ((8, 1), (10, 99)):  # encrypted; of an unknown method
        damaged = content.copy()
        damaged[entry + place] = damaged[place - 2] = value
        pack.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be unpacked"):
            SCRIPT["unpack"](pack, tmp_path / "out")
    with zipfile.ZipFile(pack, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.png", b"a picture " * 20)
    content = bytearray(pack.read_bytes())
    content[30 + len("one.png")] = 7  # a block of a kind that there is not
    pack.write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked"):
        SCRIPT["unpack"](pack, tmp_path / "out")


def test_a_state_that_is_cut_leaves_nothing_that_would_be_continued(tmp_path):
    (tmp_path / "from" / "checkpoints" / "step-000000001").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "from" / "checkpoints" / "step-000000001" / name).write_bytes(bytes(20000))
    whole = SCRIPT["bundle"](tmp_path / "from", ["checkpoints"])
    SCRIPT["divide"](whole[:30000], tmp_path / "state", "state")
    with pytest.raises(UserError, match="cannot be joined"):
        SCRIPT["restore"](tmp_path / "state", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    SCRIPT["divide"](whole, tmp_path / "state", "state")
    SCRIPT["restore"](tmp_path / "state", tmp_path / "run")
    assert len(list((tmp_path / "run").rglob("step-*/*"))) == 2


def test_arithmetic_is_counted_again_for_another_number_of_steps(tmp_path):
    words = ["train-vae", *TRAINING, f"output={tmp_path / 'run'}"]
    assert [span[:2] for span in SCRIPT["arithmetic"](words, tmp_path / "note")] == [(0, 39)]
    words += ["phases=[{steps: 5, crop: 32, batch: 2}]"]
    assert [span[:2] for span in SCRIPT["arithmetic"](words, tmp_path / "note")] == [(0, 4)]


def test_large_content_is_divided_and_small_parts_are_joined(tmp_path, monkeypatch):
    monkeypatch.setitem(SCRIPT["divide"].__globals__, "PART_BYTES", 3)
    assert SCRIPT["divide"](b"12345678", tmp_path, "state") == ["state.tar.00", "state.tar.01", "state.tar.02"]
    assert SCRIPT["divide"](b"1234", tmp_path, "model") == ["model.tar.00", "model.tar.01"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.tar.00", "model.tar.01"]  # the state has gone
