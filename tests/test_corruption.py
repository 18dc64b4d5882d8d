"""Accidents to files: every flipped bit, cut, hole and missing file is found before anything is used.

What is damaged here is of this package's own formats: a set of latents, a checkpoint, an autoencoder, a pipeline, the
stored averages of a U-Net. How each of them is used is one function; a file is damaged, the function must refuse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.posthoc_ema import read_average, stored_averages
from ldm_vae.diffusion.power_function_ema import EmaConfig, EmaSnapshots, snapshot_name
from ldm_vae.errors import UserError
from ldm_vae.files import MANIFEST, checksum, verify_checksums, write_checksums
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import read_origin, write_plan
from ldm_vae.latents.shard import Shard, write_shard
from ldm_vae.latents.verify import verify
from ldm_vae.latents.writer import Output
from ldm_vae.storage import open_folder
from ldm_vae.training.checkpoint import Checkpoint, newest, write_checkpoint
from tests.diffusion.test_posthoc_ema_snapshots import network, train
from tests.test_golden import GOLDEN, LATENTS, unpacked

BLOCK_BYTES = 4096
NOT_READ = ("plan.json", "quarantine.jsonl")
"""Of a set: nothing that trains reads them. `ldm-vae latents verify` does."""

Use = Callable[[Path], object]


def use_set(folder: Path) -> list[object]:
    """What a training takes from a set: the manifest, every sample, every id."""
    dataset = LatentDataset(folder, posterior="moments", flip=False)
    samples = [[value.tolist() for value in map(np.asarray, dataset[i].values())] for i in range(len(dataset))]
    return [dataset.manifest.to_dict(), samples, [dataset.id(i) for i in range(len(dataset))]]


def verify_set(folder: Path) -> None:
    found = verify(folder).findings
    if found:
        raise UserError(str(found[0]))


def use_pipeline(folder: Path) -> None:
    LatentDiffusionPipeline.from_pretrained(folder)


def use_checkpoint(folder: Path) -> None:
    """Of all checkpoints of a run there is one."""
    verify_checksums(folder)


def use_snapshots(folder: Path) -> list[object]:
    """Every average that is stored."""
    stored = stored_averages(folder)
    return [(key, {name: t.tolist() for name, t in read_average(path, key[1]).items()}) for key, path in stored.items()]


def refused(use: Use, folder: Path) -> bool:
    """Whether `use` says that a file is damaged. Any other error fails the test."""
    with contextlib.suppress(UserError):
        use(folder)
        return False
    return True


def flips(path: Path, every: int) -> Iterator[int]:
    """Damage one bit of a file at a time, each `every`th of them, and make it whole again. Yields its number."""
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield bit
    path.write_bytes(whole)


def cuts(path: Path, every: int) -> Iterator[int]:
    """Cut a file at each `every`th length, 0 and one byte less than all among them. Yields the length."""
    whole = path.read_bytes()
    for length in sorted({*range(0, len(whole), every), len(whole) - 1}):
        path.write_bytes(whole[:length])
        yield length
    path.write_bytes(whole)


def try_all(files: list[Path], use: Use, every_bit: int, every_length: int) -> tuple[int, int]:
    """(bits, lengths) tried. A change that is not refused must change nothing that is read: 1e-05 as 1E-05."""
    tried = [0, 0]
    for path in files:
        folder = path.parent
        original = use(folder)
        for number, damages in enumerate((flips(path, every_bit), cuts(path, every_length))):
            for place in damages:
                tried[number] += 1
                assert refused(use, folder) or use(folder) == original is not None, f"{path.name} at {place}"
        assert use(folder) == original
    return tried[0], tried[1]


def small_checkpoint(folder: Path) -> Path:
    weights = {"a.weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), "a.bias": torch.ones(4)}
    return write_checkpoint(folder, Checkpoint(7, {"net": weights, "net-ema": weights}, {"seconds": 1.5}), keep=2)


def small_snapshots(run: Path) -> Path:
    module = network()
    train(module, EmaSnapshots(EmaConfig(snapshots=2), module, run / "snapshots"), range(4), 4)
    return run / "snapshots"


def make_set(folder: Path) -> Path:
    return Path(shutil.copytree(LATENTS, folder / "set"))


def make_autoencoder(folder: Path) -> Path:
    return unpacked("autoencoder", folder)


def use_autoencoder(folder: Path) -> str:
    return fingerprint(load_autoencoder(folder))


@pytest.mark.promise(6)
@pytest.mark.parametrize(
    ("make", "use", "names"),
    [
        (make_set, use_set, ["manifest.json", "index-*", "shard-*"]),
        (make_set, verify_set, [*NOT_READ]),
        (lambda folder: (folder / "run").mkdir() or small_checkpoint(folder / "run"), use_checkpoint, ["*"]),
        (small_snapshots, use_snapshots, ["step-000000004*"]),
        (make_autoencoder, use_autoencoder, ["config.json", MANIFEST]),
    ],
    ids=["latents", "plan", "checkpoint", "snapshots", "autoencoder"],
)
@pytest.mark.parametrize("share", [600, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_every_bit_and_every_length_of_small_files(make, use, names, share, tmp_path, record_property):
    """`share` 1: all of them; else about one in so many."""
    folder = make(tmp_path)
    files = sorted(path for name in names for path in folder.glob(name) if path.is_file())
    assert len(files) >= len(names)
    every_bit, every_length = (1, 1) if share == 1 else (share - 1, share // 6)
    bits, lengths = try_all(files, use, every_bit, every_length)
    record_property("figure", f"{bits} flipped bits and {lengths} cuts in {len(files)} files, every one found")


@pytest.mark.promise(6)
@pytest.mark.parametrize("kind", ["shard", "checkpoint"])
@pytest.mark.parametrize("trials", [20, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_random_bits_and_empty_blocks_of_large_files(kind, trials, tmp_path, record_property):
    """Bits anywhere, and 4 KiB that a disk lost; of 8 MB."""
    if kind == "shard":
        folder = large_set(tmp_path / "set", shards=1, samples=500)
        file, use = folder / "shard-000000.safetensors", lambda folder: LatentDataset(folder)[0]
    else:
        (tmp_path / "run").mkdir()
        tensors = {"weight": torch.randn(2**21, generator=torch.Generator().manual_seed(0))}
        folder = write_checkpoint(tmp_path / "run", Checkpoint(7, {"net": tensors}, {}), keep=2)
        file, use = folder / "net.safetensors", use_checkpoint
    assert not refused(use, folder)
    choose, size = random.Random(0), file.stat().st_size
    assert size > 8e6
    blocks = list(range(0, size, BLOCK_BYTES))
    with open(file, "r+b") as handle:

        def exchanged(place: int, wrong: bytes) -> bytes:
            handle.seek(place)
            right = handle.read(len(wrong))
            handle.seek(place)
            handle.write(wrong)
            handle.flush()
            return right

        for _ in range(trials):
            place = choose.randrange(size)
            right = exchanged(place, b"\0")
            exchanged(place, bytes([right[0] ^ 1 << choose.randrange(8)]))
            assert refused(use, folder), place
            exchanged(place, right)
        emptied = blocks if trials > len(blocks) else choose.sample(blocks, trials)
        for place in emptied:
            right = exchanged(place, bytes(min(BLOCK_BYTES, size - place)))
            assert refused(use, folder), place
            exchanged(place, right)
    assert not refused(use, folder)
    record_property(
        "figure", f"{kind} of {size / 1e6:.1f} MB: {trials} flipped bits and {len(emptied)} zeroed 4 KiB blocks found"
    )


def large_set(folder: Path, shards: int, samples: int) -> Path:
    """Moments of 256 x 256 images, float16 (8, 32, 32), random."""
    origin = read_origin(open_folder(LATENTS))
    origin = dataclasses.replace(
        origin,
        latent_shape=(4, 32, 32),
        flipped=False,
        dataset=origin.dataset | {"count": shards * samples},
        encoding=origin.encoding | {"shard_size": samples},
    )
    folder.mkdir()
    write_plan(open_folder(folder), origin)
    for number in range(shards):
        rows = torch.randn(samples, 8, 32, 32, generator=torch.Generator().manual_seed(number)).half()
        first = number * samples
        indices = range(first, first + samples)
        shard = Shard(
            first, first + samples - 1, {"moments": rows}, [0] * samples, indices, [str(i) for i in indices], []
        )
        write_shard(open_folder(folder), number, shard, origin.layout, origin.digest)
    output = Output(open_folder(folder), origin)
    output.publish(output.complete(shards))
    return folder


@pytest.mark.promise(6)
def test_what_checksums_cost(tmp_path, record_property):
    """The rate over one large file, and as a share of an epoch that reads every sample once: its first epoch."""
    folder = large_set(tmp_path / "set", shards=4, samples=256)
    file = tmp_path / "large"
    file.write_bytes(random.Random(0).randbytes(1 << 26))
    rate = max((1 << 26) / 1e9 / timed(lambda: checksum(file)) for _ in range(5))
    epochs = {}
    for verified in (True, False):
        dataset = LatentDataset(folder, verify=verified)
        batches = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).split(64)
        epochs[verified] = timed(lambda dataset=dataset, batches=batches: [dataset[batch] for batch in batches])
    compared = sum(timed(lambda path=path: checksum(path)) for path in sorted(folder.glob("shard-*.safetensors")))
    share = compared / epochs[True]
    assert share < 0.5  # a generous bound: what it is, is in the record
    record_property(
        "figure",
        f"{rate:.1f} GB/s on one core; {share:.1%} of the time that one process needs to read the first epoch "
        f"(its later ones: 0)",
    )


def timed(action: Callable[[], object]) -> float:
    """Seconds of the processor: a busy machine changes nothing."""
    started = time.process_time()
    action()
    return time.process_time() - started


@pytest.mark.promise(6)
def test_any_file_removed_or_emptied(tmp_path, record_property):
    """Of every format; without its `MANIFEST.json` a model is one that somebody else wrote, and is read as such."""
    (tmp_path / "run").mkdir()
    cases: list[tuple[Path, Use]] = [
        (make_set(tmp_path), verify_set),
        (small_checkpoint(tmp_path / "run"), lambda folder: newest(folder.parent)),
        (make_autoencoder(tmp_path), use_autoencoder),
        (unpacked("pipeline", tmp_path), use_pipeline),
    ]
    tried = 0
    for folder, use in cases:
        assert not refused(use, folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            whole = path.read_bytes()
            if not (path.name == MANIFEST and use in (use_autoencoder, use_pipeline)):
                path.unlink()
                assert refused(use, folder), f"{path} removed"
                tried += 1
            path.write_bytes(b"")
            assert refused(use, folder), f"{path} emptied"
            path.write_bytes(whole)
            tried += 1
        assert not refused(use, folder)
    record_property("figure", f"{tried} files of a set, a checkpoint, an autoencoder and a pipeline: all refused")


@pytest.mark.promise(6)
def test_whole_files_raise_no_alarm(tmp_path, record_property):
    folder = make_set(tmp_path)
    (tmp_path / "run").mkdir()
    checkpoint = small_checkpoint(tmp_path / "run")
    for _ in range(20):
        use_set(folder)
        use_checkpoint(checkpoint)
    record_property("figure", "20 readings of whole files: no false alarm")


def test_a_shard_that_is_whole_and_of_another_set_is_refused(tmp_path):
    """Its own checksum would fit; the manifest's does not."""
    folder = make_set(tmp_path)
    shutil.copy(folder / "shard-000001.safetensors", folder / "shard-000000.safetensors")
    with pytest.raises(UserError, match="damaged, its checksum is"):
        LatentDataset(folder)[0]


def test_the_weights_of_an_average_in_another_file_are_refused(tmp_path):
    folder = small_snapshots(tmp_path)
    shutil.copy(folder / snapshot_name(2), folder / snapshot_name(4))
    with pytest.raises(UserError, match=r"is not a snapshot \(has step 2"):
        stored_averages(folder)
    with safe_open(folder / snapshot_name(2), "pt") as file:
        assert json.loads(file.metadata()["snapshot"])["format_version"] == 1


def test_a_seal_that_was_broken_on_purpose_says_what_to_do(tmp_path):
    folder = make_autoencoder(tmp_path)
    (folder / "README.md").write_text("a page may be added, and changed")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "run.json").write_text("{}")  # nor does a folder inside belong to it
    load_autoencoder(folder)
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "other.safetensors")
    with pytest.raises(
        UserError, match=r"other.safetensors is not listed in MANIFEST.json; remove that file, or remove MAN"
    ):
        load_autoencoder(folder)
    write_checksums(folder)
    verify_checksums(folder)
    assert GOLDEN.is_dir()
