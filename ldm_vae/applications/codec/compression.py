"""Pictures to small files and back: `compress` and `decompress` for files, `Codec` for arrays in memory.

    picture -> autoencoder -> latents -> Grid -> levels -> entropy model -> parts of the file       (compress)
    picture <- autoencoder <- latents <- Grid <- levels <- entropy model <- parts of the file       (decompress)

The levels that a file holds are decoded bit by bit alike on every machine. The picture is then the decoder network's
float arithmetic, which may differ in the last bit of a pixel between machines, as between any two JPEG decoders.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ldm_vae.applications.codec import entropy_models, format
from ldm_vae.applications.codec.format import FittedModel, load_model, short_fingerprint
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.config import plain_settings
from ldm_vae.data import transforms
from ldm_vae.data.decoding import ImageRejected, read_image
from ldm_vae.data.folder import find_pictures
from ldm_vae.errors import UserError
from ldm_vae.evaluation.baselines import largest_within
from ldm_vae.files import write_bytes, write_png
from ldm_vae.paths import COMPRESSED
from ldm_vae.runtime import compute_device
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say, track
from ldm_vae.utils.text import duration_text, pluralize

LEVELS_PER_QUALITY = 16
"""Steps of the search for a file size."""


@dataclass(frozen=True)
class CompressConfig:
    """`ldm-vae compress`.

    Takes files and folders, any size. Writes NAME.ldmz beside each picture, or into `output`. `decompress` needs the
    same autoencoder, and the same entropy model where one is given here.

      ldm-vae compress holiday.jpg portraits/ autoencoder=runs/mine output=small
      ldm-vae compress holiday.jpg autoencoder=runs/mine entropy=runs/codec.safetensors target_bpp=0.3

    Args:
        images: image files and folders, pictures of any size.
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: the folder for the files; null: beside each picture.
        entropy: an entropy model of `ldm-vae codec fit` for this autoencoder, which makes files smaller; null: none.
        quality: 1 to 100; 12 more halve the quantization step; null: 50.
        target_bpp: instead of a quality: the largest number of bits per pixel.
        progressive: increasing numbers of first channels that `decompress` can show without the rest.
        device: auto, cpu, cuda, cuda:1 ...
    """

    images: list[str] = field(default_factory=list)
    autoencoder: str = "???"
    output: str | None = None
    entropy: str | None = None
    quality: float | None = None
    target_bpp: float | None = None
    progressive: list[int] = field(default_factory=list)
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.quality is not None and self.target_bpp is not None:
            raise UserError("quality: and target_bpp exclude each other; give one of them")
        if self.target_bpp is not None and not 0 < self.target_bpp < 100:
            raise UserError(f"target_bpp: {self.target_bpp:g} is not a number of bits per pixel; 0.1 to 1 is usual")
        entropy_models.step_of(50.0 if self.quality is None else self.quality)
        if self.progressive != sorted(set(self.progressive)) or any(end < 1 for end in self.progressive):
            raise UserError(
                f"progressive: {self.progressive} is not a rising list of channel counts; give for example 4,8"
            )
        if len(self.progressive) >= format.MOST_PARTS:
            raise UserError(f"progressive: {len(self.progressive)} parts; give fewer than {format.MOST_PARTS}")


@dataclass(frozen=True)
class DecompressConfig:
    """`ldm-vae decompress`: into PNG pictures.

    Every file is checked first: one that is damaged, cut off or made with another autoencoder is refused, the others
    are still decompressed, and the exit code is 2. `channels` shows a preview from the first channels of a file that
    was compressed with `progressive`; only that part of it is read, so the rest may not have arrived yet.

      ldm-vae decompress small autoencoder=runs/mine output=pictures

    Args:
        files: what `compress` wrote: files, or folders of them.
        autoencoder: the autoencoder that compressed them, or one with the same encoder and another decoder.
        output: the folder for the pictures; null: beside each file.
        entropy: the entropy model that compressed them, if there was one.
        channels: number of first channels to decode of a progressive file; null: all.
        device: auto, cpu, cuda, cuda:1 ...
    """

    files: list[str] = field(default_factory=list)
    autoencoder: str = "???"
    output: str | None = None
    entropy: str | None = None
    channels: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class CompressedFile:
    """A file that `compress` wrote, of a picture of `width` x `height` pixels."""

    path: Path
    size_bytes: int
    width: int
    height: int

    @property
    def bits_per_pixel(self) -> float:
        return 8 * self.size_bytes / (self.width * self.height)


class NotDecompressed(UserError):
    """Some files were refused, the others are written. `refused`: an error for each of them."""

    def __init__(self, refused: Sequence[UserError]) -> None:
        super().__init__("\n".join(map(str, refused)))
        self.refused = tuple(refused)


def compress(config: CompressConfig, *, overwrite: bool = False, dry_run: bool = False) -> list[CompressedFile]:
    """Write NAME.ldmz for every picture, and print a line for each.

    >>> compress(CompressConfig(images=["holiday.jpg"], autoencoder="runs/vae", output="small"))

    Args:
        overwrite: replace files that are there.
        dry_run: compress the first picture only, to know how long it takes; write nothing.

    Returns:
        What was written. A picture that cannot be decoded is named and left out.

    Raises:
        UserError: no such picture, no picture that can be decoded, an autoencoder or entropy model that does not fit,
            a file that is there already, or a target that even the smallest file exceeds.
    """
    config = plain_settings(config)
    if not config.images:
        raise UserError("images: missing; give image files or folders")
    goals = _targets(config.output, find_pictures(config.images), format.SUFFIX, overwrite)
    codec = open_codec(config.autoencoder, config.entropy, compute_device(config.device))
    if any(end > codec.channels for end in config.progressive):
        raise UserError(
            f"progressive: {config.progressive} are more channels than the latents have, {codec.channels}; give fewer"
        )
    place = config.output or "beside each picture"
    pictures = pluralize(len(goals), "picture")
    begin("compress", pictures, aim_of(config), config.autoencoder, *_given(codec), f"to {place}")
    written, started = list[CompressedFile](), time.monotonic()
    for path, goal in track(goals, "compress", "picture"):
        try:
            image = read_image(path)
        except ImageRejected as error:
            say(f"{path}: left out ({error})")
            continue
        picture = codec.analyze(image, str(path))
        if config.target_bpp is not None:
            data = codec.compress_within(picture, config.target_bpp, config.progressive).data
        else:
            data = codec.compress(picture, entropy_models.step_of(quality_of(config)), config.progressive).data
        written.append(CompressedFile(goal, len(data), picture.width, picture.height))
        if dry_run:
            break
        write_bytes(goal, data)
        say(f"{goal}: {pluralize(len(data), 'byte')}, {written[-1].bits_per_pixel:.3f} bits per pixel")
    if not written:
        raise UserError(f"{config.images[0]}: no image could be decoded; give other files")
    if dry_run:
        end_dry_run(place, f"about {duration_text(len(goals) * (time.monotonic() - started))}")
        return []
    words = ["ldm-vae", "decompress", config.output or str(written[0].path), *_decoding_words(config)]
    mean = sum(8 * one.size_bytes for one in written) / sum(one.width * one.height for one in written)
    end(place, f"{pluralize(len(written), 'file')}, {mean:.3f} bits per pixel", words)
    return written


def quality_of(config: CompressConfig) -> float:
    """1 to 100."""
    return 50.0 if config.quality is None else config.quality


def aim_of(config: CompressConfig) -> str:
    """What the size of the files follows from, in words."""
    aim = (
        f"quality {quality_of(config):g}"
        if config.target_bpp is None
        else f"at most {config.target_bpp:g} bits per pixel"
    )
    return f"{aim}, in parts of {', '.join(map(str, config.progressive))} channels" if config.progressive else aim


def _given(codec: Codec) -> list[str]:
    """The entropy model and the device, in words."""
    entropy = f"{codec.model.kind} entropy model" if codec.model is not None else "each file with its own statistics"
    return [entropy, str(codec.autoencoder.device)]


def _decoding_words(config: CompressConfig) -> list[str]:
    entropy = [f"entropy={config.entropy}"] if config.entropy else []
    output = beside(config.output, "decompressed") if config.output else "decompressed"
    return [f"autoencoder={config.autoencoder}", *entropy, f"output={output}"]


def decompress(config: DecompressConfig, *, overwrite: bool = False, dry_run: bool = False) -> list[Path]:
    """Write NAME.png for every file, and print a line for each.

    >>> decompress(DecompressConfig(files=["small/holiday.ldmz"], autoencoder="runs/vae"))

    Args:
        overwrite: replace pictures that are there.
        dry_run: decompress the first file only, to know how long it takes; write nothing.

    Returns:
        The pictures.

    Raises:
        NotDecompressed: files that are damaged, cut off, newer, or of another autoencoder or entropy model; raised
            when all others are written.
        UserError: no such file, a picture that is there already, or an entropy model of another autoencoder.
    """
    config = plain_settings(config)
    if not config.files:
        raise UserError("files: missing; give files that `ldm-vae compress` wrote")
    goals = _targets(config.output, find_compressed(config.files), ".png", overwrite)
    codec = open_codec(config.autoencoder, config.entropy, compute_device(config.device))
    place = config.output or "beside each file"
    begin("decompress", pluralize(len(goals), "file"), config.autoencoder, *_given(codec), f"to {place}")
    written, refused, started = list[Path](), list[UserError](), time.monotonic()
    for path, goal in track(goals, "decompress", "file"):
        try:
            image = Image.fromarray(codec.decompress_file(path, config.channels))
        except UserError as error:
            refused.append(error)
            continue
        if dry_run:
            end_dry_run(place, f"about {duration_text(len(goals) * (time.monotonic() - started))}")
            return []
        write_png(goal, image)
        written.append(goal)
        say(f"{goal}: {image.width} x {image.height}")
    if refused:
        raise NotDecompressed(refused)
    words = ["ldm-vae", "reconstruct", config.autoencoder, str(written[0])]
    words.append(f"output={beside(config.output or 'decompressed', 'reconstructed')}")
    end(place, pluralize(len(written), "picture"), words)
    return written


def find_compressed(inputs: Sequence[str]) -> list[tuple[str, Path]]:
    """(output name without suffix, file) for files, and for folders with all files of `compress` in them.

    Raises:
        UserError: something else, or a folder without such files.
    """
    found: list[tuple[str, Path]] = []
    for text in inputs:
        path = Path(text).expanduser()
        COMPRESSED.find(path)
        if path.is_dir():
            inside = sorted(file for file in path.rglob(f"*{format.SUFFIX}") if file.is_file())
            if not inside:
                raise UserError(path, f"holds no {format.SUFFIX} file", COMPRESSED.advice)
            found += [(file.relative_to(path).with_suffix("").as_posix(), file) for file in inside]
        else:
            found.append((path.stem, path))
    return found


def _targets(
    output: str | None, named: Sequence[tuple[str, Path]], suffix: str, overwrite: bool
) -> list[tuple[Path, Path]]:
    """(file, where its result goes) for (name, file). Raises: UserError when something is there, or two go there."""
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"output: {output} is a file; give a folder")
    found: dict[Path, Path] = {}
    for name, path in named:
        goal = path.with_suffix(suffix) if output is None else Path(output) / f"{name}{suffix}"
        if goal in found:
            raise UserError(f"{goal}: {found[goal]} and {path} would both become it; give them one by one")
        if goal.exists() and not overwrite:
            raise UserError(f"{goal}: is there already; give another output, or --overwrite")
        found[goal] = path
    return [(path, goal) for goal, path in found.items()]


@dataclass(frozen=True)
class Analyzed:
    """A picture's latents, (c, h/f, w/f) float64, what its grid is made of, and its size in pixels."""

    latents: np.ndarray
    mean: np.ndarray
    unit: np.ndarray
    height: int
    width: int
    name: str


@dataclass(frozen=True)
class Compressed:
    """A file's bytes, and the bits that a perfect coder would need for its levels under the same model."""

    data: bytes
    levels: np.ndarray
    model: entropy_models.EntropyModel
    step: int

    @property
    def ideal_bits(self) -> float:
        return entropy_models.ideal_bits(self.model, self.levels)


def codec_identity(autoencoder: Autoencoder) -> str:
    """What the latents of a file belong to: the encoder's fingerprint, for codes that of the quantizer as well.

    A decoder that was trained further (encoder frozen) keeps it, so that old files get better with it.
    """
    return autoencoder.token_fingerprint() if autoencoder.has_codes else autoencoder.encoder_fingerprint()


def open_codec(autoencoder: str, entropy: str | None = None, device: torch.device | None = None) -> Codec:
    """Load both. Raises: UserError, also when the entropy model was fitted to latents of another autoencoder."""
    model = load_autoencoder(autoencoder).to(device or torch.device("cpu"))
    channels = model.latent_channels
    if channels > format.MOST_CHANNELS:
        raise UserError(f"{autoencoder}: has {channels} latent channels; the codec is for {format.MOST_CHANNELS}")
    codec = Codec(model, None, codec_identity(model), channels, model.downsampling, autoencoder)
    return codec if entropy is None else codec.with_model(entropy)


@dataclass(frozen=True)
class Codec:
    """An autoencoder on its device, and the fitted entropy model if there is one. `where` names it in errors."""

    autoencoder: Autoencoder
    model: FittedModel | None
    identity: str
    channels: int
    factor: int
    where: str

    def with_model(self, entropy: str) -> Codec:
        """The same autoencoder with the entropy model in a file. Raises: UserError."""
        model = load_model(entropy)
        if model.autoencoder != self.identity or model.channels != self.channels:
            raise UserError(
                f"{entropy}: was fitted to the latents of another autoencoder than {self.where}; give that one, or fit "
                "this one with `ldm-vae codec fit`"
            )
        return replace(self, model=model)

    def analyze(self, image: np.ndarray, name: str) -> Analyzed:
        """Encode uint8 (h, w, 3) of any size. Raises: UserError for a picture that is too large."""
        height, width = image.shape[:2]
        if max(height, width) > format.LARGEST_SIDE or height * width > format.MOST_PIXELS:
            raise UserError(f"{name}: {width} x {height} is too large to compress; reduce or cut the picture")
        mean, logvar = self.autoencoder.encode_moments(transforms.to_batch(image).to(self.autoencoder.device))
        if not bool(torch.isfinite(mean).all()):
            raise UserError(f"{name}: the autoencoder gives latents that are not finite; it is damaged or diverged")
        known = None if self.autoencoder.deterministic else logvar
        latents = mean[0].double().cpu().numpy()
        return Analyzed(
            latents, entropy_models.channel_means(mean), entropy_models.channel_units(mean, known), height, width, name
        )

    def compress(self, picture: Analyzed, step: int, parts: Sequence[int] = ()) -> Compressed:
        """The file of a picture at a step in 1/1024 units.

        Args:
            parts: numbers of first channels that can be decoded without the rest, rising.
        """
        ends = (*(end for end in parts if end < self.channels), self.channels)
        if self.model is None:
            own = format.SelfFitted.rounded(picture.mean, picture.unit, (0,) * self.channels)
            levels = entropy_models.Grid(own.mean, own.unit, step).quantize(picture.latents, picture.name)
            scales = tuple(entropy_models.best_scale(plane) for plane in levels)
            entropy: format.SelfFitted | bytes = format.SelfFitted(own.mean, own.unit, scales)
            model: entropy_models.EntropyModel = entropy_models.StaticModel(scales)
        else:
            entropy, model = self.model.short_fingerprint, self.model.at(step)
            levels = entropy_models.Grid(self.model.mean, self.model.unit, step).quantize(picture.latents, picture.name)
        header = format.FileHeader(
            short_fingerprint(self.identity), picture.width, picture.height, step, self.channels, entropy, ends
        )
        data = format.pack_file(header, entropy_models.encode_levels(model, levels, ends))
        return Compressed(data, levels, model, step)

    def compress_within(self, picture: Analyzed, bits_per_pixel: float, parts: Sequence[int] = ()) -> Compressed:
        """The best file of at most this many bits per pixel. Raises: UserError if even quality 1 takes more."""
        pixels = picture.width * picture.height
        found: dict[int, Compressed] = {}

        def size(level: int) -> int:
            if level not in found:
                try:
                    found[level] = self.compress(picture, entropy_models.step_of(level / LEVELS_PER_QUALITY), parts)
                except entropy_models.TooFine:
                    return sys.maxsize
            return len(found[level].data)

        best = largest_within(size, LEVELS_PER_QUALITY, 100 * LEVELS_PER_QUALITY, bits_per_pixel * pixels / 8)
        if best is None:
            least = 8 * len(self.compress(picture, entropy_models.step_of(1.0), parts).data) / pixels
            raise UserError(
                f"{picture.name}: its smallest file has {least:.3f} bits per pixel, more than {bits_per_pixel:g}; give "
                "a higher target_bpp, or leave it out and take quality 1"
            )
        size(best)
        return found[best]

    def decompress(self, data: bytes, name: str, channels: int | None = None) -> np.ndarray:
        """The picture in a file's bytes, uint8 (h, w, 3); see `decompress_file`."""
        return self._read(io.BytesIO(data), len(data), name, channels)

    def decompress_file(self, path: Path, channels: int | None = None) -> np.ndarray:
        """The picture in a file, uint8 (h, w, 3).

        Args:
            channels: number of first channels to decode, the others are zero; only their part of the file is read, and
                the rest may be missing.

        Raises:
            UserError: damaged, cut off, newer, or of another autoencoder or entropy model.
        """
        with open(path, "rb") as file:
            return self._read(file, os.fstat(file.fileno()).st_size, str(path), channels)

    def _read(self, file: BinaryIO, size_bytes: int, name: str, channels: int | None) -> np.ndarray:
        header, data = format.read(file, size_bytes, name, channels)
        grid, levels = self.levels_of(header, data, name)
        latents = np.zeros((self.channels, *levels.shape[1:]), np.float32)
        latents[: len(levels)] = grid.restore(levels)
        return self.picture_of(latents, header.height, header.width)

    def levels_of(
        self, header: format.FileHeader, data: list[bytes], name: str
    ) -> tuple[entropy_models.Grid, np.ndarray]:
        """The grid and the levels of the channels in `data`. Raises: UserError."""
        self.check_origin(header, name)
        size = -(-header.height // self.factor), -(-header.width // self.factor)
        own, fitted = header.entropy, self.model
        if isinstance(own, format.SelfFitted):
            model: entropy_models.EntropyModel = entropy_models.StaticModel(own.scales)
            grid = entropy_models.Grid(own.mean, own.unit, header.step)
        else:
            assert fitted is not None, "check_origin asks for it"
            model, grid = fitted.at(header.step), entropy_models.Grid(fitted.mean, fitted.unit, header.step)
        return grid, entropy_models.decode_levels(model, data, header.parts, size, name)

    def check_origin(self, header: format.FileHeader, name: str) -> None:
        """Raises: UserError unless autoencoder and entropy model are those of the file."""
        own = short_fingerprint(self.identity)
        if header.autoencoder != own or header.channels != self.channels:
            raise UserError(
                f"{name}: was compressed with autoencoder {header.autoencoder.hex()}, and {self.where} is {own.hex()}; "
                "give the one that compressed it"
            )
        if isinstance(header.entropy, format.SelfFitted):
            return
        if self.model is None:
            raise UserError(f"{name}: needs the entropy model {header.entropy.hex()}; give its file as entropy")
        if self.model.short_fingerprint != header.entropy:
            raise UserError(
                f"{name}: was compressed with entropy model {header.entropy.hex()}, this one is "
                f"{self.model.short_fingerprint.hex()}; give the one that compressed it"
            )

    def latents_of(self, data: bytes, name: str) -> np.ndarray:
        """The latents in a file's bytes, (c, h/f, w/f) float32. Raises: UserError."""
        grid, levels = self.levels_of(*format.read(io.BytesIO(data), len(data), name), name)
        return grid.restore(levels)

    def picture_of(self, latents: np.ndarray, height: int, width: int) -> np.ndarray:
        """What latents (c, h/f, w/f) decode to, cropped to uint8 (height, width, 3)."""
        tensor = torch.from_numpy(latents)[None].to(self.autoencoder.device)
        image = self.autoencoder.decode_images(tensor)[0, :, :height, :width]
        return transforms.to_uint8(image).permute(1, 2, 0).cpu().contiguous().numpy()
