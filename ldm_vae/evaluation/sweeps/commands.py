"""Running `ldm-vae` commands as processes, several at once, and ending them so that they save first."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ldm_vae.errors import EXIT_INTERRUPTED


class Commands:
    """Starts `ldm-vae` commands as processes and can end those that run."""

    def __init__(self, parallel: int = 1) -> None:
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen] = []
        self._environment = dict(os.environ)
        if parallel > 1:  # processes that each take every core wait for each other
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // parallel)))

    def __call__(self, words: Sequence[str], log: Path) -> int:
        with open(log, "a") as file:
            file.write(f"$ ldm-vae {' '.join(words)}\n")
            file.flush()
            with self._lock:
                if self.stopping.is_set():
                    return EXIT_INTERRUPTED
                process = subprocess.Popen(
                    [sys.executable, "-m", "ldm_vae.cli", *words],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                )
                self._running.append(process)
            try:
                code = process.wait()
            except BaseException:  # an interrupt of this thread: let the command save and leave first
                process.terminate()
                process.wait()
                raise
            finally:
                with self._lock:
                    self._running.remove(process)
            return EXIT_INTERRUPTED if self.stopping.is_set() and code else code

    def stop(self) -> None:
        """SIGTERM to what runs: a training saves its state and leaves."""
        with self._lock:
            self.stopping.set()
            for process in self._running:
                process.terminate()
