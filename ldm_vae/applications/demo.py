"""`ldm-vae demo`: pictures compressed and reconstructed, and new ones generated, by the models in `checkpoints/`.

Owns finding these models, the settings, measuring and the result folder; the page is `demo_page`'s. Compressing is the
codec's and generating `diffusion.generation`'s, whose folder `samples/` continues where an interrupted call left it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ldm_vae
from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications import demo_page
from ldm_vae.applications.codec import compression
from ldm_vae.applications.codec.compression import Codec
from ldm_vae.applications.codec.format import SUFFIX
from ldm_vae.applications.codec.quantisation import step_of
from ldm_vae.applications.demo_page import Reconstructed
from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.interface import decode, encode_moments, is_deterministic
from ldm_vae.autoencoder.rate import bits_per_pixel, kl_divergence
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected, decode_image
from ldm_vae.data.local_file import read_regular_file
from ldm_vae.data.synthetic import SyntheticConfig, SyntheticSource
from ldm_vae.data.transforms import cover_crop
from ldm_vae.diffusion.generation import generate, pipeline_directory
from ldm_vae.diffusion.pictures import GenerationConfig
from ldm_vae.errors import UserError
from ldm_vae.evaluation.fidelity.baselines import code_within
from ldm_vae.evaluation.fidelity.measurement import spread
from ldm_vae.evaluation.fidelity.pictures import find_pictures
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.metrics import psnr
from ldm_vae.evaluation.result_folder import (
    alone_in,
    check_made_of,
    describe_autoencoder,
    finished_result,
    publishing,
    read_json,
)
from ldm_vae.files import checksum, checksum_bytes, write_bytes, write_json, write_png
from ldm_vae.latents.words import counted

AUTOENCODER, PIPELINE = "vae-f8c4-nano", "ldm-emoji-512"
"""The names of the models in `checkpoints/`."""
RESULTS = "results.json"
SAMPLES = "samples"
BUNDLED = 8
"""Synthetic images where none are given."""
MOST_IMAGES = 24
LARGEST_SIZE = 4096
QUALITY = 50.0
"""Of the compressed files, as in `ldm-vae compress`."""


@dataclass(frozen=True)
class DemoConfig:
    """What is shown.

    Attributes:
        autoencoder, pipeline: Directories, runs or (autoencoder) a hub id; None: the one in `checkpoints/`.
        images: Which files of the user's, see `described`; or `synthetic`.
        count: Images to generate.
        size: Side in pixels to which images are scaled and cropped.
        steps: Of the sampler.
        seed: Of the noise.
        precision: Of the networks that generate.
    """

    autoencoder: str | None = None
    pipeline: str | None = None
    images: str = "synthetic"
    count: int = 16
    size: int = 512
    steps: int = 20
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if not 16 <= self.size <= LARGEST_SIZE:
            raise UserError(f"size: {self.size} is not between 16 and {LARGEST_SIZE} pixels; try 512")
        if self.count < 1 or self.steps < 1:
            raise UserError(f"count: {self.count} images in {self.steps} steps are none; give 1 or more of both")


def shipped(name: str, option: str) -> Path:
    """The directory of a model in `checkpoints/`, here or in the repository that this package lies in.

    Raises:
        UserError: it is in neither, with the places, and the option that names another.
    """
    places = [Path("checkpoints") / name, Path(ldm_vae.__file__).parents[1] / "checkpoints" / name]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"checkpoints/{name}: is neither in this folder nor in {places[1].parents[1]}; run this in a clone of the "
        f"repository, or give {option} DIR"
    )


def find_images(inputs: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of at most `MOST_IMAGES`, evenly spread. Raises: UserError for what is no file or folder."""
    found = find_pictures(inputs)
    return [found[number] for number in spread(len(found), MOST_IMAGES)]


def described(files: Sequence[tuple[str, Path]]) -> str:
    """How many files of the user's, and a checksum of what they hold; what is no file, as a pipe, is not waited for."""
    if not files:
        return "synthetic"
    identities = []
    for _, path in files:
        try:
            identities.append(checksum_bytes(read_regular_file(path)))
        except ImageRejected as error:
            identities.append(error.reason)
    return f"{counted(len(files), 'file')}, {checksum_bytes(' '.join(identities).encode())}"


def demo(
    config: DemoConfig, files: Sequence[tuple[str, Path]], output: str | Path, device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder, return the content of results.json; the finished result of these settings is read, not redone.

    Args:
        files: (name, file) of the images, in the order of `config.images`; none: synthetic ones.

    Raises:
        UserError: no model, no image that can be read, or a folder with something else.
    """
    started = time.time()
    output, target = Path(output), compute_device(device)
    model = config.autoencoder or str(shipped(AUTOENCODER, "--autoencoder"))
    pipeline = pipeline_directory(config.pipeline or str(shipped(PIPELINE, "--pipeline")))
    codec = compression.open_codec(model, None, target)
    unet = [checksum(path) for path in sorted(pipeline.glob("unet/*.safetensors"))]
    finished = finished_result(output / RESULTS, config, fingerprint(codec.autoencoder), overwrite)
    if finished is not None:
        check_made_of(output, {"another pipeline": (finished["unet"], unet)}, place="--out")
        return finished
    with alone_in(output):
        reconstructing = time.time()
        shown, rejected = reconstruct_all(codec, files, config.size)
        seconds = time.time() - reconstructing
        speed = generate_samples(config, pipeline, output, device, overwrite)
        results: dict[str, Any] = {
            "format_version": 1,
            "autoencoder": describe_autoencoder(codec.autoencoder),
            "unet": unet,
            "bundled": not files,
            "images": [asdict(one.figures) for one in shown],
            "rejected": rejected,
            "images_per_second": {"reconstructed": len(shown) / seconds, "generated": speed},
            "protocol": {
                "range": "PSNR of 8-bit pixels in dB, decoded from the posterior's mean in float32",
                "versions": provenance.versions(),
            },
            "config": configuration.to_dict(config),
        }
        with publishing(output):
            write_pictures(output, shown)
            cards = {"autoencoder": Path(model), "pipeline": pipeline}
            demo_page.write_page(output, results | {"seconds": time.time() - started}, shown, cards)
            write_json(output / RESULTS, results)
            provenance.write_run_record(output, None, started, time.time() - started, images=len(shown))
    return results


def reconstruct_all(
    codec: Codec, files: Sequence[tuple[str, Path]], size: int
) -> tuple[list[Reconstructed], list[tuple[str, str]]]:
    """Every image that can be read, and (name, reason) of the others. Raises: UserError where none can."""
    from tqdm import tqdm

    rejected: list[tuple[str, str]] = []
    shown = []
    bundled = SyntheticSource(SyntheticConfig(count=BUNDLED, resolution=max(32, size)))
    bundled_names = [(bundled.label_names[bundled.label(number)], number) for number in range(BUNDLED)]
    for name, place in tqdm(files or bundled_names, desc="reconstructing", unit="image", dynamic_ncols=True):
        try:
            image = bundled.read(place) if isinstance(place, int) else decode_image(read_regular_file(place))
        except ImageRejected as error:
            rejected.append((str(place), str(error)))
            continue
        shown.append(reconstruct_one(codec, cover_crop(image, size), name))
    if not shown:
        raise UserError(f"{rejected[0][0]}: cannot be read ({rejected[0][1]}), nor any other; give other images")
    return shown, rejected


def reconstruct_one(codec: Codec, image: np.ndarray, name: str) -> Reconstructed:
    """uint8 (h, w, 3) through the latents and back, and through a file and back."""
    original = _tensor(image).to(codec.autoencoder.device)
    mean, logvar = encode_moments(codec.autoencoder, original)
    decoded = decode(codec.autoencoder, mean)[..., : image.shape[0], : image.shape[1]]
    data = compression.compress(codec, compression.analyse(codec, image, name), step_of(QUALITY)).data
    from_file = compression.decompress(codec, data, name)
    jpeg = code_within(Image.fromarray(image), "JPEG", len(data))
    rate = None
    if not is_deterministic(codec.autoencoder):
        rate = bits_per_pixel(float(kl_divergence(mean, logvar).mean()), codec.channels, codec.factor)
    figures = demo_page.Figures(
        name=name,
        raw_bytes=image.size,
        latent_bytes=2 * mean.numel(),
        file_bytes=len(data),
        rate_bits_per_pixel=rate,
        psnr_db=float(psnr(pixels.from_uint8(pixels.to_uint8(decoded)), original)),
        file_psnr_db=float(psnr(_tensor(from_file).to(original.device), original)),
        jpeg_psnr_db=float(psnr(_tensor(np.array(jpeg.picture)).to(original.device), original)) if jpeg.fits else None,
    )
    return Reconstructed(figures, Image.fromarray(image), Image.fromarray(from_file), data)


def _tensor(image: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) -> (1, 3, h, w) in [-1, 1]."""
    return pixels.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])


def generate_samples(config: DemoConfig, pipeline: Path, output: Path, device: str, overwrite: bool) -> float:
    """Fill `samples/`; returns images per second, of the call that made them."""
    generation = GenerationConfig(
        model=str(pipeline), count=config.count, seed=config.seed, steps=config.steps, precision=config.precision
    )
    made, speed = generate(generation, output / SAMPLES, device=device, overwrite=overwrite)
    if not made:
        speed = read_json(output / SAMPLES / provenance.RUN_RECORD).get("images_per_second", 0.0)
    return speed


def write_pictures(output: Path, shown: Sequence[Reconstructed]) -> None:
    """The reconstructions and the compressed files, in the place of earlier ones."""
    for old in [*output.glob("reconstructions/[0-9][0-9]_*"), *output.glob("compressed/[0-9][0-9]_*")]:
        old.unlink()
    for number, one in enumerate(shown):
        stem = f"{number:02d}_{Path(one.figures.name).name[:50]}"
        write_png(output / "reconstructions" / f"{stem}.png", one.decoded)
        write_bytes(output / "compressed" / f"{stem}{SUFFIX}", one.data)
