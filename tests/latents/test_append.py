"""Appending: new images only, in new shards, to the same bytes whatever interrupts it; what is old stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data.folder import FolderSource
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.append import AppendConfig, append_all_sizes, segment_job
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.encode import EncodeConfig, encode_units, make_accelerator
from ldm_vae.latents.format import read_manifest, read_origin, shard_name, sidecar_name
from ldm_vae.storage import open_folder
from tests.latents.damaged_sets import content
from tests.latents.test_encode import contents
from tests.latents.test_stream import collections as collections  # a fixture
from tests.latents.test_stream import data as stream_of

Append = Callable[..., int]
GROWTH = ("b/000-new.png", "b/500.png", "c/000.png", "c/001.png", "c/002.png", "c/003.png", "d.png")
"""Two of a known class, among the others; four of a new class; one without a class."""


def draw(path: Path, seed: int) -> None:
    coarse = Image.fromarray(np.random.default_rng([7, seed]).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize((80, 96), Image.Resampling.BICUBIC).save(path)


def add_images(folder: Path, names: tuple[str, ...] = GROWTH) -> None:
    for seed, name in enumerate(names):
        draw(folder / name, seed)


@pytest.fixture(scope="module")
def grown(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the set was made of, later."""
    folder = tmp_path_factory.mktemp("grown") / "images"
    shutil.copytree(image_folder, folder)
    add_images(folder)
    return folder


@pytest.fixture(scope="module")
def append(settings: list[str]) -> Append:
    """append(output, *overrides) in this process."""

    def run(output: Path | str, *overrides: str) -> int:
        config = configuration.load(AppendConfig, None, [*settings, f"output={output}", *overrides])
        return append_all_sizes(config, make_accelerator(config)).exit_code

    return run


@pytest.fixture(scope="module")
def appended(latents: Path, append: Append, grown: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with two segments that no test may change."""
    output = tmp_path_factory.mktemp("appended") / "set"
    shutil.copytree(latents, output)
    append(output, f"data.path={grown}")
    return output


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    return shutil.copytree(latents, tmp_path / "set")


def all_latents(dataset: LatentDataset) -> torch.Tensor:
    return torch.stack([dataset[i]["latent"] for i in range(len(dataset))])


def test_new_images_follow_the_old_ones(appended, latents, grown):
    dataset, before = LatentDataset(appended, posterior="mean"), LatentDataset(latents, posterior="mean")
    ids = [dataset.id(i) for i in range(len(dataset))]
    assert ids == [before.id(i) for i in range(24)] + sorted(GROWTH)
    assert [dataset[i]["index"] for i in range(31)] == list(range(31))
    assert torch.equal(all_latents(dataset)[:24], all_latents(before))
    source, names = FolderSource(grown), dataset.manifest.label_names
    labels = {source.id(i): source.label(i) for i in range(len(source))}
    expected = [source.label_names[labels[id]] if labels[id] >= 0 else None for id in ids]
    assert [names[dataset[i]["label"]] if dataset[i]["label"] >= 0 else None for i in range(31)] == expected
    manifest = dataset.manifest
    assert (manifest.count, manifest.shards, manifest.shard_index.counts.tolist()) == (31, 8, [4] * 7 + [3])
    record = manifest.datasets[1]
    assert (record["first_shard"], record["first_index"], record["count"], record["id_prefix"]) == (6, 24, 7, "")
    assert record["plan"] == read_origin(open_folder(appended), 1).digest


def test_no_old_file_changes_but_the_records_of_the_set(appended, latents):
    old, new = contents(latents), contents(appended)
    changed = {name for name, data in old.items() if new.get(name) != data}
    assert changed == {"manifest.json"}  # readers that have opened it go on with its index


def test_latents_and_statistics_are_those_of_encoding_everything_at_once(appended, encode, grown, tmp_path):
    encode(tmp_path / "whole", f"data.path={grown}")
    together, whole = (LatentDataset(path, posterior="mean") for path in (appended, tmp_path / "whole"))
    rows = {whole.id(i): i for i in range(31)}
    for i in range(31):
        torch.testing.assert_close(together[i]["latent"], whole[rows[together.id(i)]]["latent"], atol=2e-3, rtol=2e-3)
    for name in ("mean", "std"):
        np.testing.assert_allclose(together.manifest.statistics[name], whole.manifest.statistics[name], rtol=1e-5)
    assert together.manifest.statistics["count"] == 31


def test_every_checksum_of_the_index_is_that_of_its_file(appended):
    from ldm_vae.files import checksum, checksum_bytes

    index = read_manifest(appended).shard_index
    for number in range(len(index)):
        assert checksum(appended / shard_name(number)) == index[number].checksum
        header = (appended / sidecar_name(number)).read_bytes().partition(b"\n")[0]
        assert checksum_bytes(header) == index[number].sidecar_checksum


def test_nothing_new_changes_nothing(append, appended, grown, capsys):
    before = {path: path.stat().st_mtime_ns for path in appended.iterdir()}
    assert append(appended, f"data.path={grown}") == 0
    assert "nothing new: all 31 images are in the set already, by their ids" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in appended.iterdir()}


def test_a_third_segment_and_workers(append, appended, grown, tmp_path, capsys):
    for output, override in ((tmp_path / "one", "workers=2"), (tmp_path / "two", "threads=3")):
        shutil.copytree(appended, output)
        images = tmp_path / f"{output.name}-images"
        shutil.copytree(grown, images)
        add_images(images, ("a/new.png", "e/0.png"))
        append(output, f"data.path={images}", override)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "31 of 33 images are in the set already, by their ids; 2 are new" in capsys.readouterr().out
    dataset = LatentDataset(tmp_path / "one")
    assert [record["first_shard"] for record in dataset.manifest.datasets] == [0, 6, 8]
    assert dataset.manifest.label_names == ("a", "b", "c", "e")
    assert [(dataset.id(i), dataset[i]["label"]) for i in (31, 32)] == [("a/new.png", 0), ("e/0.png", 3)]


def test_a_crash_at_any_publication_leaves_the_old_set_and_is_continued_to_the_byte(
    append, copy, appended, latents, grown, tmp_path, monkeypatch
):
    """Plan, 2 shards and 2 sidecars, quarantine, index, run record, manifest: each rename fails once."""
    rename, reader = os.replace, LatentDataset(copy, posterior="mean")
    for publication in range(9):
        output, done = shutil.copytree(latents, tmp_path / str(publication)), []

        def crash(source, target, publication=publication, done=done):
            if len(done) == publication:
                raise RuntimeError("crash")
            done.append(target)
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            with pytest.raises(RuntimeError, match="crash"):
                append(output, f"data.path={grown}")
        assert torch.equal(all_latents(LatentDataset(output, posterior="mean")), all_latents(reader))
        append(output, f"data.path={grown}")
        assert contents(output) == contents(appended)


def test_an_open_reader_keeps_reading_the_old_set(append, copy, latents, grown):
    reader = LatentDataset(copy, posterior="mean")
    append(copy, f"data.path={grown}")
    assert len(reader) == 24
    assert torch.equal(all_latents(reader), all_latents(LatentDataset(latents, posterior="mean")))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_do_not_change_a_byte(settings, copy, appended, grown, processes):
    words = [*settings, f"output={copy}", f"data.path={grown}", f"processes={processes}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    job = subprocess.run(
        [*launcher, "-m", "ldm_vae.cli", "latents", "append", *words],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("24 of 31 images are in the set already, by their ids; 7 are new") == 1
    assert contents(copy) == contents(appended)


def test_an_interrupted_append_goes_on_with_its_own_images_only(append, copy, grown, tmp_path, monkeypatch):
    images = shutil.copytree(grown, tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target, rename=os.replace: stop_at("shard-000006", source, target))
        with pytest.raises(RuntimeError, match="stop"):
            append(copy, f"data.path={images}")
    add_images(images, ("c/900.png",))
    with pytest.raises(UserError, match=r"plan-000001.json: .*7 images instead of 8.*or delete plan-000"):
        append(copy, f"data.path={images}")
    (copy / "plan-000001.json").unlink()
    append(copy, f"data.path={images}")
    assert read_manifest(copy).count == 32


def stop_at(name: str, source: str, target: str) -> None:
    if Path(target).name.startswith(name):
        raise RuntimeError("stop")
    os.rename(source, target)


def test_an_unfinished_set_is_refused(append, copy, grown, tmp_path):
    for path in (copy / "manifest.json", *copy.glob("index-*")):
        path.unlink()
    with pytest.raises(UserError, match="the encoding is not finished; run the same `ldm-vae encode` command again"):
        append(copy, f"data.path={grown}")
    with pytest.raises(UserError, match=r"holds no manifest.json; give a folder that `ldm-vae encode` wrote"):
        append(tmp_path / "nothing", f"data.path={grown}")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("dtype=float32", "dtype=float16 instead of float32"),
        ("resolution=64", "images of 32 x 32 pixels instead of 64 x 64"),
        ("batch=4", "batch=2 instead of 4"),
        ("part=train", "part=all instead of train"),
        ("flip=true", "flip=false instead of true"),
        ("store=mean", "store=moments instead of mean"),
    ],
)
def test_other_settings_are_refused_by_field(append, latents, grown, override, field):
    with pytest.raises(UserError, match=f"{field}.*give the settings that the set was encoded with"):
        append(latents, f"data.path={grown}", override)


def test_another_encoder_is_refused_and_a_polished_decoder_is_not(
    append, copy, appended, autoencoder_directory, grown, tmp_path
):
    autoencoder = load_autoencoder(autoencoder_directory)
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).add_(0.1)
    autoencoder.save_pretrained(tmp_path / "polished")
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).add_(1e-3)
    autoencoder.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"the encoder sha256:\w{12}\.\.\. instead of sha256:"):
        append(copy, f"data.path={grown}", f"autoencoder={tmp_path / 'other'}")
    append(copy, f"data.path={grown}", f"autoencoder={tmp_path / 'polished'}")
    assert contents(copy) == contents(appended)


def test_class_names_keep_their_numbers(append, copy, tmp_path):
    """The source calls b 0 and c 1; the set has a 0 and b 1."""
    add_images(tmp_path / "more", ("b/x.png", "c/y.png"))
    append(copy, f"data.path={tmp_path / 'more'}")
    dataset = LatentDataset(copy)
    assert dataset.manifest.label_names == ("a", "b", "c")
    assert [(dataset.id(i), dataset[i]["label"]) for i in (24, 25)] == [("b/x.png", 1), ("c/y.png", 2)]


def test_a_source_without_classes_gives_none(append, copy, tmp_path, capsys):
    add_images(tmp_path / "more", ("x.png", "y.png"))
    append(copy, f"data.path={tmp_path / 'more'}")
    assert "have classes, the new ones have none; their label will be -1" in capsys.readouterr().out
    dataset = LatentDataset(copy)
    assert [dataset[i]["label"] for i in (23, 24, 25)] == [1, -1, -1]


def test_a_set_without_classes_says_how_many_images_have_no_label(encode, append, tmp_path, capsys):
    add_images(tmp_path / "plain", ("x.png", "y.png", "z.png"))
    encode(tmp_path / "set", f"data.path={tmp_path / 'plain'}")
    add_images(tmp_path / "more", tuple(f"{name}/0.png" for name in "abcdefghijkl"))
    append(tmp_path / "set", f"data.path={tmp_path / 'more'}")
    said = capsys.readouterr().out
    assert "the 3 images of the set have no label, the new ones have classes" in said
    assert "new classes: a, b, c, d, e, f, g, h, i, j and 2 more (12)" in said


def test_labels_that_changed_are_named_and_stay(append, copy, grown, tmp_path, capsys):
    images = shutil.copytree(grown, tmp_path / "images")
    names = [path.relative_to(images).as_posix() for path in sorted(images.rglob("*.png"))]
    swapped = {"a": "b", "b": "a", "c": "c", "d": "c"}
    (images / "labels.csv").write_text("file,label\n" + "".join(f"{name},{swapped[name[0]]}\n" for name in names))
    append(copy, f"data.path={images}")
    said = capsys.readouterr().out
    assert (
        "8 of 8 compared images have another label now, for example a/000.png (b and not a); the labels in the set"
        in said
    )
    assert "new classes: c (1)" in said
    dataset = LatentDataset(copy)
    assert (dataset.id(0), dataset[0]["label"]) == ("a/000.png", 0)


def test_other_images_with_the_same_ids_are_not_taken_for_known(append, copy, latents, image_folder, tmp_path):
    other = tmp_path / "other"
    for seed, path in enumerate(sorted(image_folder.rglob("*.png"))):
        draw(other / path.relative_to(image_folder), seed)
    with pytest.raises(UserError, match=r"holds another image as a/000.png \(8 of 8 compared differ\).*id_prefix="):
        append(copy, f"data.path={other}")
    assert contents(copy) == contents(latents)
    append(copy, f"data.path={other}", "id_prefix=other/")
    dataset = LatentDataset(copy)
    assert len(dataset) == 48
    assert (dataset.id(0), dataset.id(24), dataset[47]["label"]) == ("a/000.png", "other/a/000.png", 1)
    assert dataset.manifest.datasets[1]["id_prefix"] == "other/"


def test_an_image_that_changed_is_named_and_stays(append, copy, grown, tmp_path, capsys):
    images = shutil.copytree(grown, tmp_path / "images")
    draw(images / "a" / "000.png", 99)
    append(copy, f"data.path={images}")
    assert "a/000.png has changed since it was encoded; its latent is kept" in capsys.readouterr().out
    assert read_manifest(copy).count == 31


@pytest.mark.parametrize("override", ["store=mean", "dtype=bfloat16", "precision=bf16", "flip=true"])
def test_known_images_are_recognised_in_every_content(encode, append, image_folder, grown, tmp_path, override, capsys):
    encode(tmp_path / "set", override)
    append(tmp_path / "set", override, f"data.path={grown}")
    assert "has changed" not in capsys.readouterr().out
    assert read_manifest(tmp_path / "set").count == 31
    other = tmp_path / "other"
    for seed, path in enumerate(sorted(image_folder.rglob("*.png"))):
        draw(other / path.relative_to(image_folder), seed)
    with pytest.raises(UserError, match="8 of 8 compared differ"):
        append(tmp_path / "set", override, f"data.path={other}")


def test_codes_are_recognised_and_appended(encode, append, image_folder, grown, tmp_path):
    from ldm_vae.autoencoder.quantized import AutoencoderQuantized

    torch.manual_seed(0)
    autoencoder = AutoencoderQuantized(
        latent_channels=3, codebook_size=20, encoder_channels=(8, 16), encoder_blocks=(1, 1),
        decoder_channels=(16, 8, 8, 8), decoder_blocks=(1, 0, 0, 0),
    )  # fmt: skip
    with torch.no_grad():
        autoencoder.encoder.head.weight.mul_(30)  # codes that depend on the picture
    autoencoder.save_pretrained(tmp_path / "tokens")
    words = [f"autoencoder={tmp_path / 'tokens'}", "store=indices"]
    encode(tmp_path / "set", *words)
    append(tmp_path / "set", *words, f"data.path={grown}")
    dataset = LatentDataset(tmp_path / "set")
    assert len(dataset) == 31
    assert dataset[30]["indices"].shape == (4, 4)
    for seed, path in enumerate(sorted(image_folder.rglob("*.png"))):
        draw(tmp_path / "other" / path.relative_to(image_folder), seed)
    with pytest.raises(UserError, match="compared differ"):
        append(tmp_path / "set", *words, f"data.path={tmp_path / 'other'}")


def test_stored_samples_get_noise_of_their_own(encode, append, tmp_path, capsys):
    """The same picture under another id is another sample: its noise follows from its index in the set."""
    encode(tmp_path / "set", "store=sample", "dtype=float32")
    append(tmp_path / "set", "store=sample", "dtype=float32")
    said = capsys.readouterr().out
    assert "nothing new" in said
    assert "has changed" not in said  # compared with the noise that was stored
    append(tmp_path / "set", "store=sample", "dtype=float32", "id_prefix=again/")
    dataset = LatentDataset(tmp_path / "set")
    assert dataset.id(24) == "again/a/000.png"
    assert not torch.equal(dataset[0]["latent"], dataset[24]["latent"])


def test_images_that_were_left_out_are_known_too(encode, append, image_folder, tmp_path, capsys):
    images, output = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "set"
    picture = (images / "a" / "004.png").read_bytes()
    (images / "a" / "004.png").write_bytes(b"no picture")
    encode(output, f"data.path={images}")
    (images / "a" / "004.png").write_bytes(picture)
    append(output, f"data.path={images}")
    said = capsys.readouterr().out
    assert "nothing new: all 24 images are in the set already" in said
    assert "1 of the images with known ids was left out at the first encoding; to add a repaired one, give it" in said
    add_images(images)
    (images / "c" / "001.png").write_bytes(b"no picture either")
    append(output, f"data.path={images}")
    manifest = read_manifest(output)
    assert (manifest.count, manifest.rejected) == (29, 2)
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["index"], line["id"]) for line in lines] == [(2, "a/004.png"), (27, "c/001.png")]
    append(output, f"data.path={images}")
    assert read_manifest(output) == manifest


def test_too_many_unreadable_images_are_judged_by_the_new_ones(append, copy, grown, tmp_path):
    images = shutil.copytree(grown, tmp_path / "images")
    for name in ("c/001.png", "c/002.png"):
        (images / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 7 images cannot be read, more than maximum_rejected=0.2"):
        append(copy, f"data.path={images}", "maximum_rejected=0.2")
    assert read_manifest(copy).count == 24


def test_encoding_again_rebuilds_the_manifest_of_all_segments(encode, appended, tmp_path, capsys):
    output = shutil.copytree(appended, tmp_path / "set")
    encode(output)
    assert "finished already: 31 latents" in capsys.readouterr().out
    for name in ("manifest.json", *(part.file for part in read_manifest(output).index), "shard-000003.jsonl"):
        (output / name).unlink()
    encode(output)
    assert content(output) == content(appended)


def test_encoding_again_never_loses_a_segment_silently(encode, append, appended, grown, tmp_path, capsys):
    output = shutil.copytree(appended, tmp_path / "set")
    (output / shard_name(7)).unlink()
    with pytest.raises(UserError, match=r"shard-000007.safetensors is not there; make it again with `ldm-vae latents"):
        encode(output)
    (output / "manifest.json").unlink()
    encode(output)
    assert "plan-000001.json is left out: shard-000007.safetensors is not there" in capsys.readouterr().out
    assert read_manifest(output).count == 24
    append(output, f"data.path={grown}")
    assert content(output) == content(appended)


def test_a_segment_is_made_again_from_a_source_that_has_grown_since(append, appended, settings, grown, tmp_path):
    output, images = shutil.copytree(appended, tmp_path / "set"), shutil.copytree(grown, tmp_path / "images")
    add_images(images, ("a/001-new.png", "e/0.png"))
    append(output, f"data.path={images}")
    before = contents(output)
    for name in (shard_name(7), sidecar_name(7)):
        (output / name).unlink()
    config = configuration.load(EncodeConfig, None, [*settings, f"output={output}", f"data.path={images}"])
    job, folder = segment_job(config, make_accelerator(config), open_folder(output), 1)
    with folder.open():
        assert folder.finished_units() == {0}
        encode_units(job, folder, folder.finished_units())
    assert contents(output) == before
    add_images(images, ("e/1.png",))
    with pytest.raises(UserError, match=r"7 images instead of 8.*this segment was made with"):
        segment_job(config, make_accelerator(config), open_folder(output), 1)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_that_has_grown(encode, append, collections, tmp_path, kind, streaming):
    (tmp_path / "files").mkdir()
    for number in (0, 1):
        shutil.copy(collections / f"{number}.{kind}", tmp_path / "files")
    words = stream_of(tmp_path / "files" / f"*.{kind}", streaming)
    encode(tmp_path / "set", *words)
    assert read_manifest(tmp_path / "set").count == 14
    shutil.copy(collections / f"2.{kind}", tmp_path / "files")
    append(tmp_path / "set", *words, "workers=2")
    encode(tmp_path / "whole", *words)
    together, whole = (LatentDataset(tmp_path / name, posterior="mean") for name in ("set", "whole"))
    assert len(together) == len(whole) == 24
    for i in range(24):
        assert (together.id(i), together[i]["label"]) == (whole.id(i), whole[i]["label"])
        torch.testing.assert_close(together[i]["latent"], whole[i]["latent"], atol=2e-3, rtol=2e-3)


def test_the_part_of_a_stream_grows(encode, append, collections, tmp_path):
    part = ["part=train", "data.held_out=0.3"]
    encode(tmp_path / "set", *stream_of(collections / "[01].tar"), *part)
    append(tmp_path / "set", *stream_of(collections / "[012].tar"), *part)
    encode(tmp_path / "whole", *stream_of(collections / "[012].tar"), *part)
    together, whole = (LatentDataset(tmp_path / name) for name in ("set", "whole"))
    assert [together.id(i) for i in range(len(together))] == [whole.id(i) for i in range(len(whole))]


def test_a_stream_that_cannot_be_counted_is_refused(encode, append, collections, tmp_path):
    encode(tmp_path / "set", *stream_of(collections / "compressed-[01].tar"))
    with pytest.raises(UserError, match="the images of this stream cannot be counted"):
        append(tmp_path / "set", *stream_of(collections / "compressed-*.tar"))


def test_another_dataset_with_the_same_row_numbers_is_refused(encode, append, collections, tmp_path):
    encode(tmp_path / "set", *stream_of(collections / "1.parquet"))
    with pytest.raises(
        UserError, match=r"train/000000000 is another image now.*it is another dataset.*id_prefix=NAME/"
    ):
        append(tmp_path / "set", *stream_of(collections / "2.parquet"))


def test_rows_that_moved_are_refused(encode, append, collections, tmp_path):
    """Of 15 images 5 moved, behind a file that sorts before theirs."""
    files, output = tmp_path / "files", tmp_path / "set"
    files.mkdir()
    shutil.copy(collections / "2.parquet", files / "a.parquet")
    shutil.copy(collections / "0.parquet", files / "c.parquet")
    encode(output, *stream_of(files / "*.parquet"))
    before = contents(output)
    shutil.copy(collections / "1.parquet", files / "b.parquet")
    with pytest.raises(UserError, match=r"\(5 of 15 compared differ\).*rows have moved.*alone .*id_prefix=NAME/"):
        append(output, *stream_of(files / "*.parquet"))
    assert contents(output) == before
    append(output, *stream_of(files / "b.parquet"), "id_prefix=b/")
    assert read_manifest(output).count == 24


def test_one_row_that_moved_is_noticed_at_the_end(encode, append, collections, tmp_path):
    """Of many images few are compared; whatever moves, the last ones move with it."""
    import datasets

    whole = datasets.Dataset.from_parquet([str(collections / f"{number}.parquet") for number in (0, 1, 2)])
    whole.select(range(20)).to_parquet(tmp_path / "rows.parquet")
    encode(tmp_path / "set", *stream_of(tmp_path / "rows.parquet"))
    whole.select([*range(18), *range(19, 24)]).to_parquet(tmp_path / "rows.parquet")  # one was deleted
    with pytest.raises(UserError, match="rows have moved"):
        append(tmp_path / "set", *stream_of(tmp_path / "rows.parquet"))


def test_several_sizes(encode, append, grown, tmp_path):
    encode(tmp_path / "sets", "resolution=32,32x48")
    append(tmp_path / "sets", "resolution=32,32x48", f"data.path={grown}")
    assert [read_manifest(tmp_path / "sets" / name).count for name in ("32", "32x48")] == [31, 31]


def test_shares_of_independent_jobs(append, copy, appended, grown):
    for share in ("1/2", "0/2"):
        append(copy, f"data.path={grown}", f"share={share}")
    assert read_manifest(copy).count == 24
    append(copy, f"data.path={grown}")
    made = {name: data for name, data in contents(copy).items() if not name.endswith(".lock")}
    assert made == contents(appended)


def test_on_s3(encode, append, appended, grown, bucket):
    location = f"{bucket}/set"
    encode(location)
    append(location, f"data.path={grown}")
    folder, expected = open_folder(location), contents(appended)
    found = {name: folder.read(name) for name in folder.sizes() if name in expected}
    assert found == expected
    assert LatentDataset(location, posterior="mean")[30]["label"] == -1


def test_command_line(settings, copy, grown, capsys):
    words = ["latents", "append", *settings, f"output={copy}", f"data.path={grown}"]
    assert cli.main([*words, "dtype=float32"]) == EXIT_USER_ERROR
    assert "dtype=float16 instead of float32" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert "31 latents of 3x4x4 in 8 shards" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert "nothing new" in capsys.readouterr().out
    assert cli.main(["latents", "append", "--print-config"]) == 0
    assert "id_prefix: ''" in capsys.readouterr().out
