"""The plots of a health report, from the content of `health.json`: one SVG a quantity, in the look of `figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm_vae.evaluation.figures import COLOURS, INK, legend, new_figure
from ldm_vae.evaluation.plots import page_svg

Report = dict[str, Any]
NAMED_CHANNELS = 8
"""Up to so many channels have their own colour and a name in the legend."""


def channel_bars(report: Report, key: str, title: str, threshold: float | None = None) -> str | None:
    """One bar a channel, a dotted line at the threshold; None where the quantity does not apply."""
    values = [channel[key] for channel in report["channels"]]
    if all(value is None for value in values):
        return None
    figure, (axes,) = new_figure(height=2.6)
    axes.bar(range(len(values)), [value or 0.0 for value in values], color=COLOURS[0], width=0.7)
    if threshold is not None:
        axes.axhline(threshold, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.set_xlabel("channel")
    axes.grid(False, axis="x")
    if len(values) <= 32:
        axes.set_xticks(range(len(values)))
    return page_svg(figure, title)


def histograms(report: Report, key: str, title: str, label: str) -> str:
    """The distribution of a posterior moment, one outline a channel, as densities."""
    found = report["curves"][key]
    figure, (axes,) = new_figure(height=2.6)
    few = len(found) <= NAMED_CHANNELS
    for channel, histogram in enumerate(found):
        edges, shares = histogram["edges"], histogram["shares"]
        width = edges[1] - edges[0]
        axes.stairs(
            [share / width for share in shares],
            edges,
            linewidth=1.4 if few else 0.8,
            alpha=1.0 if few else 0.5,
            color=COLOURS[channel % len(COLOURS)],
            label=f"channel {channel}" if few else None,
        )
    axes.set_xlabel(label)
    axes.set_yticks([])
    legend(axes)
    return page_svg(figure, title)


def noise_curve(report: Report) -> str:
    """PSNR of decode(mean + tau * deviation * noise) over tau; the level 1 dB below decode(mean) is dotted."""
    curve = report["decoder"]["noise_curve"]
    figure, (axes,) = new_figure(height=2.6)
    values = list(curve.values())
    axes.plot([float(tau) for tau in curve], values, marker="o", markersize=4)
    axes.axhline(values[0] - 1.0, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.set_xlabel("noise, in standard deviations of the channel")
    axes.set_ylabel("PSNR in dB")
    return page_svg(figure, "PSNR with noise on the latents")


def spectra(report: Report) -> str:
    """Radial power of images and latents, each relative to its lowest bin, over frequency relative to Nyquist."""
    figure, (axes,) = new_figure(height=2.6)
    names = {"image": "images", "latent_mean": "latents, mean", "latent_sample": "latents, sample"}
    for name, label in names.items():
        curve = report["curves"][name]
        pairs = [(f / 0.5, p) for f, p in zip(curve["frequency"], curve["power"]) if p > 0]
        if pairs:
            first = pairs[0][1]
            axes.plot([f for f, _ in pairs], [p / first for _, p in pairs], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("frequency, relative to Nyquist")
    axes.set_ylabel("power")
    legend(axes)
    return page_svg(figure, "Power spectra of images and latents")


def round_trips(report: Report) -> str:
    """PSNR against the original after each further round trip."""
    values: Sequence[float] = report["decoder"]["round_trips"]
    figure, (axes,) = new_figure(height=2.6)
    axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4)
    axes.set_xlabel("round trips")
    axes.set_ylabel("PSNR in dB")
    return page_svg(figure, "PSNR after repeated coding")


def beta_path(report: Report) -> str | None:
    """The KL weight over the training, and the rate it led to; None where training.json does not have it."""
    path = report["training"].get("rate", {}).get("beta_path")
    if not path:
        return None
    figure, (axes, rate) = new_figure(width=2.9, height=2.6, columns=2)
    steps = [row[0] for row in path]
    axes.plot(steps, [row[1] for row in path])
    if min(row[1] for row in path) > 0:
        axes.set_yscale("log")
    axes.set_title("weight β")
    rate.plot(steps, [row[2] for row in path], color=COLOURS[1])
    rate.set_title("nats per dimension")
    target = report["training"]["rate"].get("target_nats")
    if target and report["training"]["rate"].get("mode") == "target":
        rate.axhline(target, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    for each in (axes, rate):
        each.set_xlabel("step")
    return page_svg(figure, "The weight of the KL term and the rate during training")
