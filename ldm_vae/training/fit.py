"""`fit()`: the loop. Resume, order, logging, validation, previews, saving, signals; see `engine.py` for a step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.errors import EXIT_INTERRUPTED, UserError
from ldm_vae.random import key_hash
from ldm_vae.training import checkpoint as checkpoints
from ldm_vae.training.checkpoint import Checkpoint
from ldm_vae.training.engine import Engine, Model, TrainingConfig
from ldm_vae.training.loader import Samples, StreamedSamples, batches
from ldm_vae.training.run import RunDirectory
from ldm_vae.training.schedule import Plan
from ldm_vae.training.signals import StopRequest
from ldm_vae.training.tracking import Averages, Tracker


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
    started = time.time()
    engine = Engine(model, config, accelerator, plan.steps)
    averages = Averages()
    first_step, seconds_before = restore(model, engine, averages, run)
    if first_step >= plan.steps and (run.path / provenance.RUN_RECORD).exists():
        accelerator.print(f"{run.path}: this run is finished ({plan.steps} steps); nothing to do")
        engine.close()
        return 0
    if accelerator.is_main_process:
        run.keep_metrics_until(first_step)
    start_trackers(accelerator, config, run)
    tracker = Tracker(run, accelerator, plan.steps, first_step, seconds_before)
    try:
        with StopRequest(accelerator) as stop:
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
            )
            for step, batch in enumerate(stream, start=first_step + 1):  # `step` counts finished steps from here
                torch.manual_seed(key_hash(config.seed, "dropout", step, accelerator.process_index))
                averages.add(model.update(step - 1, batch, engine))
                tracker.advance(batch.global_size)
                report_rejected(batch.parts, run, tracker)
                if step % config.log_every == 0 or step == plan.steps:
                    engine.check_skipped(step)
                    metrics = averages.take(accelerator) | {"optim/lr": engine.learning_rate(step - 1)}
                    metrics |= tracker.throughput()
                    tracker.log(step, metrics)
                    tracker.show(metrics)
                    for alarm in model.alarms(step, metrics):
                        tracker.alarm(step, alarm.name, alarm.sentence())
                figures = look(model, engine, tracker, step, plan.steps)  # those of the last step stay
                stopping = stop.agreed(step)
                if step % config.save_every == 0 or step == plan.steps or stopping:
                    save(model, engine, averages, run, step, tracker.seconds)
                if stopping and step < plan.steps:
                    tracker.say(f"stopped at step {step} of {plan.steps}; the same command continues")
                    return EXIT_INTERRUPTED
        finish(model, engine, run, started, tracker.seconds, figures)
    except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"step {step}: out of memory; lower phases.*.micro_batch (the result stays the same), then "
            "phases.*.crop or phases.*.size, or set training.gradient_checkpointing=true"
        ) from error
    finally:
        tracker.close()
        engine.close()
    return 0


def look(model: Model, engine: Engine, tracker: Tracker, step: int, steps: int) -> dict[str, float]:
    """Held-out figures and a preview picture when they are due, from the EMA weights, on the main process.

    Returns: the figures; none where they were not due, or on another process.
    """
    config = engine.config
    last = step == steps
    validation_due = step % config.validate_every == 0 or last
    preview_due = step % config.preview_every == 0 or last
    figures: dict[str, float] = {}
    if not (validation_due or preview_due):
        return figures
    if engine.accelerator.is_main_process:
        image = model.preview(engine) if preview_due else None
        if image is not None:
            image.save(tracker.run.path / "previews" / f"step-{step:09d}.webp", quality=90)
        if validation_due:  # after the preview, whose figures it may report
            figures = model.validate(engine)
            tracker.log_and_say(step, figures)
    engine.accelerator.wait_for_everyone()
    tracker.throughput()  # the time of looking is not training time
    return figures


def report_rejected(parts: Iterable[Any], run: RunDirectory, tracker: Tracker) -> None:
    """Images that could not be read were replaced by others; each is named once a step that met it."""
    for part in parts:
        for identity, reason in part.data.get("rejected", []):
            tracker.say(f"{identity}: cannot be read ({reason}); another image took its place")


def restore(model: Model, engine: Engine, averages: Averages, run: RunDirectory) -> tuple[int, float]:
    """Load the newest checkpoint that verifies, the same one on every process. Returns its step and seconds."""
    from accelerate.utils import broadcast_object_list

    choice: list[Any] = [None]
    if engine.accelerator.is_main_process:
        path, problems = checkpoints.newest(run.checkpoints)
        for problem in problems:
            engine.accelerator.print(problem)
        choice = [str(path) if path else None]
    broadcast_object_list(choice)
    if choice[0] is None:
        return 0, 0.0
    saved = checkpoints.load(Path(choice[0]))
    for name, module in engine.modules.items():
        module.load_state_dict(saved.tensors[name])
        engine.emas[name].module.load_state_dict(saved.tensors[f"{name}-ema"])
        optimizer = engine.optimizers[name].optimizer
        checkpoints.load_optimizer_tensors(optimizer, saved.tensors[f"{name}-optimizer"])
        engine.skipped[name].fill_(saved.state["skipped"][name])
    if engine.accelerator.scaler is not None and saved.state["scaler"]:
        engine.accelerator.scaler.load_state_dict(saved.state["scaler"])
    averages.load_state_dict(saved.state["averages"], engine.device)
    model.load_state_dict(saved.state["model"], saved.tensors)
    engine.accelerator.print(f"{run.path}: continuing from step {saved.step}")
    return saved.step, saved.state["seconds"]


def save(model: Model, engine: Engine, averages: Averages, run: RunDirectory, step: int, seconds: float) -> None:
    """Publish the complete state after `step` finished steps. Every process holds the same, so the first one writes."""
    averages.synchronize(engine.accelerator)
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
            "skipped": {name: float(count) for name, count in engine.skipped.items()},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "config": configuration.to_dict(run.config),
        }
        checkpoints.save(run.checkpoints, Checkpoint(step, tensors, state), engine.config.keep_checkpoints)
    engine.accelerator.wait_for_everyone()


def finish(
    model: Model, engine: Engine, run: RunDirectory, started: float, seconds: float, figures: dict[str, float]
) -> None:
    """Export the finished model and write `run.json`. `figures`: of the last step; none when it was made before."""
    if engine.accelerator.is_main_process:
        metrics = figures or model.validate(engine)
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
    engine.accelerator.wait_for_everyone()


def start_trackers(accelerator: Any, config: TrainingConfig, run: RunDirectory) -> None:
    if config.tracker == "none":
        return
    try:
        accelerator.init_trackers("tensorboard" if config.tracker == "tensorboard" else "ldm_vae")
    except (ImportError, ValueError) as error:
        raise UserError(
            f"training.tracker={config.tracker}: is not installed ({error}); "
            f"run `pip install {config.tracker}` or set training.tracker=none"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
