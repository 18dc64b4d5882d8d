"""The health report in words (`health.md`) and as one self-contained page (`index.html`).

Owns rows, pictures and their captions; words and look are in `templates/diagnosis.html`. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ldm_vae.autoencoder.verdicts import RULES, Verdict
from ldm_vae.data import pixels
from ldm_vae.evaluation.fidelity.examples import DIFFERENCE_GAIN
from ldm_vae.evaluation.health import diagnosis_plots
from ldm_vae.evaluation.health.health_figures import Measured
from ldm_vae.evaluation.html_pages import Picture, embed_image, template_environment

Report = dict[str, Any]

SHOWN_IMAGES = 4
SHOWN_CHANNELS = 8
FLAT_GAIN = 20
CHANNEL_COLUMNS = {
    "nats": "KL (nats)",
    "information_nats": "MI (nats)",
    "variance": "Var μ",
    "noise": "E σ²",
    "capacity_bits": "capacity (bits)",
    "image_variance": "between images",
    "static_share": "static",
    "passive_share": "passive",
    "clamp_share": "clamped",
    "decoder_use": "decoder use",
    "hot_sigmas": "hottest (σ)",
    "hot_reach": "its effect elsewhere",
    "tail_share": "tail",
    "skewness": "skewness",
    "kurtosis": "kurtosis",
    "neighbour_correlation": "neighbours",
}


def global_rows(report: Report) -> list[tuple[str, str]]:
    """Name and formatted value of every quantity that is not of one channel; absent ones are `n/a`."""
    rate, latents, decoder = report["rate"], report["latents"], report["decoder"]
    rows: list[tuple[str, Any, str]] = [
        ("Rate", rate["nats_per_dim"], "nats per latent dimension"),
        ("Rate", rate["bits_per_dim"], "bits per latent dimension"),
        ("Rate", rate["bits_per_pixel"], "bits per pixel"),
        ("Median log-variance", rate["median_logvar"], ""),
        ("Noise share, E σ² / (Var μ + E σ²)", rate["noise_share"], ""),
        ("Effective rank per channel", latents["effective_rank"], ""),
        ("Largest correlation of two channels", latents["correlation"], ""),
        ("MMD² of normalised latents to N(0, I)", latents["mmd2"], f"p = {_number(latents['mmd_p_value'])}"),
        ("Spectral slope of the images", latents["image_slope"], "(power = f^-slope)"),
        ("Spectral slope of the latents", latents["latent_slope"], ""),
        ("Power above half of Nyquist, means", latents["high_frequency_share_mean"], ""),
        ("Power above half of Nyquist, samples", latents["high_frequency_share_sample"], ""),
        ("PSNR of decode(mean)", decoder["psnr_mean"], "dB"),
        ("PSNR of decode(sample)", decoder["psnr_sample"], "dB"),
        ("PSNR over the linear code of as many numbers", decoder.get("linear_margin_db"), "dB"),
        ("Stochastic gap", decoder["gap_db"], "dB"),
        ("Noise that costs 1 dB", decoder["noise_for_one_decibel"], "standard deviations of the channel"),
        ("Noise that costs 1 dB", decoder["tolerance"], "posterior standard deviations"),
        ("Error with another image's latents", decoder["permutation"], "times the own"),
        ("Round-trip error of prior samples", decoder["cycle_ratio"], "times that of posterior samples"),
        ("Loss over 10 round trips", decoder["round_trip_drift_db"], "dB"),
        ("Deviation on constant colour", decoder["flat_std"], "of the range −1 to 1"),
        ("Power at the stride's harmonics there", decoder["harmonics"], "times the neighbours"),
        ("Error of the outer 8 pixels", decoder["border_ratio"], "times the inner"),
        ("Error of the corners", decoder["corner_ratio"], "times the inner"),
        ("Largest activation in the decoder", decoder["droplet_score"], "times the stage's median"),
    ]
    return [(name, f"{_number(value)} {unit}".strip() if value is not None else "n/a") for name, value, unit in rows]


def markdown(report: Report) -> str:
    """`health.md`: verdicts, the table per channel, the other figures, the protocol."""
    lines = [f"- {verdict['sentence']}" for verdict in report["verdicts"]] or ["No verdict: nothing is wrong."]
    lines += ["", "| channel | " + " | ".join(CHANNEL_COLUMNS.values()) + " |", "|---|" + "---|" * len(CHANNEL_COLUMNS)]
    for index, channel in enumerate(report["channels"]):
        lines.append(f"| {index} | " + " | ".join(_number(channel.get(key)) for key in CHANNEL_COLUMNS) + " |")
    lines += ["", "| quantity | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in global_rows(report)]
    protocol, autoencoder = report["protocol"], report["autoencoder"]
    images = protocol["images"]
    lines += [
        "",
        f"{images['count']} images ({images['part']}), {protocol['resolution']} x {protocol['resolution']}, "
        f"{protocol['precision']}, seed {protocol['seed']}.",
        f"Autoencoder {autoencoder['class']}, {autoencoder['fingerprint']}.",
    ]
    return "\n".join(lines) + "\n"


def render(report: Report, found: Sequence[Verdict], measured: Measured) -> str:
    """The page as HTML text."""
    from markupsafe import Markup

    context = {
        "report": report,
        "headline": headline(found),
        "groups": [(name, list(group)) for name, group in groupby(found, key=lambda v: (v.severity, v.name, v.cause))],
        "rules": RULES,
        "plots": [
            (title, unit, caption, Markup(svg)) for title, unit, caption, svg in _plots(report) if svg is not None
        ],
        "columns": CHANNEL_COLUMNS,
        "rows": global_rows(report),
        "number": _number,
        "examples": _examples(measured),
        "flat": _flat(measured),
        "flat_gain": FLAT_GAIN,
        "prior": _pictures(measured.prior_images, "prior sample"),
        "difference_gain": DIFFERENCE_GAIN,
    }
    return template_environment().get_template("diagnosis.html").render(context)


def headline(found: Sequence[Verdict]) -> str:
    """What the page opens with."""
    failures = {verdict.name for verdict in found if verdict.severity == "fail"}
    warnings = {verdict.name for verdict in found if verdict.severity == "warn"}
    if not failures and not warnings:
        return "This autoencoder is healthy"
    words = [
        f"{len(names)} {word}{'s' if len(names) > 1 else ''}"
        for names, word in ((failures, "failure"), (warnings - failures, "warning"))
        if names
    ]
    return " and ".join(words)


def _plots(report: Report) -> list[tuple[str, str, str, str | None]]:
    """Title, unit, caption and SVG."""
    capacity = RULES["ignored_channel"].limits["capacity_bits"].warn
    return [
        (
            "KL per channel",
            "nats per latent dimension",
            "How far the posteriors are from the prior: what the channel is charged for.",
            diagnosis_plots.channel_bars(report, "nats", "KL per channel"),
        ),
        (
            "Capacity per channel",
            "bits per position",
            "What the channel could carry at its signal-to-noise ratio.",
            diagnosis_plots.channel_bars(report, "capacity_bits", "Capacity per channel", capacity),
        ),
        (
            "Decoder use",
            "share of the change when all channels are exchanged",
            "How much the picture changes when this channel comes from another image.",
            diagnosis_plots.channel_bars(report, "decoder_use", "Decoder use per channel"),
        ),
        (
            "Posterior means",
            "density over images and positions",
            "Without the outer 0.1 % on each side.",
            diagnosis_plots.histograms(report, "mean_histograms", "Posterior means per channel", "μ"),
        ),
        (
            "Posterior deviations",
            "density over images and positions",
            "One is the prior: a channel that sits there says nothing.",
            None
            if report["rate"]["deterministic"]
            else diagnosis_plots.histograms(report, "deviation_histograms", "Posterior deviations per channel", "σ"),
        ),
        (
            "Noise on the latents",
            "PSNR in dB",
            "How gently the decoder fails off the posterior mean; the dotted line is 1 dB below it.",
            diagnosis_plots.noise_curve(report),
        ),
        (
            "Power spectra",
            "relative to the lowest frequency",
            "Latents that fall off like images are easier for a diffusion model.",
            diagnosis_plots.spectra(report),
        ),
        (
            "Repeated coding",
            "PSNR in dB",
            "Encoding the decoded picture again, ten times.",
            diagnosis_plots.round_trips(report),
        ),
        (
            "During training",
            "from training.json",
            "The weight that the controller chose, and the rate it led to.",
            diagnosis_plots.beta_path(report),
        ),
    ]


def _examples(measured: Measured) -> list[dict[str, Any]]:
    """Per shown image: pictures in a row, and its latent channels, mean ± 3 deviations from black to white."""
    probes = measured.probes
    channels = measured.figures["channels"][:SHOWN_CHANNELS]
    found = []
    for index in range(min(SHOWN_IMAGES, len(probes.images))):
        mean, sample = measured.decoded_mean[index], measured.decoded_sample[index]
        difference = (DIFFERENCE_GAIN * (sample - mean)).clamp(-1, 1)
        row = {"original": probes.images[index], "decode(mean)": mean, "decode(sample)": sample}
        row["sample − mean"] = difference
        maps = [
            _picture(
                _grey(probes.mean[index, c], channel["mean"], channel["variance"]), f"channel {c} of image {index}"
            )
            for c, channel in enumerate(channels)
        ]
        found.append({"row": [(name, _picture(image, name)) for name, image in row.items()], "maps": maps})
    return found


def _flat(measured: Measured) -> list[tuple[str, Picture]]:
    """Constant colours, decoded: the distance from their own mean, times 20, on grey."""
    found = []
    for name, image in measured.flat.decoded.items():
        boosted = (FLAT_GAIN * (image - image.mean(dim=(1, 2), keepdim=True))).clamp(-1, 1)
        found.append((name, _picture(boosted, f"{name}, decoded, contrast times {FLAT_GAIN}")))
    return found


def _grey(latent: Tensor, mean: float, variance: float) -> Tensor:
    deviation = max(variance, 1e-12) ** 0.5
    return ((latent - mean) / (3 * deviation)).clamp(-1, 1).expand(3, *latent.shape)


def _pictures(images: Tensor, text: str) -> list[Picture]:
    return [_picture(image, f"{text} {number + 1}") for number, image in enumerate(images)]


def _picture(image: Tensor, text: str) -> Picture:
    return embed_image(pixels.to_pil(image[None].to(torch.float32).cpu())[0], text)


def _number(value: float | None) -> str:
    """Three significant digits, a true minus sign; n/a for None."""
    if value is None:
        return "n/a"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.3e}" if abs(value) >= 1e6 else f"{value:,.0f}"
    return text.replace("-", "−")
