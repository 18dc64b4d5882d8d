"""The files of a stream: counted once, so that any row can be read without the files before it.

Rows are what the `datasets` library makes of the same files in the same order; what is in a row is `stream`'s matter.
Counting costs, a file: parquet, its footer (one or two requests where it is remote); tar, the header of each member,
25 us each where it is local (14 hours for 1e9 images with labels). A remote tar is read in the blocks of its file
system (S3: 50 MB), so that members smaller than a block cost one pass over the whole file. Reading starts at the row
group of a row, or, in a tar, at most `STRIDE` - 1 samples before it; 8 bytes for each `STRIDE` samples are kept in
memory (250 MB for 1e9 samples).
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ldm_vae.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)

STRIDE = 32
"""Samples of a tar for each offset that is kept."""

THREADS = 16
"""Files that are counted at once: remote ones are waited for most of the time."""

READ_ROWS = 16
BUFFER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class StreamFiles:
    """Files that together are a stream.

    Attributes:
        kind: of all of them.
        paths: local paths or fsspec URLs, in order.
        rows: (files,) int64, of each.
        starts: of each, the offsets in bytes of the samples 0, STRIDE, 2 STRIDE ...; tar only.
    """

    kind: Literal["parquet", "webdataset"]
    paths: tuple[str, ...]
    rows: np.ndarray
    starts: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    def read(self, wanted: Iterable[int], features: Features) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number, values of the columns in `features`) of increasing row numbers; images stay encoded.

        Files without a wanted row are not opened, one with several wanted rows is opened once.

        Raises:
            UserError: a file cannot be read, or is shorter than it was.
        """
        ends = np.cumsum(self.rows)
        for file, rows in groupby(wanted, lambda row: int(np.searchsorted(ends, row, side="right"))):
            before = int(ends[file] - self.rows[file])
            path = self.paths[file]
            own = (row - before for row in rows)
            if self.kind == "parquet":
                read = _read_parquet(path, own, features)
            else:
                read = _read_tar(path, self.starts[file], own, features)
            for row, values in _explained(path, read):
                yield before + row, values


class _Shorter(Exception):
    """A file has fewer rows than were counted."""


def count_files(builder: Any, split: str) -> StreamFiles | None:
    """The files that a `datasets.DatasetBuilder` streams for a split; None where they are not known (another format,
    several splits) or not countable (a compressed tar, a server without ranges).

    Raises:
        UserError: a file cannot be read.
    """
    kind = _kind(builder)
    paths = tuple(map(str, (builder.config.data_files or {}).get(split, ()))) if kind else ()
    if not kind or not paths:
        return None
    logger.info("counting the rows of %d files", len(paths))
    count = _count_parquet if kind == "parquet" else _count_tar
    with ThreadPoolExecutor(THREADS) as pool:
        counted = list(pool.map(partial(_counted, count), paths))
    for path, (rows, _) in zip(paths, counted):
        if rows is None:
            logger.warning("%s is no plain tar with random access: every process reads the whole stream", path)
            return None
    return StreamFiles(kind, paths, np.array([rows for rows, _ in counted], np.int64), tuple(s for _, s in counted))


def _kind(builder: Any) -> Literal["parquet", "webdataset"] | None:
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if isinstance(builder, WebDataset):
        return "webdataset"
    if isinstance(builder, Parquet):
        config = builder.config  # a hub repository can set these in its card: then rows are left out
        leaves_out = getattr(config, "filters", None) is not None or getattr(config, "on_bad_files", "error") != "error"
        return None if leaves_out else "parquet"
    return None


def _counted(count: Any, path: str) -> tuple[int | None, np.ndarray]:
    try:
        with _open(path) as file:
            return count(file)
    except _errors() as error:
        raise _unreadable(path, error) from error


def _count_parquet(file: Any) -> tuple[int, np.ndarray]:
    import pyarrow.parquet as pq

    return pq.read_metadata(file).num_rows, np.empty(0, np.int64)


def _count_tar(file: Any) -> tuple[int | None, np.ndarray]:
    if not file.seekable() or not _is_plain_tar(file):
        return None, np.empty(0, np.int64)
    starts, rows = [], 0
    for _, _, members in _samples(file, 0):
        if rows % STRIDE == 0:
            starts.append(next(members)[1].offset)
        rows += 1
    return rows, np.array(starts, np.int64)


def _read_parquet(path: str, wanted: Iterable[int], features: Features) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.table import table_cast

    with _open(path) as raw:
        file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES)  # else a whole row group lies in memory
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        for group, rows in groupby(wanted, lambda row: int(np.searchsorted(ends, row, side="right"))):
            if group == len(sizes):
                raise _Shorter(f"has {file.metadata.num_rows} rows now, fewer than when it was counted")
            batches = file.iter_batches(READ_ROWS, row_groups=[group], columns=list(features), use_threads=False)
            end = int(ends[group]) - sizes[group]
            values: list[dict[str, Any]] = []
            for row in rows:
                while row >= end:
                    batch = next(batches)
                    end, values = end + len(batch), []
                if not values:
                    values = table_cast(pa.Table.from_batches([batch]), features.arrow_schema).to_pylist()
                yield row, values[row - end]


def _read_tar(
    path: str, starts: np.ndarray, wanted: Iterable[int], features: Features
) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import Image
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    with _open(path) as file:
        samples, reached = None, -1
        for row in wanted:
            if samples is None or row // STRIDE > reached // STRIDE:
                reached = row // STRIDE * STRIDE
                samples = _samples(file, int(starts[row // STRIDE]))
            sample = next(islice(samples, row - reached, None), None)
            if sample is None:
                raise _Shorter(f"ends before its sample {row}, which it had when it was counted")
            reached = row + 1
            _, archive, members = sample
            contents = ((m.name, archive.extractfile(m)) for field, m in members if field in features)
            # the library's own reading of one sample: decompression, labels and text by their suffix
            found: dict[str, Any] = next(WebDataset._get_pipeline_from_tar(path, contents), {})
            values = {name: found.get(name) for name in features}
            for name, feature in features.items():
                if isinstance(feature, Image) and values[name] is not None:
                    values[name] = feature.encode_example(values[name])
            yield row, values


def _samples(file: Any, offset: int) -> Iterator[tuple[str, tarfile.TarFile, Iterator[tuple[str, tarfile.TarInfo]]]]:
    """(key, archive, its members as (field, member)) of the samples of an open tar, from a member's offset on.

    As `datasets` and `webdataset` have it: consecutive members with the same name up to its first dot are a sample.
    """
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    file.seek(offset)
    archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's

    def members() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # else all of them stay in memory
            hidden = member.name.rsplit("/", 1)[-1].startswith((".", "__"))
            if not member.isreg() or hidden:
                continue
            key, field = base_plus_ext(member.name)
            if key is not None:
                yield key, field, member

    for key, group in groupby(members(), lambda member: member[0]):
        yield key, archive, ((field, member) for _, field, member in group)


def _is_plain_tar(file: Any) -> bool:
    try:
        tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except tarfile.ReadError:
        return False
    return True


def _explained(path: str, read: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same rows, with the errors of the file as errors of the user."""
    try:
        yield from read
    except _Shorter as error:
        raise UserError(f"{path}: {error}; start again with files that nobody writes to") from error
    except _errors() as error:
        raise _unreadable(path, error) from error


def _open(path: str) -> Any:
    from datasets.utils.file_utils import xopen

    return xopen(path, "rb")


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return OSError, tarfile.TarError, pa.ArrowException


def _unreadable(path: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"data.datasets.name: {path}: cannot be read ({reason}); replace it, or leave it out")
