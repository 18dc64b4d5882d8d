from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.errors import UserError
from ldm_vae.latents.encode import make_accelerator
from ldm_vae.latents.format import (
    MANIFEST,
    plan_name,
    read_manifest,
    read_origin,
    read_sidecar,
    shard_name,
    sidecar_name,
)
from ldm_vae.latents.repair import RepairConfig, repair_all_sizes
from ldm_vae.latents.shard import Shard, open_shard, write_shard
from ldm_vae.latents.verify import verify
from ldm_vae.latents.writer import QUARANTINE, Output
from ldm_vae.storage import open_folder
from tests.latents.damaged_sets import RichSet, content, files_of, flip, flips, make


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, settings: list[str]) -> RichSet:
    return make(tmp_path_factory.mktemp("rich"), image_folder, settings)


@pytest.fixture
def copy(rich: RichSet, tmp_path: Path) -> Path:
    return shutil.copytree(rich.path, tmp_path / "set")


def run(output: Path | str, words: list[str], remove_foreign: bool = False) -> int:
    words = [*words, f"output={output}", f"remove_foreign={remove_foreign}"]
    config = configuration.load(RepairConfig, None, words)
    return repair_all_sizes(config, make_accelerator(config)).exit_code


def words_for(rich: RichSet, name: str) -> list[str]:
    """The settings of the segment that a file belongs to."""
    return rich.appended if name.startswith("shard-") and int(name[6:12]) > 3 else rich.encoded


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in files_of(folder)} | {
        "run.json": (folder / "run.json").stat().st_mtime_ns
    }


def test_a_whole_set_is_left_as_it_is(rich, copy, capsys):
    before = times(copy)
    assert run(copy, rich.encoded) == 0
    assert "whole: 18 samples" in capsys.readouterr().out
    assert times(copy) == before


def check_mended(rich: RichSet, copy: Path, damaged: set[str], before: dict[str, int]) -> None:
    assert content(copy) == content(rich.path), damaged
    after = times(copy)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == damaged
    assert verify(copy).whole


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_mended_and_nothing_else_is_touched(rich, copy, number):
    before = times(copy)
    for path, bit in flips(copy, number, seed=number):
        flip(path, bit)
        assert run(copy, words_for(rich, path.name)) == 0, (path.name, bit)
        check_mended(rich, copy, {path.name}, before)
        before = times(copy)


@pytest.mark.parametrize("harm", ["cut", "delete"])
def test_every_cut_or_missing_file_is_made_again(rich, copy, harm):
    before = times(copy)
    for path in files_of(copy):
        data = path.read_bytes()
        if harm == "delete":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2])
        assert run(copy, words_for(rich, path.name)) == 0, path.name
        check_mended(rich, copy, {path.name}, before)
        before = times(copy)


@pytest.mark.parametrize("sidecars", [False, True])
def test_swapped_and_foreign_shards(rich, copy, latents, sidecars):
    before, names = times(copy), [shard_name(0), shard_name(1)] + ([sidecar_name(0), sidecar_name(1)] * sidecars)
    data = {name: (copy / name).read_bytes() for name in names}
    for name in names:
        other = name.replace("000000", "x").replace("000001", "000000").replace("x", "000001")
        (copy / other).write_bytes(data[name])
    assert run(copy, rich.encoded) == 0
    check_mended(rich, copy, set(names), before)
    before = times(copy)
    for name in names:
        shutil.copy(latents / name, copy)
    assert run(copy, rich.encoded) == 0
    check_mended(rich, copy, set(names), before)


def test_many_damages_at_once(rich, copy):
    before = times(copy)
    damaged = {plan_name(0), MANIFEST, QUARANTINE, shard_name(1), sidecar_name(2)}
    for name in sorted(damaged - {sidecar_name(2)}):
        flip(copy / name, 8 * ((copy / name).stat().st_size // 2))
    (copy / sidecar_name(2)).unlink()
    index = copy / read_manifest(rich.path).index[0].file
    flip(index, 0)
    assert run(copy, rich.encoded) == 0
    check_mended(rich, copy, damaged | {index.name}, before)


def test_both_segments_are_mended_one_after_the_other(rich, copy, capsys):
    before, damaged = times(copy), {shard_name(0), shard_name(5), sidecar_name(5)}
    for name in damaged:
        (copy / name).unlink()
    assert run(copy, rich.appended) == 1
    assert "only the shards of other segments are made again now" in capsys.readouterr().out
    assert verify(copy).findings[0].file == shard_name(0)
    assert run(copy, rich.encoded) == 0
    check_mended(rich, copy, damaged, before)


def test_what_was_mended_is_finished_where_other_settings_are_needed_for_the_rest(rich, copy, capsys):
    before, damaged = times(copy), {shard_name(0), shard_name(5)}
    for name in damaged:
        flip(copy / name, 8 * 1000)
    assert run(copy, rich.encoded) == 1
    said = capsys.readouterr().out
    assert "so the damaged shards of segment 1 are not repaired now" in said
    assert "1 damaged shard of segment 1 left; run this again with the settings that made it" in said
    assert f"{shard_name(0)} is made again: the same bytes as before" in said
    assert [finding.file for finding in verify(copy).findings] == [shard_name(5)]
    assert run(copy, rich.appended) == 0
    check_mended(rich, copy, damaged, before)


def test_the_manifest_and_an_appended_shard(rich, copy):
    (copy / MANIFEST).unlink()
    (copy / sidecar_name(5)).unlink()
    assert run(copy, rich.appended) == 0
    assert content(copy) == content(rich.path)


def test_it_says_whether_the_bytes_are_those_from_before(rich, copy, capsys):
    flip(copy / shard_name(0), 8 * 1000)
    assert run(copy, rich.encoded) == 0
    assert f"{shard_name(0)} is made again: the same bytes as before" in capsys.readouterr().out
    manifest = read_manifest(copy)
    sidecar = (copy / sidecar_name(0)).read_bytes()
    folder = open_folder(copy)  # a shard as another machine would have made it
    arrays = open_shard(folder, 0, manifest.shard_index[0], manifest.layout, verify=True)
    told, origin = read_sidecar(folder, 0), read_origin(folder)
    near = {
        name: torch.from_numpy((arrays[name] * np.float16(1.01)).astype(np.float16)) for name in origin.layout.names
    }
    shard = Shard(0, 3, near, arrays["label"].tolist(), [0, 1, 2, 3], [s.id for s in told.samples], [])
    write_shard(folder, 0, shard, origin.layout, origin.digest)
    last = Output(folder, read_origin(folder, 1), 1)
    last.publish(last.complete(2))
    assert verify(copy).whole
    assert sidecar != (copy / sidecar_name(0)).read_bytes()
    flip(copy / shard_name(0), 8 * 1000)
    assert run(copy, rich.encoded) == 0
    assert f"{shard_name(0)} is made again: other bytes than before" in capsys.readouterr().out
    assert content(copy) == content(rich.path)


def test_foreign_files_are_deleted_only_when_asked(rich, copy, capsys):
    before = times(copy)
    shutil.copy(copy / shard_name(0), copy / shard_name(9))
    assert run(copy, rich.encoded) == 1
    assert "shard-000009.safetensors does not belong to this set and is kept" in capsys.readouterr().out
    assert run(copy, rich.encoded, remove_foreign=True) == 0
    check_mended(rich, copy, set(), before)


def refused(rich: RichSet, copy: Path, words: list[str], message: str) -> None:
    for name in (shard_name(1), MANIFEST):
        flip(copy / name, 8000)
    (copy / sidecar_name(2)).unlink()
    (copy / shard_name(9)).write_bytes(b"foreign")
    before, bytes_before = times(copy), content(copy)
    with pytest.raises(UserError, match=message):
        run(copy, words, remove_foreign=True)
    assert (times(copy), content(copy)) == (before, bytes_before)


def test_another_autoencoder_is_refused_before_anything_changes(rich, copy, autoencoder_directory, tmp_path):
    other = load_autoencoder(str(autoencoder_directory))
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    words = [word for word in rich.encoded if not word.startswith("autoencoder=")]
    refused(rich, copy, [*words, f"autoencoder={tmp_path / 'other'}"], "the encoder sha256:")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resolution=64"], r"images of 32 x 32 pixels instead of 64 x 64"),
        (["batch=1"], r"batch=2 instead of 1"),
        (["flip=false"], "flip=true instead of false"),
        (["share=0/2"], "share: has no effect here"),
    ],
)
def test_other_settings_are_refused_before_anything_changes(rich, copy, words, message):
    refused(rich, copy, [*rich.encoded, *words], message)


def test_other_images_are_refused_before_anything_changes(rich, copy, tmp_path):
    images = Path(next(word for word in rich.encoded if word.startswith("data.path=")).removeprefix("data.path="))
    more = shutil.copytree(images, tmp_path / "images")
    shutil.copy(more / "a" / "000.png", more / "a" / "zzz.png")
    message = (
        r"was made with 14 images, the given ones are 15, and their fingerprint is .* instead of .*: images were added"
    )
    refused(rich, copy, [*rich.encoded, f"data.path={more}"], message)


def test_a_plan_that_nothing_holds_is_made_from_the_settings(rich, latents, settings, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "set")
    (copy / MANIFEST).write_text("")
    (copy / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: is damaged, and these settings make another one"):
        run(copy, [*settings, "flip=true"])
    assert run(copy, settings) == 0
    assert content(copy) == content(latents)


def test_a_set_that_is_not_finished(latents, settings, tmp_path):
    for name in ("plan.json", *(name(number) for number in (0, 1) for name in (shard_name, sidecar_name))):
        shutil.copy(latents / name, tmp_path)
    with pytest.raises(UserError, match="is not damaged, but not finished"):
        run(tmp_path, settings)
    flip(tmp_path / shard_name(1), 8000)
    assert run(tmp_path, settings) == 0
    assert (tmp_path / shard_name(1)).read_bytes() == (latents / shard_name(1)).read_bytes()
    assert not (tmp_path / MANIFEST).exists()


def test_s3(rich, bucket):
    remote = open_folder(f"{bucket}/set")
    for path in files_of(rich.path):
        if path.name not in (shard_name(2), sidecar_name(1)):
            remote.write(path.name, path.read_bytes())
    assert run(f"{bucket}/set", rich.encoded) == 0
    assert {name: remote.read(name) for name in content(rich.path)} == content(rich.path)


@pytest.mark.slow
def test_two_processes_mend_together_and_refuse_with_one_sentence(rich, copy):
    before, damaged = times(copy), {shard_name(0), shard_name(2), sidecar_name(1)}
    for name in damaged:
        (copy / name).unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*launcher, "ldm_vae.cli", "latents", "repair", *rich.encoded, f"output={copy}", "processes=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    refusal = subprocess.run([*command, "batch=1"], env=environment, capture_output=True, text=True, timeout=240)
    assert refusal.stderr.count("batch=2 instead of 1") == 1
    assert refusal.returncode != 0
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is made again: the same bytes as before") == 3
    check_mended(rich, copy, damaged, before)


def test_command_line(rich, copy, capsys):
    (copy / shard_name(0)).unlink()
    assert cli.main(["latents", "repair", *rich.encoded, f"output={copy}"]) == 0
    assert "whole: 18 samples in 6 shards" in capsys.readouterr().out.splitlines()[-1]
    (copy / shard_name(0)).unlink()
    assert cli.main(["latents", "repair", *rich.encoded, f"output={copy}", "batch=1"]) == 2
    assert "batch=2 instead of 1" in capsys.readouterr().err
    assert json.loads((copy / MANIFEST).read_text())["count"] == 18


@pytest.fixture
def grown(encode, settings, image_folder, tmp_path) -> tuple[Path, list[str]]:
    """A set of a folder, and the words with which images that came between the others were appended."""
    images, output = tmp_path / "images", tmp_path / "set"
    shutil.copytree(image_folder, images)
    for name in ("003", "013"):
        shutil.move(images / "b" / f"{name}.png", tmp_path / f"{name}.png")
    encode(output, f"data.path={images}")
    for name in ("003", "013"):
        shutil.move(tmp_path / f"{name}.png", images / "b" / f"{name}.png")
    words = [*settings, f"data.path={images}"]
    assert cli.main(["latents", "append", *words, f"output={output}"]) == 0
    return output, words


def test_the_first_segment_of_a_folder_that_has_grown_is_mended(grown, capsys):
    output, words = grown
    before = content(output)
    for name in ("shard-000001.safetensors", "shard-000004.safetensors", "shard-000004.jsonl", "shard-000006.jsonl"):
        flip(output / name, 3000)
    assert run(output, words) == 0
    assert capsys.readouterr().out.count("the same bytes as before") == 3
    assert content(output) == before


def test_a_grown_folder_that_lost_an_image_cannot_mend_the_first_segment(grown):
    output, words = grown
    flip(output / "shard-000001.safetensors", 3000)
    before = content(output)
    images = Path(next(word for word in words[::-1] if word.startswith("data.path=")).removeprefix("data.path="))
    (images / "a" / "004.png").rename(images / "a" / "004x.png")
    with pytest.raises(
        UserError, match=r"image 2 is a/004.png in the set and a/004x.png in the given images; give exactly"
    ):
        run(output, words)
    (images / "a" / "004x.png").unlink()
    with pytest.raises(
        UserError, match="its first segment has 22 images, but 21 of the given images are in no other segment"
    ):
        run(output, words)
    assert content(output) == before
