"""The run directory: its content, which run it holds, and the lock that lets only one job write to it.

config.yaml      the resolved configuration         checkpoints/   complete states to resume from
metrics.jsonl    one line per log step              previews/      pictures while training
run.json         command, versions, time            tensorboard/   the same metrics for TensorBoard
quarantine.jsonl images that could not be read

The finished model is exported to a folder that `ModelKeys` names.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ldm_vae import config as configuration
from ldm_vae.errors import FolderLocked, UserError
from ldm_vae.files import (
    check_guards,
    remove_leftovers,
    system_errors_explained,
    vanished,
    write_atomically,
    write_text,
)
from ldm_vae.paths import check_writable
from ldm_vae.provenance import RUN_LOCK, RUN_RECORD
from ldm_vae.storage import open_folder

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"

MAY_CHANGE = (
    "output",
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
"""Keys that a resumed run may change, because they do not change the result."""

PUBLISHED = (CONFIG, METRICS, RUN_RECORD)
"""Names that every run writes directly into its folder. Other commands may use other names there."""


WAIT = "wait for it, or give another output"


@dataclass(frozen=True)
class ModelKeys:
    """What the trainer has to know about a kind of model: names in its configuration, its folder and its metrics.

    Args:
        may_change: further keys that a resumed run may change, as patterns.
        exports: the folder inside the run directory that the finished model is written to.
        memory: keys to lower when memory runs out; the first one does not change the result.
        progress: metrics beside the progress bar, as patterns, in order.
        hidden: patterns of metrics that are left out of `progress`.
        command: the command that trains it, for the progress bar.
    """

    may_change: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    progress: tuple[str, ...] = ("loss/*",)
    hidden: tuple[str, ...] = ()
    command: str = "training"

    def shown(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics beside the progress bar, under the last part of their names."""
        names = [name for pattern in self.progress for name in fnmatch.filter(metrics, pattern)]
        return {
            name.split("/")[-1]: metrics[name]
            for name in names
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.hidden)
        }


class RunConfig(Protocol):
    """The configuration of a run: a dataclass with the `ModelKeys` of its model."""

    KEYS: ClassVar[ModelKeys]


class RunDirectory:
    """Opens or continues the run at `path`. Locks it until `close` or the end of the process."""

    def __init__(self, path: str | Path, config: RunConfig, *, main_process: bool = True) -> None:
        self.path = Path(path)
        self.config: Any = config
        self.keys = config.KEYS
        self._lock = ExitStack()
        if main_process:
            self._open()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    def check(self) -> str:
        """Check, without writing anything, that the run can begin or continue here.

        Returns: what it would do, as text.

        Raises:
            UserError: the folder holds something else, a run with other settings, or a run that is being trained.
        """
        check_writable(self.path)
        self._refuse_other_files()
        if holder := open_folder(self.path).holder(RUN_LOCK):
            raise FolderLocked(self.path, f"{holder} is training here", WAIT, holder=holder)
        config_file = self.path / CONFIG
        if not config_file.exists():
            return "a new run"
        self._refuse_other_config(self._read_config(config_file), str(self.path))
        return "continues the run there" if any(self.checkpoints.glob("step-*")) else "a new run"

    def _refuse_other_files(self) -> None:
        if self.path.exists() and not (self.path / CONFIG).exists() and any(self._contents()):
            raise UserError(f"{self.path}: holds other files but no run; give another output, or empty it")

    def _refuse_others(self) -> None:
        """Raises: UserError for a folder with other files, or a run with other settings. Writes nothing."""
        self._refuse_other_files()
        if (self.path / CONFIG).exists():
            self._refuse_other_config(self._read_config(self.path / CONFIG), str(self.path))

    def _open(self) -> None:
        config_file = self.path / CONFIG
        with system_errors_explained(self.path, "give another output, or make room"):
            self._refuse_others()  # before anything is made in it
            with ExitStack() as failed:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                failed.callback(self.close)
                self._refuse_others()  # another job may have begun here meanwhile
                for folder in (self.checkpoints, self.previews):
                    folder.mkdir(exist_ok=True)
                for name in (*PUBLISHED, *self.keys.exports):
                    remove_leftovers(self.path, name)
                remove_leftovers(self.previews)
                write_text(config_file, configuration.to_yaml(self.config))
                failed.pop_all()

    def _contents(self) -> list[Path]:
        return [
            path
            for path in self.path.iterdir()
            if not (path.name == RUN_LOCK or path.name.startswith(".tmp-") or self._is_empty_folder(path))
        ]

    def _is_empty_folder(self, path: Path) -> bool:
        """Whether it is one that a run makes before it writes its configuration, and nothing is in it yet."""
        return path in (self.checkpoints, self.previews) and path.is_dir() and not any(path.iterdir())

    def _read_config(self, config_file: Path) -> dict[str, Any]:
        return configuration.to_dict(configuration.load(type(self.config), config_file))  # newer keys: the defaults

    def check_settings(self, checkpoint: Path, found: Mapping[str, Any]) -> None:
        """Raises: UserError for a checkpoint of other settings, which another run has written into this folder."""
        self._refuse_other_config(_with_known_keys(found, configuration.to_dict(self.config)), str(checkpoint))

    def _refuse_other_config(self, old: Mapping[str, Any], where: str) -> None:
        changes = configuration.changed_keys(old, configuration.to_dict(self.config))
        allowed = (*MAY_CHANGE, *self.keys.may_change)
        refused = {
            key: values
            for key, values in changes.items()
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)
        }
        if refused:
            listed = configuration.describe_changes(refused)
            raise UserError(f"{where}: holds a run with other settings: {listed}; give another output, or these values")

    def _take_lock(self) -> None:
        try:
            self._lock.enter_context(open_folder(self.path).lock(RUN_LOCK))
        except FolderLocked as error:
            what = f"{error.holder} is training here"
            raise FolderLocked(self.path, what, WAIT, holder=error.holder) from error

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises: UserError when the system refuses to write, or the folder no longer exists."""
        with system_errors_explained(self.path, "the last checkpoint is intact, and the same command continues"):
            if not self.checkpoints.is_dir():
                raise vanished()
            check_guards(self.metrics)
            yield

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        with self.writing(), open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def add_preview(self, step: int, image: Image) -> None:
        path = self.previews / f"step-{step:09d}.webp"
        with self.writing():
            write_atomically(path, lambda temporary: image.save(temporary, "webp", quality=90))

    def begin(self, step: int) -> None:
        """Prepare for the steps after `step`: remove the metrics of an earlier attempt, and the record of a
        finished run that now continues."""
        with self.writing():
            (self.path / RUN_RECORD).unlink(missing_ok=True)
        self._keep_metrics_until(step)

    def _keep_metrics_until(self, step: int) -> None:
        """Remove metric lines after `step`, which the resumed run will write again, and an incomplete last line."""
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


def _with_known_keys(found: Any, present: Any) -> Any:
    """`present`, with the values that `found` has: a key that is newer than the checkpoint is not a change of it."""
    if not (isinstance(found, dict) and isinstance(present, dict)):
        return found
    return {key: _with_known_keys(found[key], value) if key in found else value for key, value in present.items()}
