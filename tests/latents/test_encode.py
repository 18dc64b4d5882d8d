from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.samples import channels_first
from ldm_vae.data.transforms import from_uint8, resize_center_crop
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.encode import EncodeConfig, make_accelerator, parse_share, prepare
from ldm_vae.latents.format import read_manifest, read_origin
from ldm_vae.latents.writer import Output
from ldm_vae.storage import open_folder


def contents(directory: Path) -> dict[str, bytes]:
    """Every file that a finished set promises to repeat to the byte."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name not in ("run.json", "encode.lock")
    }


def test_a_finished_set_has_these_files_and_records(latents):
    shards = [f"shard-{number:06d}.{suffix}" for number in range(6) for suffix in ("jsonl", "safetensors")]
    index = read_manifest(latents).index[0].file
    assert sorted(contents(latents)) == [index, "manifest.json", "plan.json", "quarantine.jsonl", *shards]
    record = json.loads((latents / "run.json").read_text())
    assert record["finished"] is True
    assert record["images"] == record["images_encoded"] == 24
    assert record["images_per_second"] > 0
    assert 0 < record["model_busy"] <= 1
    assert {"command", "started", "seconds", "versions"} <= record.keys()


@pytest.mark.parametrize("override", ["workers=2", "threads=1", "threads=3"])
def test_workers_and_threads_do_not_change_a_byte(encode, latents, tmp_path, override):
    encode(tmp_path / "set", override)
    assert contents(tmp_path / "set") == contents(latents)


def test_a_finished_set_is_left_as_it_is(encode, latents, capsys):
    before = {path: path.stat().st_mtime_ns for path in latents.iterdir() if path.name != "encode.lock"}
    assert encode(latents) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("dtype=float32", "dtype=float16 instead of float32"),
        ("resolution=64", "images of 32 x 32 pixels instead of 64 x 64"),
        ("batch=4", "batch=2 instead of 4"),
        ("part=train", "part=all instead of train"),
        ("flip=true", "flip=false instead of true"),
    ],
)
def test_another_origin_is_refused_by_field(encode, latents, override, field):
    with pytest.raises(UserError, match=field):
        encode(latents, override)


def test_another_autoencoder_is_refused(encode, latents, autoencoder_directory, tmp_path):
    autoencoder = load_autoencoder(autoencoder_directory)
    with torch.no_grad():
        next(autoencoder.parameters())[0] += 1e-3
    autoencoder.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the encoder sha256:\w{12}\.\.\. instead of sha256:"):
        encode(latents, f"autoencoder={tmp_path}")


def test_other_images_are_refused(encode, latents, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "a" / "000.png").unlink()
    with pytest.raises(UserError, match=r"24 images instead of 23, images with the fingerprint"):
        encode(latents, f"data.path={tmp_path / 'images'}")


def test_enlarged_images_are_counted_and_said(encode, latents, tmp_path, capsys):
    assert "images_enlarged" not in json.loads((latents / "run.json").read_text())
    assert encode(tmp_path / "set", "resolution=88") == 0
    assert json.loads((tmp_path / "set" / "run.json").read_text())["images_enlarged"] == 24
    assert "24 of the 24 images of this job are smaller than 88 pixels and enlarged" in capsys.readouterr().out


def test_only_what_is_missing_is_made(encode, latents, tmp_path):
    output = tmp_path / "set"
    shutil.copytree(latents, output)
    (output / "shard-000001.jsonl").unlink()
    (output / "shard-000003.safetensors").unlink()
    truncated = output / "shard-000005.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    untouched = (output / "shard-000002.safetensors").stat().st_mtime_ns
    assert encode(output) == 0
    assert contents(output) == contents(latents)
    assert (output / "shard-000002.safetensors").stat().st_mtime_ns == untouched
    assert json.loads((output / "run.json").read_text())["images_encoded"] == 12


def test_a_crash_at_any_publication_leaves_a_set_that_is_finished_to_the_byte(encode, latents, tmp_path, monkeypatch):
    """Plan, 6 shards and 6 sidecars, quarantine, index, run record, manifest: each rename fails once."""
    rename = os.replace
    for publication in range(17):
        output, done = tmp_path / str(publication), []

        def crash(source, target, publication=publication, done=done):
            if len(done) == publication:
                raise RuntimeError("crash")
            done.append(target)
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            with pytest.raises(RuntimeError, match="crash"):
                encode(output)
        assert not (output / "manifest.json").exists()
        assert encode(output) == 0
        assert contents(output) == contents(latents)


def test_a_full_disk_is_named_and_costs_no_shard(encode, latents, tmp_path, monkeypatch):
    output, sync = tmp_path / "set", os.fsync

    def full(descriptor):
        if len(list(output.glob("shard-*.jsonl"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"no space left.*run the same command again"):
            encode(output)
    assert not list(output.glob(".tmp-*"))
    assert encode(output) == 0
    assert contents(output) == contents(latents)


def test_unreadable_images_are_left_out_and_listed(encode, image_folder, tmp_path, capsys):
    images, output = tmp_path / "images", tmp_path / "set"
    shutil.copytree(image_folder, images)
    (images / "a" / "004.png").write_bytes(b"no picture")
    for name in ("016", "018", "020", "022"):  # all of shard 2
        (images / "a" / f"{name}.png").write_bytes((images / "a" / f"{name}.png").read_bytes()[:200])
    encode(output, f"data.path={images}")
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"a/{name}.png" for name in ("004", "016", "018", "020", "022")]
    assert lines[0]["index"] == 2
    assert lines[0]["reason"] == "unknown_format"
    manifest = read_manifest(output)
    assert (manifest.count, manifest.rejected, manifest.datasets[0]["count"]) == (19, 5, 24)
    assert manifest.shard_index.counts.tolist() == [3, 4, 0, 4, 4, 4]
    dataset = LatentDataset(output, posterior="mean")
    assert [dataset[i]["index"] for i in range(19)] == [0, 1, *range(3, 8), *range(12, 24)]
    assert dataset.id(7).startswith("b/")
    assert "5 images left out" in capsys.readouterr().out


def test_a_rejected_image_does_not_change_its_neighbours(encode, latents, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "a" / "004.png").write_bytes(b"no picture")
    encode(tmp_path / "set", f"data.path={tmp_path / 'images'}")
    before, after = (LatentDataset(path, posterior="mean") for path in (latents, tmp_path / "set"))
    assert torch.equal(before[3]["latent"], after[2]["latent"])


def test_images_that_are_all_unreadable_are_an_error(encode, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no image of 1 could be read; the first: a.png"):
        encode(tmp_path / "set", f"data.path={tmp_path / 'images'}")
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_images_that_were_written_after_a_finished_set_are_named(encode, image_folder, tmp_path, caplog):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    encode(tmp_path / "set", f"data.path={images}")
    encode(tmp_path / "set", f"data.path={images}")
    assert "written after" not in caplog.text
    path = images / "a" / "004.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # the same size
    path.write_bytes(data)
    encode(tmp_path / "set", f"data.path={images}")
    assert "1 image was written after the result in" in caplog.text
    assert "a/004.png" in caplog.text


@pytest.mark.promise(8)
def test_a_latent_that_is_not_finite_stops_the_job_and_names_the_image(
    encode, autoencoder_directory, image_folder, tmp_path, record_property
):
    autoencoder = load_autoencoder(autoencoder_directory)
    with torch.no_grad():
        autoencoder.encoder.head.weight.mul_(1e6)  # some latents are beyond float16
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    source = FolderSource(image_folder)
    images = from_uint8(
        torch.stack([channels_first(resize_center_crop(source.read(i), 32)) for i in range(len(source))])
    )
    finite = autoencoder.encode_moments(images)[0].half().isfinite().flatten(1).all(1).tolist()
    assert finite[0]
    first = source.id(finite.index(False))
    with pytest.raises(UserError, match=f"^{first}: its latent is not finite in float16"):
        encode(tmp_path / "set", f"autoencoder={tmp_path / 'autoencoder'}")
    assert not (tmp_path / "set" / "manifest.json").exists()
    record_property("figure", "latents beyond float16: the job stopped with the image's name, no set was published")


def test_a_lock_keeps_a_second_job_out(encode, tmp_path):
    import fcntl

    (tmp_path / "set").mkdir()
    with open(tmp_path / "set" / "encode.lock", "w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="4711 is using this folder"):
            encode(tmp_path / "set")
    assert encode(tmp_path / "set") == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["autoencoder=nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["dtype=float64"], "dtype"),
        (["resolution=36"], "36 is not a multiple of 8.*give 32 or 40"),
        (["resolution=32x"], "'32x' is not a size; give 512, 512x768"),
        (["resolution=32,32"], "names a size twice"),
        (["store=indices"], "this autoencoder has no codes; use store=moments"),
        (["store=indices", "dtype=float16"], "dtype: has no effect on codes"),
        (["seed=1"], "seed: has no effect with store=auto"),
        (["share=4/4"], "share: '4/4' is not a share; give 0/16"),
        (["maximum_rejected=1"], "maximum_rejected: 1.0 is not a share"),
        (["shard_size=5"], "shard_size: 5 is not a multiple of batch"),
        (["data.path=nowhere"], "data.path: nowhere: no such folder"),
        (["data.cache_megabytes=1"], "has no effect"),
        (["shard_sise=4"], "shard_sise"),
        (["processes=2"], "2 were asked for, 1 started"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(encode, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        encode(tmp_path / "set", *overrides)
    assert not (tmp_path / "set").exists()


def test_a_folder_with_other_files_is_refused(encode, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds thesis.tex but no plan.json; give another output"):
        encode(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_command_line(settings, tmp_path, capsys):
    words = ["encode", *settings, f"output={tmp_path / 'set'}"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "6 shards" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()
    assert cli.main(["encode", "resolution=64", "--print-config"]) == 0
    assert "resolution: '64'" in capsys.readouterr().out
    assert cli.main(words[:-1]) == EXIT_USER_ERROR
    assert "output is required" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert cli.main([*words, "dtype=float32"]) == EXIT_USER_ERROR


def test_diffusers_own_autoencoder_and_bf16(encode, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=5, **blocks
    )
    autoencoder.save_pretrained(tmp_path / "kl")
    encode(tmp_path / "set", f"autoencoder={tmp_path / 'kl'}", "precision=bf16", "dtype=bfloat16", "resolution=64")
    dataset = LatentDataset(tmp_path / "set")
    assert dataset[0]["latent"].shape == (5, 8, 8)
    assert dataset[0]["latent"].dtype == torch.float32
    assert dataset.manifest.autoencoder["class"] == "AutoencoderKL"


@pytest.fixture(scope="module")
def token_autoencoder(tmp_path_factory) -> Path:
    from ldm_vae.autoencoder.quantized import AutoencoderQuantized

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokens")
    AutoencoderQuantized(
        latent_channels=3, codebook_size=20, encoder_channels=(8, 16), encoder_blocks=(1, 1),
        decoder_channels=(16, 8, 8, 8), decoder_blocks=(1, 0, 0, 0),
    ).save_pretrained(path)  # fmt: skip
    return path


def test_codes_are_stored_as_the_smallest_integers(encode, token_autoencoder, image_folder, tmp_path):
    encode(tmp_path / "set", f"autoencoder={token_autoencoder}", "store=indices", "flip=true")
    dataset = LatentDataset(tmp_path / "set", flip=False)
    manifest = dataset.manifest
    assert (manifest.content, manifest.dtype, manifest.layout.sample_bytes) == ("indices", "uint16", 2 * 4 * 4 * 2)
    assert manifest.statistics == {"codebook_size": 20}
    images = from_uint8(
        torch.stack([channels_first(resize_center_crop(FolderSource(image_folder).read(i), 32)) for i in range(24)])
    )
    expected = load_autoencoder(token_autoencoder).token_indices(images)
    assert torch.equal(torch.stack([dataset[i]["indices"] for i in range(24)]), expected)
    assert expected.unique().numel() > 1
    assert dataset[3]["label"] == 0
    with pytest.raises(UserError, match=r"holds codes.*encode with store=moments"):
        dataset.normalizer  # noqa: B018


def test_a_deterministic_autoencoder_stores_means(encode, token_autoencoder, tmp_path):
    encode(tmp_path / "set", f"autoencoder={token_autoencoder}")
    assert read_manifest(tmp_path / "set").content == "mean"
    with pytest.raises(UserError, match="deterministic, so its latents have no variance; use store=mean"):
        encode(tmp_path / "other", f"autoencoder={token_autoencoder}", "store=sample")


def test_means_and_samples_are_those_of_the_moments(encode, tmp_path):
    for store, seed in (("moments", 0), ("mean", 0), ("sample", 0), ("sample", 1)):
        seeds = [f"seed={seed}"] if seed else []
        encode(tmp_path / f"{store}{seed}", f"store={store}", "dtype=float32", *seeds)
    moments = LatentDataset(tmp_path / "moments0", posterior="moments")
    mean, logvar = torch.stack([moments[i]["moments"] for i in range(24)]).chunk(2, 1)
    means, samples, others = (
        torch.stack([LatentDataset(tmp_path / name)[i]["latent"] for i in range(24)])
        for name in ("mean0", "sample0", "sample1")
    )
    assert torch.equal(means, mean)
    noise = (samples - mean) / torch.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert not torch.equal(samples, others)
    stored = read_manifest(tmp_path / "mean0").statistics
    np.testing.assert_allclose(stored["std"], mean.double().std((0, 2, 3), correction=0), rtol=1e-6)
    with pytest.raises(UserError, match="posterior=sample needs stored moments, this set holds mean"):
        LatentDataset(tmp_path / "mean0", posterior="sample")


def test_stored_samples_do_not_depend_on_threads_and_batches_of_noise(encode, tmp_path):
    encode(tmp_path / "one", "store=sample", "flip=true", "threads=1")
    encode(tmp_path / "two", "store=sample", "flip=true", "threads=3", "workers=2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_several_sizes_are_a_set_each(encode, latents, tmp_path):
    encode(tmp_path / "sets", "resolution=32,32x48")
    square, wide = (read_manifest(tmp_path / "sets" / name) for name in ("32", "32x48"))
    assert contents(tmp_path / "sets" / "32") == contents(latents)
    assert wide.latent_shape == (3, 4, 6)
    assert (wide.preprocessing["height"], wide.preprocessing["width"]) == (32, 48)
    assert [square.count, wide.count] == [24, 24]


def test_shares_of_independent_jobs_make_the_set_together(encode, latents, tmp_path, capsys):
    for share in ("0/3", "2/3"):
        encode(tmp_path / "set", f"share={share}")
    assert "the same command without share completes" in capsys.readouterr().out
    assert len(list((tmp_path / "set").glob("shard-*.jsonl"))) == 4
    assert not (tmp_path / "set" / "manifest.json").exists()
    encode(tmp_path / "set")
    assert json.loads((tmp_path / "set" / "run.json").read_text())["images_encoded"] == 8
    made = {name: data for name, data in contents(tmp_path / "set").items() if not name.endswith(".lock")}
    assert made == contents(latents)


def test_too_many_unreadable_images_stop_the_job(encode, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for name in ("004", "016", "018"):
        (images / "a" / f"{name}.png").write_bytes(b"no picture")
    settings = [f"data.path={images}", "maximum_rejected=0.1"]
    with pytest.raises(UserError, match=r"3 of 24 images cannot be read, more than maximum_rejected=0.1 allows"):
        encode(tmp_path / "set", *settings)
    assert not (tmp_path / "set" / "manifest.json").exists()
    for number in range(3):  # each of three jobs leaves less out than that, all together leave out too much
        encode(tmp_path / "shares", *settings, f"share={number}/3")
    with pytest.raises(UserError, match="3 of 24 images"):
        encode(tmp_path / "shares", *settings)
    assert {path.suffix for path in (tmp_path / "shares").glob("[!s]*")} == {".json"}  # the plan alone
    (images / "a" / "018.png").unlink()  # 2 of 23
    encode(tmp_path / "other", *settings)
    assert read_manifest(tmp_path / "other").rejected == 2


def test_a_decoder_that_was_trained_further_continues_the_set(encode, latents, autoencoder_directory, tmp_path):
    shutil.copytree(latents, tmp_path / "set")
    (tmp_path / "set" / "shard-000002.safetensors").unlink()
    autoencoder = load_autoencoder(autoencoder_directory)
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).add_(0.1)
    autoencoder.save_pretrained(tmp_path / "polished")
    encode(tmp_path / "set", f"autoencoder={tmp_path / 'polished'}")
    assert contents(tmp_path / "set") == contents(latents)


def test_the_bar_of_a_share_counts_its_own_images(encode, tmp_path, capsys):
    encode(tmp_path / "set", "share=1/4")  # shards 1 and 5
    assert "encode: 8 images in" in capsys.readouterr().err
    (tmp_path / "set" / "shard-000005.jsonl").unlink()
    encode(tmp_path / "set", "share=1/4")
    captured = capsys.readouterr()
    assert "1 of its shards is there" in captured.out
    assert "encode: 8 images, 4 of them in" in captured.err


def test_two_shares_with_different_settings_cannot_both_write_the_plan(settings, tmp_path):
    """Twice the same moment: one waits while the other plans, and then is refused."""
    from threading import Thread

    outcomes: list[str] = []

    def run(*overrides: str) -> None:
        config = configuration.load(EncodeConfig, None, [*settings, f"output={tmp_path / 'set'}", *overrides])
        job = prepare(config, make_accelerator(config))
        try:
            with Output(tmp_path / "set", job.origin).open(parse_share(config.share)):
                outcomes.append("planned")
        except UserError as error:
            outcomes.append(str(error))

    with open_folder(tmp_path / "set").lock("plan.lock"):
        threads = [
            Thread(target=run, args=(f"share={i}/2", f"dtype={d}")) for i, d in enumerate(("float16", "float32"))
        ]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert not outcomes
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[1] == "planned"
    assert "was made with dtype=" in sorted(outcomes)[0]


def test_a_reader_that_opened_the_version_before_still_finds_its_index(encode, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "set")
    early = read_manifest(tmp_path / "set")
    output = Output(tmp_path / "set", read_origin(open_folder(tmp_path / "set")))
    completed = output.complete(6)
    renamed = {name.replace("000000", "000001", 1): data for name, data in completed.files.items()}
    parts = tuple(replace(part, file=part.file.replace("000000", "000001", 1)) for part in completed.manifest.index)
    output.publish(replace(completed, manifest=replace(completed.manifest, index=parts), files=renamed))
    assert early.shard_index.count == read_manifest(tmp_path / "set").shard_index.count == 24
    output.publish(replace(completed, manifest=replace(completed.manifest, index=parts), files=renamed))
    assert len(list((tmp_path / "set").glob("index-*"))) == 1
