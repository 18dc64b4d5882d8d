"""`fit()`: one loop for every model. It owns all bookkeeping; the mathematics is in the model's `update()`.

A `Model` brings its modules and `update`; `Engine` gives it what one optimizer step needs; `fit` restores, trains,
logs, validates, saves and exports; `dry_run` measures what a run would cost.

def update(self, step, batch, engine):
    for part in engine.parts(batch):          # micro-batches; gradients are synchronized on the last one
        loss = ...engine.models["name"](...)   # the wrapped module, so that gradients are averaged over processes
        engine.backward(loss)
    engine.optimize("name", step)              # clip, skip if not finite, optimizer step, EMA
    return {"loss/...": ...}                   # scalar tensors; nothing waits for the device
"""

from __future__ import annotations

import contextlib
import copy
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.config import check_positive
from ldm_vae.errors import EXIT_INTERRUPTED, NotFinite, UserError
from ldm_vae.random import key_hash
from ldm_vae.runtime import check_tracker, compute_device, gigamacs
from ldm_vae.training import checkpoint as checkpoints
from ldm_vae.training import watchdog
from ldm_vae.training.checkpoint import Checkpoint
from ldm_vae.training.distributed import (
    TIMEOUT_SECONDS,
    RankConsistency,
    check_timeout,
    close_accelerator,
    open_accelerator,
    run_on_main,
    wait_for_all,
    weights_checksum,
)
from ldm_vae.training.loader import (
    Batch,
    MicroBatch,
    Plan,
    Samples,
    Span,
    StreamedSamples,
    batches,
    learning_rate,
    lost_worker,
    rank_rows,
)
from ldm_vae.training.monitor import (
    MAXIMUM_SKIPPED_STEPS,
    Averages,
    Describe,
    StabilityChecks,
    Tracker,
    marked,
    sample_names,
    unusable,
)
from ldm_vae.training.run_directory import RunDirectory
from ldm_vae.training.watchdog import StopRequest, Watchdog
from ldm_vae.utils.progress import say
from ldm_vae.utils.text import duration_text, pluralize

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TrainingConfig:
    """Training settings of every model. Steps and batches belong to the model's own config.

    Args:
        seed: seed of all random numbers: order, augmentation, noise, weights.
        learning_rate: peak value, after the warmup; it decays along a cosine.
        final_learning_rate_fraction: learning rate at the end, as a fraction of the peak.
        warmup_steps: steps in which the learning rate rises linearly from 0.
        weight_decay: weight decay of AdamW.
        betas: betas of AdamW.
        gradient_clip: largest norm of the gradient.
        ema_decay: decay of the moving average of the weights; the average is saved as the model.
        precision: precision of the forward and backward pass; fp16 needs a GPU.
        device: auto, cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.
        processes: required number of launched processes; null: any number.
        timeout_seconds: the longest wait for a batch or for another process.
        gradient_checkpointing: needs less memory and more time.
        compile: torch.compile the networks.
        workers: loading processes for each training process.
        log_every, validate_every, preview_every, save_every: number of steps between two such events.
        keep_checkpoints: number of newest checkpoints to keep; older ones are removed.
        tracker: an additional destination of the metrics, besides metrics.jsonl.
    """

    seed: int = 0
    learning_rate: float = 1e-3
    final_learning_rate_fraction: float = 0.03
    warmup_steps: int = 200
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None
    timeout_seconds: int = TIMEOUT_SECONDS
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: int = 2
    log_every: int = 20
    validate_every: int = 500
    preview_every: int = 500
    save_every: int = 500
    keep_checkpoints: int = 2
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    def __post_init__(self) -> None:
        check_positive(
            self, "log_every", "validate_every", "preview_every", "save_every", "learning_rate",
            group="training.",
        )  # fmt: skip
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay: {self.ema_decay} is not in [0, 1)")
        check_timeout(self.timeout_seconds, "training.")


class Alarm(Protocol):
    """A problem of the run, as a sentence."""

    @property
    def name(self) -> str: ...

    def sentence(self) -> str: ...


class Model(Protocol):
    """The interface of a model that `fit` trains. `modules` are wrapped, optimized and averaged under their names."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def optimizer_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Module name -> fields of TrainingConfig with other values for its optimizer."""
        ...

    def check_state(self, state: dict[str, Any], step: int) -> None:
        """Before anything of a checkpoint is loaded: raises UserError if its `state_dict` is of other data."""
        ...

    def update(self, step: int, batch: Batch, engine: Engine) -> dict[str, Tensor]:
        """Do one optimizer step. Returns: scalar metrics of this process."""
        ...

    def alarms(self, step: int, metrics: Mapping[str, float]) -> Sequence[Alarm]:
        """New alarms at this log step, from its averaged metrics."""
        ...

    def validate(self, engine: Engine) -> dict[str, float]:
        """Held-out metrics from the EMA weights (main process only)."""
        ...

    def preview(self, engine: Engine) -> Image | None:
        """An image of the progress (main process only)."""
        ...

    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write the finished model under the run directory (main process only)."""
        ...

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        """Data of a micro-batch made of noise, for `--dry-run`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State other than the modules' weights, JSON-able."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Further tensors of the state: file stem -> name -> tensor."""
        ...

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]], step: int) -> None:
        """The inverse of both, after `step` finished steps; `tensors` are those of the whole checkpoint.

        The plan may have become longer or shorter since, so state that depends on the number of steps must adapt.
        """
        ...


def make_accelerator(config: TrainingConfig, project_dir: Path | None = None) -> Any:
    """An Accelerator for the config. Raises: UserError: the processes, device, precision or tracker are not there."""
    check_tracker(config.tracker)
    if config.precision == "fp16" and compute_device(config.device, where="training.").type == "cpu":
        raise UserError("training.precision: fp16 needs a GPU; use bf16 or fp32 on CPU")
    return open_accelerator(
        config,
        "training.",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        log_with=None if config.tracker == "none" or project_dir is None else config.tracker,
        project_dir=str(project_dir) if project_dir else None,
    )


class Engine:
    """The state of a run: wrapped models, optimizers, averages. One `optimize` call is one optimizer step."""

    def __init__(
        self, model: Model, config: TrainingConfig, accelerator: Any, steps: int, starts: Sequence[int] = ()
    ) -> None:
        """`starts`: steps of `Plan` at which the loss changes."""
        self.config = config
        self.accelerator = accelerator
        self.steps = steps
        self.modules = dict(model.modules)
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self.emas: dict[str, Ema] = {}
        self.stability = StabilityChecks(self.modules, scaled=accelerator.scaler is not None, starts=starts)
        self.configs: dict[str, TrainingConfig] = {}
        self._parts = 1
        self._loss = torch.zeros((), device=accelerator.device)
        for name, module in self.modules.items():
            module.to(accelerator.device)
            self.emas[name] = Ema(module, config.ema_decay)
            if config.compile:
                module.compile()
            self.models[name] = accelerator.prepare_model(module)
            self.configs[name] = replace(config, **model.optimizer_settings.get(name, {}))
            self.optimizers[name] = accelerator.prepare_optimizer(make_optimizer(module, self.configs[name]))

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def parts(self, batch: Batch) -> Iterator[MicroBatch]:
        """The micro-batches of this process; gradients are exchanged between processes on the last one only."""
        self._parts = len(batch.parts)
        for number, part in enumerate(batch.parts, start=1):
            with contextlib.ExitStack() as stack:
                if number < self._parts:
                    for wrapped in self.models.values():
                        stack.enter_context(self.accelerator.no_sync(wrapped))
                yield part
                watchdog.advance()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient. `loss` is its mean; the step's loss is the mean over micro-batches."""
        loss = loss / self._parts
        self._loss = self._loss + loss.detach()
        self.accelerator.backward(marked(loss))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the processes, without gradient."""
        value = value.detach()
        return self.accelerator.reduce(value, "mean") if self.accelerator.num_processes > 1 else value

    def optimize(self, name: str, step: int) -> Tensor:
        """Clip, step (not if loss or gradient is not finite), zero the gradients, move the EMA. Returns the norm."""
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step, name)
        norm = self.accelerator.clip_grad_norm_(self.modules[name].parameters(), self.configs[name].gradient_clip)
        if self.accelerator.scaler is None:
            optimizer.optimizer.found_inf = unusable(norm)  # the fused kernel skips the update, without a host sync
        optimizer.step()
        optimizer.zero_grad()
        self.stability.add(name, step + 1, self._loss, norm)
        self._loss = torch.zeros_like(self._loss)
        self.emas[name].update(step)
        return norm

    def forget_moments(self, name: str) -> None:
        """Reset the optimizer of a module whose weights were replaced."""
        for state in self.optimizers[name].optimizer.state.values():
            for value in state.values():
                value.zero_()

    def learning_rate(self, step: int, name: str | None = None) -> float:
        config = self.configs[name] if name else self.config
        return learning_rate(
            step, self.steps, config.learning_rate, config.warmup_steps, config.final_learning_rate_fraction
        )

    def checksum(self) -> int:
        """Checksum of the weights of all modules. Waits for the device, so call it on log steps only."""
        return int(weights_checksum(list(self.modules.values()), self.device))

    def close(self, failure: BaseException | None = None) -> None:
        """Release the wrapped models, then the process group, then end the trackers.

        In another order, the wrapper would hold the last reference to the group. Its destructor waits for a thread that
        waits for Python's lock: about one run of two processes in twenty hung after all work was done.
        """
        self.models.clear()
        self.optimizers.clear()
        self.accelerator.free_memory()
        close_accelerator(self.accelerator, failure)


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices and kernels only."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


class Ema:
    """Exponential moving average: a copy of `module` (eval mode, no gradients), without host synchronization.

    The decay grows as (t + 1) / (t + 50) up to `decay`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        # the parameters themselves, not `state_dict()`: DistributedDataParallel gives them other storage later
        self._averages = floating_tensors(self.module)
        self._sources = floating_tensors(module)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the module's current weights; `step` counts finished optimizer steps from 0."""
        decay = min(self.decay, (step + 1) / (step + 50))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)


def floating_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Floating-point parameters and buffers, in a fixed order."""
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.is_floating_point()]


# The loop: resume, log, validate, preview, save, export.


def fit(
    model: Model,
    samples: Samples | StreamedSamples,
    plan: Plan,
    config: TrainingConfig,
    run: RunDirectory,
    accelerator: Any,
) -> int:
    """Train `model` on `samples` to the end of `plan`, resuming from the run's newest good checkpoint.

    Returns: 0 when the run is finished, 75 when a signal stopped it after saving (the same command continues).
    """
    plan.check(accelerator.num_processes)
    with StopRequest() as stop, Watchdog(accelerator, config.timeout_seconds):
        engine = Engine(model, config, accelerator, plan.steps, plan.starts)
        failure: BaseException | None = None
        try:
            return train(model, samples, plan, engine, run, stop)
        except BaseException as error:
            failure = watchdog.lost_process(error) or error
            if failure is error:
                raise
            raise failure from error
        finally:
            engine.close(failure)
            run.close()


def train(
    model: Model,
    samples: Samples | StreamedSamples,
    plan: Plan,
    engine: Engine,
    run: RunDirectory,
    stop: StopRequest,
) -> int:
    """`fit` with an engine."""
    accelerator, config, started, averages = engine.accelerator, engine.config, time.time(), Averages()
    first_step, seconds_before = restore(model, engine, averages, run)
    if first_step > plan.steps:
        raise UserError(
            f"{run.path}: has finished {first_step} steps, and {plan.steps} were asked for; ask for {first_step} (it "
            "ends where it is) or more, or give another output"
        )
    if first_step == plan.steps and (run.path / provenance.RUN_RECORD).exists():
        say(f"{run.path}: this run is finished ({plan.steps} steps); nothing to do")
        return 0
    if accelerator.is_main_process:
        run.begin(first_step)
    start_trackers(accelerator, config, run)
    tracker = Tracker(run, accelerator, plan.steps, first_step, seconds_before)
    consistency = RankConsistency(accelerator.num_processes)
    step, held_out = first_step, {}
    stream = batches(
        samples,
        plan,
        seed=config.seed,
        first_step=first_step,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=config.workers,
        device=accelerator.device,
        timeout_seconds=config.timeout_seconds,
    )
    try:
        with contextlib.closing(stream):  # else the frames of an error would keep the workers alive
            for step, batch in enumerate(stream, start=first_step + 1):  # `step` counts finished steps from here
                torch.manual_seed(key_hash(config.seed, "dropout", step, accelerator.process_index))
                averages.add(model.update(step - 1, batch, engine))
                tracker.advance(batch.global_size)
                tracker.bad_samples.observe(batch.parts)
                report_step(model, engine, averages, tracker, step, partial(sample_names, samples, plan, config.seed))
                held_out = validate_and_preview(model, engine, tracker, step, stop)  # metrics of the last step are kept
                if step % config.log_every == 0 and consistency.processes > 1:
                    consistency.set_checksum(engine.checksum())
                stopping = consistency.stop_agreed(step, batch.first_index, stop.received is not None)
                if step % config.save_every == 0 or step == plan.steps or stopping:
                    save_checkpoint(model, engine, averages, run, step, tracker.seconds)
                if stopping and step < plan.steps:
                    tracker.say(f"stopped at step {step} of {plan.steps}; the same command continues")
                    return EXIT_INTERRUPTED
                watchdog.advance(step)
        consistency.finish()
        finish(model, engine, run, started, tracker.seconds, held_out)
    except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
        if lost := lost_worker(error):  # noticed elsewhere than in the wait for its samples
            raise lost from error
        if not out_of_memory(error):
            raise
        raise UserError(f"step {step}", "out of memory", less_memory(run.keys.memory)) from error
    finally:
        tracker.close()
    return 0


def report_step(
    model: Model, engine: Engine, averages: Averages, tracker: Tracker, step: int, describe: Describe
) -> None:
    """On log steps: write the metrics and alarms.

    Raises: UserError when too many updates in a row were skipped.
    """
    stability, due = engine.stability, step % engine.config.log_every == 0 or step == engine.steps
    if due or step % MAXIMUM_SKIPPED_STEPS == 0:
        stability.collect(engine.mean)
        stability.check(describe)
    if not due:
        return
    metrics = averages.take(engine.accelerator) | {"optim/lr": engine.learning_rate(step - 1)}
    metrics |= stability.metrics() | tracker.throughput()
    tracker.log(step, metrics)
    tracker.report_rejected()
    tracker.show(metrics)
    for event in stability.take_alarms():
        tracker.alarm(step, event.name, event.sentence(describe))
    for alarm in model.alarms(step, metrics):
        tracker.alarm(step, alarm.name, alarm.sentence())


def validate_and_preview(
    model: Model, engine: Engine, tracker: Tracker, step: int, stop: StopRequest
) -> dict[str, float]:
    """Held-out metrics and a preview image when they are due, from the EMA weights, on the main process.

    A signal ends validation early, since it may take longer than a launcher waits; there are no metrics then.

    Returns: the metrics; None if they were not due, or in another process.
    """
    config = engine.config
    last = step == engine.steps
    validation_due = step % config.validate_every == 0 or last
    preview_due = step % config.preview_every == 0 or last
    metrics: dict[str, float] = {}
    if not (validation_due or preview_due):
        return metrics
    if engine.accelerator.is_main_process and stop.received is None:
        with watchdog.solo(), stop.interrupts():
            try:
                image = model.preview(engine) if preview_due else None
                if image is not None:
                    tracker.run.add_preview(step, image)
                if validation_due:  # after the preview, whose metrics it may report
                    metrics = model.validate(engine)
                    tracker.log_and_print(step, metrics)
            except NotFinite as error:  # the monitor decides whether the run can go on
                say(f"step {step}: nothing to show, nothing measured ({error})")
    wait_for_all(engine.accelerator)
    tracker.throughput()  # the time of validation is not training time
    return metrics


def restore(model: Model, engine: Engine, averages: Averages, run: RunDirectory) -> tuple[int, float]:
    """Load the newest checkpoint that verifies, the same one in every process. Returns: its step and seconds."""

    def choose() -> Path | None:
        path, problems = checkpoints.newest(run.checkpoints)
        for problem in problems:
            say(problem)
        return path

    path = run_on_main(engine.accelerator, choose)
    if path is None:
        return 0, 0.0
    saved = checkpoints.read_checkpoint(path)
    run.check_settings(path, saved.state.get("config", {}))
    model.check_state(saved.state["model"], saved.step)
    for name, module in engine.modules.items():
        module.load_state_dict(saved.tensors[name])
        engine.emas[name].module.load_state_dict(saved.tensors[f"{name}-ema"])
        optimizer = engine.optimizers[name].optimizer
        checkpoints.load_optimizer_tensors(optimizer, saved.tensors[f"{name}-optimizer"])
    if engine.accelerator.scaler is not None and saved.state["scaler"]:
        engine.accelerator.scaler.load_state_dict(saved.state["scaler"])
    averages.load_state_dict(saved.state["averages"], engine.device)
    engine.stability.load_state_dict(saved.state.get("numbers", {}))  # a checkpoint of an earlier release has none
    model.load_state_dict(saved.state["model"], saved.tensors, saved.step)
    say(f"{run.path}: continuing from step {saved.step}")
    return saved.step, saved.state["seconds"]


def save_checkpoint(
    model: Model, engine: Engine, averages: Averages, run: RunDirectory, step: int, seconds: float
) -> None:
    """Publish the complete state after `step` finished steps. It is the same in all processes; the first one writes."""
    averages.synchronize(engine.accelerator)
    engine.stability.collect(engine.mean)
    if engine.accelerator.is_main_process:
        tensors = model.tensors()
        for name, module in engine.modules.items():
            tensors[name] = module.state_dict()
            tensors[f"{name}-ema"] = engine.emas[name].module.state_dict()
            tensors[f"{name}-optimizer"] = checkpoints.optimizer_tensors(engine.optimizers[name].optimizer)
        scaler = engine.accelerator.scaler
        state = {
            "seconds": seconds,
            "model": model.state_dict(),
            "averages": averages.state_dict(),
            "numbers": engine.stability.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "config": configuration.to_dict(run.config),
        }
        with watchdog.solo():
            checkpoints.write_checkpoint(
                run.checkpoints, Checkpoint(step, tensors, state), engine.config.keep_checkpoints
            )
    wait_for_all(engine.accelerator)


def finish(
    model: Model, engine: Engine, run: RunDirectory, started: float, seconds: float, held_out: dict[str, float]
) -> None:
    """Export the finished model and write `run.json`. `held_out`: its metrics, if they are measured."""
    if engine.accelerator.is_main_process:
        with watchdog.solo():
            metrics = held_out or model.validate(engine)
        with watchdog.solo(), run.writing():
            model.export(engine, run.path, metrics)
            provenance.write_run_record(
                run.path,
                None,
                started,
                seconds,
                steps=engine.steps,
                metrics=metrics,
                processes=engine.accelerator.num_processes,
                device=str(engine.device),
                precision=engine.config.precision,
            )
    wait_for_all(engine.accelerator)


def start_trackers(accelerator: Any, config: TrainingConfig, run: RunDirectory) -> None:
    """Raises: UserError: the tracker does not start, for example without a login."""
    if config.tracker == "none":
        return
    with run.writing():
        try:
            accelerator.init_trackers("tensorboard" if config.tracker == "tensorboard" else "ldm_vae")
            started = bool(accelerator.trackers)
            reason = "accelerate does not find it"
        except OSError:
            raise
        except Exception as error:  # each tracker has errors of its own
            started, reason = False, watchdog.exit_reason(error)
    if not started:
        accelerator.trackers = []  # those that have not begun cannot end
        advice = f"see that {config.tracker} works by itself, or set training.tracker=none"
        raise UserError("training.tracker", f"{config.tracker} does not start ({reason})", advice)


def less_memory(keys: Sequence[str]) -> str:
    """Advice when memory runs out. `keys` of the model's configuration; the first does not change the result."""
    lower = [f"lower {keys[0]} (the result stays the same)"] if keys else []
    then = [f"then {' or '.join(keys[1:])}"] if keys[1:] else []
    return ", ".join([*lower, *then, "or set training.gradient_checkpointing=true"]).removeprefix("or ")


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


# `--dry-run`: build everything, do one step on random data, and measure its cost.


@dataclass(frozen=True)
class SpanCost:
    """The cost of one step in a span of the plan.

    Args:
        shapes: shapes of the tensors of a micro-batch.
        gigamacs: GMAC of one sample, forward and backward.
        seconds: time of one step of all processes, measured once.
        losses: losses of this step.
    """

    first_step: int
    last_step: int
    global_batch: int
    micro_batches: int
    shapes: dict[str, tuple[int, ...]]
    gigamacs: float
    seconds: float
    losses: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """Time of all steps of the span."""
        return self.seconds * (self.last_step + 1 - self.first_step)

    @property
    def samples_per_second(self) -> float:
        return self.global_batch / self.seconds

    def __str__(self) -> str:
        return (
            f"steps {self.first_step} to {self.last_step}: {pluralize(self.micro_batches, 'micro-batch')} of "
            f"{self.shapes}\n"
            f"  {self.gigamacs:.2f} GMAC per sample forward and backward, {self.seconds:.2f} s a step "
            f"({self.samples_per_second:.1f} samples/s), losses {self.losses}"
        )


@dataclass(frozen=True)
class DryRun:
    """The cost of a run: trained parameters of each module, the cost of each span, peak memory of a process."""

    parameters: dict[str, int]
    precision: str
    device: str
    spans: tuple[SpanCost, ...]
    memory_bytes: int
    rank: int = 0

    @property
    def seconds(self) -> float:
        """Time of all steps of the run."""
        return sum(span.total_seconds for span in self.spans)

    def expected(self) -> str:
        """The time of a run of these steps, as text."""
        steps = pluralize(self.spans[-1].last_step + 1, "step")
        return f"{steps} take about {duration_text(self.seconds)}, validation, previews and saving not counted"

    def __str__(self) -> str:
        modules = [
            f"{name}: {count / 1e6:.2f} M trained parameters, {self.precision} on {self.device}"
            for name, count in self.parameters.items()
        ]
        memory = f"peak memory of process {self.rank}: {self.memory_bytes / 2**30:.2f} GiB"
        return "\n".join([*modules, *map(str, self.spans), memory])


def dry_run(model: Model, plan: Plan, config: TrainingConfig, accelerator: Any) -> DryRun:
    """Two `update`s per span of the plan on random samples, one to count GMAC and one to time. Writes nothing."""
    plan.check(accelerator.num_processes)
    engine = Engine(model, config, accelerator, plan.steps)
    parameters = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in engine.modules.items()
    }
    costs: list[SpanCost] = []
    for span in plan.spans:
        costs.append(_span_cost(model, engine, span, costs[-1].last_step + 1 if costs else 0))
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = str(accelerator.device)
    return DryRun(parameters, config.precision, device, tuple(costs), memory, accelerator.process_index)


def _span_cost(model: Model, engine: Engine, span: Span, step: int) -> SpanCost:
    accelerator = engine.accelerator
    place = (accelerator.process_index, accelerator.num_processes)
    parts = [
        MicroBatch({name: v.to(engine.device) for name, v in model.random_samples(rows, span.size).items()}, rows)
        for rows in rank_rows(span.global_batch, span.micro_batch, *place)
    ]
    batch = Batch(tuple(parts), span.global_batch)
    counted = gigamacs(partial(model.update, step, batch, engine))
    seconds = -time.perf_counter()
    metrics = model.update(step, batch, engine)
    losses = {name: round(float(value), 4) for name, value in metrics.items() if name.startswith("loss/")}
    seconds += time.perf_counter()
    return SpanCost(
        first_step=step,
        last_step=step + span.steps - 1,
        global_batch=span.global_batch,
        micro_batches=len(parts),
        shapes={name: tuple(value.shape) for name, value in parts[0].data.items()},
        gigamacs=counted / sum(part.rows.stop - part.rows.start for part in parts),
        seconds=seconds,
        losses=losses,
    )
