"""How well an autoencoder reconstructs: the settings, the protocol and the result folder.

Every figure is of images after an 8-bit round trip, averaged over images, beside baselines on the same pixels.
Measuring is `measurement`'s, means and tables are `summary`'s, the pictures to look at `examples`'.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import features

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.interface import is_deterministic
from ldm_vae.autoencoder.models import downsampling, load_autoencoder
from ldm_vae.autoencoder.perceptual import LPIPS, Backbone
from ldm_vae.data.sources import DataConfig, ImageSource, open_source
from ldm_vae.data.split import Part, subset
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity import baselines
from ldm_vae.evaluation.fidelity.distribution import (
    KID_SUBSETS,
    Distribution,
    check_distribution,
    compare_sets,
    load_inception,
)
from ldm_vae.evaluation.fidelity.examples import grid, save_examples
from ldm_vae.evaluation.fidelity.measurement import (
    Measurer,
    Unit,
    codebook_size,
    fit_baseline,
    measure_images,
    none_readable,
    spread,
)
from ldm_vae.evaluation.fidelity.processes import Processes
from ldm_vae.evaluation.fidelity.summary import markdown, per_image, summary
from ldm_vae.evaluation.result_folder import (
    alone_in,
    check_resolution,
    describe_autoencoder,
    finished_result,
    publishing,
)
from ldm_vae.files import write_json, write_png, write_text

RESULTS = "results.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """`ldm-vae evaluate`.

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the results.
        part: held_out (what training never saw), train or all.
        resolution: side of the centre crop in pixels, a multiple of the downsampling.
        count: at most so many images, evenly spread over the part; null: all.
        baseline_images: at most so many training images fit the linear baseline.
        codecs: image codecs at equal bytes: JPEG, WebP, AVIF; `[]` for none.
        equal_bytes_bits_per_pixel: the codecs' budget; null: the rate of the autoencoder, image by image.
        perceptual_net: the LPIPS network; null: no LPIPS.
        perceptual_weights: a local safetensors file of its backbone; null: torchvision's download.
        distribution: kid or fid (with KID) of the reconstructions; none.
        fid: `force` prints a FID of fewer than 5,000 images, which misleads.
        inception_weights: a local file of torch-fidelity's Inception weights; null: its download.
        kid_subset: images in each of KID's subsets; a quarter of the images where that is less.
        batch: images per forward pass.
        examples: images kept to look at.
        seed: of the posterior samples and of KID's subsets.
        device: auto, cpu, cuda, cuda:1 ... Under torchrun, auto and cuda give each process its own GPU.
        processes: how many processes must have been launched; null: any number.
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    part: Part = "held_out"
    resolution: int = 512
    count: int | None = None
    baseline_images: int = 128
    codecs: list[str] = field(default_factory=lambda: ["JPEG", "WebP"])
    equal_bytes_bits_per_pixel: float | None = None
    perceptual_net: Backbone | None = None
    perceptual_weights: str | None = None
    distribution: Distribution = "none"
    fid: Literal["refuse", "force"] = "refuse"
    inception_weights: str | None = None
    kid_subset: int = 200
    batch: int = 4
    examples: int = 6
    seed: int = 0
    device: str = "auto"
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "baseline_images", "examples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")
        if self.count is not None and self.count < 1:
            raise UserError(f"count: {self.count} is not above 0; leave it out for all images")
        if self.perceptual_weights is not None and self.perceptual_net is None:
            raise UserError("perceptual_weights: has no effect without perceptual_net; set that too")
        if self.kid_subset < 2:
            raise UserError(f"kid_subset: {self.kid_subset} is below 2; 100 to 1000 is usual")
        for codec in self.codecs:
            if codec not in baselines.available_codecs():
                available = ", ".join(baselines.available_codecs())
                raise UserError(f"codecs: {codec!r} cannot be written here; choose among {available}")
        bits = self.equal_bytes_bits_per_pixel
        if bits is not None and bits <= 0:
            raise UserError(f"equal_bytes_bits_per_pixel: {bits} is not above 0")
        if bits is not None and not self.codecs:
            raise UserError("equal_bytes_bits_per_pixel: has no effect without codecs; leave it out")
        check_distribution(self.distribution, self.fid, self.inception_weights)


def evaluate(config: EvaluateConfig, overwrite: bool = False, processes: Processes | None = None) -> dict[str, Any]:
    """Measure, write the result folder, return the content of `results.json`, the same for any number of processes.

    A folder that holds the finished result of these settings is read, not redone.

    Raises:
        UserError: the folder holds a result of other settings or of another autoencoder, and not `overwrite`.
    """
    started = time.time()
    processes = processes or Processes()
    device = compute_device(config.device, processes)
    autoencoder = load_autoencoder(config.autoencoder).to(device)
    check_resolution(config.resolution, autoencoder)
    identity = fingerprint(autoencoder)
    finished = processes.main_decides(
        lambda: finished_result(Path(config.output) / RESULTS, config, identity, overwrite)
    )
    if finished is not None:
        return finished
    evaluated, fitted = _parts(config)
    indices = spread(len(evaluated), config.count)
    check_distribution(config.distribution, config.fid, config.inception_weights, len(indices))
    block = downsampling(autoencoder)
    chosen = spread(len(fitted), config.baseline_images)
    with contextlib.ExitStack() as held:
        processes.main_decides(lambda: held.enter_context(alone_in(config.output)))
        klt = fit_baseline(fitted, chosen, config.resolution, block, processes)
        measurer = _measurer(config, autoencoder, klt, device)
        measured = measure_images(measurer, evaluated, indices, processes)
        protocol = _protocol(config, evaluated, fitted, measured)
        return processes.main_decides(lambda: _publish(config, measurer, measured, evaluated, protocol, started))


def _publish(
    config: EvaluateConfig,
    measurer: Measurer,
    measured: Unit,
    evaluated: ImageSource,
    protocol: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Write the result folder; `run.json` is the last file, so a folder with one is complete."""
    output = Path(config.output)
    if not measured.ids:
        raise none_readable(config.output, len(evaluated), measured.rejected)
    check_distribution(config.distribution, config.fid, config.inception_weights, len(measured.ids))
    found = None
    if config.distribution != "none":
        real, decoded = np.stack(measured.real_features), np.stack(measured.decoded_features)
        found = compare_sets(real, decoded, config.distribution, config.kid_subset, config.seed)
    with publishing(output):
        results = {
            "format_version": 1,
            "autoencoder": describe_autoencoder(measurer.autoencoder),
            "protocol": protocol,
            **summary(measured, measurer),
            "distribution": found,
            "examples": save_examples(output / "examples", measured.examples),
            "rejected": [{"id": name, "reason": reason} for name, reason in measured.rejected],
            "images": per_image(measured, measurer),
            "config": configuration.to_dict(config),
        }
        if measured.examples:  # none where exactly those images could not be read
            picture = grid(measured.examples)
            write_png(output / "grid.png", picture)
        write_text(output / "results.md", markdown(results))
        write_json(output / RESULTS, results)
        provenance.write_run_record(output, None, started, time.time() - started, images=len(measured.ids))
    return results


def compute_device(name: str, processes: Processes | None = None) -> torch.device:
    """`auto` is CUDA where torch sees it; several processes on one machine each get their own GPU."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        local = processes.local_index if processes is not None and processes.count > 1 else None
        return torch.device("cuda") if local is None else torch.device("cuda", local % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name} was asked for, and torch sees no CUDA device; use device=auto")
    return device


def _measurer(config: EvaluateConfig, autoencoder: Any, klt: Any, device: torch.device) -> Measurer:
    """The networks beside the autoencoder, and what is known about its rate."""
    lpips = inception = None
    if config.perceptual_net:
        lpips = LPIPS(config.perceptual_net, config.perceptual_weights).to(device)
    if config.distribution != "none":
        inception = load_inception(config.inception_weights).to(device)
    codes = codebook_size(autoencoder)
    bits = None if codes is None else math.log2(codes) / downsampling(autoencoder) ** 2
    return Measurer(
        autoencoder, klt, lpips, inception, config, device, bits, rate_known=not is_deterministic(autoencoder)
    )


def _parts(config: EvaluateConfig) -> tuple[ImageSource, ImageSource]:
    """The images to measure, and those that fit the baseline: the training part, or everything for `all`."""
    source = open_source(config.data)
    evaluated = subset(source, config.part, config.data.held_out)
    return evaluated, evaluated if config.part == "all" else subset(source, "train", config.data.held_out)


def _protocol(config: EvaluateConfig, evaluated: ImageSource, fitted: ImageSource, measured: Unit) -> dict[str, Any]:
    """What has to be equal for two results to be comparable."""
    return {
        "images": {"fingerprint": evaluated.fingerprint(), "part": config.part, "count": len(measured.ids)},
        "preprocessing": preprocessing_record(config.resolution),
        "resolution": config.resolution,
        "range": "8-bit round trip of every reconstruction",
        "average": "per image, then mean over images; intervals are 95 % bootstrap over images",
        "ssim": "gaussian window 11, sigma 1.5, borders left out; ssim: mean over RGB, ssim_luma: BT.601 luma",
        "lpips": config.perceptual_net,
        "baseline": {
            "name": "block KLT, coefficients not quantised",
            "fitted_on": {
                "fingerprint": fitted.fingerprint(),
                "count": min(len(fitted), config.baseline_images),
            },
        },
        "codecs": {
            "settings": {codec: baselines.CODEC_SETTINGS[codec] for codec in config.codecs},
            "versions": {"pillow": PIL.__version__, **{codec: _codec_version(codec) for codec in config.codecs}},
        },
        "kid": {"subset_size_at_most": config.kid_subset, "subsets": KID_SUBSETS, "kernel": "(x·y / 2048 + 1)^3"},
        "seed": config.seed,
        "precision": "float32",
        "versions": provenance.versions(),
    }


def _codec_version(codec: str) -> str | None:
    return features.version({"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}[codec])
