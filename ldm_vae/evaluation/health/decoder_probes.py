"""What an autoencoder does with latents that are exchanged, noisy, drawn from the prior, constant or coded repeatedly.

One function a probe, each on tensors that the caller chose; images are (n, 3, h, w) in [-1, 1] on the autoencoder's
device. Verdicts belong to `judgement.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.autoencoder.interface import decode, encode_moments
from ldm_vae.evaluation.metrics import psnr

BORDER = 8
NEAR = 4
NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4)
FLAT_COLOURS = {
    "dark": (-0.8, -0.8, -0.8),
    "grey": (0.0, 0.0, 0.0),
    "light": (0.8, 0.8, 0.8),
    "red": (0.6, -0.6, -0.6),
    "green": (-0.5, 0.4, -0.4),
    "blue": (-0.5, -0.3, 0.6),
}


def decode_all(autoencoder: Any, latents: Tensor, batch: int) -> Tensor:
    """Decode (n, c, h, w) in batches."""
    return torch.cat([decode(autoencoder, part) for part in latents.split(batch)])


def decoder_use(autoencoder: Any, latents: Tensor, batch: int) -> list[float]:
    """S_c: the change when channel c comes from another image, relative to that when all channels do, (c,).

    Each image's partner is half the set away. All NaN when exchanging everything changes nothing.
    """
    partners = latents.roll(len(latents) // 2, dims=0)
    changes = torch.zeros(latents.shape[1], dtype=torch.float64)
    whole = 0.0
    for rows, others in zip(latents.split(batch), partners.split(batch)):
        decoded = decode(autoencoder, rows)
        whole += float((decode(autoencoder, others) - decoded).double().square().sum())
        for channel in range(latents.shape[1]):
            exchanged = rows.clone()
            exchanged[:, channel] = others[:, channel]
            changes[channel] += float((decode(autoencoder, exchanged) - decoded).double().square().sum())
    return (changes / whole).tolist() if whole > 1e-9 * latents[:, :1].numel() else [float("nan")] * len(changes)


def hot_reach(autoencoder: Any, mean: Tensor, factor: int) -> list[float]:
    """Share of what a channel's hottest position does to the image that it does elsewhere, (c,); NaN: it does nothing.

    The position of `mean` (n, c, h, w) farthest from its channel's mean is set to that mean, and the images decoded
    before and after are compared; elsewhere is more than `NEAR` positions away (an eighth of a small latent's side).
    What describes its own place has nearly 0, what carries a gain of the whole image nearly 1.
    """
    average = mean.mean(dim=(0, 2, 3), keepdim=True)
    distances = (mean - average).abs()
    height, width = mean.shape[-2:]
    near = max(1, min(NEAR, min(height, width) // 8))
    shares = []
    for channel in range(mean.shape[1]):
        place = int(distances[:, channel].argmax())
        image, row, column = place // (height * width), place // width % height, place % width
        latents = mean[image : image + 1].expand(2, -1, -1, -1).clone()
        latents[1, channel, row, column] = average[0, channel, 0, 0]
        before, after = decode(autoencoder, latents).double()
        change = (after - before).square().sum(dim=0)
        rows, columns = (slice(max(0, at - near) * factor, (at + near + 1) * factor) for at in (row, column))
        total = float(change.sum())
        shares.append(1 - float(change[rows, columns].sum()) / total if total > 1e-9 else float("nan"))
    return shares


def permutation_ratio(images: Tensor, decoded: Tensor) -> float:
    """MSE of images decoded from another image's latents, relative to that of their own; 1 when latents say nothing."""
    right = (decoded - images).square().mean()
    wrong = (decoded.roll(len(decoded) // 2, dims=0) - images).square().mean()
    return float(wrong / right.clamp_min(1e-10))


def noise_curve(
    autoencoder: Any, images: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor, batch: int
) -> dict[float, float]:
    """PSNR in dB (mean over images) of decode(mean + tau * deviation * noise) by tau; tau = 0 is decode(mean).

    Args:
        deviation: (c,), of each channel over the data.
        noise: standard normal, shaped like the mean.
    """
    scaled = deviation.view(1, -1, 1, 1) * noise
    curve = {}
    for tau in (0.0, *NOISE_LEVELS):
        curve[tau] = float(psnr(decode_all(autoencoder, mean + tau * scaled, batch), images).mean())
    return curve


def noise_for_one_decibel(curve: dict[float, float]) -> float | None:
    """The tau at which the curve has lost 1 dB, the error linear in tau^2 between points; None beyond the last."""
    points = sorted(curve.items())
    errors = [(tau, 10 ** (-decibels / 10)) for tau, decibels in points]
    wanted = errors[0][1] * 10**0.1
    for (tau, error), (next_tau, next_error) in itertools.pairwise(errors):
        if next_error >= wanted:
            share = (wanted - error) / max(next_error - error, 1e-30)
            return float((tau**2 + share * (next_tau**2 - tau**2)) ** 0.5)
    return None


def cycle_error(autoencoder: Any, latents: Tensor, batch: int) -> float:
    """Root mean square of E(D(z)) - z, E being the posterior's mean."""
    squared = [
        (encode_moments(autoencoder, decode(autoencoder, part))[0] - part).square().mean(dim=(1, 2, 3))
        for part in latents.split(batch)
    ]
    return float(torch.cat(squared).mean().sqrt())


def round_trips(autoencoder: Any, images: Tensor, batch: int, count: int = 10) -> list[float]:
    """PSNR in dB against the originals after 1, 2 ... `count` times encoding and decoding the result again."""
    found = torch.zeros(count)
    for originals in images.split(batch):
        current = originals
        for trip in range(count):
            current = decode(autoencoder, encode_moments(autoencoder, current)[0])[..., : images.shape[-2], :]
            current = current[..., : images.shape[-1]]
            found[trip] += psnr(current, originals).sum().cpu()
    return (found / len(images)).tolist()


class BorderError:
    """Squared error of the outer 8 pixels, and of the four 8 x 8 corners, relative to the inner pixels."""

    def __init__(self) -> None:
        self.sums = {"outer": 0.0, "corner": 0.0, "inner": 0.0}
        self.counts = dict.fromkeys(self.sums, 0)

    def add(self, decoded: Tensor, images: Tensor) -> None:
        error = (decoded - images).square().mean(dim=1).double()
        edge = BORDER
        inner = error[:, edge:-edge, edge:-edge]
        corners = torch.cat([error[:, rows, :] for rows in (slice(None, edge), slice(-edge, None))], dim=1)
        corners = torch.cat([corners[..., :edge], corners[..., -edge:]], dim=-1)
        parts = {"inner": (float(inner.sum()), inner.numel()), "corner": (float(corners.sum()), corners.numel())}
        parts["outer"] = (float(error.sum()) - parts["inner"][0], error.numel() - inner.numel())
        for name, (total, count) in parts.items():
            self.sums[name] += total
            self.counts[name] += count

    def ratio(self, part: str) -> float:
        inner = self.sums["inner"] / max(1, self.counts["inner"])
        return self.sums[part] / max(1, self.counts[part]) / max(inner, 1e-12)


@dataclass(frozen=True)
class FlatField:
    """Constant colours decoded: `std` the largest deviation over colours and channels inside, `harmonics` the power at
    the stride's harmonics relative to their neighbours, `decoded` {colour: (3, h, w)}."""

    std: float
    harmonics: float
    decoded: dict[str, Tensor]


def flat_field(autoencoder: Any, resolution: int, stride: int, device: torch.device) -> FlatField:
    """Encode and decode constant images, and look at the inner half, away from what padding does.

    The ratio of powers has a floor: a periodic pattern far under one 8-bit level (a deviation of 0.0005) is none.
    """
    decoded = {}
    worst, ratios = 0.0, []
    margin = resolution // 4 // stride * stride
    for name, colour in FLAT_COLOURS.items():
        image = torch.tensor(colour, device=device).view(1, 3, 1, 1).expand(1, 3, resolution, resolution)
        result = decode(autoencoder, encode_moments(autoencoder, image)[0])[0].cpu()
        decoded[name] = result
        inner = result[:, margin : resolution - margin, margin : resolution - margin].double()
        worst = max(worst, float(inner.std(dim=(1, 2), unbiased=False).max()))
        ratios.append(harmonic_ratio(inner, stride))
    return FlatField(worst, max(ratios), decoded)


def harmonic_ratio(field: Tensor, stride: int) -> float:
    """Mean power of (c, h, w) at multiples of 1 / stride (not 0), relative to the bins around them; flat: 0."""
    side = min(field.shape[-2:]) // stride * stride
    if side < 4 * stride:  # harmonics and neighbours would touch
        return 0.0
    field = field[:, :side, :side]
    window = torch.hann_window(side, dtype=field.dtype)  # else slow shading would leak along the axes
    window = window / window.square().mean().sqrt()
    field = (field - field.mean(dim=(1, 2), keepdim=True)) * window * window[:, None]
    power = (torch.fft.fft2(field).abs() / side**2).square().mean(dim=0)
    step = side // stride
    distance = torch.minimum(torch.arange(side) % step, -torch.arange(side) % step)
    distance = torch.maximum(distance, distance[:, None])  # to the nearest harmonic; the window fills distance 1
    from_zero = torch.minimum(torch.arange(side), side - torch.arange(side))
    from_zero = torch.maximum(from_zero, from_zero[:, None])
    harmonics = (distance == 0) & (from_zero > 0)
    near = (distance == 2) & (from_zero > 2)
    floor = 0.0005**2 / int(harmonics.sum())
    return float(power[harmonics].mean() / (power[near].mean() + floor))


def droplet_score(autoencoder: Any, latents: Tensor) -> float | None:
    """Largest max|activation| / median|activation| over the decoder's stages; None where no stage can be seen.

    Normalising decoders grow isolated spikes of this kind ("droplets", Karras et al., arXiv:1912.04958).
    """
    scores: list[float] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            sizes = output.detach().float().abs()
            scores.append(float(sizes.max() / sizes.median().clamp_min(1e-6)))

    with _hooked(decoder_stages(autoencoder), look):
        decode(autoencoder, latents)
    return max(scores, default=None)


def decoder_stages(autoencoder: Any) -> list[nn.Module]:
    """The decoder's stages: the entries of its module lists, as in diffusers' `up_blocks` and our `stages`."""
    decoder = getattr(autoencoder, "decoder", None)
    if not isinstance(decoder, nn.Module):
        return []
    return [stage for child in decoder.children() if isinstance(child, nn.ModuleList) for stage in child]


@contextmanager
def _hooked(modules: list[nn.Module], look: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(look) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
