"""The adversarial loss: discriminator, losses, schedule of the two networks, and weight of the term.

The discriminator is trained alone first, so that the decoder never follows an untrained one. Then the adversarial term
gets a measured weight: the ratio of the two gradients at the decoder's output, which does not depend on how a batch is
split. If the reconstruction loss rises above a threshold, the weight is 0. Above a second threshold, the decoder's
earlier weights are restored. The order within a step is in `VaeModel.update`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm_vae.autoencoder.health import Verdict
from ldm_vae.autoencoder.wavelet import haar_forward
from ldm_vae.config import check_positive
from ldm_vae.errors import UserError
from ldm_vae.random import generator

TIMES = ("start", "engage", "ramp_end")
"""Steps at which the stage's parts begin, in order of time."""
HELD_SHARE = 0.5
"""Share of the steps of a log interval with weight 0 from which a verdict reports it."""


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial stage. Times are steps, or fractions of the run when below 1.

    Args:
        loss: off, hinge (Lim & Ye, arXiv:1705.02894) or relativistic pairing (Jolicoeur-Martineau, arXiv:1807.00734).
        weight: calibrated: measured once while the discriminator warms up, then constant; adaptive: measured in every
            step as in the LDM recipe (arXiv:2112.10752; there at the last layer, here at the output); fixed: given.
        strength: the adversarial gradient as a share of the reconstruction gradient (the weight itself with `fixed`).
        start: when the discriminator's training begins (LDM's disc_start).
        warmup: how long the discriminator is trained alone.
        ramp: how long the weight rises to its full value.
        r1: weight of the gradient penalty on real images, per patch (Mescheder et al., arXiv:1801.04406).
        r1_every: steps between penalties (each is multiplied by this number).
        augment: differentiable augmentation of the discriminator's input.
        width: number of channels of the discriminator's first layer.
        learning_rate: peak learning rate of the discriminator; the schedule is that of the run.
        hold_above: the weight is 0 while the reconstruction loss is above this multiple of its value before the stage.
            Each such step lowers the later weight by 1 %, so that it settles where it does no harm.
        restore_above, restore_steps: if the loss is above this multiple for this number of steps, the weights from
            before the stage are restored.
    """

    loss: Literal["off", "hinge", "relativistic"] = "off"
    weight: Literal["calibrated", "adaptive", "fixed"] = "calibrated"
    strength: float = 0.1
    start: float = 0.0
    warmup: float = 0.05
    ramp: float = 0.05
    r1: float = 0.1
    r1_every: int = 8
    augment: bool = True
    width: int = 64
    learning_rate: float = 4e-4
    hold_above: float = 1.15
    restore_above: float = 1.3
    restore_steps: int = 200

    def __post_init__(self) -> None:
        if not 1 < self.hold_above <= self.restore_above:
            raise UserError("adversarial: give 1 < hold_above <= restore_above; 1.15 and 1.3 are usual")
        for name in ("start", "warmup", "ramp", "r1"):
            if getattr(self, name) < 0:
                raise UserError(f"adversarial.{name}: {getattr(self, name)} is below 0")
        check_positive(
            self, "strength", "learning_rate", "r1_every", "width", "restore_steps",
            group="adversarial.",
        )  # fmt: skip

    def starts_at(self, steps: int) -> int:
        """The step at which the discriminator's training begins, in a run of `steps`."""
        return in_steps(self.start, steps)


def in_steps(time: float, steps: int) -> int:
    """A time in steps; below 1 it is a fraction of the run."""
    return round(time * steps) if time < 1 else round(time)


def generator_loss(config: AdversarialConfig, fake: Tensor, real: Tensor | None) -> Tensor:
    """The decoder's loss, from patch logits of reconstructions (and of the originals if paired). Scalar."""
    if config.loss == "hinge":
        return -fake.mean()
    assert real is not None
    return F.softplus(real - fake).mean()


def discriminator_loss(config: AdversarialConfig, fake: Tensor, real: Tensor) -> Tensor:
    """The discriminator's loss, from patch logits. Scalar."""
    if config.loss == "hinge":
        return 0.5 * (F.relu(1 + fake).mean() + F.relu(1 - real).mean())
    return F.softplus(fake - real).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1: half the squared gradient of a patch's logit with respect to the real image, mean over images. Scalar.

    The patches of an image are summed before differentiating and the square divided by their number.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    patches = logits[0].numel()
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean() / patches


class AdversarialLoss:
    """Schedule and weight of the adversarial loss. State: a few float64 scalars on the device, no host sync."""

    AVERAGE_DECAY = 0.98
    RATIO_DECAY = 0.9
    LARGEST_WEIGHT = 1e4
    HELD_DECAY = 0.99
    WEIGHT_AFTER_RESTORE = 0.25

    def __init__(self, config: AdversarialConfig, steps: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.config, self.seed, self.steps, self.device = config, seed, steps, device
        start = config.starts_at(steps)
        engage = start + max(1, in_steps(config.warmup, steps))
        self._begin(start, engage, engage + max(1, in_steps(config.ramp, steps)))

    def _begin(self, start: int, engage: int, ramp_end: int) -> None:
        """Begin without measurements: the discriminator is trained from `start`, its loss counts from `engage`.

        Raises: UserError when the run ends before `engage`.
        """
        self.start, self.engage, self.ramp_end = start, engage, ramp_end
        self.measure_from = max(start, engage - max(1, min(200, (engage - start) // 2)))
        if engage >= self.steps:
            raise UserError(
                f"adversarial: the adversarial loss would begin at step {engage} of {self.steps}, that is "
                "never; lower adversarial.start or adversarial.warmup, or ask for more steps"
            )
        names = ("ratio_sum", "ratio_count", "ratio", "reference", "average", "bad_steps", "factor", "restores")
        self._state = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in names}
        self._state["factor"] += 1.0
        self._state["ratio"].fill_(math.nan)
        self._state["reference"].fill_(math.nan)
        self._state["average"].fill_(math.nan)

    def discriminator(self) -> PatchDiscriminator:
        return PatchDiscriminator(self.config.width).train()

    def learns(self, step: int) -> bool:
        """Whether the discriminator takes a step."""
        return step >= self.start

    def measures(self, step: int) -> bool:
        """Whether the gradients at the decoder's output are compared."""
        if self.config.weight == "adaptive":
            return step >= self.measure_from
        return self.config.weight == "calibrated" and self.measure_from <= step < self.engage

    def acts(self, step: int) -> bool:
        """Whether the decoder's adversarial loss is computed, to train it or to measure its gradient."""
        return step >= self.engage or self.measures(step)

    def weight(self, step: int) -> Tensor:
        """The weight of the adversarial term in this step: a float32 scalar on the device; 0 while it is suspended."""
        state, config = self._state, self.config
        if config.weight == "fixed":
            full = torch.full_like(state["factor"], config.strength)
        elif config.weight == "adaptive":
            full = config.strength * state["ratio"].nan_to_num(0.0)
        else:
            full = config.strength * (state["ratio_sum"] / state["ratio_count"].clamp(min=1)).exp()
        ramp = min(1.0, max(0.0, (step - self.engage) / (self.ramp_end - self.engage)))
        weight = full.clamp(max=self.LARGEST_WEIGHT) * state["factor"] * ramp
        return torch.where(self.holding, 0.0, weight).float()

    @property
    def holding(self) -> Tensor:
        return self._state["average"] > self.config.hold_above * self._state["reference"]

    def chance(self, step: int, count: int, device: torch.device) -> Tensor:
        """(count, 7) for `augment`, drawn for the global batch."""
        return torch.rand(count, 7, generator=generator(self.seed, "diffaug", step, device=device), device=device)

    def augmented(self, images: Tensor, chance: Tensor) -> Tensor:
        return augment(images, chance) if self.config.augment else images

    def decoder_term(self, discriminator: nn.Module, fake: Tensor, real: Tensor, chance: Tensor) -> Tensor:
        """The decoder's loss on reconstructions `fake` (n, 3, h, w) of `real`. The discriminator gets no gradient."""
        frozen = {name: value.detach() for name, value in discriminator.state_dict().items()}
        logits = functional_call(discriminator, frozen, (self.augmented(fake, chance),)).float()
        if self.config.loss == "hinge":
            return generator_loss(self.config, logits, None)
        with torch.no_grad():
            real_logits = discriminator(self.augmented(real, chance)).float()
        return generator_loss(self.config, logits, real_logits)

    def discriminator_terms(
        self, discriminator: nn.Module, fake: Tensor, real: Tensor, chance: Tensor, step: int
    ) -> dict[str, Tensor]:
        """The discriminator's losses; `discriminator` is the wrapped module. No gradient reaches the decoder."""
        penalized = self.config.r1 > 0 and step % self.config.r1_every == 0
        real, fake = self.augmented(real.detach(), chance), self.augmented(fake.detach(), chance)
        real = real.requires_grad_(penalized)
        real_logits, fake_logits = discriminator(torch.cat([real, fake])).float().chunk(2)
        terms = {"discriminator": discriminator_loss(self.config, fake_logits, real_logits)}
        if penalized:
            terms["r1"] = gradient_penalty(real_logits, real)
        terms["logit_gap"] = (real_logits - fake_logits).mean().detach()
        return terms

    def discriminator_total(self, terms: Mapping[str, Tensor]) -> Tensor:
        total = terms["discriminator"]
        return total + self.config.r1 * self.config.r1_every * terms["r1"] if "r1" in terms else total

    @torch.no_grad()
    def observe_ratio(self, squared_norms: Tensor) -> None:
        """(2,): squared gradient norms at the output of the reconstruction and the adversarial loss, whole batch."""
        log_ratio = (
            0.5 * (squared_norms[0].double().clamp(min=1e-30) / squared_norms[1].double().clamp(min=1e-30)).log()
        )
        state, usable = self._state, log_ratio.isfinite()  # not where the update is left out
        state["ratio_sum"] += torch.where(usable, log_ratio, 0.0)
        state["ratio_count"] += usable
        new = torch.where(usable, log_ratio.exp(), state["ratio"])
        old = torch.where(state["ratio"].isnan(), new, state["ratio"])
        state["ratio"].copy_(old + (1 - self.RATIO_DECAY) * (new - old))

    @torch.no_grad()
    def observe_loss(self, step: int, loss: Tensor) -> None:
        """Add the step's reconstruction loss, equal on all ranks: until `engage` it sets the reference."""
        if step < self.start:
            return
        state, loss = self._state, loss.double()
        average = torch.where(state["average"].isnan(), loss, state["average"])
        state["average"].copy_(
            torch.where(loss.isfinite(), average + (1 - self.AVERAGE_DECAY) * (loss - average), average)
        )
        if step < self.engage:
            state["reference"].copy_(state["average"])
        too_high = state["average"] > self.config.restore_above * state["reference"]
        state["factor"] *= torch.where(self.holding, self.HELD_DECAY, 1.0)
        state["bad_steps"].copy_(torch.where(too_high, state["bad_steps"] + 1, 0.0))

    def must_restore(self) -> bool:
        """Whether the earlier weights must be restored. Waits for the device, so call it on log steps only."""
        return float(self._state["bad_steps"]) >= self.config.restore_steps

    def restored(self) -> None:
        """Continue at a quarter of the weight, after the earlier weights were restored."""
        self._state["factor"] *= self.WEIGHT_AFTER_RESTORE
        self._state["restores"] += 1
        self._state["bad_steps"].zero_()
        self._state["average"].copy_(self._state["reference"])

    def alarms(self, metrics: Mapping[str, float]) -> list[Verdict]:
        """The alarms of this stage, from averaged metrics and the state. Waits for the device: log steps only."""
        knob = "a lower adversarial.strength, a longer adversarial.warmup, or a lower learning rate"
        found, restores = [], float(self._state["restores"])
        if restores > 0:
            cause = "the reconstruction had worsened too far, so the decoder's weights from before came back"
            name = "adversarial_restored"
            found.append(Verdict(name, "fail", "times that they came back", restores, 0.0, None, cause, knob))
        held = metrics.get("adversarial/holding", 0.0)
        if held > HELD_SHARE:
            cause = f"the reconstruction loss is more than {self.config.hold_above:g} times that before this stage"
            name = "adversarial_held"
            found.append(Verdict(name, "warn", "share of steps at weight 0", held, HELD_SHARE, None, cause, knob))
        return found

    def metrics(self, step: int) -> dict[str, Tensor]:
        return {"adversarial/weight": self.weight(step), "adversarial/holding": self.holding.float()}

    def state_dict(self) -> dict[str, str]:
        """The exact state, with the steps of the stage: a change of the plan does not move a stage that has begun."""
        times = {name: float(getattr(self, name)).hex() for name in TIMES}
        return {name: float(value).hex() for name, value in self._state.items()} | times

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after `step` finished steps of a run that may have become longer or shorter.

        A stage that has begun keeps its steps. A stage that is still ahead takes its steps from the new plan, and
        earlier measurements are dropped. A stage that should have begun begins now, since the discriminator must be
        trained alone, the weight calibrated and the reference loss measured first.

        Raises: UserError when too few steps are left for that.
        """
        values = {name: float.fromhex(value) for name, value in state.items()}
        if step <= self.start:
            return
        began = values["start"] < step if "start" in values else not math.isnan(values["average"])  # an earlier release
        if not began:
            later = step - self.start
            self._begin(*(getattr(self, name) + later for name in TIMES))
            return
        self._begin(*(int(values.get(name, getattr(self, name))) for name in TIMES))
        for name, value in self._state.items():
            value.fill_(values[name])


# The patch discriminator and the augmentation of its input.


class PatchDiscriminator(nn.Module):
    """Images (n, 3, h, w) in [-1, 1] -> one logit per patch of 72 x 72 pixels, (n, 1, h/8 - 2, w/8 - 2).

    PatchGAN (Isola et al., arXiv:1611.07004) without normalization, because batch statistics would make the result
    depend on how a batch is split. The three detail bands of a Haar level are added to the colors as input channels, so
    that sharpness is easy to detect. The receptive field of the five convolutions is 70 pixels, as in the paper; the
    Haar blocks add one pixel on each side.
    """

    SMALLEST_SIDE = 32

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        previous = 12
        for level, channels in enumerate(widths):
            stride = 2 if level < 3 else 1
            layers += [nn.Conv2d(previous, channels, 4, stride, padding=1), nn.LeakyReLU(0.2)]
            previous = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(previous, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        details = haar_forward(images)[:, 3:]
        seen = torch.cat([images, F.interpolate(details, scale_factor=2.0, mode="nearest")], dim=1)
        return self.layers(seen.contiguous(memory_format=torch.channels_last))


def augment(images: Tensor, chance: Tensor) -> Tensor:
    """Differentiable augmentation (Zhao et al., arXiv:2006.10738): brightness, saturation, contrast, shift, cutout.

    Args:
        images: (n, 3, h, w) in [-1, 1].
        chance: (n, 7) uniform in [0, 1]: equal rows give an image and its reconstruction equal treatment.
    """
    brightness, saturation, contrast, shift_x, shift_y, hole_x, hole_y = chance.to(images)[
        :, :, None, None, None
    ].unbind(1)
    images = images + (brightness - 0.5) * 0.5
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (0.5 + saturation)
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    images = level + (images - level) * (0.75 + 0.5 * contrast)
    return _cutout(_shift(images, shift_x, shift_y), hole_x, hole_y)


def _shift(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Shift by whole pixels, up to 1/8 of the side, with replicated borders."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) + ((y.flatten()[:, None] - 0.5) * height / 4).round().long()
    columns = torch.arange(width, device=images.device) + ((x.flatten()[:, None] - 0.5) * width / 4).round().long()
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    return moved.permute(0, 3, 1, 2)


def _cutout(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cover a square of a quarter of the side with gray."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    hole = ((rows - y * height).abs() <= height / 8) & ((columns - x * width).abs() <= width / 8)
    return images.masked_fill(hole, 0.0)
