"""`ldm-vae codec-bench`: this codec's files against those of JPEG, WebP and AVIF, on the same pixels.

Owns the settings, measuring, and the result folder. Every byte is one of an actual file, header included, and every
picture was decoded from it. Curves are `rate_curves`', words and plots `bench_page`'s.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.codec import bench_page, compression
from ldm_vae.applications.codec.compression import Codec
from ldm_vae.applications.codec.fitted_model import load_model
from ldm_vae.applications.codec.quantisation import step_of
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.interface import decode, encode_moments, is_deterministic
from ldm_vae.autoencoder.perceptual import LPIPS, Backbone
from ldm_vae.autoencoder.rate import bits_per_pixel, kl_divergence
from ldm_vae.data import pixels
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import Part, subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.evaluation.fidelity import baselines
from ldm_vae.evaluation.fidelity.measurement import none_readable, read_crops, spread
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.result_folder import (
    alone_in,
    check_made_of,
    check_resolution,
    describe_autoencoder,
    finished_result,
    publishing,
)
from ldm_vae.files import write_json, write_png, write_text
from ldm_vae.random import generator

RESULTS = "results.json"
SELF_FITTED = "ldm-vae, self-fitted"
SHOWN_QUALITY = 50.0


@dataclass(frozen=True)
class CodecBenchConfig:
    """`ldm-vae codec-bench`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the results.
        entropy: models of `ldm-vae codec-fit` for this autoencoder; files that need none are always measured.
        part: held_out (what training never saw), train or all.
        resolution: side of the centre crop in pixels, a multiple of the downsampling.
        count: at most so many images, evenly spread over the part; null: all.
        qualities: of this codec, 1 to 100.
        codecs: to compare with: JPEG, WebP, AVIF.
        codec_qualities: theirs, 1 to 95.
        perceptual_net: the LPIPS network; null: no LPIPS.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        examples: images kept to look at, at most.
        seed: of the posterior samples that the KL's code would decode to.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str = "???"
    output: str = "???"
    entropy: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 512
    count: int | None = None
    qualities: list[float] = field(default_factory=lambda: [1.0, 10.0, 20.0, 30.0, 45.0, 65.0])
    codecs: list[str] = field(default_factory=lambda: list(baselines.available_codecs()))
    codec_qualities: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 35, 55, 75, 90])
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    examples: int = 4
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.resolution < 8 or (self.count is not None and self.count < 1) or self.examples < 0:
            raise UserError("codec-bench: resolution is below 8, count below 1 or examples below 0; give larger ones")
        for name in ("qualities", "codec_qualities"):
            if len(set(getattr(self, name))) < 3:
                raise UserError(f"{name}: {list(getattr(self, name))} is no curve; give three or more")
        for name in ("qualities", "codec_qualities", "codecs", "entropy"):
            values = list(getattr(self, name))
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise UserError(f"{name}: {twice} is there twice; leave one out")
        for quality in self.qualities:
            step_of(quality)
        if not all(1 <= quality <= 95 for quality in self.codec_qualities):
            raise UserError(f"codec_qualities: {list(self.codec_qualities)} are not all between 1 and 95")
        for codec in self.codecs:
            if codec not in baselines.available_codecs():
                available = ", ".join(baselines.available_codecs())
                raise UserError(f"codecs: {codec!r} cannot be written here; choose among {available}")
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")


@dataclass
class Measured:
    """What was found: `rows[codec][quality]` holds lists over images of bytes, ideal bits and each metric.

    `latent[...]`: the KL in bits per pixel and the metrics of the decoded posterior sample and mean, over images.
    """

    ids: list[str] = field(default_factory=list)
    rows: dict[str, dict[float, dict[str, list[float]]]] = field(default_factory=dict)
    latent: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    examples: list[bench_page.Example] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def add(self, codec: str, quality: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.rows.setdefault(codec, {}).setdefault(quality, {}).setdefault(name, []).append(value)


def bench(config: CodecBenchConfig, overwrite: bool = False) -> dict[str, Any]:
    """Measure, write the result folder, return the content of `results.json`.

    A folder that holds the finished result of these settings is read, not redone.

    Raises:
        UserError: the folder holds another result and not `overwrite`; an entropy model is of another autoencoder; no
            image could be read.
    """
    started = time.time()
    device = compute_device(config.device)
    plain = compression.open_codec(config.autoencoder, None, device)
    check_resolution(config.resolution, plain.autoencoder)
    codecs = {SELF_FITTED: plain} | _fitted(config, plain)
    models = {name: codec.model.fingerprint for name, codec in codecs.items() if codec.model is not None}
    file = Path(config.output) / RESULTS
    finished = finished_result(file, config, fingerprint(plain.autoencoder), overwrite)
    if finished is not None:
        check_made_of(config.output, {"other entropy models": (finished["entropy"], models)})
        return finished
    source = subset(open_source(config.data), config.part, config.data.held_out)
    with alone_in(config.output):
        measured = measure(config, codecs, source)
        results = {
            "format_version": 1,
            "autoencoder": describe_autoencoder(plain.autoencoder),
            "entropy": models,
            "protocol": _protocol(config, source, measured),
            **bench_page.summary(measured, config.resolution),
            "rejected": [{"id": name, "reason": reason} for name, reason in measured.rejected],
            "images": {"ids": measured.ids, "rows": _plain(measured), "latent": measured.latent},
            "config": configuration.to_dict(config),
        }
        output, page = Path(config.output), bench_page.render(results, measured.examples)
        with publishing(output):
            for name, svg in bench_page.plot_files(results).items():
                write_text(output / name, svg)
            if measured.examples:
                write_png(output / "examples.png", bench_page.sheet(measured.examples))
            write_text(output / "results.md", bench_page.markdown(results))
            write_text(output / "index.html", page)
            write_json(file, results)
            provenance.write_run_record(output, None, started, time.time() - started, images=len(measured.ids))
    return results


def _fitted(config: CodecBenchConfig, plain: Codec) -> dict[str, Codec]:
    """Name -> codec of each entropy model; the autoencoder is loaded once."""
    found: dict[str, Codec] = {}
    for path in config.entropy:
        model = load_model(path)
        if model.autoencoder != plain.identity:
            raise UserError(f"{path}: was fitted to the latents of another autoencoder than {config.autoencoder}")
        name = f"ldm-vae, {model.kind}"
        if name in found:
            name += f" ({path})"
        found[name] = Codec(plain.autoencoder, model, plain.identity, plain.channels, plain.factor, plain.where)
    return found


def _plain(measured: Measured) -> dict[str, Any]:
    return {codec: {f"{q:g}": values for q, values in rows.items()} for codec, rows in measured.rows.items()}


@torch.no_grad()
def measure(config: CodecBenchConfig, codecs: dict[str, Codec], source: ImageSource) -> Measured:
    """Every codec at every quality on every image. Raises: UserError when none can be read."""
    from tqdm import tqdm

    device = next(iter(codecs.values())).autoencoder.device
    lpips = LPIPS(config.perceptual_net, config.perceptual_weights).to(device) if config.perceptual_net else None
    measured, chosen = Measured(), spread(len(source), config.count)
    shown = {chosen[i] for i in spread(len(chosen), config.examples)} if config.examples else set()
    for index in tqdm(chosen, desc="coding", unit="image", dynamic_ncols=True):
        _, crop = read_crops(source, [index], config.resolution, measured.rejected)
        if crop is None:
            continue
        judge = Judge(crop.to(device), lpips)
        measured.ids.append(source.id(index))
        _measure_latent(measured, config, next(iter(codecs.values())), judge, source.id(index))
        mine = _measure_own(measured, config, codecs, judge, source.id(index))
        for codec in config.codecs:
            for quality in config.codec_qualities:
                data = baselines.encode_picture(judge.picture, codec, quality)
                with Image.open(io.BytesIO(data)) as file:
                    values = judge(np.array(file.convert("RGB")))
                measured.add(codec, float(quality), {"bytes": float(len(data)), **values})
        if index in shown:
            measured.examples.append(bench_page.example(judge.picture, mine, config.codecs))
    if not measured.ids:
        raise none_readable(config.output, len(source), measured.rejected)
    return measured


class Judge:
    """Metrics of decoded pictures against one original, (1, 3, h, w) in [-1, 1]."""

    def __init__(self, original: Tensor, lpips: LPIPS | None) -> None:
        self.original, self.lpips = original, lpips
        self.picture = pixels.to_pil(original.cpu())[0]

    def __call__(self, decoded: np.ndarray) -> dict[str, float]:
        """Of uint8 (h, w, 3). MS-SSIM where the sides allow it."""
        image = pixels.from_uint8(torch.from_numpy(decoded).permute(2, 0, 1)[None]).to(self.original.device)
        values = {"psnr": metrics.psnr(image, self.original)}
        if min(image.shape[-2:]) >= metrics.MS_SSIM_SMALLEST_SIDE:
            values["ms_ssim"] = metrics.ms_ssim(image, self.original)
        else:
            values["ssim"] = metrics.ssim(image, self.original)
        if self.lpips is not None:
            values["lpips"] = self.lpips(image, self.original)
        return {name: float(value) for name, value in values.items()}


def _measure_latent(measured: Measured, config: CodecBenchConfig, codec: Codec, judge: Judge, name: str) -> None:
    """Without a file: decode(mean), and where there is a posterior what a code as long as the KL would decode to."""
    mean, logvar = encode_moments(codec.autoencoder, judge.original)
    rows: dict[str, tuple[Tensor, float | None]] = {"decode(mean)": (mean, None)}
    if not is_deterministic(codec.autoencoder):
        noise = torch.randn(mean.shape, generator=generator(config.seed, "codec-bench", name)).to(mean.device)
        nats = float(kl_divergence(mean, logvar).mean())
        rows["decode(sample)"] = (
            mean + torch.exp(0.5 * logvar) * noise,
            bits_per_pixel(nats, codec.channels, codec.factor),
        )
    for row, (latents, rate) in rows.items():
        decoded = pixels.to_uint8(decode(codec.autoencoder, latents))[0].permute(1, 2, 0).cpu().numpy()
        values = judge(decoded) | ({} if rate is None else {"kl_bits_per_pixel": rate})
        for metric, value in values.items():
            measured.latent.setdefault(row, {}).setdefault(metric, []).append(value)


def _measure_own(
    measured: Measured, config: CodecBenchConfig, codecs: dict[str, Codec], judge: Judge, name: str
) -> tuple[int, np.ndarray]:
    """Every entropy model at every quality, decoded from the file. Returns the last one's shown size and picture."""
    original = np.array(judge.picture)
    shown = min(config.qualities, key=lambda quality: abs(quality - SHOWN_QUALITY))
    sized: tuple[int, np.ndarray] | None = None
    judged: dict[bytes, tuple[np.ndarray, dict[str, float]]] = {}
    for label, codec in codecs.items():
        picture = compression.analyse(codec, original, name)
        for quality in config.qualities:
            start = time.perf_counter()
            compressed = compression.compress(codec, picture, step_of(quality))
            middle = time.perf_counter()
            latents = compression.latents_of(codec, compressed.data, name)
            measured.seconds.setdefault(f"{label}: latents to file", []).append(middle - start)
            measured.seconds.setdefault(f"{label}: file to latents", []).append(time.perf_counter() - middle)
            key = latents.tobytes()
            if key not in judged:  # entropy models of one grid give files of other lengths for the same picture
                decoded = compression.picture_of(codec, latents, picture.height, picture.width)
                judged[key] = decoded, judge(decoded)
            decoded, values = judged[key]
            sizes = {"bytes": float(len(compressed.data)), "ideal_bits": compressed.ideal_bits}
            measured.add(label, quality, values | sizes)
            if quality == shown:
                sized = len(compressed.data), decoded
    assert sized is not None, "there are codecs and qualities"
    return sized


def _protocol(config: CodecBenchConfig, source: ImageSource, measured: Measured) -> dict[str, Any]:
    """What has to be equal for two results to be comparable."""
    return {
        "images": {"fingerprint": source.fingerprint(), "part": config.part, "count": len(measured.ids)},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "bytes": "whole files, headers counted; entropy models and autoencoders not",
        "average": "per image, then mean over images, rates and qualities alike",
        "lpips": config.perceptual_net,
        "codecs": {codec: baselines.CODEC_SETTINGS[codec] for codec in config.codecs},
        "versions": {"pillow": PIL.__version__, **provenance.versions()},
    }
