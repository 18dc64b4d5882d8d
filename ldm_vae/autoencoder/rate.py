"""The rate: the KL divergence in honest units, and a controller that holds it at a target.

A fixed KL weight means a different rate in every project, and drifts within one run. Here the user asks for a rate in
nats per latent dimension and beta follows. For a unit-variance aggregate, R nats mean a posterior standard deviation
of exp(-R), and bits per pixel = c * nats / (64 ln 2) at f8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_vae.errors import UserError

MINIMUM_BETA, MAXIMUM_BETA = 1e-7, 10.0


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, element by element, float32. Kingma & Welling, eq. 10."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def bits_per_dimension(nats: float) -> float:
    return nats / math.log(2)


def bits_per_pixel(nats: float, latent_channels: int, downsampling: int = 8) -> float:
    """Bits per image pixel of `nats` per latent dimension."""
    return nats * latent_channels / (downsampling**2 * math.log(2))


def whole_image_rate(target_nats: float, crops_nats: float, images_nats: float, side: int) -> str:
    """What a target that was held on crops is on whole held-out images, and the target that would hold it there."""
    found = (
        f"rate: {crops_nats:.2f} nats per latent dimension on held-out training crops (target {target_nats:g}), "
        f"{images_nats:.2f} on whole held-out images of {side} x {side}"
    )
    if abs(images_nats / target_nats - 1) <= RateController.MISS:
        return found
    aimed = target_nats * crops_nats / images_nats
    return f"{found}; for {target_nats:g} nats there, train with about rate.target_nats={aimed:.2f}"


@dataclass(frozen=True)
class RateConfig:
    """How much the KL weighs. Betas weigh the KL as a mean per latent element against terms that are means per pixel.

    `target`: beta is steered so that the KL meets `target_nats` per latent dimension, on training crops. Whole images
    in another size have another rate, often a higher one: the end of a run says which, and the target that would hold
    it there.
    `fixed`: `beta` is given; 0 trains a plain autoencoder. The Stable Diffusion convention (sums, weight w) is
    beta = w * c / 192 at f8.
    `free_bits`: `beta` is given, and a channel whose KL is below `free_nats` is left alone (Kingma et al.,
    arXiv:1606.04934, eq. 15, one group a channel).

    Args:
        mode: how the KL weight is set, see above.
        target_nats: for mode=target: KL in nats per latent dimension, held on training crops (not on whole images).
        beta: for mode=fixed and mode=free_bits: the KL weight.
        free_nats: for mode=free_bits: nats per dimension without a penalty.
        proportional_gain: gain k_p of the controller.
        lock_fraction: fraction of the run at its end in which beta does not change.
        integral_gain: gain k_i of the controller; null: 80 divided by the steps of the run, between 0.01 and 0.2.
    """

    mode: Literal["target", "fixed", "free_bits"] = "target"
    target_nats: float = 2.5
    beta: float | None = None
    free_nats: float | None = None
    proportional_gain: float = 0.5
    integral_gain: float | None = None
    lock_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.mode != "target" and (self.beta is None or self.beta < 0):
            raise UserError(f"rate.beta: rate.mode={self.mode} needs a weight >= 0; give rate.beta=VALUE")
        if self.mode == "target" and self.beta is not None:
            raise UserError("rate.beta: has no effect with rate.mode=target; set rate.target_nats, or rate.mode=fixed")
        if self.mode == "free_bits" and not (self.free_nats and self.free_nats > 0):
            raise UserError("rate.free_nats: rate.mode=free_bits needs a KL per channel above 0; 0.25 is usual")
        if self.mode != "free_bits" and self.free_nats is not None:
            raise UserError(f"rate.free_nats: has no effect with rate.mode={self.mode}; set rate.mode=free_bits")
        if self.target_nats <= 0:
            raise UserError(f"rate.target_nats: {self.target_nats} is not above 0; 2.5 suits 4 latent channels")
        if not 0 < self.lock_fraction < 0.5:
            raise UserError(f"rate.lock_fraction: {self.lock_fraction} is not between 0 and 0.5; 0.1 is usual")

    @property
    def logvar_floor(self) -> float:
        """The log-variance bound of the encoder that leaves the target reachable, also for channels above the mean."""
        return -2.0 * (self.target_nats + 1.5) if self.mode == "target" else -14.0


class RateController:
    """beta as a function of the KL seen so far: a PI controller in the log domain, on the device, without host sync.

        e   = clip(ln(KL_average / target), -1, 1)
        I  += k_i e          (not when beta sits at a bound and e pushes further out)
        ln beta = I + k_p e

    A young encoder needs hundreds of steps to spend any bits at all, and integrating that would wind the integral down
    to its bound: until the KL has met the target once, the integral moves only where the KL has stopped rising by
    itself, in the first fifth of the run not at all. In the last `lock_fraction` of the run beta stays at the geometric
    mean of the stretch before, half as long, so that the final objective is stationary. The integral rests then too.

    A run that continues with another number of steps averages again, over as many steps as the new plan says, and locks
    after that; where fewer steps are left, beta is steered to the end.

    The state lives in float64 tensors on the device: `average` is ln of the KL average and `slow_average` a slower one,
    `met` whether the target was met once, `pinned` counts steps at a bound with the target missed by more than 5 %,
    `locked_sum` is the sum of `averaged` values of ln beta.
    """

    INITIAL_BETA = 1e-3
    AVERAGE_DECAY, SLOW_DECAY = 0.9, 0.98
    RISING = 0.02
    WARMUP_STEPS = 100
    PATIENCE = 0.2
    DEADBAND = 0.01
    MISS = 0.05

    def __init__(self, config: RateConfig, steps: int, channels: int = 1, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.steps = steps
        self.lock_start = round(steps * (1 - config.lock_fraction))
        self.averaging_start = round(steps * (1 - 1.5 * config.lock_fraction))
        self.window = self.lock_start - self.averaging_start
        self.averaged = 0
        self.integral_gain = config.integral_gain or min(0.2, max(0.01, 80 / steps))
        initial = {
            "average": math.log(config.target_nats),
            "integral": math.log(self.INITIAL_BETA),
            "log_beta": math.log(self.INITIAL_BETA),
            "locked_sum": 0.0,
            "slow_average": math.log(config.target_nats),
            "met": 0.0,
            "pinned": 0.0,
        }
        self._state = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in initial.items()}
        self._channels = torch.full((channels,), math.inf, dtype=torch.float64, device=device)  # average KL, free bits

    def beta(self, step: int) -> Tensor:
        """The weight for this step: a scalar tensor on the device, float32."""
        if self.config.mode != "target":
            return torch.full_like(self._state["log_beta"], self.config.beta or 0.0, dtype=torch.float32)
        log_beta = self._state["locked_sum"] / self.averaged if self.locked(step) else self._state["log_beta"]
        return log_beta.exp().float()

    def locked(self, step: int) -> bool:
        """Whether beta stays as it is from this step on."""
        return step >= self.lock_start and self.averaged >= self.window > 0

    def penalty(self, step: int, kl: Tensor) -> Tensor:
        """What the KL adds to the loss: a scalar from the KL per channel (c,), means over batch and positions.

        Free bits gate a channel by its average over earlier steps: the KL of the whole batch is not known before its
        last micro-batch, and this way splitting a batch changes nothing.
        """
        if self.config.mode == "free_bits":
            kl = kl * (self._channels > (self.config.free_nats or 0.0)).to(kl)
        return self.beta(step) * kl.mean()

    @torch.no_grad()
    def observe(self, step: int, kl: Tensor) -> None:
        """Take the step's KL per channel (c,) in nats per latent dimension, equal on every rank, and move beta."""
        kl = kl.double()
        if self.config.mode == "free_bits":
            new = torch.where(self._channels.isinf(), kl, self._channels)
            self._channels = torch.where(kl.isfinite(), new + (1 - self.AVERAGE_DECAY) * (kl - new), self._channels)
        if self.config.mode != "target":
            return
        state, log_kl = self._state, kl.mean().clamp(min=1e-8).log()
        log_kl = torch.where(log_kl.isfinite(), log_kl, state["average"])
        state["average"] += (1 - self.AVERAGE_DECAY) * (log_kl - state["average"])
        state["slow_average"] += (1 - self.SLOW_DECAY) * (log_kl - state["slow_average"])
        raw_error = state["average"] - math.log(self.config.target_nats)
        error = torch.where(raw_error.abs() < self.DEADBAND, 0.0, raw_error.clamp(-1, 1))
        if step >= self.WARMUP_STEPS:
            state["met"] = torch.maximum(state["met"], (raw_error >= 0).double())
        stalled = (state["average"] - state["slow_average"] < self.RISING) & (step >= self.PATIENCE * self.steps)
        acting = torch.maximum(state["met"], (stalled & (step >= self.WARMUP_STEPS)).double())
        low, high = math.log(MINIMUM_BETA), math.log(MAXIMUM_BETA)
        saturated = ((state["log_beta"] <= low) & (error < 0)) | ((state["log_beta"] >= high) & (error > 0))
        state["pinned"] += acting * (saturated & (raw_error.abs() > self.MISS)).double()
        if not self.locked(step):  # beta does not answer then, so the integral would wind up
            state["integral"] += torch.where(saturated, 0.0, self.integral_gain * error * acting)
        state["log_beta"] = (state["integral"] + self.config.proportional_gain * error).clamp(low, high)
        if self.averaging_start <= step and self.averaged < self.window:
            state["locked_sum"] += state["log_beta"]
            self.averaged += 1

    @property
    def pinned_share(self) -> Tensor:
        """Share of the run's steps that beta spent at a bound while the KL missed the target by more than 5 %."""
        return self._state["pinned"] / self.steps

    def state_dict(self) -> dict[str, Any]:
        """Exact in JSON: Python writes doubles so that they read back equal. `steps`: of the plan it belongs to."""
        numbers: dict[str, Any] = {name: float(value) for name, value in self._state.items()}
        channels = [value.hex() for value in self._channels.tolist()]
        return numbers | {"channels": channels, "averaged": self.averaged, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Continue after `step` finished steps; a window of another plan, or of one that lies ahead, starts again."""
        for name, value in self._state.items():
            value.fill_(state[name])
        self._channels.copy_(torch.tensor([float.fromhex(value) for value in state["channels"]], dtype=torch.float64))
        self.averaged = state["averaged"] if "averaged" in state else self._averaged_before(step)
        if state.get("steps", self.steps) != self.steps or step < self.averaging_start or not self.averaged:
            self.averaged = 0
            self._state["locked_sum"].zero_()

    def _averaged_before(self, step: int) -> int:
        """How many values a `locked_sum` without a count is of, as earlier releases saved it; 0: it is of another plan.

        A value of ln beta is at most the proportional gain away from the integral.
        """
        count = min(max(step - self.averaging_start, 0), self.window)
        distance = self._state["locked_sum"] / max(count, 1) - self._state["integral"]
        return count if float(distance.abs()) <= self.config.proportional_gain else 0
