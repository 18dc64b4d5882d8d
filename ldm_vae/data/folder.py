"""A folder of image files as a source: listing, order and labels.

`LocalFiles` reads them from a disk, `RemoteFiles` from a URL. Everything else is the same for both.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from ldm_vae.data.decoding import SUFFIXES, DecodeLimits, ImageRejected, decode_image, read_regular_file
from ldm_vae.data.sources import DataConfig, hash_items, number_labels
from ldm_vae.errors import UserError
from ldm_vae.paths import IMAGES
from ldm_vae.storage.base import is_url, local_path
from ldm_vae.storage.remote import AccessDenied, Connection
from ldm_vae.utils.text import pluralize, short_name

logger = logging.getLogger(__name__)

LABEL_FILES = ("labels.csv", "labels.tsv", "metadata.csv", "metadata.tsv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path", "file_path", "filepath", "image_path", "image_name")
LABEL_COLUMNS = ("label", "class", "category", "label_name", "class_name", "category_name")
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
"""Columns whose texts are of one image each, never of a class."""
SEPARATORS = (",", ";", "\t", "|")
PARTS = frozenset(
    {"train", "training", "trainset", "val", "valid", "validation", "dev", "eval", "evaluation"}
    | {"test", "testing", "testset", "holdout", "held_out"}
)
"""Folders, in any case, that hold a part of a collection and not a class."""


class ImageFiles(Protocol):
    """The files below a local or remote folder. Picklable, safe to use after a fork."""

    location: str

    def sizes(self) -> Iterator[tuple[str, int]]:
        """(relative path with `/`, size in bytes) of every visible file. Raises: UserError if there is no folder."""
        ...

    def read(self, name: str, length: int | None = None) -> bytes:
        """The first `length` bytes, or all. Raises: ImageRejected `unreadable` if only this file is at fault."""
        ...


class FolderSource:
    """All images below a folder, in the order of their relative paths, without hidden files and folders.

    The folder is a path or an fsspec URL; the same files have the same ids, labels and fingerprint in both.

    Labels come from the first of these that exists (`labels_from` says which):
    1. `labels.csv`, `labels.tsv`, `metadata.csv` or `metadata.tsv`, separated by `,`, `;`, tabs or `|`, with a column
       of `LABEL_COLUMNS` and one of `FILE_COLUMNS`; or with any two columns, if the other one has no captions;
    2. `metadata.jsonl` with `file_name` and `label` (or other names of these columns) in each line;
    3. the direct subfolders, if at least two of them contain images; below `train/`, `val/` ... the folders in these.
    An image that is not listed has no label (-1).

    Raises:
        UserError: the folder does not exist or has no image, or the label file lists none of its images
            or one of them twice; or it has several of the folders `PARTS` and `include` does not choose.
    """

    def __init__(
        self,
        path: str | Path,
        limits: DecodeLimits = DecodeLimits(),  # noqa: B008
        include: Sequence[str] = (),
    ) -> None:
        self.files, self.limits = _open_files(path), limits
        files, tables = _find_images(self.files, include)
        self.names = [name for name, _ in files]
        self.sizes_bytes = np.array([size for _, size in files], np.int64)
        self.label_names, self.labels = self._label(tables, bool(include))

    def __len__(self) -> int:
        return len(self.names)

    def id(self, i: int) -> str:
        """The path relative to the folder, with `/`; bytes that are not UTF-8 are escaped."""
        return printable(self.names[i])

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def read(self, i: int) -> np.ndarray:
        return decode_image(self.files.read(self.names[i], self.limits.file_bytes + 1), self.limits)

    def fingerprint(self) -> str:
        rows = ((self.id(i), self.label(i), int(self.sizes_bytes[i])) for i in range(len(self)))
        return hash_items([("folder", self.label_names), *rows])

    def _label(self, tables: list[str], chosen: bool) -> tuple[tuple[str, ...], np.ndarray]:
        """(label names, class numbers (n,) int64). `tables`: of LABEL_FILES; `chosen`: by patterns."""
        where = self.files.location
        folders = list(dict.fromkeys(name.split("/")[0] for name in self.names if "/" in name))
        parts = [folder for folder in folders if folder.casefold() in PARTS]
        if len(parts) > 1 and not chosen:
            raise UserError(
                f"data.path: {where}",
                f"holds {', '.join(parts[:-1])} and {parts[-1]}, which are parts of a collection and not classes",
                f"give one, as {where}/{parts[0]}, or choose with data.include=[{parts[0]}/*], [*] for all",
            )
        listed = self._listed_labels(tables)
        if listed is None:
            listed = self._folder_labels(folders, parts)
        elif len(listed) < len(self.names):
            missing = len(self.names) - len(listed)
            logger.warning("%s/%s: %d of %d images have no label", where, self.labels_from, missing, len(self.names))
        numbers = number_labels(listed.values())
        labels = [numbers[listed[name]] if name in listed else -1 for name in self.names]
        return tuple(numbers), np.array(labels, np.int64)

    def _folder_labels(self, folders: list[str], parts: list[str]) -> dict[str, str]:
        """File -> the subfolder that it is in, or the one below a part; empty if that is the same for all files."""
        self.labels_from = "the subfolders"
        depth = 0
        if parts and len(parts) == len(folders):
            depth = 1
            self.labels_from = f"the subfolders of {' and '.join(parts)}"
        elif parts:
            logger.warning("%s: %s is taken for a class, as its neighbors are", self.files.location, parts[0])
        split = {name: name.split("/") for name in self.names}
        listed = {name: folder[depth] for name, folder in split.items() if len(folder) > depth + 1}
        return listed if len(set(listed.values())) > 1 else {}

    def _listed_labels(self, tables: list[str]) -> dict[str, str] | None:
        """File -> label from the first table that has labels; None if there is none."""
        images = {unicodedata.normalize("NFC", name): name for name in self.names}
        for name in tables:
            where = f"{self.files.location}/{name}"
            try:
                text = self.files.read(name).decode("utf-8-sig")
                rows, columns = (_json_rows if name.casefold().endswith(".jsonl") else _table_rows)(text, images)
            except ImageRejected as error:
                raise UserError(f"{where}: {error}; make it readable or remove it") from error
            except (ValueError, csv.Error, RecursionError) as error:
                suffix = name.rsplit(".", 1)[1]
                raise UserError(f"{where}: cannot be read ({error}); write it as UTF-8 {suffix}") from error
            if not rows:
                logger.warning(
                    "%s: no labels are read from it: its columns are %s, and a label is in one named %s",
                    where, ", ".join(columns) or "missing", ", ".join(LABEL_COLUMNS[:3]),
                )  # fmt: skip
                continue
            listed: dict[str, str] = {}
            for file, label in rows:
                path = unicodedata.normalize("NFC", str(PurePosixPath(file.replace("\\", "/"))))
                if listed.setdefault(path, label) != label:
                    raise UserError(
                        where, f"lists {file} as {listed[path]!r} and as {label!r}", "give one label for each image"
                    )
            found = {images[file]: label for file, label in listed.items() if file in images}
            if not found:
                raise UserError(
                    f"{where}: lists no image of this folder, for example {next(iter(listed))!r}; "
                    "give paths relative to the folder"
                )
            if len(found) < len(listed):
                missing = len(listed) - len(found)
                logger.warning("%s: %d of the %d files listed are not among the images", where, missing, len(listed))
            self.labels_from = name
            return found
        return None


def _find_images(files: ImageFiles, include: Sequence[str] = ()) -> tuple[list[tuple[str, int]], list[str]]:
    """The images by name, each with its size in bytes, and the tables of labels in the order of LABEL_FILES.

    Raises:
        UserError: there is no folder, or no image in it.
    """
    where = files.location
    others: Counter[str] = Counter()
    found, tables, deeper = [], [], []
    for name, size_bytes in files.sizes():
        if name.casefold() in LABEL_FILES:
            tables.append(name)
            continue
        if name.rsplit("/", 1)[-1].casefold() in LABEL_FILES:
            deeper.append(name)
        if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            continue
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            found.append((name, size_bytes))
        else:
            others[suffix or "no suffix"] += 1
    if not found and include:
        raise UserError(f"data.include: no image below {where} matches {list(include)}; `*` crosses folders")
    if not found:
        raise UserError(
            f"data.path: {where}: no image in it (found: {_counts(others) or 'nothing'}); "
            f"give a folder with files ending in {', '.join(sorted(SUFFIXES))}"
        )
    if others:
        logger.warning("%s: skipped files without an image suffix: %s", where, _counts(others))
    if deeper and not tables:
        logger.warning("%s: no labels are read from %s, which is not directly in the folder", where, min(deeper))
    return sorted(found), sorted(tables, key=lambda name: (LABEL_FILES.index(name.casefold()), name))


class LocalFiles:
    """See `ImageFiles`."""

    def __init__(self, path: str | Path) -> None:
        self.root = local_path(path)
        self.location = str(self.root)

    def sizes(self) -> Iterator[tuple[str, int]]:
        IMAGES.find(self.root, "data.path")
        yield from _files(self.root)

    def read(self, name: str, length: int | None = None) -> bytes:
        return read_regular_file(self.root / name, length)


def printable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _counts(suffixes: Counter[str]) -> str:
    """The most frequent suffixes as text."""
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(3))


def _open_files(path: str | Path) -> ImageFiles:
    if is_url(path):
        return RemoteFiles(str(path))
    return LocalFiles(path)


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """(relative path, size in bytes) of every visible file below `root`; size 0 if it is not a regular file.

    Links are followed, and each real folder is visited once, real folders before linked ones, so loops end. A broken
    link counts as a file and is reported when it is read.
    """
    entered = set()
    folders: list[str] = [""]
    linked: list[str] = []
    while folders or linked:
        if not folders:
            linked.sort(reverse=True)
            folders.append(linked.pop())
        folder = folders.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            advice = "make the folder readable or remove it"
            raise UserError(f"{root / folder}: {error.strerror}; {advice}") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:
                yield name, 0
                continue
            if stat.S_ISDIR(status.st_mode):
                (linked if entry.is_symlink() else folders).append(name)
            else:
                yield name, status.st_size if stat.S_ISREG(status.st_mode) else 0


Rows = tuple[list[tuple[str, str]], list[str]]
"""(file, label) pairs, none if there is no column of labels; and the names of the columns."""


def _table_rows(text: str, images: Collection[str]) -> Rows:
    """The rows of a table with a separator. `images`: names, to tell a first row from a header."""
    header, rows = max((_split(text, separator, images) for separator in SEPARATORS), key=lambda split: split[0])[1:]
    file_column = next((header.index(name) for name in FILE_COLUMNS if name in header), 0)
    label_column = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    if label_column is None:
        if len(header) != 2 or header[1 - file_column].rstrip("s") in CAPTION_COLUMNS:
            return [], header
        label_column = 1 - file_column
    without_header = _is_image(rows[0][file_column], images)
    last = max(file_column, label_column)
    listed = [row for row in (rows if without_header else rows[1:]) if len(row) > last and row[label_column]]
    return [(row[file_column], row[label_column]) for row in listed], header


def _split(text: str, separator: str, images: Collection[str]) -> tuple[tuple[int, int], list[str], list[list[str]]]:
    """(how well the first row reads, its cells in lower case, all rows), of cells between a separator."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows = [[cell.strip() for cell in row] for row in reader if row]
    first = rows[0] if rows else []
    header = [cell.lower() for cell in first]
    known = sum(cell in FILE_COLUMNS or cell in LABEL_COLUMNS for cell in header)
    return (known + any(_is_image(cell, images) for cell in first), len(first)), header, rows


def _is_image(cell: str, images: Collection[str]) -> bool:
    return unicodedata.normalize("NFC", str(PurePosixPath(cell.replace("\\", "/")))) in images


def _json_rows(text: str, images: Collection[str]) -> Rows:
    """The rows of a JSON-lines file."""
    rows: list[tuple[str, str]] = []
    columns: dict[str, None] = {}
    for line in io.StringIO(text, newline=None):
        row = json.loads(line) if line.strip() else {}
        if not isinstance(row, dict):
            raise ValueError(f"the line {line.strip()[:40]!r} is not an object with {FILE_COLUMNS[0]}")
        columns |= dict.fromkeys(row)
        name = next((row[column] for column in FILE_COLUMNS if column in row), None)
        label = next((row[column] for column in LABEL_COLUMNS if column in row), None)
        if isinstance(name, str) and isinstance(label, (str, int)):
            rows.append((name, str(label)))
        elif label is not None:
            raise ValueError(f"the line {line.strip()[:40]!r} has no file, or a label that is neither text nor number")
    return rows, list(columns)


# Image files below an fsspec URL such as `s3://bucket/images`: one listing, and one bounded request per image.


class RemoteFiles:
    """See `ImageFiles`."""

    def __init__(self, location: str) -> None:
        self.location, self.connection = location.rstrip("/"), Connection(location)

    def sizes(self) -> Iterator[tuple[str, int]]:
        root = self.connection.root
        try:
            entries = self.connection.request(lambda filesystem: filesystem.find(root, detail=True))
        except FileNotFoundError:
            entries = {}
        if root in entries or not entries:
            what = "is a file" if entries else "no such folder"
            raise UserError(f"data.path: {self.location}: {what}; give the folder that holds the images")
        for path, entry in entries.items():
            name = path[len(root) + 1 :]
            hidden = name.startswith(".") or "/." in name
            if not hidden and not name.endswith("/"):  # some tools mark folders with empty objects
                yield name, int(entry["size"])

    def read(self, name: str, length: int | None = None) -> bytes:
        try:
            return self.connection.read(name, length)
        except FileNotFoundError as error:
            raise ImageRejected("unreadable", "cannot be opened: it is not there any more") from error
        except AccessDenied as error:
            raise ImageRejected("unreadable", "cannot be opened: access denied") from error


def report_newer_images(data: Any, result: str | Path) -> None:
    """Log one line where images of a local folder were written after a finished result of them.

    A fingerprint has names, labels and sizes of files, so an image that was edited to the same size would pass
    unnoticed. This costs one `stat` for each image.

    Args:
        data: the `DataConfig` of the images; what is not a folder on this machine is not looked at.
        result: the file that was written when it was finished.
    """
    if not isinstance(data, DataConfig) or data.source != "folder" or is_url(str(data.path)) or is_url(result):
        return
    try:
        finished = local_path(result).stat().st_mtime
        files = LocalFiles(str(data.path))
        newer = sorted(name for name in _names(files, data.include) if _written(files.root / name) > finished)
    except (OSError, UserError):
        return
    if newer:
        logger.warning(
            "%s: %s written after the result in %s, for example %s; if that changed them, give another output",
            files.location, f"{pluralize(len(newer), 'image')} {'was' if len(newer) == 1 else 'were'}",
            local_path(result).parent, printable(newer[0]),
        )  # fmt: skip


def _names(files: LocalFiles, include: Sequence[str]) -> Iterator[str]:
    for name, _ in files.sizes():
        chosen = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
        if chosen and os.path.splitext(name)[1].lower() in SUFFIXES:
            yield name


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it is reported when it is read
        return 0.0


def find_pictures(inputs: Sequence[str | Path] | str | Path) -> list[tuple[str, Path]]:
    """(output name without suffix, file) for files and folders. Duplicate names get the suffix, then a number;
    names that are too long for a file with another ending are shortened.

    Raises:
        UserError: something else than a file or a folder.
    """
    found: list[tuple[str, Path]] = []
    taken: set[str] = set()
    for path, relative in _named_files([inputs] if isinstance(inputs, str | Path) else inputs):
        name = "/".join(map(short_name, relative.with_suffix("").parts))
        candidates = [name, f"{name}-{relative.suffix.removeprefix('.')}"]
        candidates += [f"{name}-{number}" for number in range(2, len(taken) + 3)]
        name = next(word for word in candidates if not taken & {word, f"{word}_beside"})
        taken |= {name, f"{name}_beside"}
        found.append((name, path))
    return found


def _named_files(inputs: Sequence[str | Path]) -> Iterator[tuple[Path, Path]]:
    for text in inputs:
        if not isinstance(text, str | Path):
            raise UserError("images", f"{type(text).__name__} is not a path", "give image files or folders")
        path = Path(text).expanduser()
        if path.is_dir():
            for name, _ in _find_images(LocalFiles(path))[0]:
                yield path / name, Path(printable(name))
        elif path.is_file():
            yield path, Path(printable(path.name))
        else:
            raise UserError(f"{text}: no such file or folder; give image files or folders")
