"""The run directory: which run it holds, that only one process group writes it, and what is in it.

config.yaml      the resolved configuration         checkpoints/   complete states to resume from
metrics.jsonl    one line a log step                previews/      pictures while training
run.json         command, versions, time            tensorboard/   the same metrics for TensorBoard
quarantine.jsonl images that could not be read
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_vae import config as configuration
from ldm_vae.errors import FolderLocked, UserError
from ldm_vae.files import remove_leftovers, system_errors_explained, vanished, write_atomically, write_text
from ldm_vae.provenance import RUN_RECORD

if TYPE_CHECKING:
    from PIL.Image import Image

MAY_CHANGE = (
    "output",
    "steps",
    "micro_batch",
    "phases.*.steps",
    "phases.*.micro_batch",
    "neighbours",
    "patience",
    "kid.*",
    "training.*_every",
    "training.keep_checkpoints",
    "training.workers",
    "training.processes",
    "training.timeout_seconds",
    "training.device",
    "training.compile",
    "training.tracker",
    "training.gradient_checkpointing",
)
"""Keys that a resumed run may change: they do not change what is learnt (steps: the run gets longer or shorter)."""


PUBLISHED = ("config.yaml", "metrics.jsonl", "run.json", "autoencoder", "pipeline")
"""What trainings write directly into the folder. Other commands may be at work on other names there."""

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
"""The open lock files of this process."""


def _let_go_of_locks() -> None:
    """In a new fork: a worker that outlives a killed run for some seconds must not hold its lock."""
    for lock in _locks:
        lock.close()


os.register_at_fork(after_in_child=_let_go_of_locks)


class RunDirectory:
    """Opens or continues the run at `path`. Holds a lock until `close`, or the end of the process."""

    def __init__(self, path: str | Path, config: Any, *, main_process: bool = True) -> None:
        self.path = Path(path)
        self.config = config
        self._lock: Any = None
        if main_process:
            self._open()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    def _open(self) -> None:
        config_file = self.path / "config.yaml"
        with system_errors_explained(self.path, "give another output, or make room"):
            if self.path.exists() and not config_file.exists() and any(self._contents()):
                raise UserError(f"{self.path}: holds other files but no run; give another output, or empty it")
            for folder in (self.path, self.checkpoints, self.previews):
                folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if config_file.exists():
                self._refuse_other_config(config_file)
            for name in PUBLISHED:
                remove_leftovers(self.path, name)
            remove_leftovers(self.previews)
            write_text(config_file, configuration.to_yaml(self.config))

    def _contents(self) -> list[Path]:
        return [
            path
            for path in self.path.iterdir()
            if path.name not in ("checkpoints", "previews", "run.lock") and not path.name.startswith(".tmp-")
        ]

    def _refuse_other_config(self, config_file: Path) -> None:
        old = configuration.load(type(self.config), config_file)  # a key that is newer than the run has its default
        changes = configuration.changed_keys(configuration.to_dict(old), configuration.to_dict(self.config))
        refused = {key: values for key, values in changes.items() if not may_change(key)}
        if refused:
            listed = ", ".join(f"{key} ({before} -> {after})" for key, (before, after) in refused.items())
            raise UserError(
                f"{self.path}: holds a run with other settings: {listed}; give another output, or these values"
            )

    def _take_lock(self) -> None:
        self._lock = open(self.path / "run.lock", "a+")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            what, instead = f"process {holder} is training here", "wait for it, or give another output"
            raise FolderLocked(self.path, what, instead, holder=f"process {holder}") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        _locks.add(self._lock)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises: UserError in one sentence when the system refuses to write, or the folder has vanished."""
        with system_errors_explained(self.path, "the last checkpoint is intact, and the same command continues"):
            if not self.checkpoints.is_dir():
                raise vanished()
            yield

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        with self.writing(), open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def add_preview(self, step: int, image: Image) -> None:
        path = self.previews / f"step-{step:09d}.webp"
        with self.writing():
            write_atomically(path, lambda temporary: image.save(temporary, "webp", quality=90))

    def begin(self, step: int) -> None:
        """Steps after `step` are to come: drop what an earlier attempt said of them, and that the run is finished, as
        it was if it has become longer."""
        with self.writing():
            (self.path / RUN_RECORD).unlink(missing_ok=True)
        self.keep_metrics_until(step)

    def keep_metrics_until(self, step: int) -> None:
        """Drop metric lines after `step` (a killed run wrote them, the resumed one will again) and a torn last line."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with self.writing():
            write_text(self.metrics, "".join(kept))


def may_change(key: str, allowed: Sequence[str] = MAY_CHANGE) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)
