"""`ldm-vae interpolate`: the settings, the pairs, and a folder with animations, frames, sheets, figures and a page."""

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

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.applications import interpolation
from ldm_vae.applications.interpolation import MEASURES, Draws, Way, WayFigures
from ldm_vae.applications.interpolation_page import write_page
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data import pixels
from ldm_vae.data.decoding import ImageRejected, decode_image
from ldm_vae.data.folder import printable
from ldm_vae.data.local_file import read_regular_file
from ldm_vae.data.sheets import labelled_sheet, side_by_side
from ldm_vae.data.transforms import cover_crop
from ldm_vae.errors import UserError
from ldm_vae.evaluation import metrics
from ldm_vae.evaluation.fidelity.measurement import spread
from ldm_vae.evaluation.fidelity.pictures import find_pictures
from ldm_vae.evaluation.fidelity.reconstruction import compute_device
from ldm_vae.evaluation.result_folder import alone_in, check_made_of, describe_autoencoder, finished_result, publishing
from ldm_vae.files import write_atomically, write_json, write_png

RESULTS = "results.json"
SHOWN_PAIRS = 4
"""Whose frames and animations are written; all pairs are measured."""
SHEET_FRAMES = 7
MILLISECONDS = 70
NAME_LENGTH = 40
"""Characters of each image's name in those of files."""
HOLD = 8
"""Frames that an animation rests at each end."""


@dataclass(frozen=True)
class InterpolateConfig:
    """What lies between which images, in what.

    Attributes:
        autoencoder: A directory, run or hub id; None: that of the pipeline.
        images: Checksums of the pairs' files, one after the other.
        pipeline: A diffusion model whose noise is another way.
        compare: Another autoencoder on the same pairs.
        frames: Of every way, odd, so that one is half way.
        size: Images are scaled and cropped to this side; None: their own size.
        steps, strength: Of the diffusion model; the share of the steps that noised latents go through.
        prior: Draws from the prior to decode; 0: none.
        seed: Of the noise.
        animation: webp or gif.
    """

    autoencoder: str | None
    images: tuple[str, ...]
    pipeline: str | None = None
    compare: str | None = None
    frames: int = 13
    size: int | None = None
    steps: int = 20
    strength: float = 0.6
    prior: int = 0
    seed: int = 0
    animation: Literal["webp", "gif"] = "webp"

    def __post_init__(self) -> None:
        if self.autoencoder is None and self.pipeline is None:
            raise UserError("autoencoder: missing; give --autoencoder DIR, or --pipeline DIR with its own")
        if self.frames < 3 or self.frames % 2 == 0:
            raise UserError(f"frames: {self.frames} is not odd and at least 3, so that one is half way; try 13")
        if self.size is not None and self.size < 16:
            raise UserError(f"size: {self.size} is below 16 pixels")
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is below 1")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength: {self.strength} is no share above 0; give up to 1, which keeps nothing")
        if self.prior < 0:
            raise UserError(f"prior: {self.prior} is negative; give 0 for no draws")


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
    if pairs is not None and pairs < 1:
        raise UserError(f"pairs: {pairs} is below 1")
    if len(files) < 2:
        raise UserError(f"{inputs[0]}: one image; give two, or a folder")
    if pairs is not None or folders:
        wanted = 2 * (pairs or len(files) // 2)
        if len(files) < wanted:
            raise UserError(f"pairs: {pairs} pairs of {len(files)} images; give at most {len(files) // 2}")
        chosen = [files[number] for number in spread(len(files), wanted)]
        halves = zip(chosen[: wanted // 2], chosen[wanted // 2 :])  # neighbours are of one class in folders of classes
        return [path for pair in halves for path in pair]
    if len(files) % 2:
        raise UserError(f"{inputs[-1]}: {len(files)} images make no pairs; give an even number, or a folder")
    return files


def read_pairs(files: Sequence[Path], size: int | None) -> list[Pair]:
    """All of one size. Raises: UserError for an unreadable image, or sizes that differ."""
    images = []
    for path in files:
        try:
            image = decode_image(read_regular_file(path))
        except ImageRejected as error:
            raise UserError(f"{path}: cannot be read ({error}); give another image") from error
        if size is not None:
            image = cover_crop(image, size)
        images.append(pixels.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)))
        if images[-1].shape != images[0].shape:
            shapes = [f"{one.shape[2]} x {one.shape[1]}" for one in (images[0], images[-1])]
            raise UserError(
                f"{path}: {shapes[1]} pixels, {files[0]} has {shapes[0]}; bring all to one size by --size N"
            )
    if min(images[0].shape[1:]) < 16:
        raise UserError(f"{files[0]}: is below 16 pixels; give larger images, or --size N")
    return [
        Pair(
            f"{number // 2:02d}_{_short(files[number])}_{_short(files[number + 1])}",
            torch.stack(images[number : number + 2]),
        )
        for number in range(0, len(images), 2)
    ]


def _short(path: Path) -> str:
    return printable(path.stem)[:NAME_LENGTH]


def interpolate(
    config: InterpolateConfig, files: Sequence[Path], output: str | Path, device: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Write the folder, return the content of results.json; the finished result of these settings is read, not redone.

    Raises:
        UserError: autoencoders, pipeline or images that do not go together, or a folder with something else.
    """
    started = time.time()
    output, target = Path(output), compute_device(device)
    pipeline = None if config.pipeline is None else _load_pipeline(config.pipeline, target)
    own = None if pipeline is None else pipeline.autoencoder
    autoencoder = own if config.autoencoder is None else load_autoencoder(config.autoencoder).to(target)
    if own is not None and encoder_fingerprint(autoencoder) != encoder_fingerprint(own):
        raise UserError(
            f"autoencoder: {config.autoencoder} is not the one of the pipeline {config.pipeline}; leave it out, or "
            "give it as --compare"
        )
    other = None if config.compare is None else load_autoencoder(config.compare).to(target)
    identity = fingerprint(autoencoder)
    finished = finished_result(output / RESULTS, config, identity, overwrite)
    networks = {
        "compare": None if other is None else fingerprint(other),
        "pipeline": None if pipeline is None else fingerprint(pipeline.unet),
    }
    if finished is not None:
        parts = {f"another {name}": (finished["networks"][name], present) for name, present in networks.items()}
        check_made_of(output, parts, place="--out")
        return finished
    pairs = read_pairs(files, config.size)
    ways = ways_of(config, autoencoder, other, pipeline)
    with alone_in(output):
        found: dict[str, list[WayFigures]] = {way.key: [] for way in ways}
        shown: list[tuple[Pair, dict[str, Tensor]]] = []
        for number, pair in enumerate(_progress(pairs)):
            made = {way.key: way.frames(pair.images) for way in ways}
            for key, frames in made.items():
                found[key].append(interpolation.measure_way(frames, pair.images))
            if number < SHOWN_PAIRS:
                shown.append((pair, made))
        drawn = draws_of(config, pairs, autoencoder, other, pipeline)
        results = {
            "format_version": 1,
            "autoencoder": describe_autoencoder(autoencoder),
            "networks": networks,
            "other": None if other is None else describe_autoencoder(other),
            "protocol": {
                "pairs": len(pairs),
                "size": list(pairs[0].images.shape[-2:]),
                "distance": found[interpolation.PIXELS][0].distance,
                "versions": provenance.versions(),
            },
            "ways": [{"key": way.key, "title": way.title, **summary(found[way.key])} for way in ways],
            "differences": differences(found),
            "prior": [{"title": draws.title, "round_trip": draws.round_trip} for draws in drawn],
            "pairs": [
                {"name": pair.name, "ways": {key: asdict(values[n]) for key, values in found.items()}}
                for n, pair in enumerate(pairs)
            ],
            "config": configuration.to_dict(config),
        }
        with publishing(output):
            sheet, animations = write_pictures(output, config, ways, shown)
            write_page(output, results, sheet, drawn, animations)
            write_json(output / RESULTS, results)
            provenance.write_run_record(output, None, started, time.time() - started, pairs=len(pairs))
    return results


def _load_pipeline(model: str, device: torch.device) -> Any:
    from ldm_vae.diffusion.generation import load_pipeline
    from ldm_vae.diffusion.pictures import GenerationConfig

    return load_pipeline(GenerationConfig(model=model), device)


def ways_of(config: InterpolateConfig, autoencoder: Any, other: Any, pipeline: Any) -> list[Way]:
    """Every way that the settings ask for, the cross-fade of the pixels first."""
    count = config.frames
    ways = [
        Way(interpolation.PIXELS, "pixels (cross-fade)", lambda pair: interpolation.cross_fade(pair, count)),
        Way(
            interpolation.LATENTS, "latents", lambda pair: interpolation.through_latents(autoencoder, pair, count)
        ),
    ]  # fmt: skip
    if other is not None:
        ways.append(
            Way(
                interpolation.OTHER, "latents of the other",
                lambda pair: interpolation.through_latents(other, pair, count),
            )
        )  # fmt: skip
    if pipeline is not None:
        ways += [
            Way(
                interpolation.INVERTED, "diffusion, through noise",
                lambda pair: interpolation.through_inversion(pipeline, pair, count, config.steps),
            ),
            Way(
                interpolation.NOISED, f"diffusion, {config.strength:.0%} noised",
                lambda pair: interpolation.through_noising(
                    pipeline, pair, count, config.steps, config.strength, config.seed
                ),
            ),
        ]  # fmt: skip
    return ways


def draws_of(
    config: InterpolateConfig, pairs: Sequence[Pair], autoencoder: Any, other: Any, pipeline: Any
) -> list[Draws]:
    """The decoded priors, of both autoencoders and of the diffusion model."""
    if not config.prior:
        return []
    images = torch.cat([pair.images for pair in pairs])
    drawn = interpolation.draw_priors(autoencoder, images, config.prior, config.seed)
    if other is not None:
        of_other = interpolation.draw_priors(other, images, config.prior, config.seed)
        drawn += [Draws(f"other: {draws.title}", draws.images, draws.round_trip) for draws in of_other]
    if pipeline is not None:
        drawn.append(interpolation.draw_model(pipeline, images, config.prior, config.steps, config.seed))
    return drawn


def summary(figures: Sequence[WayFigures]) -> dict[str, Any]:
    """Mean over pairs and 95 % bootstrap interval of every measure."""
    found = {}
    for measure in MEASURES:
        values = np.array([getattr(one, measure) for one in figures])
        low, high = metrics.bootstrap_interval(values)
        found[measure] = {"mean": float(values.mean()), "low": low, "high": high}
    return found


def differences(found: dict[str, list[WayFigures]]) -> dict[str, Any]:
    """Latents minus the other autoencoder's, pair by pair; empty without another, and for one pair."""
    if interpolation.OTHER not in found or len(found[interpolation.OTHER]) < 2:
        return {}
    ours, theirs = found[interpolation.LATENTS], found[interpolation.OTHER]
    return {
        measure: metrics.paired_difference(
            np.array([getattr(one, measure) for one in ours]), np.array([getattr(one, measure) for one in theirs])
        )
        for measure in MEASURES
    }


def write_pictures(
    output: Path, config: InterpolateConfig, ways: Sequence[Way], shown: Sequence[tuple[Pair, dict[str, Tensor]]]
) -> tuple[Image.Image, list[Path]]:
    """Frames, animations and sheet.png; returns the sheet, and for each pair the animation of all ways together."""
    cells: list[Image.Image] = []
    captions: list[str] = []
    animations: list[Path] = []
    for pair, made in shown:
        pictures = {way.key: pixels.to_pil(made[way.key]) for way in ways}
        animations.append(output / f"{pair.name}_all.{config.animation}")
        animate([side_by_side(row) for row in zip(*pictures.values())], animations[-1])
        for way in ways:
            frames = pictures[way.key]
            for old in (output / "frames" / pair.name).glob(f"{way.key}_*.png"):
                old.unlink()  # an earlier result had more
            for k, frame in enumerate(frames):
                write_png(output / "frames" / pair.name / f"{way.key}_{k:03d}.png", frame)
            animate(frames, output / f"{pair.name}_{way.key}.{config.animation}")
            chosen = spread(len(frames), SHEET_FRAMES)
            cells += [frames[k] for k in chosen]
            captions += [f"{way.title}" if k == 0 else f"{k / (len(frames) - 1):.0%}" for k in chosen]
    columns = min(SHEET_FRAMES, config.frames)
    sheet = labelled_sheet(cells, captions, columns=columns)
    write_png(output / "sheet.png", sheet)
    return sheet, animations


def animate(frames: Sequence[Image.Image], path: Path) -> None:
    """There and back, resting at both ends, for ever."""
    there = [frames[0]] * HOLD + list(frames[1:-1]) + [frames[-1]] * HOLD
    loop = there + list(frames[-2:0:-1])
    kind: dict[str, Any] = {"format": "GIF"} if path.suffix == ".gif" else {"format": "WEBP", "quality": 85}
    write_atomically(
        path,
        lambda temporary: loop[0].save(
            temporary, save_all=True, append_images=loop[1:], duration=MILLISECONDS, loop=0, **kind
        ),
    )


def _progress(pairs: Sequence[Pair]) -> Any:
    from tqdm import tqdm

    return tqdm(pairs, desc="interpolating", unit="pair", dynamic_ncols=True, leave=False)
