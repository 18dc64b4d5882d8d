"""The health report of an autoencoder: its settings, the protocol, and the result folder.

`health.json` holds every figure and verdict, `health.md` the same in words, `index.html` the page.
The figures are measured by `health_metrics.py`; `verdicts` compares them with the rules of `autoencoder/health.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.autoencoder.health import RULES, Severity, Verdict, by_severity, check_rule, severity_of_rate
from ldm_vae.autoencoder.lineage import RECORD, read_record
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import check_positive
from ldm_vae.data import open_source, transforms
from ldm_vae.data.samples import Enlarged, Rejected, evenly_spaced, none_readable, read_crops
from ldm_vae.data.sources import DataConfig, ImageSource
from ldm_vae.data.split import Part, subset
from ldm_vae.data.survey import describe_images
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.health_metrics import Figures, Measured, dead_channels, measure
from ldm_vae.evaluation.pages import Picture, embed_image, template_environment
from ldm_vae.evaluation.plots import COLORS, INK, legend, new_figure, page_svg
from ldm_vae.evaluation.reconstruction import DIFFERENCE_GAIN
from ldm_vae.evaluation.study import Study, StudyPlan, check_resolution, enlarged_lines, rejected_images
from ldm_vae.runtime import compute_device
from ldm_vae.utils.progress import beside, track
from ldm_vae.utils.text import markdown_table

Report = dict[str, Any]

SMALLEST_RESOLUTION = 64


@dataclass(frozen=True)
class DiagnoseConfig:
    """`ldm-vae diagnose`.

    Works on any diffusers autoencoder. Writes health.json, health.md and index.html into the output folder, by default
    health/ in the autoencoder's directory; each verdict comes with its threshold, its likely cause and the knob to
    turn. A finished report is not redone.

      ldm-vae diagnose runs/mine data=~/images
      ldm-vae diagnose runs/mine data=~/images output=runs/health

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the report.
        part: held_out (not used in training), its halves validation and test, train or all.
        resolution: side of the center crop in pixels, a multiple of the downsampling, at least 64; for an autoencoder
            of one size, that size.
        count: largest number of images, evenly spread over the part. 256 make the figures comparable between runs.
        batch: images per forward pass.
        seed: seed of the posterior samples and of all other noise.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 256
    count: int = 256
    batch: int = 8
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "batch", "count")


def diagnose(config: DiagnoseConfig, overwrite: bool = False, dry_run: bool = False) -> Report:
    """Measure, find verdicts, write the report, return the content of `health.json`.

    A folder that holds the finished report of these settings is read, not redone.

    Raises:
        UserError: the folder holds a report of other settings or of another autoencoder, and not `overwrite`; there
            are fewer than 8 readable images.
    """
    return Diagnosis(config, overwrite).run(dry_run)


class Diagnosis(Study):
    """The study of `ldm-vae diagnose`."""

    results_file, markdown_file = "health.json", "health.md"
    command, product = "diagnose", "the health report"
    config: DiagnoseConfig

    def __init__(self, config: DiagnoseConfig, overwrite: bool) -> None:
        self.device = compute_device(config.device)
        autoencoder = load_autoencoder(config.autoencoder).to(self.device)
        super().__init__(config, autoencoder, overwrite=overwrite)
        check_resolution(config.resolution, autoencoder)
        if config.resolution < SMALLEST_RESOLUTION and autoencoder.only_side is None:
            raise UserError(f"resolution: {config.resolution} is under {SMALLEST_RESOLUTION}; 256 is usual")

    def prepare(self) -> None:
        self.source = subset(open_source(self.config.data), self.config.part, self.config.data.held_out)
        self.chosen = evenly_spaced(len(self.source), self.config.count)

    def work(self) -> StudyPlan:
        config = self.config
        images = describe_images(self.source, len(self.chosen))
        what = (images, f"part {config.part}", f"{config.resolution} pixels", config.autoencoder, str(self.device))
        return StudyPlan(what, self.source, self.chosen, config.resolution)

    def then(self, results: Report) -> list[str]:
        config = self.config
        words = ["ldm-vae", "encode", config.autoencoder, *config.data.words(), f"resolution={config.resolution}"]
        return [] if failed(results) else [*words, f"output={beside(config.autoencoder, 'latents')}"]

    def measure(self) -> Report:
        config, chosen = self.config, self.chosen
        rejected: list[tuple[str, str]] = []
        images = read_images(self.source, chosen, config, rejected, self.enlarged)
        training = training_record(config.autoencoder)
        plain = is_plain(training.get("rate", {}))
        self.measured = measure(self.autoencoder, images, len(chosen), config.batch, config.seed, self.device, plain)
        figures = self.measured.figures
        self.verdicts = verdicts(figures, training.get("rate", {}))
        return {
            "protocol": _protocol(config, self.source, figures["images"]["count"]),
            "training": training,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            **figures,
            "rejected": rejected_images(rejected),
        }

    def markdown(self, results: Report) -> str:
        return markdown(results)

    def page(self, results: Report) -> str:
        return render(results, self.verdicts, self.measured)

    def record(self, results: Report) -> dict[str, Any]:
        return {"images": results["protocol"]["images"]}


def failed(report: dict[str, Any]) -> bool:
    """Whether a report holds a verdict of severity fail."""
    return any(verdict["severity"] == "fail" for verdict in report["verdicts"])


def read_images(
    source: ImageSource, indices: list[int], config: DiagnoseConfig, rejected: Rejected, enlarged: Enlarged
) -> Iterator[Tensor]:
    """Center crops (n, 3, resolution, resolution) in [-1, 1] in batches, with a progress bar.

    Images that cannot be decoded are appended to `rejected` and left out; those that are enlarged, to `enlarged`.

    Raises:
        UserError: none of them can be decoded.
    """
    starts = range(0, len(indices), config.batch)
    for start in track(starts, "diagnose", "batch", leave=True):
        batch = indices[start : start + config.batch]
        _, images = read_crops(source, batch, config.resolution, rejected, enlarged)
        if images is not None:
            yield images
    if indices and len(rejected) == len(indices):
        raise none_readable("data", len(indices), rejected)


def training_record(autoencoder: str) -> dict[str, Any]:
    """What training left beside the weights in training.json; empty where there is none (a foreign autoencoder).

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_record(autoencoder)
    except ValueError as error:
        raise UserError(f"{autoencoder}: its {RECORD} is not valid JSON ({error}); restore the folder") from error


def _protocol(config: DiagnoseConfig, source: ImageSource, count: int) -> dict[str, Any]:
    """What has to be equal for two reports to be comparable."""
    return {
        "images": {"fingerprint": source.fingerprint(), "part": config.part, "count": count},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "seed": config.seed,
        "precision": "float32; sums of the posteriors in float64",
        "range": "reconstructions clamped to [-1, 1], not rounded to 8 bits",
        "versions": provenance.versions(),
    }


# From the figures of a health report to its verdicts: which rule looks at what, and which finding explains another.

PLAIN = "trained with beta = 0: a plain autoencoder"
COSTS_FIDELITY = frozenset(
    ("dead_channel", "ignored_channel", "static_channel", "redundant", "smuggling", "brittle_decoder", "border")
)
"""A code with one of these has less than its channels to describe an image with, or a decoder that is off: that it is
worse than a linear one follows."""
ELSEWHERE = 0.2
"""A hot position with no more of its effect on the image elsewhere describes its own place."""
DETERMINISTIC = "deterministic autoencoder, no rate"


def verdicts(figures: Figures, training: Figures) -> list[Verdict]:
    """All findings, most severe first.

    Args:
        figures: what `health_metrics.measure` returns; None stands for a quantity that does not apply.
        training: the `rate` record of training.json (`mode`, `target_nats`, `final_beta`, `pinned_share`,
            `beta_path`), or empty.
    """
    rate, decoder = figures["rate"], figures["decoder"]
    severity = severity_of_rate(trained_steps(training))
    unreachable = check_rule("rate_unreachable", {"pinned_share": _pinned_share(training)}, severity=severity)
    collapse = check_rule("posterior_collapse", {"nats": rate["nats_per_dim"], "permutation": decoder["permutation"]})
    inactive = _kl_inactive(rate, training)
    if collapse:  # everything else that could be said about the latents or the picture follows from it
        statement = inactive if inactive and inactive.severity == "info" else None
        return by_severity(verdict for verdict in (unreachable, collapse, statement) if verdict)
    found = [unreachable, inactive]
    if unreachable is None:
        error = relative_error(rate["nats_per_dim"], training)
        found.append(check_rule("rate_miss", {"relative_error": error}, severity=severity))
    plain = inactive is not None and inactive.severity == "info"  # then nothing keeps the log-variance off its bound
    found += [v for v in _channel_verdicts(figures) if v and not (plain and v.name == "clamped")]
    found.append(check_rule("redundant", {key: figures["latents"][key] for key in ("effective_rank", "correlation")}))
    found.append(check_rule("brittle_decoder", {key: decoder[key] for key in ("gap_db", "tolerance")}))
    found.append(check_rule("prior_hole", {"cycle_ratio": decoder["cycle_ratio"]}))
    visible = decoder["flat_std"] is not None and decoder["flat_std"] > 0.001  # an eighth of one 8-bit level
    harmonics = decoder["harmonics"] if visible else None
    found.append(check_rule("grid", {"flat_std": decoder["flat_std"], "harmonics": harmonics}))
    found.append(check_rule("border", {"border_ratio": decoder["border_ratio"]}))
    if not any(verdict and verdict.name in COSTS_FIDELITY and verdict.severity != "info" for verdict in found):
        margin = {"linear_margin_db": decoder["linear_margin_db"]}
        found.append(check_rule("worse_than_linear", margin) or check_rule("near_linear", margin))
    return by_severity(verdict for verdict in found if verdict)


def is_plain(training: Figures) -> bool:
    """Whether the `rate` record of training.json is that of beta = 0: a plain autoencoder."""
    return training.get("mode") == "fixed" and training.get("final_beta") == 0


def trained_steps(training: Figures) -> int | None:
    """Steps of the training, the last of `beta_path` of the `rate` record of training.json; None where it has none."""
    path = training.get("beta_path")
    return int(path[-1][0]) if path else None


def relative_error(nats: float | None, training: Figures) -> float | None:
    """|nats - target| / target for a training with a target rate; None for any other."""
    target = training.get("target_nats")
    if nats is None or training.get("mode") != "target" or not target:
        return None
    return abs(nats - target) / target


def _channel_verdicts(figures: Figures) -> list[Verdict | None]:
    dead = dead_channels(figures)
    count = len(figures["channels"])
    many = RULES["dead_channel"].limits["dead_share"].crossed(len(dead) / count)
    severity: Severity = "fail" if count <= 4 or many else "warn"
    found: list[Verdict | None] = []
    for index, channel in enumerate(figures["channels"]):
        if index in dead:
            keys = ("nats", "image_variance", "passive_share")
            found.append(check_rule("dead_channel", {key: channel[key] for key in keys}, index, severity))
            continue
        smuggling = _smuggling(channel, index)
        static = check_rule("static_channel", {"static_share": channel["static_share"]}, index)
        if smuggling:  # a hot position that never moves makes most of the variance the same for all images
            static = None
        found += [smuggling, static, check_rule("clamped", {"clamp_share": channel["clamp_share"]}, index)]
        capacity = RULES["ignored_channel"].limits["capacity_bits"]
        spends = channel["capacity_bits"] is None or capacity.crossed(channel["capacity_bits"])
        if spends and not static and not smuggling:  # exchanging what is the same for all images changes nothing
            found.append(check_rule("ignored_channel", {"decoder_use": channel["decoder_use"]}, index))
        if not smuggling and not static:
            shape = {"skewness": abs(channel["skewness"]), "kurtosis": channel["kurtosis"]}
            found.append(check_rule("non_gaussian", shape, index))
    return found


def _smuggling(channel: Mapping[str, Any], index: int) -> Verdict | None:
    """A hot position alone is not a fault: a sharp edge is rare in the pixels too. One that acts elsewhere is."""
    reach = channel["hot_reach"]
    if reach is not None and reach <= ELSEWHERE:
        return None
    return check_rule("smuggling", {key: channel[key] for key in ("hot_sigmas", "tail_share")}, index)


def _kl_inactive(rate: Figures, training: Figures) -> Verdict | None:
    """A failure, unless no rate was wanted: then a statement."""
    limit = RULES["kl_inactive"].limits["median_logvar"]
    assert limit.fail is not None
    if rate["deterministic_by_design"]:
        knob = "nothing, if it was meant to be; its latents take any scale, so normalize them before diffusion"
        return Verdict(
            "kl_inactive", "info", limit.metric, rate["median_logvar"], limit.fail, None, DETERMINISTIC, knob
        )
    found = check_rule("kl_inactive", {"median_logvar": rate["median_logvar"], "nats": rate["nats_per_dim"]})
    if is_plain(training):
        knob = "nothing, if it was meant to be; rate.mode=target gives a rate"
        return Verdict("kl_inactive", "info", limit.metric, rate["median_logvar"], limit.fail, None, PLAIN, knob)
    return found


def _pinned_share(training: Figures) -> float | None:
    share = training.get("pinned_share")
    return float(share) if share is not None and training.get("mode") == "target" else None


# The health report in words (`health.md`) and as one self-contained page (`index.html`).

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
    "neighbour_correlation": "neighbors",
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
        ("MMD² of normalized latents to N(0, I)", latents["mmd2"], f"p = {_number(latents['mmd_p_value'])}"),
        ("Spectral slope of the images", latents["image_slope"], "(power = f^-slope)"),
        ("Spectral slope of the latents", latents["latent_slope"], ""),
        ("Power above half of Nyquist, means", latents["high_frequency_share_mean"], ""),
        ("Power above half of Nyquist, samples", latents["high_frequency_share_sample"], ""),
        ("PSNR of decode(mean)", decoder["psnr_mean"], "dB"),
        ("PSNR of decode(sample)", decoder["psnr_sample"], "dB"),
        ("PSNR over the linear code of as many numbers", decoder.get("linear_margin_db"), "dB"),
        ("Stochastic gap", decoder["gap_db"], "dB"),
        ("Noise that costs 1 dB, beside the channel", decoder["noise_for_one_decibel"], "of its standard deviations"),
        ("Noise that costs 1 dB, beside the posterior", decoder["tolerance"], "of its standard deviations"),
        ("Error with another image's latents", decoder["permutation"], "times the own"),
        ("Round-trip error of prior samples", decoder["cycle_ratio"], "times that of posterior samples"),
        ("Loss over 10 round trips", decoder["round_trip_drift_db"], "dB"),
        ("Deviation on constant color", decoder["flat_std"], "of the range −1 to 1"),
        ("Power at the stride's harmonics there", decoder["harmonics"], "times the neighbors"),
        ("Error of the outer 8 pixels", decoder["border_ratio"], "times the inner"),
        ("Error of the corners", decoder["corner_ratio"], "times the inner"),
        ("Largest activation in the decoder", decoder["droplet_score"], "times the stage's median"),
    ]
    return [(name, f"{_number(value)} {unit}".strip() if value is not None else "n/a") for name, value, unit in rows]


def markdown(report: Report) -> str:
    """`health.md`: verdicts, the table per channel, the other figures, the protocol."""
    lines = [f"- {verdict['sentence']}" for verdict in report["verdicts"]] or ["No verdict: nothing is wrong."]
    channels = [
        [str(index), *(_number(channel.get(key)) for key in CHANNEL_COLUMNS)]
        for index, channel in enumerate(report["channels"])
    ]
    lines += ["", *markdown_table(["channel", *CHANNEL_COLUMNS.values()], channels)]
    lines += ["", *markdown_table(["quantity", "value"], global_rows(report))]
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
        "enlarged": enlarged_lines(report),
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
            channel_bars(report, "nats", "KL per channel"),
        ),
        (
            "Capacity per channel",
            "bits per position",
            "What the channel could carry at its signal-to-noise ratio.",
            channel_bars(report, "capacity_bits", "Capacity per channel", capacity),
        ),
        (
            "Decoder use",
            "share of the change when all channels are exchanged",
            "How much the picture changes when this channel comes from another image.",
            channel_bars(report, "decoder_use", "Decoder use per channel"),
        ),
        (
            "Posterior means",
            "density over images and positions",
            "Without the outer 0.1 % on each side.",
            plot_histograms(report, "mean_histograms", "Posterior means per channel", "μ"),
        ),
        (
            "Posterior deviations",
            "density over images and positions",
            "One is the prior: a channel that sits there says nothing.",
            None
            if report["rate"]["deterministic"]
            else plot_histograms(report, "deviation_histograms", "Posterior deviations per channel", "σ"),
        ),
        (
            "Noise on the latents",
            "PSNR in dB",
            "How gently the decoder fails off the posterior mean; the dotted line is 1 dB below it.",
            plot_noise_curve(report),
        ),
        (
            "Power spectra",
            "relative to the lowest frequency",
            "Latents that fall off like images are easier for a diffusion model.",
            plot_spectra(report),
        ),
        (
            "Repeated coding",
            "PSNR in dB",
            "Encoding the decoded picture again, ten times.",
            plot_round_trips(report),
        ),
        (
            "During training",
            "from training.json",
            "The weight that the controller chose, and the rate it led to.",
            plot_beta_path(report),
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
                _gray(probes.mean[index, c], channel["mean"], channel["variance"]), f"channel {c} of image {index}"
            )
            for c, channel in enumerate(channels)
        ]
        found.append({"row": [(name, _picture(image, name)) for name, image in row.items()], "maps": maps})
    return found


def _flat(measured: Measured) -> list[tuple[str, Picture]]:
    """Constant colors, decoded: the distance from their own mean, times 20, on gray."""
    found = []
    for name, image in measured.flat.decoded.items():
        boosted = (FLAT_GAIN * (image - image.mean(dim=(1, 2), keepdim=True))).clamp(-1, 1)
        found.append((name, _picture(boosted, f"{name}, decoded, contrast times {FLAT_GAIN}")))
    return found


def _gray(latent: Tensor, mean: float, variance: float) -> Tensor:
    deviation = max(variance, 1e-12) ** 0.5
    return ((latent - mean) / (3 * deviation)).clamp(-1, 1).expand(3, *latent.shape)


def _pictures(images: Tensor, text: str) -> list[Picture]:
    return [_picture(image, f"{text} {number + 1}") for number, image in enumerate(images)]


def _picture(image: Tensor, text: str) -> Picture:
    return embed_image(transforms.to_pil(image[None].to(torch.float32).cpu())[0], text)


def _number(value: float | None) -> str:
    """Three significant digits, a true minus sign; n/a for None."""
    if value is None:
        return "n/a"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.3e}" if abs(value) >= 1e6 else f"{value:,.0f}"
    return text.replace("-", "−")


# The plots of a health report, from the content of `health.json`: one SVG a quantity, in the look of `figures.py`.

NAMED_CHANNELS = 8
"""Largest number of channels with their own color and a name in the legend."""


def channel_bars(report: Report, key: str, title: str, threshold: float | None = None) -> str | None:
    """One bar a channel, a dotted line at the threshold; None where the quantity does not apply."""
    values = [channel[key] for channel in report["channels"]]
    if all(value is None for value in values):
        return None
    figure, (axes,) = new_figure(height=2.6)
    axes.bar(range(len(values)), [value or 0.0 for value in values], color=COLORS[0], width=0.7)
    if threshold is not None:
        axes.axhline(threshold, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.set_xlabel("channel")
    axes.grid(False, axis="x")
    if len(values) <= 32:
        axes.set_xticks(range(len(values)))
    return page_svg(figure, title)


def plot_histograms(report: Report, key: str, title: str, label: str) -> str:
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
            color=COLORS[channel % len(COLORS)],
            label=f"channel {channel}" if few else None,
        )
    axes.set_xlabel(label)
    axes.set_yticks([])
    legend(axes)
    return page_svg(figure, title)


def plot_noise_curve(report: Report) -> str:
    """PSNR of decode(mean + tau * deviation * noise) over tau; the level 1 dB below decode(mean) is dotted."""
    curve = report["decoder"]["noise_curve"]
    figure, (axes,) = new_figure(height=2.6)
    values = list(curve.values())
    axes.plot([float(tau) for tau in curve], values, marker="o", markersize=4)
    axes.axhline(values[0] - 1.0, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.set_xlabel("noise, in standard deviations of the channel")
    axes.set_ylabel("PSNR in dB")
    return page_svg(figure, "PSNR with noise on the latents")


def plot_spectra(report: Report) -> str:
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


def plot_round_trips(report: Report) -> str:
    """PSNR against the original after each further round trip."""
    values: Sequence[float] = report["decoder"]["round_trips"]
    figure, (axes,) = new_figure(height=2.6)
    axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4)
    axes.set_xlabel("round trips")
    axes.set_ylabel("PSNR in dB")
    return page_svg(figure, "PSNR after repeated coding")


def plot_beta_path(report: Report) -> str | None:
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
    rate.plot(steps, [row[2] for row in path], color=COLORS[1])
    rate.set_title("nats per dimension")
    target = report["training"]["rate"].get("target_nats")
    if target and report["training"]["rate"].get("mode") == "target":
        rate.axhline(target, color=INK, linewidth=1.0, linestyle=(0, (1, 3)))
    for each in (axes, rate):
        each.set_xlabel("step")
    return page_svg(figure, "The weight of the KL term and the rate during training")


def recorded_verdicts(health: dict[str, Any]) -> list[dict[str, str]]:
    """Name, severity and sentence of each finding, the worst first; of one that many channels share, the first."""
    order = {"fail": 0, "warn": 1}
    shared: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for verdict in health.get("verdicts") or []:
        name, severity = (str(verdict.get(key, "not recorded")) for key in ("name", "severity"))
        shared.setdefault((name, severity), []).append(verdict)
    found = []
    for (name, severity), several in shared.items():
        sentence = str(several[0].get("sentence", "not recorded")).removeprefix(f"{name} ({severity}): ")
        if others := [str(verdict["channel"]) for verdict in several[1:] if verdict.get("channel") is not None]:
            sentence += f" Likewise channel{'s' * (len(others) > 1)} {', '.join(others)}."
        found.append({"name": name, "severity": severity, "sentence": sentence})
    return sorted(found, key=lambda verdict: order.get(verdict["severity"], 2))
