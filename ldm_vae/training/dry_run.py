"""`--dry-run`: build everything, do one step on random data, and say how large and how costly it is."""

from __future__ import annotations

import resource
import time
from functools import partial
from typing import Any

import torch

from ldm_vae.costs import gigamacs
from ldm_vae.training.engine import Engine, Model, TrainingConfig
from ldm_vae.training.loader import Batch, MicroBatch, rank_rows
from ldm_vae.training.schedule import Plan


def dry_run(model: Model, plan: Plan, config: TrainingConfig, accelerator: Any) -> int:
    """One `update` per span of the plan on random samples of the model; prints a table. Writes nothing."""
    plan.check(accelerator.num_processes)
    engine = Engine(model, config, accelerator, plan.steps)
    say = accelerator.print
    for name, module in engine.modules.items():
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        say(f"{name}: {count / 1e6:.2f} M trained parameters, {config.precision} on {accelerator.device}")
    step = 0
    for span in plan.spans:
        parts = [
            MicroBatch(
                {key: value.to(accelerator.device) for key, value in model.random_samples(rows, span.size).items()},
                rows,
            )
            for rows in rank_rows(
                span.global_batch, span.micro_batch, accelerator.process_index, accelerator.num_processes
            )
        ]
        batch = Batch(tuple(parts), span.global_batch)
        gigamacs_of_all = gigamacs(partial(model.update, step, batch, engine))
        seconds = -time.perf_counter()
        metrics = model.update(step, batch, engine)
        losses = {name: round(float(value), 4) for name, value in metrics.items() if name.startswith("loss/")}
        seconds += time.perf_counter()
        shapes = {key: tuple(value.shape) for key, value in parts[0].data.items()}
        gigamacs_each = gigamacs_of_all / sum(part.rows.stop - part.rows.start for part in parts)
        say(
            f"steps {step} to {step + span.steps - 1}: {len(parts)} micro-batch(es) of {shapes}\n"
            f"  {gigamacs_each:.2f} GMAC per sample forward and backward, {seconds:.2f} s a step "
            f"({span.global_batch / seconds:.1f} samples/s), losses {losses}"
        )
        step += span.steps
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(f"peak memory of process {accelerator.process_index}: {memory / 2**30:.2f} GiB; nothing was written")
    return 0
