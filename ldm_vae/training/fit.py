"""`fit()`: the loop. Resume, order, logging, validation, previews, saving, signals; see `engine.py` for a step."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.errors import EXIT_INTERRUPTED, UserError
from ldm_vae.random import key_hash
from ldm_vae.training import checkpoint as checkpoints
from ldm_vae.training import watchdog
from ldm_vae.training.checkpoint import Checkpoint
from ldm_vae.training.engine import Engine, Model, TrainingConfig
from ldm_vae.training.loader import Samples, StreamedSamples, batches, loss_of_worker
from ldm_vae.training.numbers import MAXIMUM_SKIPPED_STEPS, Describe, sample_names
from ldm_vae.training.processes import main_decides, wait_for_all
from ldm_vae.training.roll_call import RollCall
from ldm_vae.training.run import RunDirectory
from ldm_vae.training.schedule import Plan
from ldm_vae.training.signals import StopRequest
from ldm_vae.training.tracking import Averages, Tracker
from ldm_vae.training.watchdog import Watchdog


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
        engine = Engine(model, config, accelerator, plan.steps)
        failure: BaseException | None = None
        try:
            return train(model, samples, plan, engine, run, stop)
        except BaseException as error:
            failure = watchdog.explained(error) or error
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
    """`fit` between the making of the engine and its end."""
    accelerator, config, started, averages = engine.accelerator, engine.config, time.time(), Averages()
    first_step, seconds_before = restore(model, engine, averages, run)
    if first_step >= plan.steps and (run.path / provenance.RUN_RECORD).exists():
        accelerator.print(f"{run.path}: this run is finished ({plan.steps} steps); nothing to do")
        return 0
    if accelerator.is_main_process:
        run.begin(first_step)
    start_trackers(accelerator, config, run)
    tracker = Tracker(run, accelerator, plan.steps, first_step, seconds_before)
    roll_call = RollCall(accelerator.num_processes)
    step, figures = first_step, {}
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
        with contextlib.closing(stream):  # else the frames of an error would keep its workers waiting
            for step, batch in enumerate(stream, start=first_step + 1):  # `step` counts finished steps from here
                torch.manual_seed(key_hash(config.seed, "dropout", step, accelerator.process_index))
                averages.add(model.update(step - 1, batch, engine))
                tracker.advance(batch.global_size)
                tracker.quarantine.meet(batch.parts)
                report(model, engine, averages, tracker, step, partial(sample_names, samples, plan, config.seed))
                figures = look(model, engine, tracker, step, stop)  # those of the last step stay
                if step % config.log_every == 0 and roll_call.processes > 1:
                    roll_call.holds(engine.checksum())
                stopping = roll_call.stop_agreed(step, batch.first_index, stop.received is not None)
                if step % config.save_every == 0 or step == plan.steps or stopping:
                    save(model, engine, averages, run, step, tracker.seconds)
                if stopping and step < plan.steps:
                    tracker.say(f"stopped at step {step} of {plan.steps}; the same command continues")
                    return EXIT_INTERRUPTED
                watchdog.advance(step)
        roll_call.finish()
        finish(model, engine, run, started, tracker.seconds, figures)
    except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
        if reason := loss_of_worker(error):  # noticed while something else was done than waiting for its samples
            raise UserError(reason) from error
        if not out_of_memory(error):
            raise
        raise UserError(
            f"step {step}: out of memory; lower phases.*.micro_batch (the result stays the same), then "
            "phases.*.crop or phases.*.size, or set training.gradient_checkpointing=true"
        ) from error
    finally:
        tracker.close()
    return 0


def report(model: Model, engine: Engine, averages: Averages, tracker: Tracker, step: int, describe: Describe) -> None:
    """On log steps: the metrics, and in words what goes wrong.

    Raises: UserError when too many updates in a row were left out.
    """
    numbers, due = engine.numbers, step % engine.config.log_every == 0 or step == engine.steps
    if due or step % MAXIMUM_SKIPPED_STEPS == 0:
        numbers.collect(engine.mean)
        numbers.check(describe)
    if not due:
        return
    metrics = averages.take(engine.accelerator) | {"optim/lr": engine.learning_rate(step - 1)}
    metrics |= numbers.figures() | tracker.throughput()
    tracker.log(step, metrics)
    tracker.report_rejected()
    tracker.show(metrics)
    for event in numbers.take_alarms():
        tracker.alarm(step, event.name, event.sentence(describe))
    for alarm in model.alarms(step, metrics):
        tracker.alarm(step, alarm.name, alarm.sentence())


def look(model: Model, engine: Engine, tracker: Tracker, step: int, stop: StopRequest) -> dict[str, float]:
    """Held-out figures and a preview picture when they are due, from the EMA weights, on the main process.

    A signal cuts them short, since validation may take longer than a launcher waits: the figures are missing then.

    Returns: the figures; none where they were not due, or on another process.
    """
    config = engine.config
    last = step == engine.steps
    validation_due = step % config.validate_every == 0 or last
    preview_due = step % config.preview_every == 0 or last
    figures: dict[str, float] = {}
    if not (validation_due or preview_due):
        return figures
    if engine.accelerator.is_main_process and stop.received is None:
        with watchdog.solo(), stop.interrupts():
            image = model.preview(engine) if preview_due else None
            if image is not None:
                tracker.run.add_preview(step, image)
            if validation_due:  # after the preview, whose figures it may report
                figures = model.validate(engine)
                tracker.log_and_say(step, figures)
    wait_for_all(engine.accelerator)
    tracker.throughput()  # the time of looking is not training time
    return figures


def restore(model: Model, engine: Engine, averages: Averages, run: RunDirectory) -> tuple[int, float]:
    """Load the newest checkpoint that verifies, the same one on every process. Returns its step and seconds."""

    def choose() -> Path | None:
        path, problems = checkpoints.newest(run.checkpoints)
        for problem in problems:
            engine.accelerator.print(problem)
        return path

    path = main_decides(engine.accelerator, choose)
    if path is None:
        return 0, 0.0
    saved = checkpoints.load(path)
    for name, module in engine.modules.items():
        module.load_state_dict(saved.tensors[name])
        engine.emas[name].module.load_state_dict(saved.tensors[f"{name}-ema"])
        optimizer = engine.optimizers[name].optimizer
        checkpoints.load_optimizer_tensors(optimizer, saved.tensors[f"{name}-optimizer"])
    if engine.accelerator.scaler is not None and saved.state["scaler"]:
        engine.accelerator.scaler.load_state_dict(saved.state["scaler"])
    averages.load_state_dict(saved.state["averages"], engine.device)
    engine.numbers.load_state_dict(saved.state.get("numbers", {}))  # a checkpoint of an earlier release has none
    model.load_state_dict(saved.state["model"], saved.tensors)
    engine.accelerator.print(f"{run.path}: continuing from step {saved.step}")
    return saved.step, saved.state["seconds"]


def save(model: Model, engine: Engine, averages: Averages, run: RunDirectory, step: int, seconds: float) -> None:
    """Publish the complete state after `step` finished steps. Every process holds the same, so the first one writes."""
    averages.synchronize(engine.accelerator)
    engine.numbers.collect(engine.mean)
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
            "numbers": engine.numbers.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "config": configuration.to_dict(run.config),
        }
        with watchdog.solo():
            checkpoints.save(run.checkpoints, Checkpoint(step, tensors, state), engine.config.keep_checkpoints)
    wait_for_all(engine.accelerator)


def finish(
    model: Model, engine: Engine, run: RunDirectory, started: float, seconds: float, figures: dict[str, float]
) -> None:
    """Export the finished model and write `run.json`. `figures`: of the last step; none when it was made before."""
    if engine.accelerator.is_main_process:
        with watchdog.solo():
            metrics = figures or model.validate(engine)
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
    if config.tracker == "none":
        return
    with run.writing():
        try:
            accelerator.init_trackers("tensorboard" if config.tracker == "tensorboard" else "ldm_vae")
        except (ImportError, ValueError) as error:
            raise UserError(
                f"training.tracker={config.tracker}: is not installed ({error}); "
                f"run `pip install {config.tracker}` or set training.tracker=none"
            ) from error


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
