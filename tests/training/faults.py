"""Real faults for code that writes files: strace kills it, or makes the system refuse, at an operation of our choice.

The code runs in a fork of the test's process. What it did is read from strace's record, so safetensors' own system
calls count as well.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from ldm_vae.errors import EXIT_USER_ERROR, UserError

OPERATIONS = (
    "mkdir", "openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "chmod", "fchmodat", "rename",
    "renameat", "renameat2", "unlink", "unlinkat", "rmdir",
)  # fmt: skip
PR_SET_PTRACER = 0x59616D61


@cache
def require_strace() -> None:
    """Skip the test where there is no strace, or it may not watch."""
    try:
        job = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    if job.returncode:
        pytest.skip(f"strace may not watch a process here: {job.stderr.strip()}")


def fork(function: Callable[[], object], told: Path | None = None) -> int:
    """The process id of a fork that runs `function`; it ends with 0, or 2 for a UserError and 1 for another error.

    `told`: file for what the error says.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        function()
        code = 0
    except UserError as error:
        code = EXIT_USER_ERROR
        if told is not None:
            told.write_text(str(error))
    except BaseException:
        if told is not None:
            told.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def outcome(function: Callable[[], object], told: Path) -> tuple[int, str]:
    """The exit code of a fork that runs `function`, -9 when it was killed, and what its error says."""
    told.write_text("")
    _, status = os.waitpid(fork(function, told), 0)
    return os.waitstatus_to_exitcode(status), told.read_text()


def watched(function: Callable[[], object], record: Path, *options: str) -> tuple[int, list[str]]:
    """Run `function` in a fork under strace.

    Args:
        record: File for what strace writes.
        options: Of strace, for example `-e inject=fsync:error=EIO:when=2`.

    Returns:
        The exit code, -9 when it was killed; and the file operations, one line each.
    """
    begin, let_begin = os.pipe()

    def waiting() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))
        os.read(begin, 1)
        function()

    process = fork(waiting)
    command = ["strace", "-y", "-qq", "-p", str(process), "-o", str(record), "-e", f"trace={','.join(OPERATIONS)}"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE) as strace:
        try:
            while "TracerPid:\t0\n" in Path(f"/proc/{process}/status").read_text():
                assert strace.poll() is None, strace.stderr and strace.stderr.read()
                time.sleep(0.001)
            os.write(let_begin, b"!")
            _, status = os.waitpid(process, 0)
        except BaseException:
            os.kill(process, signal.SIGKILL)
            raise
    os.close(begin)
    os.close(let_begin)
    return os.waitstatus_to_exitcode(status), record.read_text().splitlines()


def places(operations: list[str]) -> list[tuple[str, int]]:
    """(name, how manieth of that name) of each operation: where a fault can be put."""
    seen: Counter[str] = Counter()
    found = []
    for line in operations:
        name = re.match(r"\w+", line)
        if name and name[0] in OPERATIONS:
            seen[name[0]] += 1
            found.append((name[0], seen[name[0]]))
    return found
