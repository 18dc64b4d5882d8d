"""How an autoencoder is trained: `VaeModel.update()` is all the mathematics of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.fast_layers import use_blocked_group_norm
from ldm_vae.autoencoder.gan import AdversarialLoss
from ldm_vae.autoencoder.health import Verdict, batch_health, training_alarms
from ldm_vae.autoencoder.lineage import write_record
from ldm_vae.autoencoder.losses import ReconstructionLoss
from ldm_vae.autoencoder.models import build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.rate import (
    RateController,
    bits_per_dimension,
    bits_per_pixel,
    kl_divergence,
    whole_image_rate,
)
from ldm_vae.autoencoder.train_config import (
    HeldOut,
    TrainVaeConfig,
    describe_data,
    held_out_part,
    large_batch,
    measured_batches,
    training_samples,
)
from ldm_vae.config import plain_settings
from ldm_vae.data import transforms
from ldm_vae.data.samples import ImageSamples, enlarged_sentences
from ldm_vae.errors import UserError
from ldm_vae.files import published_directory, write_checksums
from ldm_vae.metrics import codebook_usage
from ldm_vae.random import generator, numpy_rng
from ldm_vae.training.distributed import check_same_data
from ldm_vae.training.loader import Batch
from ldm_vae.training.run_directory import RunDirectory
from ldm_vae.training.trainer import DryRun, Engine, fit, make_accelerator
from ldm_vae.training.trainer import dry_run as dry_run_of
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import pluralize

SMALLEST_PERCEPTUAL_SIDE = 48
SMALLEST_LATENT_SIDE = 4
ALARMS_FROM, ALARMS_FROM_STEP = 0.2, 500
"""Share of the run and step from which on, both, alarms of latents are raised: a young encoder looks collapsed."""
OF_THE_PLAN = {"rate_miss", "rate_unreachable"}
"""Alarms that another number of steps may settle, and that are raised again where it does not."""
WHOLE_IMAGES_NATS = "held_out/nats_per_dim_images"
"""The rate on whole held-out images; `held_out/nats_per_dim` is that on held-out training crops."""
BEFORE_ADVERSARIAL = "autoencoder-before-game"


@overload
def train_vae(config: TrainVaeConfig, *, dry_run: Literal[False] = ...) -> int: ...
@overload
def train_vae(config: TrainVaeConfig, *, dry_run: bool) -> int | DryRun: ...
def train_vae(config: TrainVaeConfig, *, dry_run: bool = False) -> int | DryRun:
    """`ldm-vae train-vae`: train the autoencoder in `config.output`, or continue there.

    Args:
        dry_run: look at images and output, build everything, do one step on random data, print parameters, GMACs,
            shapes, memory and the time of the run; write nothing.

    Returns: 0 when the run is finished, 75 when a signal stopped it after saving (the same call continues); with
        `dry_run` what was printed.

    Raises:
        UserError: a setting, the images or the output folder are not usable.
    """
    config = plain_settings(config)
    samples, held_out = training_samples(config), held_out_part(config)
    accelerator = make_accelerator(config.training, None if dry_run else Path(config.output))
    images: dict[str, Any] | None = None
    if isinstance(samples, ImageSamples):
        images = {"count": len(samples.source), "fingerprint": samples.source.fingerprint()}
        check_same_data(accelerator, images["fingerprint"])
    writes = accelerator.is_main_process and not dry_run
    run_directory = RunDirectory(config.output, config, main_process=writes)
    begin(
        "train-vae", *describe_data(config, samples, held_out), f"{accelerator.device}, {config.training.precision}",
        f"to {config.output} ({run_directory.check()})" if dry_run else f"to {config.output}",
    )  # fmt: skip
    if found := large_batch(config, samples):
        say(found)
    say_enlarged(held_out)
    if dry_run:
        costs = training_costs(config, accelerator)
        say(str(costs))
        end_dry_run(config.output, costs.expected())
        return costs
    model = VaeModel(config, held_out, accelerator.device, images)
    if model.measures_before_training and not any(run_directory.checkpoints.glob("step-*")):
        model.autoencoder.fit_statistics(measured_batches(config))
    plan = config.plan(accelerator.num_processes)
    code = fit(model, samples, plan, config.training, run_directory, accelerator)
    if code == 0:
        words = ["ldm-vae", "encode", config.output, *config.data.words(), f"resolution={config.held_out_resolution}"]
        what = f"the autoencoder, after {pluralize(plan.steps, 'step')}"
        end(Path(config.output) / "autoencoder", what, [*words, f"output={beside(config.output, 'latents')}"])
    return code


def training_costs(config: TrainVaeConfig, accelerator: Any = None) -> DryRun:
    """What a training takes, from a few steps on noise. Writes and prints nothing."""
    accelerator = accelerator or make_accelerator(config.training)
    model = VaeModel(config, held_out=None, device=accelerator.device)
    return dry_run_of(model, config.plan(accelerator.num_processes), config.training, accelerator)


def say_enlarged(held_out: HeldOut | None) -> None:
    """Print that held-out images are smaller than their crops, where some are."""
    if held_out:
        for line in enlarged_sentences(held_out.enlarged, len(held_out.images), "held_out_resolution"):
            say(f"held out: {line}")
        for line in enlarged_sentences(held_out.enlarged_crops, held_out.read, "phases.crop"):
            say(f"training crops, by the held-out images: {line}")


@dataclass(frozen=True)
class StepNoise:
    """What is random in one step, for the whole global batch: splitting the batch changes nothing."""

    noise: Tensor
    disturbance: Tensor | None
    kept: Tensor | None
    latent_side: int | None
    chance: Tensor | None


class Sums:
    """Means over the micro-batches of a step, name by name, detached, on the device."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.values: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            value = term.detach() / self.parts
            self.values[name] = self.values[name] + value if name in self.values else value


class VaeModel:
    """Stage 1 for `fit()`: reconstruction terms + beta * KL [+ quantizer terms] [+ weight * adversarial], all means."""

    def __init__(
        self,
        config: TrainVaeConfig,
        held_out: HeldOut | None,
        device: torch.device | str = "cpu",
        images: dict[str, Any] | None = None,
    ) -> None:
        """Builds every network with random weights, or `config.initial`'s; a checkpoint replaces them later.

        Args:
            images: `count` and `fingerprint` of those it learns from, where they are known before they are read.
        """
        self.config, self.held_out, self.images = config, held_out, images
        steps, seed = config.plan(1).steps, config.training.seed
        torch.manual_seed(seed)
        if config.initial is None:
            autoencoder = build_autoencoder(config.autoencoder, logvar_floor=config.rate.logvar_floor)
        else:
            autoencoder = start_from(config.initial)
        select_trained(autoencoder, config.train)
        use_blocked_group_norm(autoencoder)
        if config.training.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        self.autoencoder = autoencoder
        self.channels, self.factor = autoencoder.latent_channels, autoencoder.downsampling
        self.check_sizes()
        trained = ForwardPass(autoencoder.train(), encoder_is_frozen(autoencoder))
        self.has_rate = not (trained.deterministic or trained.encoder_frozen)
        self.modules: dict[str, nn.Module] = {"autoencoder": trained}
        self.optimizer_settings: dict[str, dict[str, Any]] = {}
        self.loss = ReconstructionLoss(config.loss).to(device)
        self.rate = RateController(config.rate, steps, self.channels, device)
        self.adversarial_loss: AdversarialLoss | None = None
        self.before_adversarial: dict[str, Tensor] = {}
        if config.adversarial.loss != "off":
            self.adversarial_loss = AdversarialLoss(config.adversarial, steps, seed, device)
            self.modules["discriminator"] = self.adversarial_loss.discriminator()
            self.optimizer_settings["discriminator"] = {
                "learning_rate": config.adversarial.learning_rate,
                "betas": (0.0, 0.99),
                "weight_decay": 0.0,
                "gradient_clip": math.inf,  # clipped, the rare steps with the penalty would count for next to nothing
            }
        self._raised: set[str] = set()

    def update(self, step: int, batch: Batch, engine: Engine) -> dict[str, Tensor]:
        phase, draws, sums = self.config.phase_at(step), self.draws(step, batch, engine.device), Sums(len(batch.parts))
        adversarial_loss = self.adversarial_loss if self.adversarial_loss and draws.latent_side is None else None
        weights = self.autoencoder.loss_weights
        if self.adversarial_loss and step == self.adversarial_loss.engage:
            self.before_adversarial = {
                name: value.clone() for name, value in self.averaged(engine).state_dict().items()
            }
        pairs: list[tuple[Tensor, Tensor]] = []
        for part in engine.parts(batch):
            images = transforms.from_uint8(part["image"]).contiguous(memory_format=torch.channels_last)
            kept = None if draws.kept is None else draws.kept[part.rows]
            disturbance = None if draws.disturbance is None else draws.disturbance[part.rows]
            made: ForwardOutput = engine.models["autoencoder"](
                images, draws.noise[part.rows], kept, draws.latent_side, disturbance
            )
            side = made.reconstruction.shape[-1]
            targets = shrink(images, side)
            perceptual = phase.perceptual if side >= SMALLEST_PERCEPTUAL_SIDE else 0.0
            reconstruction_loss, terms = self.loss(made.reconstruction, targets, step, perceptual)
            total = reconstruction_loss + sum(weights[name] * term for name, term in made.losses.items())
            if self.has_rate:
                kl = kl_divergence(made.mean, made.logvar).mean(dim=(0, 2, 3))
                total = total + self.rate.penalty(step, kl)
                sums.add({"kl": kl})
            if adversarial_loss and adversarial_loss.acts(step):
                assert draws.chance is not None
                with engine.accelerator.autocast():
                    adversarial = adversarial_loss.decoder_term(
                        engine.modules["discriminator"], made.reconstruction, targets, draws.chance[part.rows]
                    )
                if adversarial_loss.measures(step):
                    sums.add({"norms": squared_gradients(reconstruction_loss, adversarial, made.reconstruction)})
                total = total + adversarial_loss.weight(step) * adversarial
                terms["adversarial"] = adversarial
            engine.backward(total)
            sums.add({f"loss/{name}": term for name, term in (terms | made.losses).items()})
            sums.add({"reconstruction": reconstruction_loss})
            pairs.append((made.reconstruction.detach(), targets))
        metrics = {"optim/grad_norm": engine.optimize("autoencoder", step)}
        if self.has_rate:
            metrics |= self.observe_rate(step, engine.mean(sums.values.pop("kl")))
        if adversarial_loss:
            metrics |= self.observe_adversarial(step, sums.values, engine)
            if adversarial_loss.learns(step):
                metrics |= self.update_discriminator(step, batch, pairs, draws, engine)
        sums.values.pop("reconstruction")
        if (step + 1) % engine.config.log_every == 0:
            metrics |= self.health(made)
        return sums.values | metrics

    def update_discriminator(
        self, step: int, batch: Batch, pairs: list[tuple[Tensor, Tensor]], draws: StepNoise, engine: Engine
    ) -> dict[str, Tensor]:
        """The discriminator's own step, on the reconstructions that the decoder's step made."""
        assert self.adversarial_loss is not None
        assert draws.chance is not None
        sums = Sums(len(batch.parts))
        for part, (fake, real) in zip(engine.parts(batch), pairs):
            terms = self.adversarial_loss.discriminator_terms(
                engine.models["discriminator"], fake, real, draws.chance[part.rows], step
            )
            engine.backward(self.adversarial_loss.discriminator_total(terms))
            sums.add({f"adversarial/{name}": term for name, term in terms.items()})
        return sums.values | {"optim/discriminator_grad_norm": engine.optimize("discriminator", step)}

    def observe_rate(self, step: int, kl: Tensor) -> dict[str, Tensor]:
        """Move beta by the KL per channel (c,) of the whole batch; the figures to log."""
        beta = self.rate.beta(step)
        self.rate.observe(step, kl)
        nats = kl.mean()
        return {
            "loss/kl": nats,
            "rate/nats_per_dim": nats,
            "rate/bits_per_dim": bits_per_dimension(1.0) * nats,
            "rate/bits_per_pixel": bits_per_pixel(1.0, self.channels, self.factor) * nats,
            "rate/beta": beta,
        }

    def observe_adversarial(self, step: int, sums: dict[str, Tensor], engine: Engine) -> dict[str, Tensor]:
        """Calibrate and guard; on log steps, bring back the weights from before when it went too far."""
        assert self.adversarial_loss is not None
        if "norms" in sums:
            self.adversarial_loss.observe_ratio(engine.mean(sums.pop("norms")))
        self.adversarial_loss.observe_loss(step, engine.mean(sums["reconstruction"]))
        if (
            (step + 1) % engine.config.log_every == 0
            and self.before_adversarial
            and self.adversarial_loss.must_restore()
        ):
            for autoencoder in (self.autoencoder, self.averaged(engine)):
                autoencoder.load_state_dict(self.before_adversarial)
            engine.forget_moments("autoencoder")
            self.adversarial_loss.restored()
        return self.adversarial_loss.metrics(step)

    def health(self, made: ForwardOutput) -> dict[str, Tensor]:
        """The cheap part of the health report, from the last micro-batch of this process."""
        if made.indices is not None:
            assert self.autoencoder.codebook_size is not None
            usage = codebook_usage(made.indices, self.autoencoder.codebook_size)
            return {f"codebook/{name}": torch.tensor(value, device=made.mean.device) for name, value in usage.items()}
        return batch_health(made.mean, made.logvar) if self.has_rate else {}

    def draws(self, step: int, batch: Batch, device: torch.device) -> StepNoise:
        """Posterior noise, the disturbance, kept channels, the size after shrinking, the augmentation."""
        seed, latents, count = self.config.training.seed, self.config.latents, batch.global_size
        side = self.config.phase_at(step).crop // self.factor
        rng = generator(seed, "posterior", step, device=device)
        noise = torch.randn((count, self.channels, side, side), generator=rng, device=device)
        disturbance, kept, latent_side, chance = None, None, None, None
        if latents.decoder_noise:
            rng = generator(seed, "decoder_noise", step, device=device)
            strength = torch.randn((count, 1, 1, 1), generator=rng, device=device)
            white = torch.randn(noise.shape, generator=rng, device=device)
            disturbance = latents.decoder_noise * strength.abs() * white
        if latents.nested:
            rng = generator(seed, "nested", step)
            kept = channel_masks(list(latents.nested), self.channels, torch.rand(count, generator=rng)).to(device)
        if latents.scale_equivariance:
            share, choice = numpy_rng(seed, "scale", step).random(2)
            if share < latents.scale_equivariance:
                scale = latents.scales[int(choice * len(latents.scales))]
                latent_side = max(SMALLEST_LATENT_SIDE, round(scale * side))
        if self.adversarial_loss:
            chance = self.adversarial_loss.chance(step, count, device)
        return StepNoise(noise, disturbance, kept, latent_side, chance)

    def check_sizes(self) -> None:
        """Raises: UserError for sizes that the autoencoder cannot take, and for channel counts that it has not."""
        for phase in self.config.phases:
            if phase.crop % self.factor:
                raise UserError(f"phases: crop {phase.crop} is not a multiple of {self.factor}, the downsampling")
        for phase in self.config.phases:
            self.autoencoder.check_side("phases: crop", phase.crop)
        self.autoencoder.check_side("held_out_resolution:", self.config.held_out_resolution)
        if self.config.latents.scale_equivariance and self.autoencoder.only_side is not None:
            raise UserError("latents.scale_equivariance: the latents are one vector, which has no scale; leave it out")
        if any(count >= self.channels for count in self.config.latents.nested):
            raise UserError(f"latents.nested: {list(self.config.latents.nested)} are not all below {self.channels}")

    @property
    def measures_before_training(self) -> bool:
        """Those with statistics of the images inside, where they are new."""
        return self.config.initial is None and self.autoencoder.needs_statistics

    def averaged(self, engine: Engine) -> Any:
        """The autoencoder with EMA weights."""
        return engine.emas["autoencoder"].module.autoencoder

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        """What is wrong after `step` finished steps, from the metrics of a log step; each is raised once."""
        steps = self.config.plan(1).steps
        found = self.adversarial_loss.alarms(metrics) if self.adversarial_loss else []
        if step >= max(ALARMS_FROM * steps, ALARMS_FROM_STEP) and self.has_rate:
            found += training_alarms(
                dict(metrics),
                rate_mode=self.config.rate.mode,
                target_nats=self.config.rate.target_nats,
                beta=metrics["rate/beta"],
                pinned_share=float(self.rate.pinned_share),
                locked=self.rate.locked(step) and step >= 0.5 * (self.rate.lock_start + steps),
                steps=steps,
            )
        new = [verdict for verdict in found if verdict.name not in self._raised]
        self._raised |= {verdict.name for verdict in new}
        return new

    @torch.no_grad()
    def validate(self, engine: Engine) -> dict[str, float]:
        """PSNR and L1 of decode(mean) on held-out images, the rate on held-out training crops and on those images."""
        if self.held_out is None:
            return {}
        autoencoder = self.averaged(engine)
        squared, absolute = [], []
        for image in self.held_out.images.split(1):
            image = image.to(engine.device)
            with engine.accelerator.autocast():
                difference = autoencoder.reconstruct(image) - image
            squared.append((difference.square().mean() / 4).clamp(min=1e-10))
            absolute.append(difference.abs().mean())
        figures = {
            "held_out/psnr": float((-10 * torch.stack(squared).log10()).mean()),
            "held_out/l1": float(torch.stack(absolute).mean()),
        }
        if not self.modules["autoencoder"].deterministic:
            figures["held_out/nats_per_dim"] = self.nats(engine, self.held_out.crops.split(8))
            figures[WHOLE_IMAGES_NATS] = self.nats(engine, self.held_out.images.split(1))
        return figures

    def nats(self, engine: Engine, batches: Sequence[Tensor]) -> float:
        """The mean KL of the averaged weights in nats per latent dimension, over batches (n, 3, h, w)."""
        found = []
        for images in batches:
            with engine.accelerator.autocast():
                posterior = self.averaged(engine).encode(images.to(engine.device)).latent_dist
            found.append(kl_divergence(posterior.mean, posterior.logvar).mean(dim=(1, 2, 3)))
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def preview(self, engine: Engine) -> Image.Image | None:
        """Held-out inputs, reconstructions, boosted differences, and the discriminator's logits of them."""
        if self.held_out is None:
            return None
        images = self.held_out.images[:PREVIEW_IMAGES].to(engine.device)
        with engine.accelerator.autocast():
            reconstructions = self.averaged(engine).reconstruct(images)
            logits = engine.modules["discriminator"](reconstructions) if self.adversarial_loss else None
        return preview_sheet(images, reconstructions, logits)

    def export(self, engine: Engine, directory: Path, metrics: Mapping[str, float]) -> None:
        """Write `autoencoder/`: a diffusers directory with the EMA weights, and how it was made in training.json."""
        autoencoder = self.averaged(engine)
        with published_directory(directory / "autoencoder") as temporary:
            autoencoder.save_pretrained(temporary)
            write_record(
                temporary,
                autoencoder,
                self.config,
                final_beta=float(self.rate.beta(engine.steps)),
                pinned_share=float(self.rate.pinned_share),
                metrics_file=directory / "metrics.jsonl",
                held_out=metrics,
                enlarged={
                    "held_out_enlarged": len(self.held_out.enlarged) if self.held_out else 0,
                    "training_crops_enlarged": len(self.held_out.enlarged_crops) if self.held_out else 0,
                },
            )
            write_checksums(temporary)
        rate, side = self.config.rate, self.config.held_out_resolution
        if self.has_rate and rate.mode == "target" and WHOLE_IMAGES_NATS in metrics:
            crops_nats, images_nats = metrics["held_out/nats_per_dim"], metrics[WHOLE_IMAGES_NATS]
            say(f"{directory}: {whole_image_rate(rate.target_nats, crops_nats, images_nats, side)}")

    def random_samples(self, rows: slice, size: int | None) -> dict[str, Tensor]:
        assert size is not None
        return {"image": torch.randint(0, 256, (rows.stop - rows.start, 3, size, size), dtype=torch.uint8)}

    def state_dict(self) -> dict[str, Any]:
        adversarial = self.adversarial_loss.state_dict() if self.adversarial_loss else None
        return {
            "rate": self.rate.state_dict(), "game": adversarial, "alarms": sorted(self._raised), "images": self.images,
        }  # fmt: skip

    def check_state(self, state: dict[str, Any], step: int) -> None:
        """See `Model`. Raises: UserError when the run began on other images, unless `changed_data` allows it."""
        before, now = state.get("images"), self.images  # a checkpoint of an earlier release has none, nor a stream
        if before is None or now is None or before == now:
            return
        counts = f"{before['count']:,} images then, {now['count']:,} now"
        if before["count"] == now["count"]:
            counts = f"{pluralize(now['count'], 'image')} with other names, classes or sizes in bytes"
        what = f"the images are not those of the first {pluralize(step, 'step')} ({counts})"
        if self.config.changed_data == "refuse":
            instead = "give those, or another output, or go on with these images by changed_data=continue"
            raise UserError(self.config.output, what, instead)
        say(f"{self.config.output}: {what}; going on with these, as changed_data=continue asks")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {BEFORE_ADVERSARIAL: self.before_adversarial} if self.before_adversarial else {}

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]], step: int) -> None:
        self.rate.load_state_dict(state["rate"], step)
        self._raised = set(state["alarms"])
        if state["rate"].get("steps", self.rate.steps) != self.rate.steps:
            self._raised -= OF_THE_PLAN
        if self.adversarial_loss and state["game"]:
            self.adversarial_loss.load_state_dict(state["game"], step)
            if step > self.adversarial_loss.engage:
                self.before_adversarial = dict(tensors.get(BEFORE_ADVERSARIAL, {}))


def squared_gradients(reconstruction: Tensor, adversarial: Tensor, output: Tensor) -> Tensor:
    """(2,): the squared norm of each loss's gradient at the decoder's output."""
    norms = [
        torch.autograd.grad(loss, output, retain_graph=True)[0].float().square().sum()
        for loss in (reconstruction, adversarial)
    ]
    return torch.stack(norms)


# One forward pass of training: encode, sample, keep some channels, shrink, decode. All of it inside one module.


class ForwardOutput(NamedTuple):
    """What one forward pass gives.

    `reconstruction` (n, 3, h', w') of the images at its own size; `mean`, `logvar` (n, c, h/8, w/8), float32;
    `losses`: further scalar terms of a quantizer, `indices` (n, h/8, w/8) its codes (empty, None for other kinds).
    """

    reconstruction: Tensor
    mean: Tensor
    logvar: Tensor
    losses: dict[str, Tensor]
    indices: Tensor | None


class ForwardPass(nn.Module):
    """An autoencoder as it is trained.

    Args:
        autoencoder: any with `encode(x).latent_dist` and `decode(z).sample`.
        encoder_frozen: nothing before the latent is trained, so no gradient is computed there.
    """

    def __init__(self, autoencoder: Autoencoder, encoder_frozen: bool = False) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.encoder_frozen = encoder_frozen
        self.deterministic = autoencoder.deterministic

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        kept: Tensor | None = None,
        latent_side: int | None = None,
        disturbance: Tensor | None = None,
    ) -> ForwardOutput:
        """A training pass.

        Args:
            images: (n, 3, h, w) in [-1, 1].
            noise: standard normal, (n, c, h/8, w/8).
            kept: (n, c, 1, 1) of 0 and 1, the channels that the decoder gets; None: all.
            latent_side: the latents are shrunk to this side before they are decoded; None: as they are.
            disturbance: (n, c, h/8, w/8), added to the latents; None: nothing.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            posterior = self.autoencoder.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean if self.deterministic else mean + torch.exp(0.5 * logvar) * noise
        if disturbance is not None:
            latents = latents + disturbance
        if kept is not None:
            latents = latents * kept
        if latent_side is not None:
            latents = shrink(latents, latent_side)
        reconstruction, losses, indices = self.autoencoder.decode_with_losses(latents)
        return ForwardOutput(reconstruction, mean, logvar, losses, indices)


def shrink(images: Tensor, side: int) -> Tensor:
    """(n, c, h, w) -> (n, c, side, side), antialiased, float32."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)


def channel_masks(counts: list[int], channels: int, chance: Tensor) -> Tensor:
    """(n, channels, 1, 1): half of the rows keep all channels, the others the first `counts[i]`, equally often.

    `chance`: (n,) uniform in [0, 1).
    """
    choices = torch.tensor([*counts, *[channels] * len(counts)], device=chance.device)
    keep = choices[(chance * len(choices)).long()]
    return (torch.arange(channels, device=chance.device) < keep[:, None]).float()[:, :, None, None]


# Starting from an autoencoder that exists, and training only a part of it.


def start_from(path: str) -> Autoencoder:
    """The autoencoder at `path`, every parameter trainable, float32.

    Raises: UserError for diffusers' VQModel, whose codebook loss is of another shape.
    """
    autoencoder = load_autoencoder(path)
    if not autoencoder.trainable:
        raise UserError(
            f"initial={path}: diffusers' VQModel can be evaluated and encoded with, not trained here; "
            "train one with autoencoder.kind=vq"
        )
    return autoencoder.train().requires_grad_(True)


def select_trained(autoencoder: Autoencoder, names: list[str] | None) -> None:
    """Freeze every parameter whose name does not start with one of `names`; None leaves all as they are.

    `decoder` includes diffusers' `post_quant_conv`. Raises: UserError for a name that matches nothing.
    """
    if names is None:
        return
    prefixes = [*names, *(autoencoder.decoder_parts if "decoder" in names else ())]
    found = [name for name, _ in autoencoder.named_parameters()]
    for name in names:
        if not any(parameter.startswith(name) for parameter in found):
            parts = ", ".join(sorted({parameter.split(".")[0] for parameter in found}))
            raise UserError(f"train: no parameter's name starts with {name!r}; the parts are {parts}")
    for name, parameter in autoencoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(tuple(prefixes)))


def encoder_is_frozen(autoencoder: Autoencoder) -> bool:
    """Nothing that makes the latents is trained."""
    parameters = autoencoder.named_parameters()
    return not any(p.requires_grad for name, p in parameters if name.split(".")[0] not in autoencoder.decoder_parts)


# The preview: held-out images, their reconstructions, the differences, the discriminator's logits.

PREVIEW_IMAGES = 6
BOOST = 4.0


def preview_sheet(images: Tensor, reconstructions: Tensor, logits: Tensor | None = None) -> Image.Image:
    """Rows: inputs, reconstructions, their difference times 4 on gray, and the discriminator's logits as colors.

    Args:
        images, reconstructions: (n, 3, h, w) in [-1, 1].
        logits: (n, 1, h', w') of the reconstructions; None leaves the row out.
    """
    rows = [images, reconstructions, (BOOST * (reconstructions - images)).clamp(-1, 1)]
    if logits is not None:
        rows.append(heat_map(logits, images.shape[-1]))
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return transforms.to_pil(sheet[None].cpu())[0]


def heat_map(logits: Tensor, side: int) -> Tensor:
    """(n, 1, h, w) -> (n, 3, side, side) in [-1, 1]: blue where a patch passes for real, orange where it does not."""
    strength = torch.tanh(F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False))
    real, fake = strength.clamp(min=0), (-strength).clamp(min=0)
    gray = torch.full_like(strength, -0.6)
    return torch.cat([gray + 1.5 * fake, gray + 0.6 * fake + 0.5 * real, gray + 1.5 * real], dim=1).clamp(-1, 1)
