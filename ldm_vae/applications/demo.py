"""A first look: pictures compressed and reconstructed, and new ones generated, by the models in `checkpoints/`.

Compressing is the codec's work and generating that of `diffusion.generation`, whose folder `samples/` continues where
an interrupted call left it. The result is index.html, one file that loads nothing, and demo.webp, one picture of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from PIL import Image

import ldm_vae
from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications.codec.compression import Codec, open_codec
from ldm_vae.applications.codec.entropy_models import step_of
from ldm_vae.applications.codec.format import SUFFIX
from ldm_vae.autoencoder.models import model_directory
from ldm_vae.autoencoder.rate import bits_per_pixel, kl_divergence
from ldm_vae.config import check_positive
from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected, read_image, read_regular_file
from ldm_vae.data.folder import find_pictures
from ldm_vae.data.samples import Enlarged, Rejected, crop_image, evenly_spaced
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.diffusion.generation import GenerateConfig, generate, pipeline_directory
from ldm_vae.errors import UserError
from ldm_vae.evaluation.baselines import code_around
from ldm_vae.evaluation.pages import embed, embed_image, image_label, template_environment
from ldm_vae.evaluation.study import GIVEN, Content, Results, Study, StudyPlan, enlarged_lines, read_json
from ldm_vae.files import checksum, checksum_bytes
from ldm_vae.metrics import psnr
from ldm_vae.runtime import compute_device
from ldm_vae.utils.image_grid import PAPER, labeled_sheet
from ldm_vae.utils.progress import inside, track
from ldm_vae.utils.text import pluralize

AUTOENCODER, PIPELINE = "vae-f8c4-nano", "ldm-emoji-512"
"""The names of the models in `checkpoints/`."""
SAMPLES = "samples"
BUNDLED = 8
"""Synthetic images where none are given."""
MOST_IMAGES = 24
LARGEST_SIZE = 4096
QUALITY = 50.0
"""Quality of the compressed files, as in `ldm-vae compress`."""
COLUMNS = 8
CARD = "README.md"
MEANS = ("raw_bytes", "latent_bytes", "file_bytes", "psnr_db", "file_psnr_db")
"""Metrics of an image whose mean over all images is in the text."""


@dataclass(frozen=True)
class DemoConfig:
    """`ldm-vae demo`.

    Takes files and folders; without any, eight synthetic images. Each is scaled and cropped to `resolution`. Writes
    index.html, which is one file with everything in it, demo.webp, the reconstructions, the compressed files and the
    samples. The same command continues an interrupted one.

      ldm-vae demo
      ldm-vae demo holiday.jpg portraits/ output=seen
      ldm-vae demo autoencoder=runs/vae model=runs/diffusion output=mine

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id; null: the one in `checkpoints/`.
        pipeline: a diffusion pipeline or run; null: the one in `checkpoints/`.
        images: image files and folders; `[]`: synthetic ones.
        output: the folder for the results.
        count: number of images to generate.
        size: side in pixels to which images are scaled and cropped.
        steps: number of steps of the sampler.
        seed: seed of the noise.
        precision: precision of the networks that generate: fp32 or bf16.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str | None = None
    pipeline: str | None = None
    images: list[str] = field(default_factory=list)
    output: str = "demo"
    count: int = 16
    size: int = 512
    steps: int = 20
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 16 <= self.size <= LARGEST_SIZE:
            raise UserError(f"size: {self.size} is not between 16 and {LARGEST_SIZE} pixels; try 512")
        check_positive(self, "count", "steps")


def demo(config: DemoConfig, *, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Write the folder, return the content of results.json; the finished result of these settings is read, not redone.

    Raises:
        UserError: no model, no image that can be read, or a folder with something else.
    """
    return Demo(config, overwrite).run(dry_run)


class Demo(Study):
    """The study of `ldm-vae demo`."""

    replaced = ("reconstructions/[0-9][0-9]_*", "compressed/[0-9][0-9]_*")
    command, product = "demo", "the page of the demo"
    config: DemoConfig

    def __init__(self, config: DemoConfig, overwrite: bool) -> None:
        self.images = find_images(config.images) if config.images else []
        self.model = config.autoencoder or str(shipped(AUTOENCODER, "autoencoder"))
        self.pipeline = pipeline_directory(config.pipeline or str(shipped(PIPELINE, "pipeline")))
        self.codec = open_codec(self.model, None, compute_device(config.device))
        self.unet = [checksum(path) for path in sorted(self.pipeline.glob("unet/*.safetensors"))]
        super().__init__(config, self.codec.autoencoder, overwrite=overwrite)

    def settings(self) -> dict[str, Any]:
        """Images count by what they hold."""
        found = configuration.to_dict(self.config) | {"images": describe_files(self.images)}
        return {key: value for key, value in found.items() if key not in ("output", "device")}

    def inputs(self, results: Results) -> dict[str, tuple[Any, Any]]:
        return {"another pipeline": (results["unet"], self.unet)}

    def work(self) -> StudyPlan:
        config, count = self.config, len(self.images)
        images = pluralize(count, "image") if count else f"{BUNDLED} synthetic images"
        generated = f"{pluralize(config.count, 'sample')} of {pluralize(config.steps, 'step')}, {config.precision}"
        models = (self.model, str(self.pipeline), str(self.autoencoder.device))
        return StudyPlan((f"{images} at {config.size} pixels", generated, *models))

    def measure(self) -> Results:
        started = time.time()
        self.shown, rejected = reconstruct_all(self.codec, self.images, self.config.size, self.enlarged)
        seconds = time.time() - started
        return {
            "unet": self.unet,
            "bundled": not self.images,
            "images": [asdict(one.metrics) for one in self.shown],
            "rejected": rejected,
            "images_per_second": {"reconstructed": len(self.shown) / seconds, "generated": self._generate()},
            "protocol": {
                "range": "PSNR of 8-bit pixels in dB, decoded from the posterior's mean in float32",
                "images": {"count": len(self.shown), "part": GIVEN},
                "versions": provenance.versions(),
            },
        }

    def _generate(self) -> float:
        """Fill `samples/`; returns images per second, of the call that made them."""
        config, folder = self.config, self.output / SAMPLES
        generation = GenerateConfig(
            model=str(self.pipeline), output=str(folder), count=config.count, seed=config.seed, steps=config.steps,
            precision=config.precision, device=config.device,
        )  # fmt: skip
        with inside():
            result = generate(generation, overwrite=self.overwrite)
        return (
            result.images_per_second
            if result.made
            else read_json(folder / provenance.RUN_RECORD).get("images_per_second", 0.0)
        )

    def files(self, results: Results) -> dict[str, Content]:
        found: dict[str, Content] = {}
        for number, one in enumerate(self.shown):
            stem = f"{number:02d}_{Path(one.metrics.name).name[:50]}"
            found[f"reconstructions/{stem}.png"] = one.decoded
            found[f"compressed/{stem}{SUFFIX}"] = one.data
        samples, labels = self._samples()
        sheet = demo_sheet(self.shown, [Image.open(path).convert("RGB") for path in samples], labels)
        return found | {"demo.webp": lambda path: sheet.save(path, format="WEBP", quality=88, method=6)}

    def _samples(self) -> tuple[list[Path], list[str]]:
        """The generated images, and the label of each."""
        folder = self.output / SAMPLES
        samples = sorted(folder.glob("[0-9][0-9][0-9][0-9]*.png"))
        return samples, [image_label(path, folder) for path in samples]

    def page(self, results: Results) -> str:
        cards = {"autoencoder": Path(self.model), "pipeline": self.pipeline}
        context = {
            "results": results | {"seconds": time.time() - self.started},
            "sentences": [*demo_sentences(results), *enlarged_lines(results)],
            "pairs": [
                (one.metrics, embed_image(one.original, "original"), embed_image(one.decoded, "reconstruction"))
                for one in self.shown
            ],
            "samples": [
                (label, embed(path, f"generated: {label}" if label else "generated"))
                for path, label in zip(*self._samples())
            ],
            "cards": {name: link for name, path in cards.items() if (link := card_link(path, self.output)) is not None},
        }
        return template_environment().get_template("demo.html").render(context)

    def record(self, results: Results) -> dict[str, Any]:
        return {"images": len(results["images"])}

    def summary(self, results: Results) -> str:
        return "\n".join(demo_sentences(results))


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of one image. `raw_bytes`: 8-bit pixels; `latent_bytes`: in half precision; `file_bytes`: compressed.

    `rate_bits_per_pixel` is what the posterior carries, None for an autoencoder without one; `jpeg_psnr_db` is
    what a JPEG reaches at `file_bytes`, None where there is none so small.
    """

    name: str
    raw_bytes: int
    latent_bytes: int
    file_bytes: int
    rate_bits_per_pixel: float | None
    psnr_db: float
    file_psnr_db: float
    jpeg_psnr_db: float | None


@dataclass(frozen=True)
class Reconstructed:
    """An image, its compressed file, and what that decodes to."""

    metrics: ImageMetrics
    original: Image.Image
    decoded: Image.Image
    data: bytes


def reconstruct_all(
    codec: Codec, images: Sequence[tuple[str, Path]], size: int, enlarged: Enlarged
) -> tuple[list[Reconstructed], Rejected]:
    """Every image that can be read, synthetic ones where there are none. Those that are smaller than `size` are
    appended to `enlarged`. Raises: UserError where none can be read."""
    rejected, shown = Rejected(), []
    bundled = SyntheticSource(SyntheticConfig(count=BUNDLED, resolution=max(32, size)))
    places: list[tuple[str, Path | int]] = [*images]
    places = places or [(bundled.label_names[bundled.label(number)], number) for number in range(BUNDLED)]
    for name, place in track(places, "reconstructing"):
        try:
            image = bundled.read(place) if isinstance(place, int) else read_image(place)
        except ImageRejected as error:
            rejected.append((str(place), str(error)))
        else:
            shown.append(reconstruct_one(codec, crop_image(image, size, name, enlarged).pixels, name))
    if not shown:
        raise UserError(f"{rejected[0][0]}: cannot be read ({rejected[0][1]}), nor any other; give other images")
    return shown, rejected


def reconstruct_one(codec: Codec, image: np.ndarray, name: str) -> Reconstructed:
    """uint8 (h, w, 3) through the latents and back, and through a file and back."""
    original = transforms.to_batch(image).to(codec.autoencoder.device)
    mean, logvar = codec.autoencoder.encode_moments(original)
    decoded = codec.autoencoder.decode_images(mean)[..., : image.shape[0], : image.shape[1]]
    data = codec.compress(codec.analyze(image, name), step_of(QUALITY)).data
    from_file = codec.decompress(data, name)
    jpeg = code_around(Image.fromarray(image), "JPEG", len(data))
    rate = None
    if not codec.autoencoder.deterministic:
        rate = bits_per_pixel(float(kl_divergence(mean, logvar).mean()), codec.channels, codec.factor)

    def quality(pixels: np.ndarray) -> float:
        return float(psnr(transforms.to_batch(pixels).to(original.device), original))

    metrics = ImageMetrics(
        name=name,
        raw_bytes=image.size,
        latent_bytes=2 * mean.numel(),
        file_bytes=len(data),
        rate_bits_per_pixel=rate,
        psnr_db=float(psnr(transforms.from_uint8(transforms.to_uint8(decoded)), original)),
        file_psnr_db=quality(from_file),
        jpeg_psnr_db=jpeg.at_budget(quality(np.array(jpeg.below.picture)), quality(np.array(jpeg.above.picture)))
        if jpeg.below.fits
        else None,
    )
    return Reconstructed(metrics, Image.fromarray(image), Image.fromarray(from_file), data)


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
        f"repository, or give {option}=DIR"
    )


def find_images(inputs: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of at most `MOST_IMAGES`, evenly spaced. Raises: UserError where there is no such file."""
    found = find_pictures(inputs)
    return [found[number] for number in evenly_spaced(len(found), MOST_IMAGES)]


def describe_files(files: Sequence[tuple[str, Path]]) -> str:
    """How many files of the user's, and a checksum of what they hold; a pipe is not waited for."""
    if not files:
        return "synthetic"
    identities = []
    for _, path in files:
        try:
            identities.append(checksum_bytes(read_regular_file(path)))
        except ImageRejected as error:
            identities.append(error.reason)
    return f"{pluralize(len(files), 'file')}, {checksum_bytes(' '.join(identities).encode())}"


def demo_sheet(shown: Sequence[Reconstructed], samples: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """A row of originals above their reconstructions, as often as it takes, then the samples."""
    cells, captions = [], []
    blank = Image.new("RGB", shown[0].original.size, PAPER)
    for first in range(0, len(shown), COLUMNS):
        part = shown[first : first + COLUMNS]
        empty = COLUMNS - len(part)
        cells += [*(one.original for one in part), *[blank] * empty]
        cells += [*(one.decoded for one in part), *[blank] * empty]
        captions += [*(["original"] * len(part)), *[""] * empty]
        captions += [
            *(f"{one.metrics.file_psnr_db:.1f} dB, {one.metrics.file_bytes / 1000:.1f} kB" for one in part),
            *[""] * empty,
        ]
    captions += [label or "generated" for label in labels]
    return labeled_sheet([*cells, *samples], captions, columns=COLUMNS)


def demo_sentences(results: Mapping[str, Any]) -> list[str]:
    """What was measured, in words."""
    images, config, autoencoder = results["images"], results["config"], results["autoencoder"]
    mean = {key: fmean(image[key] for image in images) for key in images[0] if key in MEANS}
    found = [
        f"A latent has {mean['raw_bytes'] / mean['latent_bytes']:.0f} times fewer bytes than the pixels "
        f"({mean['latent_bytes']:,.0f} of {mean['raw_bytes']:,.0f}, in half precision), and decodes to "
        f"{mean['psnr_db']:.1f} dB PSNR, the mean of {pluralize(len(images), 'image')} of {config['size']} pixels.",
        f"Quantized and entropy coded, as by ldm-vae compress, a file has {mean['file_bytes']:,.0f} bytes, "
        f"{8 * mean['file_bytes'] / config['size'] ** 2:.3f} bits per pixel and "
        f"{mean['raw_bytes'] / mean['file_bytes']:.0f} times fewer than the pixels, at {mean['file_psnr_db']:.1f} dB.",
    ]
    jpegs = [image["jpeg_psnr_db"] for image in images if image["jpeg_psnr_db"] is not None]
    if len(jpegs) == len(images):
        found.append(f"JPEG files of as many bytes: {fmean(jpegs):.1f} dB.")
    elif jpegs:
        found.append(f"JPEG can be as small for {len(jpegs)} of the {pluralize(len(images), 'image')} only.")
    rates = [image["rate_bits_per_pixel"] for image in images if image["rate_bits_per_pixel"] is not None]
    if rates:
        found.append(f"The rate, what the posterior says of an image: {fmean(rates):.3f} bits per pixel.")
    speeds = results["images_per_second"]
    found.append(
        f"The autoencoder has {autoencoder['parameters'] / 1e6:.1f} million parameters. Encoding an image and decoding "
        f"it twice, from its latent and from its file: {speeds['reconstructed']:.2g} images/s; generating "
        f"{speeds['generated']:.2g} images/s ({pluralize(config['steps'], 'step')}, {config['precision']}), on "
        f"{results['protocol']['versions']['machine']}."
    )
    if results["bundled"]:
        found.append("The images are synthetic and bundled; name files or folders to see your own.")
    if results["rejected"]:
        listed = "; ".join(f"{Path(name).name} ({reason})" for name, reason in results["rejected"])
        found.append(f"Left out: {pluralize(len(results['rejected']), 'image')} that could not be read: {listed}.")
    return found


def card_link(model: Path, output: Path) -> str | None:
    """The way from the page to the model's card; None where there is none."""
    card = next((one / CARD for one in (model, model_directory(model)) if one and (one / CARD).is_file()), None)
    return Path(os.path.relpath(card.resolve(), output.resolve())).as_posix() if card else None
