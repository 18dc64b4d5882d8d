"""What lies between two images: in pixels, in an autoencoder's latents, and through a diffusion model's noise.

    pairs of images -> each `Way` between them -> frames -> `measure_way` -> results.json, animations, frames, page

Autoencoders' latents are image-like, so they are mixed along a straight line; noise is mixed along a great circle,
which keeps its variance (arXiv:2408.08558).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae import config as configuration
from ldm_vae import metrics, provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.config import check_positive
from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected, read_image
from ldm_vae.data.folder import find_pictures, printable
from ldm_vae.data.samples import Enlarged, crop_image, evenly_spaced
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.editing import interpolation_weights, lerp, slerp
from ldm_vae.diffusion.generation import load_pipeline
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.samplers import Guidance, GuidedVelocity, Heun, first_step, flow_times, scheduler_shift, solve
from ldm_vae.errors import UserError
from ldm_vae.evaluation.latent_space import decode_and_encode, measure_path
from ldm_vae.evaluation.pages import Picture, embed_image, plain_page
from ldm_vae.evaluation.study import GIVEN, Content, Results, Study, StudyPlan, describe_autoencoder, enlarged_lines
from ldm_vae.files import checksum
from ldm_vae.random import generator
from ldm_vae.runtime import compute_device
from ldm_vae.utils.image_grid import labeled_sheet, side_by_side
from ldm_vae.utils.progress import track
from ldm_vae.utils.text import Table, markdown_table, pluralize

PIXELS, LATENTS, OTHER, INVERTED, NOISED = "pixels", "latents", "other", "inverted", "noised"
SHOWN_PAIRS = 4
"""Whose frames and animations are written; all pairs are measured."""
SHEET_FRAMES = 7
MILLISECONDS = 70
NAME_LENGTH = 40
"""Characters of each image's name in those of files."""
REST = 8
"""Frames that an animation rests at each end."""
LARGEST_ANIMATION_BYTES = 2 << 20
"""Largest animation that is embedded into the page."""


@dataclass(frozen=True)
class InterpolateConfig:
    """`ldm-vae interpolate`: in pixels, in latents, through a diffusion model's noise.

    Several pairs, or a folder, are measured together. Writes animations, frames, sheet.png, results.json, results.md
    and index.html. `compare` puts another autoencoder beside it, a plain one for instance; `prior` decodes draws from
    the prior.

      ldm-vae interpolate a.jpg b.jpg autoencoder=runs/mine output=between
      ldm-vae interpolate ~/images pairs=16 resolution=256 autoencoder=runs/vae compare=runs/plain output=between
      ldm-vae interpolate a.jpg b.jpg model=runs/diffusion resolution=512 animation=gif output=between

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id; null: that of the pipeline.
        images: image files (A B, or A B C D ...), or folders.
        output: the folder for the results.
        pipeline: a diffusion pipeline or run, for a path through its noise.
        compare: another autoencoder to compare with, on the same pairs.
        pairs: number of pairs of the images, evenly spaced; null: A with B, C with D, or half of a folder with the
            other.
        frames: number of frames of every path, odd, so that one is half way.
        size: side in pixels to which images are scaled and cropped; null: their own size.
        steps: number of steps of the sampler.
        strength: share of the steps that are applied to noised latents.
        prior: number of draws from the prior to decode; 0: none.
        seed: seed of the noise.
        animation: format of the animation: webp or gif.
        device: auto, cpu, cuda, cuda:1 ...
    """

    autoencoder: str | None = None
    images: list[str] = field(default_factory=list)
    output: str = "???"
    pipeline: str | None = None
    compare: str | None = None
    pairs: int | None = None
    frames: int = 13
    size: int | None = None
    steps: int = 20
    strength: float = 0.6
    prior: int = 0
    seed: int = 0
    animation: Literal["webp", "gif"] = "webp"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.autoencoder is None and self.pipeline is None:
            raise UserError("autoencoder: missing; give autoencoder, or a pipeline with its own")
        if self.frames < 3 or self.frames % 2 == 0:
            raise UserError(f"frames: {self.frames} is not odd and at least 3, so that one is half way; try 13")
        if self.size is not None and self.size < 16:
            raise UserError(f"size: {self.size} is below 16 pixels")
        check_positive(self, "steps", "pairs")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength: {self.strength} is not a share above 0; give up to 1, which keeps nothing")
        if self.prior < 0:
            raise UserError(f"prior: {self.prior} is negative; give 0 for no draws")


def interpolate_images(config: InterpolateConfig, *, overwrite: bool = False, dry_run: bool = False) -> Results:
    """Write the folder, return the content of results.json; the finished result of these settings is read, not redone.

    Raises:
        UserError: autoencoders, pipeline or images that do not go together, or a folder with something else.
    """
    return InterpolationStudy(config, overwrite).run(dry_run)


class InterpolationStudy(Study):
    """The study of `ldm-vae interpolate`."""

    format_version = 2  # 1 took brightness on [-1, 1] in SSIM
    replaced = ("frames/[0-9][0-9]_*/*_[0-9][0-9][0-9].png",)
    command, product = "interpolate", "the animations"
    config: InterpolateConfig

    def __init__(self, config: InterpolateConfig, overwrite: bool) -> None:
        if not config.images:
            raise UserError("images: missing; give two image files, or a folder")
        self.paths, device = find_pairs(config.images, config.pairs), compute_device(config.device)
        self.pipeline = autoencoder = None
        if config.pipeline is not None:
            self.pipeline = load_pipeline(config.pipeline, device)
            autoencoder = self.pipeline.autoencoder
        if config.autoencoder is not None:
            own, autoencoder = autoencoder, load_autoencoder(config.autoencoder).to(device)
            if own is not None and autoencoder.encoder_fingerprint() != own.encoder_fingerprint():
                raise UserError(
                    f"autoencoder: {config.autoencoder} is not the one of the pipeline {config.pipeline}; leave it "
                    "out, or give it as compare"
                )
        self.other = None if config.compare is None else load_autoencoder(config.compare).to(device)
        self.networks = {
            "compare": None if self.other is None else self.other.fingerprint(),
            "pipeline": None if self.pipeline is None else fingerprint(self.pipeline.unet),
        }
        super().__init__(config, autoencoder, overwrite=overwrite)

    def settings(self) -> dict[str, Any]:
        """Images count by what they hold."""
        found = configuration.to_dict(self.config) | {"images": [checksum(path) for path in self.paths]}
        return {key: value for key, value in found.items() if key not in ("output", "pairs", "device")}

    def inputs(self, results: Results) -> dict[str, tuple[Any, Any]]:
        return {f"another {name}": (results["networks"][name], present) for name, present in self.networks.items()}

    def prepare(self) -> None:
        self.pairs = read_pairs(self.paths, self.config.size, self.enlarged)
        self.ways = ways_of(self.config, self.autoencoder, self.other, self.pipeline)

    def work(self) -> StudyPlan:
        config, side = self.config, self.pairs[0].images.shape[-2:]
        pairs = f"{pluralize(len(self.pairs), 'pair')} of images, {side[0]} x {side[1]} pixels"
        ways = f"{pluralize(len(self.ways), 'way')} ({', '.join(way.title for way in self.ways)})"
        return StudyPlan((pairs, ways, pluralize(config.frames, "frame"), str(self.autoencoder.device)))

    def then(self, results: Results) -> list[str]:
        config = self.config
        return ["ldm-vae", "explore", config.autoencoder] if config.autoencoder else []

    def measure(self) -> Results:
        found: dict[str, list[WayMetrics]] = {way.key: [] for way in self.ways}
        self.shown: list[tuple[Pair, dict[str, list[Image.Image]]]] = []
        for pair in track(self.pairs, "interpolating", "pair"):
            made = {way.key: way.frames(pair.images) for way in self.ways}
            for key, frames in made.items():
                found[key].append(measure_way(frames, pair.images))
            if len(self.shown) < SHOWN_PAIRS:
                self.shown.append((pair, {key: transforms.to_pil(frames) for key, frames in made.items()}))
        self.drawn = draws_of(self.config, self.pairs, self.autoencoder, self.other, self.pipeline)
        return {
            "networks": self.networks,
            "other": None if self.other is None else describe_autoencoder(self.other),
            "protocol": {
                "pairs": len(self.pairs),
                "images": {"count": len(self.paths), "part": GIVEN},
                "size": list(self.pairs[0].images.shape[-2:]),
                "distance": found[PIXELS][0].distance,
                "versions": provenance.versions(),
            },
            "ways": [{"key": way.key, "title": way.title, **interval_means(found[way.key])} for way in self.ways],
            "differences": differences(found),
            "prior": [{"title": draws.title, "round_trip": draws.round_trip} for draws in self.drawn],
            "pairs": [
                {"name": pair.name, "ways": {key: asdict(values[n]) for key, values in found.items()}}
                for n, pair in enumerate(self.pairs)
            ],
        }

    def files(self, results: Results) -> dict[str, Content]:
        """Frames, animations of each way and of all together, and sheets."""
        found: dict[str, Content] = {}
        cells: list[Image.Image] = []
        captions: list[str] = []
        kind = self.config.animation
        self.animations = [animated([side_by_side(row) for row in zip(*made.values())], kind) for _, made in self.shown]
        for (pair, made), together in zip(self.shown, self.animations):
            found[f"{pair.name}_all.{kind}"] = together
            for way in self.ways:
                frames = made[way.key]
                found |= {f"frames/{pair.name}/{way.key}_{k:03d}.png": frame for k, frame in enumerate(frames)}
                found[f"{pair.name}_{way.key}.{kind}"] = animated(frames, kind)
                chosen = evenly_spaced(len(frames), SHEET_FRAMES)
                cells += [frames[k] for k in chosen]
                captions += [f"{way.title}" if k == 0 else f"{k / (len(frames) - 1):.0%}" for k in chosen]
        self.sheet = labeled_sheet(cells, captions, columns=min(SHEET_FRAMES, self.config.frames))
        found["sheet.png"] = self.sheet
        return found | ({"prior.png": prior_sheet(self.drawn)} if self.drawn else {})

    def markdown(self, results: Results) -> str:
        lines = ["# Interpolation", ""]
        for table in tables(results):
            lines += [*markdown_table(table.headings, table.rows), "", *[f"{note}\n" for note in table.notes]]
        return "\n".join(lines).rstrip() + "\n"

    def page(self, results: Results) -> str:
        pictures = [
            embed_image(self.sheet, "Every way between the first pairs, from the first image to the second.", None)
        ]
        text = "From left to right: " + ", ".join(way.title for way in self.ways) + "."
        for animation in self.animations:
            if len(animation) <= LARGEST_ANIMATION_BYTES:
                pictures.append(embedded_animation(animation, text))
        if self.drawn:
            pictures.append(embed_image(prior_sheet(self.drawn), "Draws decoded, one row for each prior.", None))
        lead = f"What lies between two images, over {pluralize(len(self.pairs), 'pair')}."
        sentences = [*way_verdicts(results), *enlarged_lines(results)]
        return plain_page("Interpolation", lead, sentences, [], tables(results), pictures)

    def record(self, results: Results) -> dict[str, Any]:
        return {"pairs": results["protocol"]["pairs"]}


# The ways from one image to another.

Frames = Callable[[Tensor], Tensor]
"""Images (2, 3, h, w) in [-1, 1] -> the way from the first to the second (s, 3, h, w)."""


@dataclass(frozen=True)
class Way:
    """One way of going from an image to another. `key`: for file names, `title`: for people."""

    key: str
    title: str
    frames: Frames


def ways_of(
    config: InterpolateConfig,
    autoencoder: Autoencoder,
    other: Autoencoder | None,
    pipeline: LatentDiffusionPipeline | None,
) -> list[Way]:
    """Every way that the settings ask for, the cross-fade of the pixels first."""
    count, steps = config.frames, config.steps
    ways = [
        Way(PIXELS, "pixels (cross-fade)", lambda pair: cross_fade(pair, count)),
        Way(LATENTS, "latents", lambda pair: through_latents(autoencoder, pair, count)),
    ]
    if other is not None:
        ways.append(Way(OTHER, "latents of the other", lambda pair: through_latents(other, pair, count)))
    if pipeline is not None:
        strength, seed = config.strength, config.seed
        ways += [
            Way(INVERTED, "diffusion, through noise", lambda pair: through_inversion(pipeline, pair, count, steps)),
            Way(
                NOISED,
                f"diffusion, {strength:.0%} noised",
                lambda pair: through_noising(pipeline, pair, count, steps, strength, seed),
            ),
        ]
    return ways


def cross_fade(pair: Tensor, count: int) -> Tensor:
    """Mixed pixels (s, 3, h, w): what every other way has to be better than."""
    return torch.cat([lerp(pair[:1], pair[1:], share) for share in interpolation_weights(count)])


def through_latents(autoencoder: Autoencoder, pair: Tensor, count: int) -> Tensor:
    """A straight line between posterior means, decoded one by one."""
    ends = means_of(autoencoder, pair)
    return decode_cropped(
        autoencoder, [lerp(ends[:1], ends[1:], share) for share in interpolation_weights(count)], pair
    )


def through_inversion(pipeline: LatentDiffusionPipeline, pair: Tensor, count: int, steps: int) -> Tensor:
    """Both images followed back to the noise that the flow makes them of, a great circle there, and forward again."""
    ends = pipeline.normalizer.normalize(means_of(pipeline.autoencoder, pair))
    velocity, times = flow_of(pipeline, ends, steps)
    back = Heun(times[::-1])
    noises = [solve(velocity, end[None], back) for end in ends]
    ahead = Heun(times)
    found = [solve(velocity, slerp(noises[0], noises[1], share), ahead) for share in interpolation_weights(count)]
    return decode_cropped(pipeline.autoencoder, [pipeline.normalizer.denormalize(z) for z in found], pair)


def through_noising(
    pipeline: LatentDiffusionPipeline, pair: Tensor, count: int, steps: int, strength: float, seed: int
) -> Tensor:
    """The straight line between normalized latents, noised by one noise for all frames and denoised by the model."""
    ends = pipeline.normalizer.normalize(means_of(pipeline.autoencoder, pair))
    velocity, times = flow_of(pipeline, ends, steps)
    times = times[first_step(steps, strength) :]
    noise = torch.randn(ends[:1].shape, generator=generator(seed, "interpolation")).to(ends)
    start = torch.full((1,), times[0], device=ends.device)
    found = []
    for share in interpolation_weights(count):
        clean = lerp(ends[:1], ends[1:], share)
        found.append(solve(velocity, flow.interpolate(clean, noise, start), Heun(times)))
    return decode_cropped(pipeline.autoencoder, [pipeline.normalizer.denormalize(z) for z in found], pair)


def flow_of(pipeline: LatentDiffusionPipeline, latents: Tensor, steps: int) -> tuple[Any, tuple[float, ...]]:
    """The velocity of any class, without guidance, and the times for latents of this size."""
    trained_height, trained_width = pipeline.config["latent_size"]
    height, width = latents.shape[-2:]
    shift = scheduler_shift(pipeline.scheduler) * (height * width / (trained_height * trained_width)) ** 0.5
    guided = GuidedVelocity(pipeline.unet, None, None, Guidance())

    @torch.no_grad()
    def velocity(noisy: Tensor, time: Tensor) -> Tensor:
        return guided(noisy, time)

    return velocity, flow_times(steps, shift)


def means_of(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Posterior means of images (n, 3, h, w), encoded one by one. Raises: UserError when they are not finite."""
    means = torch.cat([autoencoder.encode_moments(image[None].to(autoencoder.device))[0] for image in images])
    if not bool(torch.isfinite(means).all()):
        raise UserError("latents: some are not finite; check the autoencoder with `ldm-vae diagnose`")
    return means


def decode_cropped(autoencoder: Autoencoder, latents: Sequence[Tensor], like: Tensor) -> Tensor:
    """Latents (1, c, h, w) -> images of the height and width of `like`, on the CPU, after an 8-bit round trip."""
    images = torch.cat([autoencoder.decode_images(latent).cpu() for latent in latents])
    return transforms.from_uint8(transforms.to_uint8(images[..., : like.shape[-2], : like.shape[-1]]))


# The metrics of a way.


@dataclass(frozen=True)
class WayMetrics:
    """Metrics of one path between one pair; the first four are from `latent_space.measure_path`.

    Attributes:
        end_psnr_db: of the first and the last frame to the two images, mean.
        fade_psnr_db: of the frame half way to the cross-fade of the pixels: where it is high, the way is little more.
    """

    unevenness: float
    midpoint_sharpness: float
    perceptual_length: float
    distance: str
    end_psnr_db: float
    fade_psnr_db: float


MEASURES = {
    "unevenness": "unevenness",
    "midpoint_sharpness": "midpoint sharpness",
    "perceptual_length": "perceptual length",
    "end_psnr_db": "ends (dB)",
    "fade_psnr_db": "midpoint to cross-fade (dB)",
}


MEANINGS = {
    "unevenness": "the largest step over the mean step; 1 is even, a jump is as large as there are steps",
    "midpoint_sharpness": "fine contrast half way over that of both ends of the way; under 1 is softer",
    "perceptual_length": "mean of the distance of neighbors over the squared step: the smaller, the smoother",
    "end_psnr_db": "the first and last frame against the two images",
    "fade_psnr_db": "the frame half way against the mixed pixels: where it is high, the way is a cross-fade",
}


def measure_way(frames: Tensor, pair: Tensor) -> WayMetrics:
    """Figures of frames (s, 3, h, w) between two images (2, 3, h, w)."""
    path = measure_path(frames)
    middle = cross_fade(pair, 3)[1:2]
    return WayMetrics(
        unevenness=path.unevenness,
        midpoint_sharpness=path.midpoint_sharpness,
        perceptual_length=path.perceptual_length,
        distance=path.distance,
        end_psnr_db=float(metrics.psnr(frames[[0, -1]], pair).mean()),
        fade_psnr_db=float(metrics.psnr(frames[len(frames) // 2][None], middle)),
    )


def interval_means(figures: Sequence[WayMetrics]) -> dict[str, Any]:
    """Mean over pairs and 95 % bootstrap interval of every measure."""
    found = {}
    for measure in MEASURES:
        values = np.array([getattr(one, measure) for one in figures])
        low, high = metrics.bootstrap_interval(values)
        found[measure] = {"mean": float(values.mean()), "low": low, "high": high}
    return found


def differences(found: dict[str, list[WayMetrics]]) -> dict[str, Any]:
    """Latents minus the other autoencoder's, pair by pair; empty without another, and for one pair."""
    if OTHER not in found or len(found[OTHER]) < 2:
        return {}
    ours, theirs = found[LATENTS], found[OTHER]
    return {
        measure: metrics.paired_difference(
            np.array([getattr(one, measure) for one in ours]), np.array([getattr(one, measure) for one in theirs])
        )
        for measure in MEASURES
    }


# Draws from priors.


@dataclass(frozen=True)
class PriorDraws:
    """Decoded draws from one prior. `images` (n, 3, h, w). `round_trip`: rms of encode(decode(z)) - z, per channel in
    standard deviations of the latents: 0.1 says that the decoder understood z, 1 that z is nothing to it."""

    title: str
    images: Tensor
    round_trip: float


def draw_priors(autoencoder: Autoencoder, images: Tensor, count: int, seed: int) -> list[PriorDraws]:
    """`count` draws from N(0, 1), from a normal of each channel's own mean and deviation, both independent between
    positions, and for comparison posterior samples of real images (n, 3, h, w), n >= 2; all from the same noise."""
    found = [autoencoder.encode_moments(image[None].to(autoencoder.device)) for image in images]
    mean, variance = torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found]).exp()
    if not bool(torch.isfinite(mean).all()):
        raise UserError("latents: some are not finite; check the autoencoder with `ldm-vae diagnose`")
    center = mean.mean(dim=(0, 2, 3), keepdim=True)
    spread = (mean.var(dim=(0, 2, 3), keepdim=True, correction=0) + variance.mean(dim=(0, 2, 3), keepdim=True)).sqrt()
    noise = torch.randn((count, *mean.shape[1:]), generator=generator(seed, "prior")).to(mean)
    rows = np.arange(count) % len(mean)
    kinds = {
        "N(0, 1)": noise,
        "channel statistics": center + spread * noise,
        "posterior samples": mean[rows] + variance[rows].sqrt() * noise,
    }
    drawn = []
    for title, latents in kinds.items():
        decoded, error = decode_and_encode(autoencoder, latents, spread)
        drawn.append(PriorDraws(title, decoded[..., : images.shape[-2], : images.shape[-1]].cpu(), error))
    return drawn


def draw_model(pipeline: LatentDiffusionPipeline, like: Tensor, count: int, steps: int, seed: int) -> PriorDraws:
    """`count` images that the diffusion model generates, of any class, without guidance, in the size of `like`."""
    normalized = torch.empty(1, *means_of(pipeline.autoencoder, like[:1]).shape[1:])
    velocity, times = flow_of(pipeline, normalized, steps)
    noise = torch.randn((count, *normalized.shape[1:]), generator=generator(seed, "prior"))
    device = pipeline.autoencoder.device
    latents = torch.cat([solve(velocity, one[None].to(device), Heun(times)) for one in noise])
    latents = pipeline.normalizer.denormalize(latents)
    spread = torch.tensor(pipeline.normalizer.std, device=device, dtype=torch.float32).view(1, -1, 1, 1)
    decoded, error = decode_and_encode(pipeline.autoencoder, latents, spread)
    return PriorDraws("diffusion model", decoded[..., : like.shape[-2], : like.shape[-1]].cpu(), error)


def draws_of(
    config: InterpolateConfig,
    pairs: Sequence[Pair],
    autoencoder: Autoencoder,
    other: Autoencoder | None,
    pipeline: LatentDiffusionPipeline | None,
) -> list[PriorDraws]:
    """The decoded priors, of both autoencoders and of the diffusion model."""
    if not config.prior:
        return []
    images = torch.cat([pair.images for pair in pairs])
    drawn = draw_priors(autoencoder, images, config.prior, config.seed)
    if other is not None:
        of_other = draw_priors(other, images, config.prior, config.seed)
        drawn += [PriorDraws(f"other: {draws.title}", draws.images, draws.round_trip) for draws in of_other]
    if pipeline is not None:
        drawn.append(draw_model(pipeline, images, config.prior, config.steps, config.seed))
    return drawn


# Pairs of images, pictures and words.


@dataclass(frozen=True)
class Pair:
    """Two images (2, 3, h, w) in [-1, 1] and a name for files."""

    name: str
    images: Tensor


def find_pairs(inputs: Sequence[str], pairs: int | None) -> list[Path]:
    """An even number of files, the first with the second and so on; of folders, or with `pairs`, so many evenly
    spread, the first half of them with the second.

    Raises:
        UserError: fewer than two files, or an odd number of them.
    """
    files = [path for _, path in find_pictures(inputs)]
    folders = any(Path(text).expanduser().is_dir() for text in inputs)
    if len(files) < 2:
        raise UserError(f"{inputs[0]}: one image; give two, or a folder")
    if pairs is not None or folders:
        count = 2 * (pairs or len(files) // 2)
        if len(files) < count:
            raise UserError(f"pairs: {pairs} pairs of {len(files)} images; give at most {len(files) // 2}")
        chosen = [files[number] for number in evenly_spaced(len(files), count)]
        halves = zip(chosen[: count // 2], chosen[count // 2 :])  # neighbors are of one class in folders of classes
        return [path for pair in halves for path in pair]
    if len(files) % 2:
        raise UserError(f"{inputs[-1]}: {len(files)} images make no pairs; give an even number, or a folder")
    return files


def read_pairs(files: Sequence[Path], size: int | None, enlarged: Enlarged) -> list[Pair]:
    """All of one size; images that are smaller than `size` are appended to `enlarged`.

    Raises: UserError for an unreadable image, or sizes that differ.
    """
    images = []
    for path in files:
        try:
            image = read_image(path)
        except ImageRejected as error:
            raise UserError(f"{path}: cannot be read ({error}); give another image") from error
        if size is not None:
            image = crop_image(image, size, path.name, enlarged).pixels
        images.append(transforms.to_batch(image)[0])
        if images[-1].shape != images[0].shape:
            shapes = [f"{one.shape[2]} x {one.shape[1]}" for one in (images[0], images[-1])]
            raise UserError(f"{path}: {shapes[1]} pixels, {files[0]} has {shapes[0]}; bring all to one size with size")
    if min(images[0].shape[1:]) < 16:
        raise UserError(f"{files[0]}: is below 16 pixels; give larger images, or size")
    return [
        Pair(
            f"{number // 2:02d}_{_short(files[number])}_{_short(files[number + 1])}",
            torch.stack(images[number : number + 2]),
        )
        for number in range(0, len(images), 2)
    ]


def _short(path: Path) -> str:
    return printable(path.stem)[:NAME_LENGTH]


def animated(frames: Sequence[Image.Image], kind: str) -> bytes:
    """A webp or gif file that runs forward and back in a loop, with a rest at both ends."""
    there = [frames[0]] * REST + list(frames[1:-1]) + [frames[-1]] * REST
    loop, buffer = there + list(frames[-2:0:-1]), io.BytesIO()
    options: dict[str, Any] = {} if kind == "gif" else {"quality": 85}
    loop[0].save(buffer, kind.upper(), save_all=True, append_images=loop[1:], duration=MILLISECONDS, loop=0, **options)
    return buffer.getvalue()


def embedded_animation(animation: bytes, text: str) -> Picture:
    """An animation as it is, embedded."""
    with Image.open(io.BytesIO(animation)) as file:
        width, height = file.size
        kind = (file.format or "WEBP").lower()
    return Picture(f"data:image/{kind};base64,{base64.b64encode(animation).decode()}", text, width, height)


def prior_sheet(drawn: Sequence[PriorDraws]) -> Image.Image:
    """One row for each prior, its title below the first picture."""
    cells, captions = [], []
    for draws in drawn:
        cells += transforms.to_pil(draws.images)
        captions += [draws.title, *[""] * (len(draws.images) - 1)]
    return labeled_sheet(cells, captions, columns=len(drawn[0].images))


def tables(results: Results) -> list[Table]:
    """The ways, and the priors where there are some."""
    found = [way_table(results)]
    if results["prior"]:
        note = (
            "Channel statistics: a normal of each channel's own mean and deviation over the images. Round trip: rms of "
            "encode(decode(z)) - z in standard deviations of each channel. Positions are drawn independently, so that "
            "pictures are not expected of the first two: arranging latents is what a diffusion model does."
        )
        rows = [[draws["title"], f"{draws['round_trip']:.2f}"] for draws in results["prior"]]
        found.append(Table(["drawn from", "round trip (deviations)"], rows, [note]))
    return found


def way_table(results: dict[str, Any]) -> Table:
    """One row for each way; intervals where there are several pairs."""
    rows = []
    for way in results["ways"]:
        cells = [way["title"]]
        for measure in MEASURES:
            value = way[measure]
            interval = f" ({value['low']:.2f} to {value['high']:.2f})" if results["protocol"]["pairs"] > 1 else ""
            cells.append(f"{value['mean']:.2f}{interval}")
        rows.append(cells)
    return Table(["way", *MEASURES.values()], rows, way_notes(results))


def way_notes(results: dict[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    protocol = results["protocol"]
    height, width = protocol["size"]
    plural = "s" if protocol["pairs"] > 1 else ""
    meanings = "; ".join(f"{title}: {MEANINGS[measure]}" for measure, title in MEASURES.items())
    found = [
        f"{protocol['pairs']} pair{plural} of {width} x {height} pixels, {results['config']['frames']} frames each; "
        f"distance {protocol['distance']}. {meanings[0].upper()}{meanings[1:]}."
    ]
    if results["differences"]:
        gaps = []
        for measure, title in MEASURES.items():
            gap = results["differences"][measure]
            gaps.append(f"{title} {gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})")
        found.append(f"Latents minus those of the other, pair by pair: {'; '.join(gaps)}.")
    return found


def way_verdicts(results: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    ways = {way["key"]: way for way in results["ways"]}
    latents = ways["latents"]
    found = [
        f"Half way through the latents the picture is at {latents['fade_psnr_db']['mean']:.1f} dB to the mixed pixels, "
        f"while the ends are at {latents['end_psnr_db']['mean']:.1f} dB to the images: "
        + (
            "the way is a cross-fade, and the two objects are seen through each other."
            if latents["fade_psnr_db"]["mean"] > latents["end_psnr_db"]["mean"] - 6
            else "the way is more than a cross-fade."
        )
    ]
    if results["differences"]:
        apart = [
            title
            for measure, title in MEASURES.items()
            if results["differences"][measure]["low"] > 0 or results["differences"][measure]["high"] < 0
        ]
        result = f"differ in {', '.join(apart)}" if apart else "do not differ in any measure"
        found.append(f"The two autoencoders {result} (95 % interval over pairs).")
    if "inverted" in ways:
        inverted, noised = (ways[key]["end_psnr_db"]["mean"] for key in ("inverted", "noised"))
        found.append(
            f"Through the diffusion model's noise the ends come back at {inverted:.1f} dB, noised and denoised at "
            f"{noised:.1f} dB: what is lost is no longer the image."
        )
    return found
