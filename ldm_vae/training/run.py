"""The run directory: which run it holds, that only one process group writes it, and what is in it.

config.yaml      the resolved configuration         checkpoints/   complete states to resume from
metrics.jsonl    one line a log step                previews/      pictures while training
run.json         command, versions, time            tensorboard/   the same metrics for TensorBoard
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_vae import config as configuration
from ldm_vae.errors import UserError
from ldm_vae.files import write_text

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
    "training.device",
    "training.compile",
    "training.tracker",
    "training.gradient_checkpointing",
)
"""Keys that a resumed run may change: they do not change what is learnt (steps: the run gets longer or shorter)."""


class RunDirectory:
    """Opens or continues the run at `path`. Holds a lock until the process ends."""

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

    def _open(self) -> None:
        config_file = self.path / "config.yaml"
        if self.path.exists() and not config_file.exists() and any(self._contents()):
            raise UserError(f"{self.path}: holds other files but no run; give another output, or empty it")
        try:
            for folder in (self.path, self.checkpoints, self.path / "previews"):
                folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); give another output") from error
        if config_file.exists():
            self._refuse_other_config(config_file)
        write_text(config_file, configuration.to_yaml(self.config))

    def _contents(self) -> list[Path]:
        return [p for p in self.path.iterdir() if p.name not in ("checkpoints", "previews", "run.lock")]

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
            raise UserError(
                f"{self.path}: process {holder} is training here; wait for it, or give another output"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

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
        write_text(self.metrics, "".join(kept))


def may_change(key: str, allowed: Sequence[str] = MAY_CHANGE) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)
