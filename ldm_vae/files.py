"""Files that are complete or absent, checksums of them, and checks of model files before they are loaded.

Everything is written to a temporary name in the same folder, fsynced and renamed; then the folder is fsynced. A folder
of weights has a `MANIFEST.json` with the xxh3_128 checksum of each file. It detects accidental damage at memory speed;
it does not protect against tampering.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_vae.errors import DISK_FULL, DamagedFile, NewerFormat, OlderFormat, UserError
from ldm_vae.redaction import redacted
from ldm_vae.utils.text import short_name

_guards: dict[tuple[str, str], Callable[[], None]] = {}
"""(folder, name of its lock) -> a check that the folder is still the one that was locked."""


def guard(folder: Path, name: str, check: Callable[[], None] | None) -> None:
    """From now on, call `check` before anything is published in the folder or below it; None: no longer.

    Args:
        name: of the lock; several may be held in one folder.
    """
    key = (os.path.abspath(folder), name)
    if check is None:
        _guards.pop(key, None)
    else:
        _guards[key] = check


def check_guards(path: Path) -> None:
    """Before `path` is written or removed. Raises: UserError if a folder above it is not the one that was locked."""
    if not _guards:
        return
    text = os.path.abspath(path)
    for (folder, _), check in list(_guards.items()):
        if text.startswith(folder.rstrip(os.sep) + os.sep):
            check()


def fsync_path(path: Path) -> None:
    """Force a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` make a file, then publish it as `path`. A crash leaves the old file or none."""
    check_guards(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        fsync_path(temporary)
        check_guards(path)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new name beside `path`. A long name would become longer than file systems allow."""
    stem = short_name(path.stem)
    return path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{stem}{path.suffix}")


def write_bytes(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_png(path: Path, picture: Any) -> None:
    """Publish a PIL image atomically as PNG, regardless of the suffix of `path`."""
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def write_text(path: Path, text: str) -> None:
    """Publish a text atomically, with secrets and the home folder removed (see `redaction`)."""
    write_bytes(path, redacted(text).encode())


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys: equal values give equal bytes. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def readable_json(value: Any) -> str:
    """Indented, with a final newline. NaN and infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, published atomically."""
    write_text(path, readable_json(value))


def publish_directory(temporary: Path, final: Path) -> None:
    """Fsync everything in a finished folder, then rename it into place. An older one is moved aside, then removed.

    Files get the folder's permissions: safetensors makes files that only their owner can read.
    """
    permissions = temporary.stat().st_mode & 0o666
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            path.chmod(permissions)
        fsync_path(path)
    fsync_path(temporary)
    check_guards(final)
    trash = _moved_aside(final) if final.exists() else None
    os.rename(temporary, final)
    fsync_path(final.parent)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)


def temporary_directory(final: Path) -> Path:
    """A new empty folder next to `final` (same filesystem), to be filled and passed to `publish_directory`."""
    check_guards(final)
    folder = _temporary(final)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def published_directory(final: Path) -> Iterator[Path]:
    """Create the folder `final` completely or not at all: yields a temporary one, which is published at the end."""
    temporary = temporary_directory(final)
    try:
        yield temporary
        publish_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a folder. It is renamed first, so that no process sees a partial one under its name."""
    shutil.rmtree(_moved_aside(path), ignore_errors=True)


def _moved_aside(path: Path) -> Path:
    check_guards(path)
    trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}-{path.name}")
    os.rename(path, trash)
    return trash


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files of killed writers of `name` (a pattern) in `folder`. No writer may be running."""
    for path in [*folder.glob(f".tmp-*-{name}"), *folder.glob(f".trash-*-{name}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def vanished() -> FileNotFoundError:
    """The error for a folder that disappeared with its mount: writing would go to the disk underneath."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


@contextmanager
def system_errors_explained(where: str | Path, advice: str) -> Iterator[None]:
    """Turn operating system errors inside the block, such as a full disk, into a UserError that begins with `where`.

    This includes errors of safetensors, which carry the system's error number only in their text.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
        if number is None:
            raise
        reason = "no space left on the device" if number in DISK_FULL else os.strerror(number)
        raise UserError(where, f"cannot be written ({reason})", advice) from error


def checksum_bytes(data: bytes | memoryview) -> str:
    """`xxh3_128:HEX` of bytes in memory."""
    import xxhash

    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"


def checksum(path: Path) -> str:
    """`xxh3_128:HEX` of a file's bytes."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"xxh3_128:{digest.hexdigest()}"


# Checksums.

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
LISTED_SUFFIXES = (".json", ".safetensors")
"""Suffixes of the files that are listed; a README may be edited freely."""


def write_checksums(folder: Path, others: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a folder and its subfolders. `others`: name -> checksum of files to be listed as well."""
    files = dict(others or {}) | {name: checksum(folder / name) for name in _listed_files(folder)}
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    write_text(folder / MANIFEST, readable_json(manifest))


def update_checksums(folder: Path, changed: Path, names: Iterable[str]) -> None:
    """Bring the manifest of `folder`, if it has one that lists files of `changed`, up to date with files that were
    written to `changed` (`folder` or one in it) or removed from it. What it says of others stays."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, str] = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that loading will name as damaged
        return
    inside = changed.absolute().relative_to(folder.absolute())
    if not any(PurePosixPath(name).parent == PurePosixPath(inside.as_posix()) for name in files):
        return
    for name in names:
        listed, path = (inside / name).as_posix(), changed / name
        files.pop(listed, None)
        if path.suffix in LISTED_SUFFIXES and path.is_file():
            files[listed] = checksum(path)
    write_text(folder / MANIFEST, readable_json(manifest | {"files": dict(sorted(files.items()))}))


def verify_checksums(folder: Path) -> None:
    """Compare a folder with its manifest.

    Raises:
        DamagedFile: a file (or the manifest itself) is damaged, missing or unexpected.
        NewerFormat: the manifest was written by a later release.
        UserError: a file cannot be read for lack of permission.
    """
    restore = f"restore it from a copy or create it again, or remove {MANIFEST} if the change was intended"
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        version, files = manifest["format_version"], manifest["files"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            what = f"has format version {version}, this program reads {FORMAT_VERSION}"
            raise NewerFormat(folder, what, "update ldm_vae")
        if version != FORMAT_VERSION or readable_json(manifest) != text:
            raise DamagedFile(folder, f"{MANIFEST} is damaged", restore)
        there = _listed_files(folder)
        folders = {PurePosixPath(), *(PurePosixPath(name).parent for name in files)}
        for name in sorted({*files, *there}):
            if name not in files and PurePosixPath(name).parent not in folders:
                continue  # in a folder that another program added, for example of generated images
            if name not in files:
                remove = f"remove that file, or remove {MANIFEST} if the change was intended"
                raise DamagedFile(folder, f"{name} is not listed in {MANIFEST}", remove)
            if name not in there:  # nor is a file elsewhere touched
                raise DamagedFile(folder, f"{name} is missing", restore)
            if checksum(folder / name) != files[name]:
                raise DamagedFile(folder, f"{name} is damaged", restore)
    except FileNotFoundError:
        raise DamagedFile(folder, f"{MANIFEST} is missing", restore) from None
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(folder, f"cannot be read ({error.strerror})", "make it readable") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        raise DamagedFile(folder, what, restore) from error


def check_checksums(folder: Path) -> None:
    """`verify_checksums` if the folder has a manifest: models of other programs have none."""
    if (folder / MANIFEST).exists():
        verify_checksums(folder)


def _listed_files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.suffix in LISTED_SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST)


# Checks of the sizes that untrusted model files claim, before memory or time is spent on them.

MAXIMUM_HEADER_BYTES = 8 << 20
"""The headers of all of Stable Diffusion take 0.3 MB; some files carry a small picture as well."""
MAXIMUM_TENSORS = 20_000
MAXIMUM_JSON_BYTES = 16 << 20


def check_tensor_file(path: str | Path) -> None:
    """Raises: UserError if the header is larger than the file or than any model's. A missing file is not an error."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            check_tensor_header(file.read(length) if length <= MAXIMUM_HEADER_BYTES else b"", length, path)
    except (FileNotFoundError, IsADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or restore it") from error


def check_tensor_header(header: bytes, length: int, where: str | Path) -> None:
    """`header`: the bytes after the first eight, which give `length`; it may be longer. Raises: UserError."""
    if length > MAXIMUM_HEADER_BYTES or length > len(header):
        what = f"cannot be read as a safetensors file (a header of {length} bytes)"
        raise UserError(where, what, "download it again")
    if (tensors := header.count(b'"data_offsets"', 0, length)) > MAXIMUM_TENSORS:
        raise UserError(where, f"holds {tensors} tensors, more than {MAXIMUM_TENSORS}", "give a model")


def check_bin_file(path: Path) -> tuple[int, int]:
    """The most tensors and numbers that a `.bin` file can hold.

    Raises:
        UserError: it is not the archive that `torch.save` writes, or unpacks to more than its own size.
    """
    instead = "save the model as safetensors where it was made"
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(path, f"cannot be read as weights of torch ({error})", instead) from error
    if sum(sizes) > path.stat().st_size:
        raise UserError(path, "is compressed, which torch's files of weights are not", instead)
    return len(sizes), sum(sizes)


def check_model_folder(folder: Path, model_class: Any = None) -> None:
    """For a folder with `config.json` and weights. A missing folder is not an error.

    Args:
        model_class: diffusers' class of the model; with it, a configuration with more parameters than the files
            contain is refused.

    Raises:
        UserError: a header or `config.json` is larger than any model's, or describes more than the files contain.
    """
    for path in folder.glob("*.json"):
        if path.is_file() and path.stat().st_size > MAXIMUM_JSON_BYTES:
            raise UserError(path, f"is larger than {MAXIMUM_JSON_BYTES} bytes", "give the configuration of a model")
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        check_tensor_file(path)
    files += sorted(folder.glob("diffusion_pytorch_model*.bin"))
    if model_class is None or not files:
        return
    config = model_class.load_config(folder)
    tensors, numbers = (sum(found) for found in zip(*map(_contents, files)))
    layers = _layers(config)
    if layers > tensors:
        what = f"describes {layers} layers, but the files hold {tensors} tensors"
        raise UserError(f"{folder}/config.json", what, "restore it")
    described = count_numbers(lambda: model_class.from_config(config))
    if described > 2 * numbers:  # missing tensors are reported by the loader
        what = f"describes {described} parameters, but the files hold {numbers}"
        raise UserError(f"{folder}/config.json", what, "restore it")


def _contents(path: Path) -> tuple[int, int]:
    """(number of tensors, number of elements) of a file whose header was checked; the most of a `.bin` file."""
    if path.suffix == ".bin":
        return check_bin_file(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    size_bytes = path.stat().st_size
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    return len(tensors), sum(min(math.prod(tensor["shape"]), 8 * size_bytes) for tensor in tensors)


def _layers(config: Any) -> int:
    """The total number of layers that a configuration asks for; each layer has at least one tensor."""
    named = [value for key, value in config.items() if "blocks" in key or "layers" in key]
    named += [count for value in named if isinstance(value, (list, tuple)) for count in value]
    return sum(value for value in named if isinstance(value, int))


def count_numbers(build: Callable[[], Any]) -> int:
    """Number of elements in the state of the module that `build` makes, counted without allocating memory."""
    import torch
    from torch.overrides import TorchFunctionMode

    sized = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}

    class WithoutMemory(TorchFunctionMode):
        """For this thread only: accelerate's `init_empty_weights` patches torch for all threads. Tensors made
        of given numbers stay, since some modules compute with them when they are built."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in sized and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    with WithoutMemory():
        return sum(tensor.numel() for tensor in build().state_dict().values())


# Results made of a JSON description and tensors, in one safetensors file or in a folder with checksums.


@contextmanager
def parsing(where: str | Path, instead: str) -> Iterator[None]:
    """Turn parsing errors inside the block into one sentence that begins with `where`. Raises: DamagedFile."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(where, f"cannot be read ({type(error).__name__}: {error})", instead) from error


def check_format_version(where: str | Path, version: Any, known: int) -> None:
    """Raises: NewerFormat for a version above `known`, OlderFormat for one below; ValueError unless it is a version."""
    if type(version) is int and version > known:
        raise NewerFormat(where, f"has format version {version}, this program reads {known}", "update ldm_vae")
    if type(version) is int and 0 < version < known:
        raise OlderFormat(where, f"has format version {version}, this program reads {known}", "make it again")
    if version != known:
        raise ValueError(f"format version {version!r}")


def read_described_file(
    path: Path, key: str, known: int, maximum_bytes: int, framework: str = "pt"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON under `key` in a safetensors file's metadata, and the tensors. Call it inside `parsing`.

    Raises:
        NewerFormat, OlderFormat: its `format_version` is above or below `known`.
        UserError, ValueError or another error that `parsing` handles: the file is too large or damaged.
    """
    from safetensors import safe_open

    if path.stat().st_size > maximum_bytes:
        raise UserError(path, f"is larger than {maximum_bytes} bytes", "give another file")
    check_tensor_file(path)
    with safe_open(path, framework) as file:
        description = dict(json.loads(file.metadata()[key]))
        check_format_version(path, description["format_version"], known)
        return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_described_folder(folder: Path, description: str, tensors: str, known: int) -> tuple[dict[str, Any], Any]:
    """The JSON file `description` and the tensors of a folder with checksums. Call it inside `parsing`.

    Raises:
        DamagedFile: a file is damaged, missing or unexpected.
        NewerFormat, OlderFormat: the `format_version` of the description is above or below `known`.
        ValueError or another error that `parsing` handles: the description is not valid.
    """
    from safetensors.torch import load_file

    if (folder / description).stat().st_size > MAXIMUM_JSON_BYTES:
        raise DamagedFile(folder / description, f"is larger than {MAXIMUM_JSON_BYTES} bytes", "restore it from a copy")
    verify_checksums(folder)
    found = json.loads((folder / description).read_text())
    check_format_version(folder, found["format_version"], known)
    check_tensor_file(folder / tensors)
    return found, load_file(folder / tensors)
