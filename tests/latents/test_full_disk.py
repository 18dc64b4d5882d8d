"""A set on a disk that is full, read-only or gone."""

from __future__ import annotations

import shutil

import pytest

from ldm_vae import cli
from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.export import Export, ExportConfig, export_latents
from ldm_vae.latents.verify import verify
from tests.disks import disk as disk  # a fixture
from tests.latents.test_encode import contents
from tests.latents.test_processes import Forked


def export_set(source, output: str, *settings, **more) -> Export:
    return export_latents(ExportConfig(str(source), output, *settings, **more))


@pytest.mark.promise(5)
@pytest.mark.parametrize("size", ["8k", "16k", "32k", "48k", "60k", "64k"])
def test_a_full_disk_is_named_and_the_same_command_completes_the_set(encode, latents, disk, size, record_property):
    """The 17 files of this set need a page of 4 KiB each: the space ends at the plan, at a shard, at the index."""
    disk.resize(size)
    with pytest.raises(UserError, match=r"no space left on the device; finished shards are intact"):
        encode(disk.path / "set")
    assert not list((disk.path / "set").glob(".tmp-*"))
    assert not (disk.path / "set" / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (disk.path / "set").glob("shard-*.jsonl")}
    disk.resize("1m")
    assert encode(disk.path / "set") == 0
    assert contents(disk.path / "set") == contents(latents)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    record_property("figure", f"full at {size}: {len(finished)} of 6 shards stay, then the set is byte-identical")


def test_too_little_space_is_said_before_the_first_shard(encode, disk, capsys):
    with pytest.raises(UserError, match="no space left"):
        encode(disk.path / "set", "resolution=512", "dtype=float32")
    assert "the set still needs 0.00236 GB and 0.00" in capsys.readouterr().out


@pytest.mark.promise(5)
def test_a_full_disk_under_an_export(latents, disk, tmp_path, record_property):
    export_set(latents, str(tmp_path / "expected"), "webdataset", rows=4)
    expected, output, sizes = contents(tmp_path / "expected"), disk.path / "out", ("4k", "24k", "60k", "88k")
    for size in sizes:
        disk.resize(size)
        with pytest.raises(UserError, match="out: no space left on the device"):
            export_set(latents, str(output), "webdataset", rows=4)
        assert {name: data for name, data in expected.items() if (output / name).exists()} == contents(output)
        disk.resize("1m")
        export_set(latents, str(output), "webdataset", rows=4)
        assert contents(output) == expected
        shutil.rmtree(output)
    record_property("figure", f"an export, full at each of {len(sizes)} sizes: finished files stay, then all of them")


@pytest.mark.promise(5)
def test_a_set_on_a_read_only_disk_is_read_and_an_unfinished_one_waits(encode, latents, disk, record_property, capsys):
    encode(disk.path / "whole")
    encode(disk.path / "part", "share=0/2")
    (disk.path / "free").mkdir()
    before = {path: path.stat().st_mtime_ns for path in disk.path.rglob("*")}
    disk.make_read_only()
    for name in ("free", "part"):
        with pytest.raises(UserError, match=rf"{name}: cannot be written \(Read-only file system\)"):
            encode(disk.path / name)
    assert LatentDataset(disk.path / "whole")[23]["latent"].isfinite().all()
    assert verify(disk.path / "whole").whole
    for tool in ("info", "verify", "stats"):
        assert cli.main(["latents", tool, str(disk.path / "whole")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in disk.path.rglob("*")}
    disk.make_writable()
    encode(disk.path / "part")
    made = {name: data for name, data in contents(disk.path / "part").items() if not name.endswith(".lock")}
    assert made == contents(latents)
    record_property("figure", "dataset, info, verify and stats read; encode refused in one line, then byte-identical")


@pytest.mark.promise(5)
def test_a_disk_that_vanishes_ends_the_job_and_the_same_command_goes_on(
    encode, settings, disk, tmp_path, record_property
):
    output, log = disk.path / "set", tmp_path / "log.txt"
    settings = [*settings, "data.source=synthetic", "data.path=", "data.synthetic.count=60"]
    settings += ["data.synthetic.resolution=64", "batch=2", "shard_size=2"]
    job = Forked(["encode", *settings, f"output={output}"], 1, log, halt=(output, "shard-*.jsonl", 4))
    assert job.halts(), log.read_text()
    disk.vanish()
    job.go_on()
    job.processes[0].join(240)
    assert job.processes[0].exitcode == 2, log.read_text()
    assert "set: was removed, replaced or unmounted while in use (encode.lock" in log.read_text().splitlines()[-1]
    assert not list(disk.path.rglob("shard-*")), "nothing was written onto the disk below"
    disk.bring_back()
    finished = len(list(output.glob("shard-*.jsonl")))
    encode(output, *settings)
    encode(tmp_path / "whole", *settings)
    assert contents(output) == contents(tmp_path / "whole")
    record_property("figure", f"{finished} of 30 shards stay, exit code 2, one line; then byte-identical")
