"""Training and measuring several autoencoders, each by the commands that a user would type, in a folder of its own.

A point is one autoencoder: `train.yaml` and `evaluate.yaml` say how it is made; `vae/`, `evaluation/` and `health/`
hold the results. A rerun continues. Several launches may share the folder: a point is locked while one works on it.
`Sweep` is the study of several points; `rate_distortion.py` and `comparison.py` say which points and what they show.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.train_config import TrainVaeConfig, describe_phases
from ldm_vae.errors import EXIT_INTERRUPTED, FolderLocked, UserError
from ldm_vae.evaluation.reconstruction import FORMAT_VERSION, RESULTS, EvaluateConfig
from ldm_vae.evaluation.study import MAY_CHANGE, Results, Study, StudyPlan, enlarged_lines, read_json
from ldm_vae.files import write_json, write_text
from ldm_vae.paths import check_writable
from ldm_vae.storage import open_folder
from ldm_vae.training.run_directory import METRICS
from ldm_vae.utils.progress import Progress, beside, end_dry_run, inside, say
from ldm_vae.utils.text import duration_text, pluralize

DIAGNOSED_IMAGES = 256

Reporter = Callable[["Point", str], None]
"""Prints what happens to a point."""


def no_report(point: Point, text: str) -> None:
    """Prints nothing: for calls from Python."""


Run = Callable[[Sequence[str], Path], int]
"""Runs `ldm-vae` with these words, its output appended to a log file, and returns the exit code."""


@dataclass(frozen=True)
class Point:
    """One autoencoder of a sweep: its folder, and the two resolved configurations."""

    name: str
    folder: Path
    train: TrainVaeConfig
    evaluate: EvaluateConfig

    @property
    def autoencoder(self) -> Path:
        return self.folder / "vae"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Outcome:
    """How a point ended: `detail` in words where it did not finish."""

    name: str
    status: Literal["finished", "busy", "failed", "interrupted"]
    detail: str = ""


class Sweep(Study):
    """A study of several points. A subclass plans them and says what is gathered from those that are finished.

    Only the points are locked, and the results are collected again in each run, which is cheap.

    Args:
        run: runs the commands; None: as processes.
    """

    command: ClassVar[str]
    noun: ClassVar[str] = "point"
    may_change: ClassVar[tuple[str, ...]]
    """Settings that a rerun may change: points that they touch are trained on or measured again."""

    def __init__(self, config: Any, run: Run | None = None) -> None:
        super().__init__(config)
        self.commands = Commands(config.parallel)
        self.runner: Run = run or self.commands

    def plan(self) -> list[Point]:
        """The points. Raises: UserError for settings that do not load."""
        raise NotImplementedError

    def prepare(self) -> None:
        if not self.dry_run:  # planning may leave measured speeds there, which another sweep must not take for its own
            with self.lock():
                self.points = self.plan()
        else:
            self.points = self.plan()

    def work(self) -> StudyPlan:
        """The images of the first point; all points have the same."""
        config, train = self.config, self.points[0].train
        steps = sum(total_steps(point) for point in self.points)
        count = f"{pluralize(len(self.points), self.noun)} ({', '.join(point.name for point in self.points)})"
        at_once = f"{config.parallel} at a time" if config.parallel > 1 else ""
        data = " ".join(train.data.words()) or "data=synthetic"
        what = (count, f"{pluralize(steps, 'step')} of training in all", at_once, data, config.vae)
        return StudyPlan((*what, f"{train.training.device}, {train.training.precision}"))

    def preview(self, work: StudyPlan) -> None:
        """A dry run of each training that is not finished."""
        from ldm_vae.autoencoder.training import train_vae

        seconds = 0.0
        for number, point in enumerate(self.points, start=1):
            where = f"{self.command}: {number} of {len(self.points)}, {point.name}"
            if is_trained(point):
                say(f"{where}: is trained already")
                continue
            say(f"{where}:")
            try:
                with inside():
                    found = train_vae(point.train, dry_run=True)
            except UserError as error:
                raise UserError(f"{point.name}: {error}") from error
            assert not isinstance(found, int)
            say(f"{where}: {found.expected()}")
            seconds += found.seconds
        measuring = "their evaluation, validation, previews and saving not counted"
        end_dry_run(self.output, f"all trainings take about {duration_text(seconds)}, {measuring}")

    def best_autoencoder(self, results: Results) -> Path:
        """The autoencoder of the finished point with the highest PSNR."""
        records = results[f"{self.noun}s"]
        best = max(records, key=lambda record: record["metrics"]["psnr"]["mean"])
        return next(point.autoencoder for point in self.points if point.name == best["name"])

    def then(self, results: Results) -> list[str]:
        best, train = self.best_autoencoder(results), self.points[0].train
        words = ["ldm-vae", "encode", str(best), *train.data.words(), f"resolution={train.held_out_resolution}"]
        return [*words, f"output={beside(self.output, 'latents')}"]

    def gather(self, finished: Sequence[tuple[Point, Results]], missing: list[dict[str, Any]]) -> Results:
        """The sweep's results, from the finished points and their results.json; `missing`: outcomes of the others."""
        raise NotImplementedError

    def load(self) -> None:
        """Nothing is taken as it is; points that are there stay valid for the same sweep.

        Raises:
            UserError: the folder holds something else, or this sweep with other settings that all points share.
        """
        settings = self.output / self.marker
        if settings.is_file():
            before = configuration.to_dict(configuration.load(type(self.config), settings))
            changes = configuration.changed_keys(before, configuration.to_dict(self.config))
            refused = {key: value for key, value in changes.items() if key.split(".")[0] not in self.may_change}
            if refused:
                listed = configuration.describe_changes(refused)
                raise UserError(
                    f"{self.output}: holds a {self.command} with other settings: {listed}; give another output"
                )
        elif self.output.is_dir() and any(not path.name.startswith(".tmp-") for path in self.output.iterdir()):
            raise UserError(f"{self.output}: holds other files but no {self.command}; give another output, or empty it")
        check_writable(self.output)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Note which sweep the folder holds."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(self.output / self.marker, configuration.to_yaml(self.config))
        yield

    def measure(self) -> Results:
        """Make what is missing and gather it. Raises: UserError where no point is finished."""
        with StepsBar(self.command, self.points) as bar:
            outcomes = run_points(self.points, self.config.parallel, self.runner, self.commands, bar.report)
        finished: list[tuple[Point, Results]] = []
        missing = []
        for point, outcome in zip(self.points, outcomes, strict=True):
            results = read_results(point) if outcome.status == "finished" else None
            if results is None:
                missing.append(asdict(outcome))
            else:
                finished.append((point, results))
        if not finished:
            reasons = "; ".join(f"{one['name']}: {one['detail']}" for one in missing)
            raise UserError(f"{self.output}: no {self.noun} is finished ({reasons})")
        return self.gather(finished, missing)

    def record(self, results: Results) -> dict[str, Any]:
        key = f"{self.noun}s"
        return {"finished": not results["missing"], key: len(results[key])}


def total_steps(point: Point) -> int:
    """Number of training steps of a point."""
    return sum(phase.steps for phase in point.train.phases)


def steps_done(point: Point) -> int:
    """Steps of the training of a point so far, from the last complete line of its metrics."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        with open(point.autoencoder / METRICS, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LAST_BYTES))
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        return min(int(json.loads(whole[-1])["step"]), total_steps(point))
    return 0


LAST_BYTES = 1 << 16
"""Number of bytes at the end of a metrics file that are read to find its last line."""
SECONDS_BETWEEN_LOOKS = 2.0


class StepsBar:
    """The bar of a sweep: steps of all trainings together, read from the metrics that the commands write.

    `report` prints a line when a point begins and one when it ends. Where the runs are can be seen in their logs.
    """

    def __init__(self, command: str, points: Sequence[Point]) -> None:
        self.command, self.points = command, points
        self.numbers = {point.name: number for number, point in enumerate(points, start=1)}
        self.started: dict[str, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        total = sum(total_steps(point) for point in points)
        self.bar = Progress(command, total, "step", done=sum(map(steps_done, points)))

    def report(self, point: Point, text: str) -> None:
        """Print what happens to a point: `compare: 2 of 4, vq: ...`."""
        say(f"{self.command}: {self.numbers[point.name]} of {len(self.points)}, {point.name}: {text}")

    def _look(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
            self.bar.advance_to(max(self.bar.done, sum(map(steps_done, self.points))))

    def __enter__(self) -> StepsBar:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.bar.advance_to(max(self.bar.done, sum(map(steps_done, self.points))))
        self.bar.close(kind is None)


def remarks(records: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]]) -> list[str]:
    """What every sweep says below its table: points that are missing, or that were judged by their rate alone."""
    lines = [f"{one['name']} is missing ({one['status']}): {one['detail']}" for one in missing]
    undiagnosed = [record["name"] for record in records if not record["diagnosed"]]
    if undiagnosed:
        lines.append(f"No health report could be made of {', '.join(undiagnosed)}: judged by the rate alone.")
    lines += sorted({line for record in records for line in record.get("enlarged", [])})
    return lines


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Each failing verdict in words."""
    return [
        f"{record['name']}: {verdict['sentence']}"
        for record in records
        for verdict in record["verdicts"]
        if verdict["severity"] == "fail"
    ]


def verdict_names(record: dict[str, Any]) -> str:
    """The cell of a table."""
    return ", ".join(f"{verdict['name']} ({verdict['severity']})" for verdict in record["verdicts"]) or "none"


def with_interval(value: dict[str, float]) -> str:
    """The cell of a mean with its interval."""
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def plan_point(
    root: Path,
    name: str,
    vae: str,
    overrides: Sequence[str],
    evaluate: Sequence[str],
    steps: int | None = None,
) -> Point:
    """Resolve a point. `steps`: the total, shared among the phases as in the recipe.

    The images are those of the training; `evaluate` are settings of `ldm-vae evaluate`, which may name others.

    Raises:
        UserError: a setting that does not load, with the point's name.
    """
    folder = root / "points" / name
    try:
        train = configuration.load(TrainVaeConfig, vae, [*overrides, "output=POINT"])
        measure = configuration.load(EvaluateConfig, None, ["autoencoder=POINT", "output=POINT"])
        measure = replace(measure, data=train.data, device=train.training.device)
        measure = _with_overrides(measure, evaluate)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if steps is not None:
        train = replace(train, phases=scaled_phases(train.phases, steps))
    return Point(
        name,
        folder,
        replace(train, output=str(folder / "vae")),
        replace(measure, autoencoder=str(folder / "vae"), output=str(folder / "evaluation")),
    )


def _with_overrides(config: EvaluateConfig, overrides: Sequence[str]) -> EvaluateConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        base = OmegaConf.structured(config)
        merged = OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"evaluate: {str(error).splitlines()[0]}") from error


def scaled_phases(phases: Sequence[Any], steps: int) -> list[Any]:
    """The phases with `steps` together, in the recipe's proportions, at least one step each."""
    if steps < len(phases):
        raise UserError(f"steps: {steps} are fewer than the recipe's {len(phases)} phases; give more")
    total = sum(phase.steps for phase in phases)
    ends = [round(steps * sum(phase.steps for phase in phases[: i + 1]) / total) for i in range(len(phases))]
    lengths, before = [], 0
    for i, end in enumerate(ends):
        remaining = len(phases) - 1 - i
        length = min(max(1, end - before), steps - before - remaining)
        lengths.append(length)
        before += length
    return [replace(phase, steps=length) for phase, length in zip(phases, lengths, strict=True)]


def run_points(
    points: Sequence[Point],
    parallel: int,
    run: Run | None = None,
    commands: Commands | None = None,
    report: Reporter = no_report,
) -> list[Outcome]:
    """Train and evaluate what is missing, `parallel` points at a time; outcomes in the order of the points.

    `report` is called with the events of each point.

    An interrupt is passed on to the commands, which save and leave; then it goes on to the caller.
    """
    commands = commands or Commands(parallel)
    runner = run or commands
    if parallel == 1:
        try:
            return [run_point(point, runner, report=report) for point in points]
        except BaseException:
            commands.stop()
            raise
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run_point, point, runner, commands.stopping, report) for point in points]
        try:
            return [future.result() for future in futures]
        except BaseException:
            commands.stop()
            raise


def run_point(point: Point, run: Run, stopping: threading.Event | None = None, report: Reporter = no_report) -> Outcome:
    """Train and evaluate one point, each only where it is missing or not of these settings."""
    if stopping is not None and stopping.is_set():
        return Outcome(point.name, "interrupted", "not started")
    point.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with point_lock(point.folder) as held:
        if not held or is_training(point.autoencoder):
            outcome = Outcome(point.name, "busy", "another launch works on it")
        elif is_trained(point) and is_evaluated(point) and is_diagnosed(point):
            report(point, "was finished before")
            return Outcome(point.name, "finished")
        else:
            report(point, f"{describe_point(point)}; log {point.log}")
            outcome = _made(point, run, report)
    detail = f": {outcome.detail}" if outcome.detail else ""
    report(point, f"{outcome.status} after {duration_text(time.monotonic() - started)}{detail}")
    return outcome


def describe_point(point: Point) -> str:
    """The settings of a training, in words."""
    train = point.train
    kind = f"kind {train.autoencoder.kind}, {pluralize(train.autoencoder.latent_channels, 'latent channel')}"
    rate = (
        f", {train.rate.target_nats:g} nats" if train.rate.mode == "target" and train.autoencoder.kind == "kl" else ""
    )
    return f"{kind}{rate}, {describe_phases(train)}, then evaluate and diagnose"


def _made(point: Point, run: Run, report: Reporter) -> Outcome:
    """Run the commands that are missing, under the lock of the point."""
    if not is_trained(point):
        write_text(point.folder / "train.yaml", configuration.to_yaml(point.train))
        outcome = _outcome(point, run(["train-vae", str(point.folder / "train.yaml")], point.log))
        if outcome is not None:
            return outcome
    if not is_evaluated(point):
        report(point, "is measured")
        write_text(point.folder / "evaluate.yaml", configuration.to_yaml(point.evaluate))
        words = ["evaluate", str(point.folder / "evaluate.yaml"), "--overwrite"]
        outcome = _outcome(point, run(words, point.log))
        if outcome is not None:
            return outcome
    if not is_diagnosed(point):
        run(diagnosis_words(point), point.log)  # without it, verdicts_of judges by the rate alone, and says so
    return Outcome(point.name, "finished")


def diagnosis_words(point: Point) -> list[str]:
    """`ldm-vae diagnose` on the images of the evaluation."""
    from ldm_vae.evaluation.diagnosis import SMALLEST_RESOLUTION, DiagnoseConfig

    evaluate = point.evaluate
    settings = DiagnoseConfig(
        autoencoder=str(point.autoencoder),
        output=str(point.folder / "health"),
        data=evaluate.data,
        part=evaluate.part,
        resolution=max(evaluate.resolution, SMALLEST_RESOLUTION),
        count=min(evaluate.count or DIAGNOSED_IMAGES, DIAGNOSED_IMAGES),
        device=evaluate.device,
    )
    write_text(point.folder / "diagnose.yaml", configuration.to_yaml(settings))
    return ["diagnose", str(point.folder / "diagnose.yaml"), "--overwrite"]


def is_diagnosed(point: Point) -> bool:
    """Whether there is a health report of the weights that are there now."""
    found = read_json(point.folder / "health" / "health.json").get("autoencoder", {}).get("fingerprint")
    return found is not None and found == (read_results(point) or {}).get("autoencoder", {}).get("fingerprint")


def _outcome(point: Point, code: int) -> Outcome | None:
    """None where the command succeeded."""
    if code == 0:
        return None
    if code == EXIT_INTERRUPTED:
        return Outcome(point.name, "interrupted", "the same command continues")
    last = last_line(point.log)
    if is_training(point.autoencoder):
        return Outcome(point.name, "busy", last)
    return Outcome(point.name, "failed", f"exit code {code}: {last or 'no output'}; see {point.log}")


def is_trained(point: Point) -> bool:
    """Whether the run is finished and of these settings."""
    folder = point.autoencoder
    if not _finished(folder) or not (folder / "config.yaml").is_file():
        return False
    try:
        found = configuration.load(TrainVaeConfig, folder / "config.yaml")
    except UserError:
        return False  # the command itself says what is wrong
    changes = configuration.changed_keys(configuration.to_dict(found), configuration.to_dict(point.train))
    return not changes.keys() - {"output"}


def is_evaluated(point: Point) -> bool:
    """Whether the result is finished, of these settings and of the weights that are there now."""
    results = read_results(point)
    if results is None or results["format_version"] != FORMAT_VERSION:
        return False
    changes = configuration.changed_keys(results["config"], configuration.to_dict(point.evaluate))
    record = read_json(point.autoencoder / "autoencoder" / "training.json")
    same_weights = record.get("fingerprint") in (None, results["autoencoder"]["fingerprint"])
    return same_weights and not changes.keys() - {*MAY_CHANGE, "autoencoder"}


def common_record(point: Point, results: dict[str, Any]) -> dict[str, Any]:
    """What every sweep says of a finished point: rate, metrics of decode(mean) with intervals, verdicts, cost."""
    return {
        "name": point.name,
        "fingerprint": results["autoencoder"]["fingerprint"],
        "rate": results["rate"],
        "metrics": results["rows"][0]["metrics"],
        "verdicts": verdicts_of(point, results),
        "diagnosed": is_diagnosed(point),
        "steps": sum(phase.steps for phase in point.train.phases),
        "seconds": read_json(point.autoencoder / provenance.RUN_RECORD).get("seconds"),
        "resolution": results["protocol"]["resolution"],
        "enlarged": enlarged_lines(results),
    }


def read_results(point: Point) -> dict[str, Any] | None:
    """The content of the point's finished results.json; None where there is none."""
    folder = point.folder / "evaluation"
    return read_json(folder / RESULTS) or None if _finished(folder) else None


def _finished(folder: Path) -> bool:
    return bool(read_json(folder / provenance.RUN_RECORD).get("finished"))


@contextlib.contextmanager
def point_lock(folder: Path) -> Iterator[bool]:
    """Whether this launch got the point: until the block ends no other one does."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(open_folder(folder).lock("point.lock"))
        except FolderLocked:
            yield False
            return
        yield True


def is_training(run: Path) -> bool:
    """Whether a process has the run's own lock."""
    return open_folder(run).holder(provenance.RUN_LOCK) is not None


def steps_for(
    point: Point, seconds: float, speeds: Callable[[TrainVaeConfig], list[float]] | None = None, *, keep: bool = True
) -> int:
    """Steps that take about `seconds` here, from the measured speed of one step of each phase.

    Measured once and with `keep` written to `budget.json`, so a rerun has the same plan. Rough: one step is timed, and
    saving, validation and the start of the program are not counted.

    Args:
        speeds: the training's samples per second in each phase; None: `measured_speeds`.

    Raises:
        UserError: the dry run failed.
    """
    kept = read_json(point.folder / "budget.json")
    if kept.get("seconds") == seconds:
        return int(kept["steps"])
    try:
        per_second = (speeds or measured_speeds)(point.train)
    except UserError as error:
        raise UserError(f"{point.name}: its speed could not be measured ({error}); give steps instead") from error
    phases = point.train.phases
    total = sum(phase.steps for phase in phases)
    recipe_seconds = sum(phase.steps * phase.batch / rate for phase, rate in zip(phases, per_second, strict=True))
    steps = max(len(phases), round(total * seconds / recipe_seconds))
    if keep:
        write_json(point.folder / "budget.json", {"seconds": seconds, "steps": steps, "images_per_second": per_second})
    return steps


def measured_speeds(config: TrainVaeConfig) -> list[float]:
    """Samples per second in each phase, from a dry run in a process of its own, which takes its memory with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_dry_run, config).result()


def _dry_run(config: TrainVaeConfig) -> list[float]:
    from ldm_vae.autoencoder.training import training_costs

    return [span.samples_per_second for span in training_costs(config).spans]


def last_line(log: Path) -> str:
    """The last line of a log that is not a progress bar."""
    if not log.is_file():
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace"))]
    return next((line for line in reversed(lines) if line and "it/s]" not in line and "%|" not in line), "")


def verdicts_of(point: Point, results: dict[str, Any]) -> list[dict[str, Any]]:
    """What is wrong with the autoencoder, most severe first: from its health report, where there is one of these
    weights, else from rate and training alone."""
    if is_diagnosed(point):
        return list(read_json(point.folder / "health" / "health.json")["verdicts"])
    from ldm_vae.autoencoder.health import by_severity, check_rule, severity_of_rate
    from ldm_vae.evaluation.diagnosis import trained_steps

    rate = read_json(point.autoencoder / "autoencoder" / "training.json").get("rate") or {}
    nats, target = results["rate"]["nats_per_dim"], rate.get("target_nats")
    if nats is None or results["rate"]["kind"] != "KL to N(0, 1)":
        return []
    found = [check_rule("posterior_collapse", {"nats": nats})]
    if rate.get("mode") == "target" and target:
        severity = severity_of_rate(trained_steps(rate))
        found.append(check_rule("rate_miss", {"relative_error": abs(nats - target) / target}, severity=severity))
        found.append(check_rule("rate_unreachable", {"pinned_share": rate.get("pinned_share")}, severity=severity))
    return [verdict.to_dict() for verdict in by_severity(verdict for verdict in found if verdict is not None)]


# Running `ldm-vae` commands as processes, several at once, and ending them so that they save first.


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


def has_failed(found: dict[str, Any]) -> bool:
    """Whether a point of a finished sweep has failed."""
    return any(one["status"] == "failed" for one in found["missing"])
