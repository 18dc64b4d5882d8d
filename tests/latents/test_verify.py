from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from ldm_vae import cli
from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json
from ldm_vae.latents.format import (
    MANIFEST,
    read_manifest,
    read_origin,
    read_sidecar,
    shard_name,
    sidecar_name,
    write_manifest,
)
from ldm_vae.latents.shard import Shard, write_shard
from ldm_vae.latents.state import Finding
from ldm_vae.latents.verify import Verification, verify
from ldm_vae.latents.writer import QUARANTINE, Output
from ldm_vae.storage import open_folder
from ldm_vae.training.watchdog import Watchdog
from tests.latents.damaged_sets import RichSet, files_of, flip, flips, make

COUNTS = [4, 4, 4, 1, 3, 2]
"""Samples of the shards of the rich set."""


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, settings: list[str]) -> RichSet:
    return make(tmp_path_factory.mktemp("rich"), image_folder, settings)


@pytest.fixture
def copy(rich: RichSet, tmp_path: Path) -> Path:
    return shutil.copytree(rich.path, tmp_path / "set")


def test_each_shard_is_a_sign_of_life(rich: RichSet) -> None:
    """A repair reads the whole set first, which may take longer than a process has alone."""
    with Watchdog(SimpleNamespace(process_index=0, num_processes=1), timeout_seconds=1000) as dog:
        dog._still_seconds = 1000.0
        verify(rich.path)
        assert dog._still_seconds < 500


def numbers(verification: Verification) -> list[int | None]:
    return sorted({sample.sample for sample in verification.samples})


def samples_of(*shards: int) -> list[int]:
    starts = np.cumsum([0, *COUNTS])
    return [sample for shard in shards for sample in range(starts[shard], starts[shard + 1])]


def only(verification: Verification) -> Finding:
    (finding,) = verification.findings
    return finding


def write_again(folder: Path, number: int, **changes) -> None:
    """Publish a shard anew, with other content and everything that depends on it, as a faulty writer would have."""
    output, manifest = open_folder(folder), read_manifest(folder)
    values = load_file(folder / shard_name(number)) | changes
    sidecar = read_sidecar(output, number)
    record = sidecar.header.record
    shard = Shard(
        record.first_index, record.last_index,
        {name: torch.from_numpy(values[name]) for name in manifest.layout.names},
        values["label"].tolist(), values["index"].tolist(),
        changes.get("ids") or [sample.id for sample in sidecar.samples], sidecar.rejected,
    )  # fmt: skip
    write_shard(output, number, shard, manifest.layout, sidecar.header.origin)
    rebuild(folder)


def rebuild(folder: Path) -> None:
    output = Output(str(folder), read_origin(open_folder(folder), 1), 1)
    output.publish(output.complete(2))


def test_a_clean_set_has_no_findings(rich, latents):
    for path in (rich.path, latents):
        found = verify(path)
        assert found.whole, found.findings
        assert found.finished
        assert not found.notes
        assert verify(path, quick=True).whole
    assert (verify(rich.path).shards, verify(rich.path).count) == (6, sum(COUNTS))
    assert read_manifest(rich.path).shard_index.counts.tolist() == COUNTS


def test_nothing_is_written(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    verify(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def damaged_samples(path: Path, bit: int) -> list[int]:
    """By the specification of the files: the row that a bit of a shard is in; all samples of a sidecar."""
    if not path.name.startswith("shard-"):
        return []
    samples = samples_of(int(path.name[6:12]))
    if path.suffix == ".jsonl":
        return samples
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    offset = bit // 8 - 8 - length
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    for tensor in header.values():
        begin, end = tensor["data_offsets"]
        if begin <= offset < end:
            return [samples[(offset - begin) * len(samples) // (end - begin)]]
    return []


def test_every_flipped_bit_is_found_and_its_samples_are_named(copy):
    for path, bit in flips(copy, 200, seed=1):
        right = damaged_samples(path, bit)
        flip(path, bit)
        found = verify(copy)
        assert {finding.file for finding in found.findings} == {path.name}, (path.name, bit, found.findings)
        assert numbers(found) == right, (path.name, bit, found.findings)
        flip(path, bit)
    assert verify(copy).whole


def test_samples_come_with_index_and_id(copy):
    path = copy / shard_name(4)
    flip(path, 8 * (path.stat().st_size - 1))
    (sample,) = only(verify(copy)).samples
    assert (sample.sample, sample.index, sample.id) == (15, 17, "more/b/007.png")
    assert "sample 15 (more/b/007.png, index 17)" in verify(copy).lines()[0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_every_cut_file_is_found(copy, share):
    for path in files_of(copy):
        data = path.read_bytes()
        path.write_bytes(data[: min(int(share * len(data)), len(data) - 1)])
        found = verify(copy)
        assert {finding.file for finding in found.findings} == {path.name}, (path.name, found.findings)
        if path.suffix == ".jsonl" and path.name.startswith("shard-"):
            assert numbers(found) == samples_of(int(path.name[6:12]))
        path.write_bytes(data)


def test_of_a_cut_shard_the_rows_beyond_are_affected(copy):
    path = copy / shard_name(1)
    data = path.read_bytes()
    row_bytes = 2 * 6 * 4 * 4  # of the mirror images, which are last
    for rows in range(1, 4):
        path.write_bytes(data[: -rows * row_bytes + 1])
        assert numbers(verify(copy)) == samples_of(1)[-rows:]
        assert "cut off" in only(verify(copy)).message
    path.write_bytes(data + b"more")
    assert not only(verify(copy)).samples
    assert "4 bytes longer" in only(verify(copy)).message


def test_what_was_cut_off_is_lost_even_where_it_was_zeros(copy):
    values = load_file(copy / shard_name(1))["moments_flipped"]
    values[2:] = 0
    write_again(copy, 1, moments_flipped=values)
    path = copy / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    assert numbers(verify(copy)) == samples_of(1)[3:]


def test_every_missing_file_is_found(copy):
    for path in files_of(copy):
        data = path.read_bytes()
        path.unlink()
        found = only(verify(copy))
        assert (found.file, found.kind) == (path.name, "missing")
        expected = samples_of(int(path.name[6:12])) if path.name.startswith("shard-") else []
        assert [sample.sample for sample in found.samples] == expected
        if path.suffix == ".safetensors" and expected:
            assert all(sample.id for sample in found.samples)  # of the sidecar
        path.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 5)])
def test_swapped_shards_are_found_with_their_ids(copy, one, other):
    swap(copy / shard_name(one), copy / shard_name(other))
    found = verify(copy)
    assert {finding.file for finding in found.findings} == {shard_name(one), shard_name(other)}
    assert {finding.kind for finding in found.findings} == {"foreign"}
    assert numbers(found) == samples_of(one, other)
    swap(copy / sidecar_name(one), copy / sidecar_name(other))
    found = verify(copy)
    assert len(found.findings) == 4
    assert numbers(found) == samples_of(one, other)
    assert {sample.id for sample in found.samples} == {
        sample.id for number in (other, one) for sample in _samples(copy, number)
    }


def _samples(folder: Path, number: int) -> list:
    lines = (folder / sidecar_name(number)).read_text().splitlines()[1:]
    return [type("Line", (), json.loads(line)) for line in lines if "reason" not in line]


def test_shards_of_other_sets_are_found(copy, latents):
    for name in (shard_name(0), sidecar_name(0)):
        shutil.copy(latents / name, copy)
    found = verify(copy)
    assert [(finding.file, finding.kind) for finding in found.findings] == [
        (sidecar_name(0), "foreign"),
        (shard_name(0), "foreign"),
    ]
    assert numbers(found) == samples_of(0)
    assert not verify(copy, quick=True).whole


def test_files_that_do_not_belong_here_are_found(copy, latents):
    shutil.copy(copy / shard_name(0), copy / shard_name(6))
    shutil.copy(copy / "plan.json", copy / "plan-000000.json")
    for name in ("notes.bin", "README.md", "damage.json", "index-of-mine", "shard-notes.txt"):
        (copy / name).write_text("what people put beside a set is no damage")
    shutil.copy(next(latents.glob("index-*")), copy)  # as that of the version before
    found = verify(copy)
    assert [(finding.file, finding.kind) for finding in found.findings] == [
        ("plan-000000.json", "foreign"),
        (shard_name(6), "foreign"),
    ]
    assert "--remove-foreign" in found.lines()[-1]


def test_an_unfinished_segment_is_no_damage(copy, rich):
    manifest = read_manifest(copy)
    (copy / shard_name(5)).unlink()
    (copy / MANIFEST).unlink()
    output = Output(str(copy), read_origin(open_folder(copy)), 0)
    output.publish(output.complete(4))
    found = verify(copy)
    assert found.whole, found.findings
    assert found.count < manifest.count
    assert "segment 1 is unfinished: 1 of 2 shards are there" in found.notes[0]
    flip(copy / shard_name(4), 8 * ((copy / shard_name(4)).stat().st_size - 1))
    assert only(verify(copy)).file == shard_name(4)


def test_an_append_that_was_killed_before_the_manifest_is_no_damage(copy, rich):
    shard = (copy / shard_name(5)).read_bytes()
    (copy / shard_name(5)).unlink()
    (copy / MANIFEST).unlink()
    output = Output(str(copy), read_origin(open_folder(copy)), 0)
    output.publish(output.complete(4))
    (copy / shard_name(5)).write_bytes(shard)
    for path in (rich.path / QUARANTINE, rich.path / read_manifest(rich.path).index[0].file):
        shutil.copy(path, copy)
    for quick in (False, True):
        found = verify(copy, quick=quick)
        assert found.whole, found.findings
        assert "2 of 2 shards are there; run the same `ldm-vae latents append` command again" in found.notes[0]
    assert "quarantine.jsonl lists the images of the unfinished segment already" in verify(copy).notes
    (copy / QUARANTINE).write_text((copy / QUARANTINE).read_text().split("\n")[1] + "\n")
    assert only(verify(copy)).file == QUARANTINE


def test_a_set_that_is_not_finished_yet(latents, tmp_path, capsys):
    for name in ("plan.json", shard_name(0), sidecar_name(0), shard_name(1)):
        shutil.copy(latents / name, tmp_path)
    assert cli.main(["latents", "verify", str(tmp_path)]) == 2
    assert "not finished: 4 samples in 1 shard so far" in capsys.readouterr().out
    flip(tmp_path / shard_name(0), 8 * ((tmp_path / shard_name(0)).stat().st_size - 1))
    assert cli.main(["latents", "verify", str(tmp_path)]) == 1


def test_values_that_cannot_be_are_found_under_right_checksums(copy, monkeypatch):
    shard = load_file(copy / shard_name(1))
    moments, labels, indices = (shard[name].copy() for name in ("moments", "label", "index"))
    labels[2] = 7
    write_again(copy, 1, label=labels)
    assert numbers(verify(copy)) == [samples_of(1)[2]]
    assert "labels are outside of -1 to" in only(verify(copy)).message
    indices[3] = indices[2]
    write_again(copy, 1, label=shard["label"], index=indices)
    assert "source indices are out of order" in verify(copy).findings[0].message
    moments[3, 2, 1, 1] = np.nan
    monkeypatch.setattr("ldm_vae.latents.shard.channel_sums", lambda *_: np.ones((3, 3)))
    write_again(copy, 1, index=shard["index"], moments=moments)
    monkeypatch.undo()
    finding = verify(copy).findings[0]
    assert (finding.kind, finding.message) == ("content", "values are not finite")
    assert [sample.sample for sample in finding.samples] == [samples_of(1)[3]]


def test_wrong_sums_and_ids_that_are_there_twice(copy, monkeypatch):
    monkeypatch.setattr("ldm_vae.latents.shard.channel_sums", lambda *_: np.ones((3, 3)))
    write_again(copy, 1)
    monkeypatch.undo()
    assert "its sums are not those" in only(verify(copy)).message
    write_again(copy, 1)
    assert verify(copy).whole
    write_again(copy, 1, ids=["a/000.png", "b", "c", "d"])
    found = only(verify(copy))
    assert found.kind == "duplicate"
    assert [(sample.sample, sample.id) for sample in found.samples] == [(0, "a/000.png"), (4, "a/000.png")]


def test_records_that_do_not_fit_the_shards(copy):
    manifest = read_manifest(copy)
    wrong = manifest.statistics | {"std": [1.0, 1.0, 1.0]}
    for changes in ({"statistics": wrong}, {"label_names": ("x",)}, {"dtype": "bfloat16"}, {"count": 17}):
        write_manifest(open_folder(copy), dataclasses.replace(manifest, **changes))
        found = verify(copy)
        assert {finding.file for finding in found.findings} == {MANIFEST}, found.findings
        assert next(iter(changes)) in found.findings[0].message
    write_manifest(open_folder(copy), manifest)
    (copy / QUARANTINE).write_text((copy / QUARANTINE).read_text().split("\n")[0] + "\n")
    assert only(verify(copy)).file == QUARANTINE


def test_a_shard_that_was_made_again_elsewhere_leaves_a_stale_index(copy):
    records = {name: (copy / name).read_bytes() for name in (MANIFEST, *(p.name for p in copy.glob("index-*")))}
    values = load_file(copy / shard_name(2))["moments"]
    write_again(copy, 2, moments=(values + np.float16(0.01)).astype(np.float16))
    for path in copy.glob("index-*"):
        path.unlink()
    for name, data in records.items():
        (copy / name).write_bytes(data)
    found = only(verify(copy))
    assert (found.kind, found.cure) == ("stale", "rebuild")


def test_quick_reads_no_content(copy):
    path = copy / shard_name(0)
    flip(path, 8 * (path.stat().st_size - 1))
    assert verify(copy, quick=True).whole
    path.write_bytes(path.read_bytes()[:-1])
    assert not verify(copy, quick=True).whole
    shutil.copy(copy / shard_name(1), path)
    assert "is shard 1 of this set" in only(verify(copy, quick=True)).message
    (copy / sidecar_name(3)).unlink()
    assert not verify(copy, quick=True).whole


def test_other_ways_to_write_json_are_no_damage(copy):
    (copy / MANIFEST).write_text(canonical_json(json.loads((copy / MANIFEST).read_text())))
    assert verify(copy).whole


@pytest.mark.parametrize("store", ["mean", "sample"])
def test_every_content(encode, tmp_path, store):
    path = tmp_path / "set"
    encode(path, f"store={store}", "dtype=bfloat16")
    assert verify(path).whole
    with safe_open(path / shard_name(0), "pt") as file:
        assert file.get_slice(store).get_dtype() == "BF16"
    flip(path / shard_name(0), 8 * (path / shard_name(0)).stat().st_size - 1)
    assert numbers(verify(path)) == [3]


def test_s3(rich, bucket):
    remote = open_folder(f"{bucket}/set")
    for path in rich.path.iterdir():
        remote.write(path.name, path.read_bytes())
    assert verify(f"{bucket}/set").whole
    data = bytearray((rich.path / shard_name(1)).read_bytes())
    data[-1] ^= 1
    remote.write(shard_name(1), bytes(data))
    remote.remove(sidecar_name(5))
    assert numbers(verify(f"{bucket}/set")) == [7, 16, 17]


def test_a_plan_whose_key_without_a_value_has_another_name_is_found(copy):
    """Equal in every value that it has, and not the plan."""
    plan = (copy / "plan.json").read_text()
    renamed = re.sub(r'"(\w+)"(: *null)', r'"x\1"\2', plan, count=1)
    assert renamed != plan
    (copy / "plan.json").write_text(renamed)
    (finding,) = verify(copy).findings
    assert (finding.file, finding.kind) == ("plan.json", "damaged")


def test_what_is_no_set_is_said(tmp_path, copy):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty; give the folder that `ldm-vae encode` wrote"):
        verify(tmp_path / "empty")
    for name in ("plan.json", MANIFEST):
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {"format_version": 3}))
    with pytest.raises(UserError, match="format version 3"):
        verify(copy)


def test_command_line(copy, tmp_path, capsys):
    assert cli.main(["latents", "verify", str(copy)]) == 0
    assert "whole: 18 samples in 6 shards" in capsys.readouterr().out
    (copy / shard_name(0)).unlink()
    report = tmp_path / "damage.json"
    assert cli.main(["latents", "verify", str(copy), "--report", str(copy / "damage.json")]) == 2
    assert "report: " in capsys.readouterr().err
    assert not (copy / "damage.json").exists()
    assert cli.main(["latents", "verify", str(copy), "--quick", "--report", str(report)]) == 1
    out = capsys.readouterr().out
    assert "4 samples: 0 (a/000.png, index 0)" in out
    assert "run `ldm-vae latents repair" in out.splitlines()[-1]
    values = json.loads(report.read_text())
    assert values["whole"] is False
    assert [sample["sample"] for sample in values["findings"][0]["samples"]] == [0, 1, 2, 3]
