"""The rate: the KL divergence in honest units, and a controller that holds it at a target.

A fixed KL weight means a different rate in every project, and drifts within one run. Here the user asks for a rate in
nats per latent dimension and beta follows. For a unit-variance aggregate, R nats mean a posterior standard deviation
of exp(-R), and bits per pixel = c * nats / (64 ln 2) at f8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class RateConfig:
    """`target`: beta is steered so that the KL meets `target_nats`. `fixed`: beta is given (0: a plain autoencoder).

    Both betas weigh the KL as a mean per latent element against reconstruction terms that are means per pixel. The
    Stable Diffusion convention (sums, weight w) is beta = w * c / 192 at f8.
    """

    mode: Literal["target", "fixed"] = "target"
    target_nats: float = 2.5
    beta: float | None = None
    proportional_gain: float = 0.5
    integral_gain: float = 0.01
    lock_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.mode == "fixed" and (self.beta is None or self.beta < 0):
            raise UserError("rate.beta: rate.mode=fixed needs a weight >= 0; give rate.beta=VALUE")
        if self.mode == "target" and self.beta is not None:
            raise UserError("rate.beta: has no effect with rate.mode=target; set rate.target_nats, or rate.mode=fixed")
        if self.target_nats <= 0:
            raise UserError(f"rate.target_nats: {self.target_nats} is not above 0; 2.5 suits 4 latent channels")

    @property
    def logvar_floor(self) -> float:
        """The log-variance bound of the encoder that leaves the target reachable."""
        return -2.0 * (self.target_nats + 1.0) if self.mode == "target" else -14.0


class RateController:
    """beta as a function of the KL seen so far: a PI controller in the log domain, on the device, without host sync.

        e   = clip(ln(KL_average / target), -1, 1)
        I  += k_i e          (not when beta sits at a bound and e pushes further out)
        ln beta = I + k_p e

    In the last `lock_fraction` of the run beta stays at the geometric mean of the stretch before, so that the final
    objective is stationary.
    """

    INITIAL_BETA = 1e-3
    AVERAGE_DECAY = 0.9
    WARMUP_STEPS = 100
    DEADBAND = 0.01

    def __init__(self, config: RateConfig, steps: int, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.steps = steps
        self.lock_start = round(steps * (1 - config.lock_fraction))
        self.averaging_start = round(steps * (1 - 1.5 * config.lock_fraction))
        initial = {"average": math.log(config.target_nats), "integral": math.log(self.INITIAL_BETA), "locked_sum": 0.0}
        # one float64 vector on the device: ln of the KL average, the integral, the sum of ln beta before the lock
        self._state = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in initial.items()}
        self._log_beta = self._state["integral"].clone()

    def beta(self, step: int) -> Tensor:
        """The weight for this step: a scalar tensor on the device, float32."""
        if self.config.mode == "fixed":
            return torch.full_like(self._log_beta, self.config.beta or 0.0, dtype=torch.float32)
        if step >= self.lock_start > self.averaging_start:
            log_beta = self._state["locked_sum"] / (self.lock_start - self.averaging_start)
        else:
            log_beta = self._log_beta
        return log_beta.exp().float()

    @torch.no_grad()
    def observe(self, step: int, kl: Tensor) -> None:
        """Take the step's mean KL (nats per latent dimension, the same on every rank) and move beta."""
        if self.config.mode == "fixed":
            return
        state, log_kl = self._state, kl.double().clamp(min=1e-8).log()
        log_kl = torch.where(log_kl.isfinite(), log_kl, state["average"])
        state["average"] += (1 - self.AVERAGE_DECAY) * (log_kl - state["average"])
        error = (state["average"] - math.log(self.config.target_nats)).clamp(-1, 1)
        error = torch.where(error.abs() < self.DEADBAND, 0.0, error)
        low, high = math.log(MINIMUM_BETA), math.log(MAXIMUM_BETA)
        saturated = ((self._log_beta <= low) & (error < 0)) | ((self._log_beta >= high) & (error > 0))
        if step >= self.WARMUP_STEPS:
            state["integral"] += torch.where(saturated, 0.0, self.config.integral_gain * error)
        self._log_beta = (state["integral"] + self.config.proportional_gain * error).clamp(low, high)
        if self.averaging_start <= step < self.lock_start:
            state["locked_sum"] += self._log_beta

    def state_dict(self) -> dict[str, float]:
        """Exact in JSON: Python writes doubles so that they read back equal."""
        return {name: float(value) for name, value in self._state.items()} | {"log_beta": float(self._log_beta)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in self._state.items():
            value.fill_(state[name])
        self._log_beta = torch.full_like(self._log_beta, state["log_beta"])
