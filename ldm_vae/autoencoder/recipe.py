"""What a training run of an autoencoder is: its configuration. Each part owns its own settings; here they meet."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm_vae.autoencoder.adversarial.game import AdversarialConfig
from ldm_vae.autoencoder.loss import LossConfig
from ldm_vae.autoencoder.models import AutoencoderConfig
from ldm_vae.autoencoder.rate import RateConfig
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.transforms import CropConfig
from ldm_vae.errors import UserError
from ldm_vae.training.engine import TrainingConfig
from ldm_vae.training.schedule import Plan, Span


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. Small crops first are cheap; larger ones in the last part teach the context.

    Args:
        steps: optimizer steps.
        crop: side of the square training crops in pixels, divisible by 8.
        batch: images per step over all processes.
        micro_batch: images per forward pass of a process; null: its whole share.
        perceptual: multiplies the weight loss.perceptual in this phase; 0 saves its cost.
    """

    steps: int = 1000
    crop: int = 64
    batch: int = 32
    micro_batch: int | None = None
    perceptual: float = 1.0

    def __post_init__(self) -> None:
        if self.crop < 16 or self.crop % 8:
            raise UserError(f"phases: crop {self.crop} is not a multiple of 8 from 16 on; use 64, 128, 192, 256 ...")
        if self.steps < 1 or self.batch < 1:
            raise UserError("phases: steps and batch are at least 1")


@dataclass(frozen=True)
class LatentConfig:
    """What is asked of the latent space beyond its rate.

    Args:
        scale_equivariance: share of the steps that shrink latents and images alike (antialiased), decode the small
            latents and compare with the small images, instead of the full-size comparison (arXiv:2502.14831). Latents
            become easier to diffuse, and such a step is cheaper.
        scales: the factors, drawn with equal chance.
        decoder_noise: with a frozen encoder, the decoder sees latents that are off by up to some times this much, in
            standard deviations of N(0, 1), as those of a diffusion model are: per image |N(0, 1)| times it, white
            (arXiv:2510.11690). 0.2 suits a decoder that only serves a small diffusion model.
        nested: channel counts below the full one: half of the images keep only so many first channels, so that one
            autoencoder serves at each count (nested dropout, arXiv:1402.0915). `[4, 8, 12]` suits 16 channels.
    """

    scale_equivariance: float = 0.0
    scales: list[float] = field(default_factory=lambda: [0.5, 0.75])
    decoder_noise: float = 0.0
    nested: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.scale_equivariance <= 1:
            raise UserError(f"latents.scale_equivariance: {self.scale_equivariance} is no share; 0.35 is usual")
        if not self.scales or not all(0 < scale < 1 for scale in self.scales):
            raise UserError(f"latents.scales: {list(self.scales)} are not factors between 0 and 1")
        if not 0 <= self.decoder_noise <= 2:
            raise UserError(f"latents.decoder_noise: {self.decoder_noise} is not between 0 and 2; 0.2 is usual")
        if any(count < 1 for count in self.nested):
            raise UserError(f"latents.nested: {list(self.nested)} are no channel counts")


@dataclass(frozen=True)
class TrainVaeConfig:
    """`ldm-vae train-vae`: everything that a run depends on.

    Args:
        repeat: how often images of a pattern of ids count in an epoch, as `{photos/*: 6}`: for a few good images among
            many lesser ones. What is held out, and all evaluation, count each image once.
        initial: an autoencoder to start from: a run, a diffusers directory or a hub id. Its architecture is taken.
        train: names of what is trained, as the start of parameter names; null: everything. `[decoder]` leaves the
            encoder as it is: latents that were made with it stay valid.
    """

    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    repeat: dict[str, int] = field(default_factory=dict)
    crop: CropConfig = field(default_factory=CropConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    initial: str | None = None
    train: list[str] | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    training: TrainingConfig = field(default_factory=TrainingConfig)
    held_out_resolution: int = 256
    held_out_images: int = 16

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("phases: at least one is needed")
        if any(times < 1 for times in self.repeat.values()):
            raise UserError(f"repeat: {dict(self.repeat)} are no counts from 1 on; data.include leaves images out")
        if self.repeat and self.data.streaming:
            raise UserError("repeat: has no effect on a stream; leave it out")
        if self.initial is not None and self.autoencoder != AutoencoderConfig():
            raise UserError(
                "autoencoder: has no effect with initial, whose architecture is taken; leave one of them out"
            )
        if self.train is not None and self.initial is None:
            raise UserError(
                "train: leaves random weights as they are; name an autoencoder to start from as initial=DIR"
            )
        if self.latents.decoder_noise and self.train != ["decoder"]:
            raise UserError(
                "latents.decoder_noise: an encoder that is trained would only grow its latents against it; "
                "set train=[decoder], or leave it out"
            )
        first_of_last = sum(phase.steps for phase in self.phases[:-1])
        steps = first_of_last + self.phases[-1].steps
        start = self.adversarial.starts_at(steps)
        if self.adversarial.loss != "off" and start < first_of_last:
            raise UserError(
                f"adversarial.start: step {start} lies before the last phase, and its guard compares losses, which "
                f"change with the phase; start it at step {first_of_last} or later"
            )

    def plan(self, processes: int) -> Plan:
        return Plan(
            tuple(
                Span(phase.steps, phase.batch, phase.micro_batch or max(1, phase.batch // processes), phase.crop)
                for phase in self.phases
            )
        )

    def phase_at(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]
