"""Train on a machine that is lent for minutes at a time: unpack images, train until the time is up, pack what returns.

The same command continues where the last one stopped. Packs are tar or zip files; `{packs}` in the arguments stands for
the folder that they are unpacked into. What comes back into --out is chunk.json (steps, images/s, memory, with
--peak-tflops the share of the device's arithmetic that the model used), and in parts below 16 MiB the finished model or
the state of an unfinished run, where that is small enough; `cat NAME.tar.* | tar x` joins them. See docs/how-to/gpu.md.

  python -m tools.train_in_chunks --minutes 8.5 --packs photos.tar --work runs/gpu --out back \\
      train-vae configs/vae_f8c4_base.yaml data.path={packs}
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import lzma
import os
import resource
import shlex
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from statistics import median
from typing import TYPE_CHECKING, Any

from ldm_vae import cli
from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.files import checksum, publish_directory, temporary_directory, write_bytes, write_json, write_text
from ldm_vae.training.trainer import DryRun

if TYPE_CHECKING:
    from ldm_vae.training.trainer import DryRun

PART_BYTES = 15 << 20
RETURNED_BYTES = 56 << 20
"""More than this of a state stays on the machine."""
LARGEST_MEMBER_BYTES = 64 << 20
LARGEST_PACK_BYTES = 8 << 30
"""Unpacked."""
KEPT_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
KEPT = frozenset([*KEPT_IMAGES, ".csv", ".json", ".jsonl", ".yaml", ".safetensors"])
"""With labels, sets of latents, models."""
UNREADABLE = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What a damaged, encrypted or unknown archive raises."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="time until the run is stopped, after saving")
    parser.add_argument("--packs", nargs="*", type=Path, default=[], metavar="FILE", help="tar and zip files")
    parser.add_argument("--work", type=Path, required=True, help="folder that stays on the machine between calls")
    parser.add_argument("--out", type=Path, required=True, help="folder of what comes back")
    parser.add_argument("--state", type=Path, help="an earlier --out, to continue its run on a new machine")
    parser.add_argument("--peak-tflops", type=float, help="of the device in the run's precision, from its data sheet")
    parser.add_argument("command", nargs="?", choices=("train-vae", "train-diffusion"), help="none: only unpack")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="as for that command, without output=")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    run = options.work / "run"
    try:
        check_names(options.packs)
        for pack in options.packs:
            unpack(pack, options.work / "packs" / pack.stem)
        if options.command is None:
            return 0
        if options.state is not None and not (run / "checkpoints").exists():
            restore(options.state, run)
        rest = [word.replace("{packs}", str(options.work / "packs")) for word in options.rest]
        words = [options.command, *rest, f"output={run}"]
        spans = arithmetic(words, options.work / "dry_run.json") if options.peak_tflops else []
        first, started = steps_done(run), time.monotonic()
        code = train_until(deadline, words)
        chunk = {
            "exit_code": code,
            "finished": code == 0,
            "first_step": first,
            "steps_done": steps_done(run),
            "seconds": round(time.monotonic() - started, 1),
            **memory(),
            "speed": speed(run / "metrics.jsonl", first, spans, options.peak_tflops),
        }
        if code in (0, EXIT_INTERRUPTED):
            chunk["returned"] = give_back(run, options.out, finished=code == 0)
        write_json(options.out / "chunk.json", chunk)
    except UserError as error:
        print(f"train_in_chunks: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(json.dumps(chunk, indent=2))
    return code


def check_names(packs: Sequence[Path]) -> None:
    """Raises: UserError for two packs of one folder: the second one would be taken for unpacked already."""
    first: dict[str, Path] = {}
    for pack in packs:
        if first.setdefault(pack.stem, pack) is not pack:
            raise UserError(
                f"--packs: {first[pack.stem]} and {pack} would both be unpacked into {pack.stem}; rename one of them"
            )


def unpack(pack: Path, folder: Path) -> None:
    """Files of the kinds `KEPT` below `folder`, once and completely; nothing outside it, no links.

    Beside the folder the checksum of its pack is kept.

    Raises: UserError: no pack, one that is too large or names a place outside, or a folder of another pack.
    """
    note = folder.with_name(f".{folder.name}.checksum")
    if folder.exists():
        if pack.exists() and note.is_file() and note.read_text() != checksum(pack):
            raise UserError(f"{pack}: {folder} was unpacked from another pack; rename this one, or remove that folder")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, total = temporary_directory(folder), 0
    try:
        for name, size_bytes, read in members(pack):
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts:
                raise UserError(f"{pack}: {name!r} leads outside; pack it again with plain relative names")
            if place.suffix.lower() not in KEPT:
                continue
            total += size_bytes
            if size_bytes > LARGEST_MEMBER_BYTES or total > LARGEST_PACK_BYTES:
                raise UserError(f"{pack}: {name!r} or all before it are too large unpacked; make smaller packs")
            target = temporary / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read())
        write_text(note, checksum(pack))
        publish_directory(temporary, folder)
    except UNREADABLE as error:
        raise UserError(f"{pack}: cannot be unpacked ({error}); give a tar or zip file that is whole") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def members(pack: Path) -> Iterator[tuple[str, int, Any]]:
    """(name, bytes, function that reads them) of the plain files in a pack."""
    if zipfile.is_zipfile(pack):
        with zipfile.ZipFile(pack) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, lambda entry=entry: archive.read(entry)
        return
    with tarfile.open(pack) as archive:
        for member in archive:
            if member.isfile():
                file = archive.extractfile(member)
                assert file is not None, "isfile() says that it has content"
                yield member.name, member.size, file.read


def arithmetic(words: Sequence[str], note: Path) -> list[tuple[int, int, float]]:
    """(first step, last step, GMAC a sample forward and backward) of each part of the run, counted once a command."""
    kept = json.loads(note.read_text()) if note.is_file() else {}
    if kept.get("command") != shlex.join(words):
        spans = [(span.first_step, span.last_step, span.gigamacs) for span in dry_run(words).spans]
        kept = {"command": shlex.join(words), "spans": spans}
        write_json(note, kept)
    return [(first, last, cost) for first, last, cost in kept["spans"]]


def dry_run(words: Sequence[str]) -> DryRun:
    """The dry run of a command."""
    from ldm_vae import config as configuration
    from ldm_vae.autoencoder.train_config import TrainVaeConfig
    from ldm_vae.autoencoder.training import train_vae
    from ldm_vae.diffusion.training import TrainDiffusionConfig, train_diffusion

    command, *rest = words
    recipe, settings = (rest[0], rest[1:]) if "=" not in rest[0] else (None, rest)
    with contextlib.redirect_stdout(None):
        if command == "train-vae":
            costs = train_vae(configuration.load(TrainVaeConfig, recipe, settings), dry_run=True)
        else:
            costs = train_diffusion(configuration.load(TrainDiffusionConfig, recipe, settings), dry_run=True)
    assert not isinstance(costs, int), "a dry run returns its costs"
    return costs


def train_until(deadline: float, words: Sequence[str]) -> int:
    """Run the command in this process; at the deadline it gets SIGTERM as soon as it listens."""
    with stopped_at(deadline):
        return cli.main(words)


@contextlib.contextmanager
def stopped_at(deadline: float) -> Iterator[None]:
    """What trains inside gets SIGTERM at the deadline, of `time.monotonic()`, as soon as it listens.

    A SIGTERM from outside that comes while nothing listens is the deadline.
    """
    due, done = threading.Event(), threading.Event()

    def not_yet(*_: object) -> None:
        """Ignore signals: before the first step, and after everything is saved."""
        due.set()

    def remind() -> None:
        due.wait(max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))
        while not done.wait(0.01):
            if signal.getsignal(signal.SIGTERM) is not not_yet:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    previous = signal.signal(signal.SIGTERM, not_yet)
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        done.set()
        due.set()
        reminder.join()  # else its signal could meet the handler of before, which ends the process
        signal.signal(signal.SIGTERM, previous)


def steps_done(run: Path) -> int:
    """Number of steps of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoints/step-*")), default=0)


def memory() -> dict[str, float]:
    """The most that was taken, in GiB."""
    import torch

    found = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        found["device_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {name: round(value, 2) for name, value in found.items()}


def speed(
    metrics: Path, after: int, spans: Sequence[tuple[int, int, float]], peak_tflops: float | None
) -> list[dict[str, Any]]:
    """For each part of the run in this chunk: median images/s of its log steps, and the share of the peak, where known.

    The share counts the multiplications of forward and backward passes as two operations each, and nothing else.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    rates = [(line["step"], line["time/images_per_second"]) for line in lines if "time/images_per_second" in line]
    rows = []
    for first, last, gigamacs in spans or [(0, sys.maxsize, 0.0)]:
        found = [rate for step, rate in rates if max(after, first) < step <= last + 1]
        if not found:
            continue
        row: dict[str, Any] = {"first_step": first, "images_per_second": median(found)}
        if peak_tflops and gigamacs:
            row["model_flops_utilisation"] = round(2e9 * gigamacs * median(found) / (1e12 * peak_tflops), 4)
        rows.append(row)
    return rows


def give_back(run: Path, out: Path, *, finished: bool) -> list[str]:
    """Write the model of a finished run, or the state of another one where it is small enough; names of the parts."""
    if finished:
        from ldm_vae.diffusion.export import pack

        pack(str(run), run / "model", overwrite=True)
        return divide(bundle(run, ["model"]), out, "model")
    newest = max(run.glob("checkpoints/step-*"), key=lambda path: path.name, default=None)
    if newest is None:
        return []
    size_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    if size_bytes > RETURNED_BYTES:
        print(f"the state of {size_bytes >> 20} MiB stays in {run}: continue on this machine")
        return []
    names = [
        str(newest.relative_to(run)),
        *(name for name in ("config.yaml", "metrics.jsonl") if (run / name).exists()),
    ]
    return divide(bundle(run, names), out, "state")


def bundle(folder: Path, names: Sequence[str]) -> bytes:
    """A tar file of what lies in `folder` under `names`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.add(folder / name, arcname=name)
    return buffer.getvalue()


def divide(data: bytes, out: Path, name: str) -> list[str]:
    """Write NAME.tar.00, NAME.tar.01 ...; earlier ones go."""
    for old in out.glob("*.tar.[0-9][0-9]"):
        old.unlink()
    parts = {f"{name}.tar.{i:02d}": data[first : first + PART_BYTES]
             for i, first in enumerate(range(0, len(data), PART_BYTES))}  # fmt: skip
    for part, content in parts.items():
        write_bytes(out / part, content)
    return list(parts)


def restore(state: Path, run: Path) -> None:
    """The run in the parts of an earlier --out. Raises: UserError where there are none, or they are damaged."""
    parts = sorted(state.glob("state.tar.[0-9][0-9]"))
    if not parts:
        raise UserError(f"{state}: holds no state.tar.00; give the --out of an unfinished run")
    temporary = temporary_directory(run)
    try:
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
            archive.extractall(temporary, filter="data")  # nothing outside
        publish_directory(temporary, run)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{state}: its parts cannot be joined ({error}); copy them again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
