"""The readers that `read.py` compares: each writes the samples in its format, and reads them its best way.

A sample is float16 (8, 64, 64). What a reader yields are torch tensors with memory of their own, single or as batches.
Owns the formats and the check that every reader gives the same samples; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import Origin
from ldm_vae.latents.shard import Shard, write_shard
from ldm_vae.latents.writer import Output

SHAPE = (8, 64, 64)
SAMPLE_BYTES = 2 * prod(SHAPE)
BATCH = 64
SHARD = 1024
SHUFFLE_BUFFER = 1000
OURS, LIMIT = "`LatentDataset`", "memory copy (the limit)"

Pass = Callable[[str, str], Iterable[Tensor]]
"""One pass over the set: tensors of a size ("single" or "batch") in an order ("sequential" or "random")."""


@dataclass(frozen=True)
class Reader:
    """One way to read the set. `latents`: a pass of posterior samples, where the reader draws them itself."""

    moments: Pass
    latents: Pass | None = None


def mapped(count: int, one: Callable[[int], Tensor], some: Callable[[Sequence[int]], Tensor]) -> Pass:
    """The pass of a reader with random access. `some` gets a range for neighbors, else a list."""

    class Some:
        def __getitem__(self, indices: Sequence[int]) -> Tensor:
            return some(indices)

    def one_pass(size: str, order: str) -> Iterable[Tensor]:
        if size == "single":
            return map(one, places(count, order))
        return DataLoader(Some(), batch_size=None, sampler=batches(count, order))  # type: ignore[arg-type]

    return one_pass


def places(count: int, order: str) -> Sequence[int]:
    return torch.randperm(count).tolist() if order == "random" else range(count)


def batches(count: int, order: str) -> list[Any]:
    indices = places(count, order)
    return [indices[start : start + BATCH] for start in range(0, count, BATCH)]


def latent_dataset(folder: Path, moments: np.ndarray) -> Reader:
    write_latents(folder, moments)
    raw = LatentDataset(folder, posterior="moments")
    sampled = LatentDataset(folder, posterior="sample")

    def one_pass(dataset: LatentDataset, name: str, size: str, order: str) -> Iterable[Tensor]:
        if size == "single":
            return (dataset[i][name] for i in places(len(dataset), order))
        loader = DataLoader(dataset, batch_size=None, sampler=batches(len(dataset), order))
        return (batch[name] for batch in loader)

    return Reader(
        lambda size, order: one_pass(raw, "moments", size, order),
        lambda size, order: one_pass(sampled, "latent", size, order),
    )


def write_latents(folder: Path, moments: np.ndarray) -> None:
    """A finished set of these moments, as if an autoencoder had made it."""
    origin = Origin(
        autoencoder={"fingerprint": "", "encoder_fingerprint": "", "class": "none", "config": {}},
        preprocessing={},
        content="moments",
        dtype="float16",
        latent_shape=(SHAPE[0] // 2, *SHAPE[1:]),
        flipped=False,
        encoding={"shard_size": SHARD},
        dataset={"source": "random", "count": len(moments), "label_names": []},
    )
    output = Output(folder, origin)
    with output.open():
        for number, start in enumerate(range(0, len(moments), SHARD)):
            rows = range(start, min(start + SHARD, len(moments)))
            tensors = {"moments": torch.from_numpy(moments[rows.start : rows.stop])}
            ids = [f"{row:08d}" for row in rows]
            shard = Shard(rows[0], rows[-1], tensors, [-1] * len(rows), rows, ids, [])
            write_shard(output.folder, number, shard, origin.layout, origin.digest)
        output.publish(output.complete(number + 1))


def datasets_array3d(folder: Path, moments: np.ndarray) -> Reader:
    """The documented way: an `Array3D` column, torch format. Without `dtype` it would come as float32, more slowly."""
    import datasets

    features = datasets.Features({"moments": datasets.Array3D(SHAPE, "float16")})
    datasets.Dataset.from_dict({"moments": moments}, features=features).save_to_disk(folder)
    dataset = datasets.load_from_disk(folder).with_format("torch", dtype=torch.float16)
    return Reader(of_datasets(dataset, lambda rows: rows["moments"]))


def datasets_list(folder: Path, moments: np.ndarray) -> Reader:
    """The fastest torch format that we found: a flat list of fixed length, given its shape after reading."""
    dataset = save_fixed_size_lists(folder, moments).with_format("torch", dtype=torch.float16)
    return Reader(of_datasets(dataset, lambda rows: rows["moments"].unflatten(-1, SHAPE)))


def of_datasets(dataset: Any, tensor: Callable[[Any], Tensor]) -> Pass:
    """Iterating is faster than indexing, for single rows in order."""
    random_access = mapped(len(dataset), lambda i: tensor(dataset[i]), lambda indices: tensor(dataset[indices]))

    def one_pass(size: str, order: str) -> Iterable[Tensor]:
        return map(tensor, dataset) if (size, order) == ("single", "sequential") else random_access(size, order)

    return one_pass


def datasets_arrow(folder: Path, moments: np.ndarray) -> Reader:
    """The same lists in Arrow format: what `datasets` finds, copied by hand out of Arrow's memory."""
    dataset = save_fixed_size_lists(folder, moments).with_format("arrow")

    def one(i: int) -> Tensor:
        row = dataset[i]["moments"].chunk(0).flatten().to_numpy()
        return torch.from_numpy(row.reshape(SHAPE).copy())

    def some(indices: Sequence[int]) -> Tensor:
        rows, filled = np.empty((len(indices), *SHAPE), np.float16), 0
        for chunk in dataset[indices]["moments"].chunks:
            stop = filled + len(chunk)
            rows[filled:stop] = chunk.flatten().to_numpy().reshape(-1, *SHAPE)
            filled = stop
        return torch.from_numpy(rows)

    return Reader(mapped(len(moments), one, some))


def save_fixed_size_lists(folder: Path, moments: np.ndarray) -> Any:
    import datasets
    import pyarrow

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(moments.reshape(-1)), moments[0].size)
    table = datasets.table.InMemoryTable(pyarrow.table({"moments": column}))
    datasets.Dataset(table).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def webdataset_tar(folder: Path, moments: np.ndarray) -> Reader:
    """`.npy` members, seen as arrays where they lie: faster than webdataset's own `decode()`."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=SHARD, verbose=0) as writer:
        for i, row in enumerate(moments):
            writer.write({"__key__": f"{i:08d}", "npy": row})
    files = sorted(map(str, folder.glob("*.tar")))

    def tensor(sample: dict[str, Any]) -> Tensor:
        data = sample["npy"]
        start = 10 + int.from_bytes(data[8:10], "little")  # of the data, after the header of npy version 1
        return torch.from_numpy(np.frombuffer(data, np.float16, offset=start).reshape(SHAPE).copy())

    def one_pass(size: str, order: str) -> Iterable[Tensor]:
        if order == "random":  # an endless stream of tars: the buffer is always full
            stream = webdataset.WebDataset(files, resampled=True, shardshuffle=False)
            stream = stream.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER)
        else:
            stream = webdataset.WebDataset(files, shardshuffle=False)
        stream = stream.map(tensor)
        if size == "batch":
            stream = stream.batched(BATCH, collation_fn=torch.stack)
        return webdataset.WebLoader(stream, batch_size=None, num_workers=0)

    return Reader(one_pass)


def npy_files(folder: Path, moments: np.ndarray) -> Reader:
    folder.mkdir()
    paths = [f"{folder}/{i:08d}.npy" for i in range(len(moments))]
    for path, row in zip(paths, moments):
        np.save(path, row)

    def some(indices: Sequence[int]) -> Tensor:
        rows = np.empty((len(indices), *SHAPE), np.float16)
        for row, i in zip(rows, indices):
            row[:] = np.load(paths[i])
        return torch.from_numpy(rows)

    return Reader(mapped(len(paths), lambda i: torch.from_numpy(np.load(paths[i])), some))


def memmap(path: Path, moments: np.ndarray) -> Reader:
    moments.tofile(path)
    rows = np.memmap(path, np.float16, mode="r", shape=moments.shape)

    def some(indices: Sequence[int]) -> Tensor:
        if isinstance(indices, range):
            return torch.from_numpy(np.array(rows[indices.start : indices.stop]))
        return torch.from_numpy(np.asarray(rows[indices]))

    return Reader(mapped(len(rows), lambda i: torch.from_numpy(np.array(rows[i])), some))


def memory_copy(_: Path, moments: np.ndarray) -> Reader:
    """Rows of one array into one batch. `take` copies scattered rows faster than a `copyto` of each from Python."""
    batch = np.empty((BATCH, *SHAPE), np.float16)

    def some(indices: Sequence[int]) -> Tensor:
        target = batch[: len(indices)]
        if isinstance(indices, range):
            np.copyto(target, moments[indices.start : indices.stop])
        else:
            np.take(moments, indices, axis=0, out=target, mode="clip")  # other modes copy twice
        return torch.from_numpy(target)

    return Reader(mapped(len(moments), lambda i: some(range(i, i + 1))[0], some))


READERS: dict[str, Callable[[Path, np.ndarray], Reader]] = {
    OURS: latent_dataset,
    "HF `datasets`, `Array3D`, torch format": datasets_array3d,
    "HF `datasets`, fixed-size list, torch format": datasets_list,
    "HF `datasets`, fixed-size list, Arrow format, copied by hand": datasets_arrow,
    "webdataset, tar of `.npy`": webdataset_tar,
    "one `.npy` per image": npy_files,
    "plain `np.memmap`": memmap,
    LIMIT: memory_copy,
}


def open_readers(folder: Path, moments: np.ndarray) -> tuple[dict[str, Reader], dict[str, str]]:
    """The readers on their freshly written files, each checked and so warm; and for others why they are missing."""
    readers, missing = {}, {}
    for number, (name, make) in enumerate(READERS.items()):
        try:
            readers[name] = make(folder / str(number), moments)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
        else:
            check(name, readers[name].moments, moments)
    return readers, missing


def check(name: str, one_pass: Pass, moments: np.ndarray) -> None:
    """Read the whole set in order, and some of it in the other ways.

    Raises: AssertionError where a sample is another one than was written.
    """
    start = 0
    for batch in one_pass("batch", "sequential"):
        assert np.array_equal(batch.numpy(), moments[start : start + len(batch)]), f"{name}: wrong from {start} on"
        start += len(batch)
    assert start == len(moments), f"{name}: {start} samples"
    place = {row.reshape(-1)[:8].tobytes(): i for i, row in enumerate(moments)}
    for size, order in (("single", "sequential"), ("single", "random"), ("batch", "random")):
        rows = next(iter(one_pass(size, order))).reshape(-1, *SHAPE).numpy()
        assert len(rows) == (BATCH if size == "batch" else 1), f"{name}: {len(rows)} samples at once"
        found = [place[row.reshape(-1)[:8].tobytes()] for row in rows]
        assert np.array_equal(rows, moments[found]), f"{name}: wrong in {order} order"
