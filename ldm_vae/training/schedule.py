"""What a step is, as a pure function of its number: its learning rate, its batch, its positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm_vae.errors import UserError


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to `final_fraction * peak` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


@dataclass(frozen=True)
class Span:
    """A stretch of steps with the same batch and sample size.

    Args:
        steps: optimizer steps.
        global_batch: samples per step over all processes.
        micro_batch: samples per forward pass of one process; the accumulation follows from it.
        size: side of the samples in pixels (or latent positions), None for their own size.
    """

    steps: int
    global_batch: int
    micro_batch: int
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """The whole run: spans in order. Everything about a step follows from its number."""

    spans: tuple[Span, ...]

    @property
    def steps(self) -> int:
        return sum(span.steps for span in self.spans)

    def span(self, step: int) -> tuple[Span, int]:
        """The span that holds `step`, and the position (count of samples before it) of the step's first sample."""
        position = 0
        for span in self.spans:
            if step < span.steps:
                return span, position + step * span.global_batch
            step -= span.steps
            position += span.steps * span.global_batch
        raise IndexError("step beyond the plan")

    def check(self, processes: int) -> None:
        """Raises: UserError when a global batch does not divide into processes times micro-batches."""
        for span in self.spans:
            if span.global_batch % (processes * span.micro_batch):
                raise UserError(
                    f"batch: {span.global_batch} samples per step do not divide into {processes} process(es) of "
                    f"micro-batches of {span.micro_batch}; choose a multiple of {processes * span.micro_batch}"
                )
