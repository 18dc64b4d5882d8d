"""Where a result comes from: the versions, the machine and the command, written next to it as `run.json`.

The command is recorded as typed, except for what `redaction` removes. The machine is described by processor, cores and
accelerator, never by its host name.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm_vae.files import write_json
from ldm_vae.redaction import redacted
from ldm_vae.version import __version__

RUN_RECORD = "run.json"
RUN_LOCK = "run.lock"
"""The lock of the job that is writing to a result folder."""


def versions() -> dict[str, str]:
    """Name -> version of python, torch, diffusers and ldm_vae, the git commit (if the package is in a checkout; with
    `-dirty` if tracked files differ), and the machine."""
    found = {"ldm_vae": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "accelerate"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    if commit:
        found["commit"] = commit
    return found | {"machine": _machine()}


def command_line(argv: Sequence[str] | None = None) -> list[str]:
    """The command as typed; an absolute path of the program is reduced to its name."""
    program, *arguments = sys.argv if argv is None else argv
    path = Path(program)
    if path.parent == Path(__file__).parent:  # python -m ldm_vae.cli
        return ["ldm-vae", *arguments]
    return [path.name if path.is_absolute() else program, *arguments]


def write_run_record(directory: str | Path, *arguments: Any, **extra: Any) -> None:
    """Write `run.json` atomically into an existing result folder. Other arguments are those of `run_record`."""
    write_json(Path(directory) / RUN_RECORD, run_record(*arguments, **extra))


def run_record(
    command: Sequence[str] | None, started: float, seconds: float, *, finished: bool = True, **extra: Any
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        command: The words of the command; None for this process's own (`command_line()`).
        started: `time.time()` at the start, in seconds since 1970; recorded as ISO 8601 UTC.
        seconds: Wall time, including interrupted attempts if the caller knows them.
        finished: False in the record that a job writes when it starts, in case it never finishes.
        extra: JSON-able values of this command.
    """
    record = {
        "command": command_line() if command is None else list(command),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(float(seconds), 3),
        "versions": versions(),
        "finished": finished,
    }
    return redacted(record | extra)


@functools.cache
def _commit() -> str | None:
    """The checkout's short commit; None for an installed package, a checkout without commits, or without git."""
    folder = Path(__file__).parent
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # git status must not write the index

    def git(*arguments: str) -> str:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=10, check=True, env=environment,
        )  # fmt: skip
        return process.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else: installed inside another project's checkout
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _machine() -> str:
    """For example `AMD EPYC 9354, 2 cores, 16 GB` or `..., NVIDIA H200`."""
    parts = [_processor(), f"{_cores()} cores"]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB")
    torch = sys.modules.get("torch")  # only if the caller has used torch
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
