"""Fitting an entropy model to the latents of a set.

latents -> statistics of each channel (`static`) -> context networks trained in floats -> integers -> `FittedModel`
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.applications.codec import entropy_models
from ldm_vae.applications.codec.compression import codec_identity
from ldm_vae.applications.codec.entropy_models import (
    CROSS,
    EARLIER_CHANNELS,
    HIDDEN,
    LARGEST_ACTIVATION,
    MARGIN,
    OUTPUTS,
    ROLES,
    STEP_DENOMINATOR,
    VALUE_BITS,
    Grid,
    Pass,
    channel_units,
    flat_weights,
    input_count,
    passes,
    step_of,
)
from ldm_vae.applications.codec.format import LARGEST_INTEGER, EntropyKind, FittedModel
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import check_positive, plain_settings
from ldm_vae.errors import UserError
from ldm_vae.latents.dataset import LatentDataset, Posterior, evenly
from ldm_vae.latents.format import read_manifest
from ldm_vae.latents.inspect import check_autoencoder
from ldm_vae.random import numpy_rng
from ldm_vae.utils.progress import Progress, begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import duration_text, pluralize

STATISTICS_SAMPLES = 256
HELD_OUT = 0.1
"""The part of the ids that `data.held_out` keeps from every training is kept from this one, for the report."""
EVERY = 10
"""Where a set has none of them, as one of the training part, every tenth sample is kept instead."""
REPORTED_SAMPLES = 24
CROP = 64
"""Longest side of a training sample in latent positions."""
MOST_CONTEXT_CHANNELS = 64
QUALITIES = (5.0, 80.0)
"""Training draws the step of each batch from these."""
LEAST_SAMPLES = 20

LatentSamples = tuple[LatentDataset, np.ndarray]
"""A set and the numbers of some of its samples."""


@dataclass(frozen=True)
class CodecFitConfig:
    """`ldm-vae codec fit`.

    Compressed pictures get smaller than with `compress` alone. The model is a small file that belongs to the
    autoencoder. Compressing and decompressing both need it, and a picture names the one it was compressed with.
    `kind=context` trains small networks that predict each level from its decoded neighbors; `kind=static` keeps one
    distribution a channel.

      ldm-vae codec fit runs/mine latents=runs/latents output=runs/codec.safetensors

    Args:
        autoencoder: the autoencoder that made the latents: a diffusers directory, a run of `train-vae`, or a hub id.
        latents: the folder of a finished set with store=moments or mean, or its URL.
        output: the file to write, a .safetensors.
        kind: `context` (small networks over decoded neighbors) or `static` (one distribution per channel).
        steps: number of training steps, for `context`.
        batch: samples per step.
        learning_rate: initial value; it decays to zero along a cosine.
        seed: seed of the weights, samples and steps.
    """

    autoencoder: str = "???"
    latents: str = "???"
    output: str = "???"
    kind: EntropyKind = "context"
    steps: int = 1500
    batch: int = 8
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch", "learning_rate")


def fit_codec(config: CodecFitConfig, *, overwrite: bool = False, dry_run: bool = False) -> FittedModel | None:
    """Fit and write the file; prints the bits per level on held-out samples at quality 50.

    Args:
        dry_run: open everything and time a few steps; write nothing and return None.

    Raises:
        UserError: the output is there and not `overwrite`; the latents are codes, samples, too few, of another
            autoencoder, or not finite.
    """
    config = plain_settings(config)
    output = Path(config.output)
    if output.suffix != ".safetensors":
        raise UserError(f"output: {output} is not a name for an entropy model; let it end in .safetensors")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: is there already; give another output, or --overwrite")
    autoencoder = load_autoencoder(config.autoencoder)
    (dataset, fitted_on), held_out = _split(config)
    _check(config, dataset, autoencoder)
    samples = f"{pluralize(len(fitted_on), 'sample')} of {config.latents}, {len(held_out[1]):,} others held out"
    steps = f"{pluralize(config.steps, 'step')} of {config.batch}" if config.kind == "context" else ""
    begin("codec fit", samples, f"a {config.kind} model", steps, config.autoencoder, f"to {output}")
    statistics = _statistics(config, dataset, autoencoder, fitted_on)
    if dry_run:
        end_dry_run(output, _expected(config, dataset, statistics, fitted_on))
        return None
    model = statistics
    if config.kind == "context":
        model = _with_networks(statistics, _train(config, dataset, statistics, fitted_on))
    model.save(output)
    bits = _report(statistics, model, *held_out)
    say("held out, quality 50: " + ", ".join(f"{name} {value:.3f} bits per level" for name, value in bits.items()))
    words = ["ldm-vae", "codec", "bench", config.autoencoder, f"entropy={output}", f"output={beside(output, 'bench')}"]
    end(output, f"{model.kind} model of {pluralize(model.channels, 'channel')}, {model.fingerprint}", words)
    return model


TIMED_STEPS = 3


def _expected(config: CodecFitConfig, dataset: LatentDataset, statistics: FittedModel, indices: np.ndarray) -> str:
    """How long the training takes, from a few steps of it."""
    if config.kind != "context":
        return "a few seconds"
    started = time.monotonic()
    _train(replace(config, steps=TIMED_STEPS), dataset, statistics, indices, shown=False)
    seconds = (time.monotonic() - started) / TIMED_STEPS * config.steps
    return f"{pluralize(config.steps, 'step')} take about {duration_text(seconds)}"


def _check(config: CodecFitConfig, dataset: LatentDataset, autoencoder: Autoencoder) -> None:
    content, channels = dataset.manifest.content, dataset.manifest.latent_shape[0]
    if content not in ("moments", "mean"):
        raise UserError(
            f"{config.latents}: holds {content}, and files hold posterior means; encode with store=moments or mean"
        )
    check_autoencoder(dataset.manifest, autoencoder, f"autoencoder: {config.autoencoder}")
    if len(dataset) < LEAST_SAMPLES:
        raise UserError(
            f"{config.latents}: {pluralize(len(dataset), 'sample')} cannot be enough; give {LEAST_SAMPLES} or more"
        )
    if config.kind == "context" and channels > MOST_CONTEXT_CHANNELS:
        raise UserError(
            f"kind: context is for up to {MOST_CONTEXT_CHANNELS} channels, these latents have {channels}; use static"
        )


def _split(config: CodecFitConfig) -> tuple[LatentSamples, LatentSamples]:
    """Samples to fit to, and those to report on."""
    content = read_manifest(config.latents).content
    posterior: Posterior | None = "moments" if content == "moments" else None
    try:
        fitted, held = (
            LatentDataset(config.latents, posterior=posterior, part=part, held_out=HELD_OUT)
            for part in ("train", "held_out")
        )
        return (fitted, np.arange(len(fitted))), (held, np.arange(len(held)))
    except UserError:  # of one part alone, or damaged: then this fails too
        whole = LatentDataset(config.latents, posterior=posterior)
        kept = np.arange(len(whole)) % EVERY == EVERY - 1
        return (whole, np.flatnonzero(~kept)), (whole, np.flatnonzero(kept))


def moments(dataset: LatentDataset, indices: Any) -> tuple[Tensor, Tensor | None]:
    """Posterior means (n, c, h, w), and log-variances where they are stored, float32. Raises: UserError for NaN."""
    chosen = [int(i) for i in indices]
    if dataset.manifest.content == "moments":
        mean, logvar = dataset[chosen]["moments"].float().chunk(2, dim=1)
    else:
        mean, logvar = dataset[chosen]["latent"], None
    if not bool(torch.isfinite(mean).all()):
        raise UserError(f"{dataset.where}: holds latents that are not finite; encode again with a healthy autoencoder")
    return mean, logvar


def _statistics(
    config: CodecFitConfig, dataset: LatentDataset, autoencoder: Autoencoder, indices: np.ndarray
) -> FittedModel:  # fmt: skip
    mean, logvar = moments(dataset, indices[evenly(len(indices), STATISTICS_SAMPLES)])
    units = channel_units(mean, None if autoencoder.deterministic else logvar)
    center = mean.double().mean(dim=(0, 2, 3)).numpy()
    deviation = mean.double().std(dim=(0, 2, 3), correction=0).clamp_min(1e-6).numpy()
    normal = (mean.double().numpy() - center[:, None, None]) / deviation[:, None, None]
    one = 1 << entropy_models.RATIO_BITS
    ratios = tuple(_integer(float(u / d) * one) for u, d in zip(units, deviation, strict=True))
    scales = tuple(_integer(_logistic_scale(normal[:, c]) * one) for c in range(len(center)))
    return FittedModel("static", codec_identity(autoencoder), center, units, ratios, scales)


def _integer(value: float) -> int:
    """Rounded, within what the file allows: a dead channel has next to no deviation."""
    return min(max(1, round(value)), LARGEST_INTEGER - 1)


def _logistic_scale(values: np.ndarray) -> float:
    """The scale at which a logistic density of mean 0 gives the values the highest likelihood, to 2 %."""
    sample = np.abs(values.reshape(-1)[:: max(1, values.size // 100_000)])
    scales = 2.0 ** (np.arange(-160, 64) / 32)
    cost = [float(np.mean(sample / s + 2 * np.log1p(np.exp(-sample / s)) + np.log(s))) for s in scales]
    return float(scales[int(np.argmin(cost))])


class ContextNetworks(nn.Module):
    """The networks of all channels and roles in floats, with the layout of `integer_network.shapes`."""

    def __init__(self, channels: int, scales: np.ndarray, generator: torch.Generator) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict()
        for channel in range(channels):
            for role in range(ROLES):
                inputs = input_count(channel, role)
                made = {
                    "first": torch.randn(inputs, HIDDEN, generator=generator) / math.sqrt(inputs),
                    "first_bias": torch.zeros(HIDDEN),
                    "second": torch.randn(HIDDEN, HIDDEN, generator=generator) * math.sqrt(2 / HIDDEN),
                    "second_bias": torch.zeros(HIDDEN),
                    "last": 0.1 * torch.randn(HIDDEN, OUTPUTS, generator=generator) / math.sqrt(HIDDEN),
                    "direct": torch.zeros(inputs, OUTPUTS),
                    "last_bias": torch.tensor([0.0, math.log2(float(scales[channel]))]),
                }
                for name, tensor in made.items():
                    self.tensors[f"{channel}_{role}_{name}"] = nn.Parameter(tensor)

    def of(self, channel: int, role: int) -> dict[str, Tensor]:
        names = ("first", "first_bias", "second", "second_bias", "last", "direct", "last_bias")
        return {name: self.tensors[f"{channel}_{role}_{name}"] for name in names}

    def forward(self, inputs: Tensor, channel: int, role: int) -> Tensor:
        """(n, inputs) -> (n, 2): mean and log2 of the scale, in standard deviations."""
        t, most = self.of(channel, role), float(LARGEST_ACTIVATION >> VALUE_BITS)
        hidden = (inputs @ t["first"] + t["first_bias"]).clamp(0, most)
        hidden = (hidden @ t["second"] + t["second_bias"]).clamp(0, most)
        return hidden @ t["last"] + inputs @ t["direct"] + t["last_bias"]


def _train(
    config: CodecFitConfig, dataset: LatentDataset, statistics: FittedModel, indices: np.ndarray, shown: bool = True
) -> Any:
    """Networks that minimize the code length of levels at random steps."""
    one = 1 << entropy_models.RATIO_BITS
    networks = ContextNetworks(
        statistics.channels, np.array(statistics.scales) / one, torch.Generator().manual_seed(config.seed)
    )
    optimizer = torch.optim.Adam(networks.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    bar = Progress("codec fit", config.steps, "step", shown=shown)
    for number in range(config.steps):
        rng = numpy_rng(config.seed, "codec", number)
        dataset.set_epoch(number)  # another choice between images and their mirror images
        step = step_of(float(rng.uniform(*QUALITIES)))
        mean, _ = moments(dataset, rng.choice(indices, size=min(config.batch, len(indices)), replace=False))
        levels = _levels(statistics, _crop(mean, rng).double().numpy(), step)
        loss = code_length(networks, levels, statistics, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.advance(1, f"{loss.item():.3f} bits per level" if number % 50 == 0 else None)
    bar.close()
    return networks


def _crop(mean: Tensor, rng: np.random.Generator) -> Tensor:
    height, width = mean.shape[-2:]
    top, left = (int(rng.integers(max(0, side - CROP) + 1)) for side in (height, width))
    return mean[..., top : top + CROP, left : left + CROP]


def _levels(model: FittedModel, means: np.ndarray, step: int) -> np.ndarray:
    """Latents (n, c, h, w) -> levels, int64."""
    return Grid(model.mean, model.unit, step).quantize(means, "latents")


def code_length(networks: ContextNetworks, levels: np.ndarray, model: FittedModel, step: int) -> Tensor:
    """Mean bits per level of (n, c, h, w): a logistic distribution of the predicted mean and scale over each level."""
    widths = np.array(model.ratios) * step / (1 << entropy_models.RATIO_BITS) / STEP_DENOMINATOR
    margins = ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))
    values = torch.from_numpy(np.pad(levels * widths[:, None, None], margins).astype(np.float32))
    bits = torch.zeros(())
    for channel, width in enumerate(map(float, widths)):
        for part in passes(*levels.shape[-2:]):
            predicted = networks(_inputs(values, channel, part, width), channel, part.role)
            own = values[(slice(None), channel, *part.window())].reshape(-1)
            bits = bits + logistic_bits(own, predicted, width).sum()
    return bits / levels.size


def _inputs(values: Tensor, channel: int, part: Pass, width: float) -> Tensor:
    """As `entropy_models.gather` in floats: (n * positions, inputs)."""
    earlier = range(max(0, channel - EARLIER_CHANNELS), channel)
    places = [(channel, place) for place in part.neighbors] + [(other, place) for other in earlier for place in CROSS]
    found = [values[(slice(None), other, *part.window(*place))].reshape(-1) for other, place in places]
    count = values[(slice(None), channel, *part.window())].numel()
    found.append(torch.full((count,), math.floor(16 * math.log2(width)) / 16))
    return torch.stack(found, dim=-1).clamp(-16, 16)


def logistic_bits(values: Tensor, predicted: Tensor, width: float) -> Tensor:
    """-log2 of the probability of cells of `width` around values (n,); stable however small it is."""
    mean, scale = predicted[:, 0], torch.exp2(predicted[:, 1].clamp(-12, 6)).clamp_min(width / 16)
    distance = (values - mean).abs()
    upper, lower = (0.5 * width - distance) / scale, (-0.5 * width - distance) / scale
    log_probability = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width / scale))
    return -log_probability / math.log(2)


def _with_networks(statistics: FittedModel, networks: ContextNetworks) -> FittedModel:
    weights = {}
    for channel in range(statistics.channels):
        for role in range(ROLES):
            floats = {name: tensor.detach().numpy() for name, tensor in networks.of(channel, role).items()}
            weights[channel, role] = flat_weights(floats, input_count(channel, role))
    return FittedModel(
        "context", statistics.autoencoder, statistics.mean, statistics.unit, statistics.ratios, statistics.scales,
        weights,
    )  # fmt: skip


def _report(
    statistics: FittedModel, model: FittedModel, dataset: LatentDataset, held_out: np.ndarray
) -> dict[str, float]:
    """Bits per level on held-out samples at quality 50, with the integers that the codec uses."""
    chosen = held_out[evenly(len(held_out), REPORTED_SAMPLES)]
    step = step_of(50.0)
    levels = _levels(statistics, moments(dataset, chosen)[0].double().numpy(), step)
    return {
        kind.kind: float(np.mean([entropy_models.ideal_bits(kind.at(step), one) / one.size for one in levels]))
        for kind in {"static": statistics, model.kind: model}.values()
    }
