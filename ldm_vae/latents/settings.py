"""The settings of an encoding job, and what they are on their own: the sizes of the images, the share of the work."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import Part
from ldm_vae.errors import UserError
from ldm_vae.storage import join
from ldm_vae.training.processes import TIMEOUT_SECONDS, check_timeout

Settings = TypeVar("Settings", bound="EncodeConfig")


@dataclass(frozen=True)
class EncodeConfig:
    """`ldm-vae encode`.

    Args:
        autoencoder: directory of a diffusers autoencoder, or of a finished `train-vae` run.
        output: folder for the shards, or any fsspec URL, as s3://bucket/latents.
        resolution: pixels: the side of square images, HEIGHTxWIDTH, or several with commas (256,512x768), which
            makes a set of each in a folder of that name.
        store: `moments` (posterior mean and log-variance), `mean`, `sample` (one posterior sample), `indices` (codes
            of a VQ or FSQ autoencoder); `auto`: moments where there is a posterior, else mean.
        dtype: of what is stored; float16 keeps 11 significant bits, bfloat16 8. null: float16, for codes what they
            need.
        flip: store each mirror image too; encoding does not commute with flipping.
        batch: images a forward pass. Part of the plan: the last bits of a latent depend on it.
        shard_size: images a shard; what an interruption can cost each process (each worker, for a stream of files).
        part: all images, or one part of the split that `data.held_out` defines.
        maximum_rejected: share of unreadable images (0 to 1) above which the job stops; null: never.
        seed: of the noise of store=sample.
        share: "3/16": make the fourth (they count from 0) of 16 shares of the shards, for independent jobs on a
            cluster; the same command without it completes the set.
        workers: image decoding processes for each encoding process.
        threads: CPU only: batches computed at once, each on one core; null: one for each core, up to 8.
        precision: of the computation; bf16 is faster and errs by about 0.4 % of each activation.
        processes: how many processes must have been launched; null: any number.
        timeout_seconds: the longest wait for a batch of images, for a sign of life of another process, for anything;
            what the first process does for all (counting files, publishing) may take twelve times as long.
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    resolution: str = "512"
    store: Literal["auto", "moments", "mean", "sample", "indices"] = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    flip: bool = False
    batch: int = 8
    shard_size: int = 256
    part: Part = "all"
    maximum_rejected: float | None = None
    seed: int = 0
    share: str | None = None
    workers: int = 2
    threads: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None
    timeout_seconds: int = TIMEOUT_SECONDS

    def __post_init__(self) -> None:
        for name in ("batch", "shard_size", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is below 1")
        if self.workers < 0:
            raise UserError(f"workers: {self.workers} is negative; 0 decodes in the encoding process itself")
        if self.shard_size % self.batch:
            raise UserError(
                f"shard_size: {self.shard_size} is not a multiple of batch ({self.batch}), so the last batch of every "
                "shard would be padded; change one of them"
            )
        if self.maximum_rejected is not None and not 0 <= self.maximum_rejected < 1:
            raise UserError(f"maximum_rejected: {self.maximum_rejected} is no share; give 0 up to, but not, 1")
        if self.data.cache_megabytes:
            raise UserError("data.cache_megabytes: has no effect here, each image is read once; leave it out")
        if self.store == "indices" and self.dtype is not None:
            raise UserError("dtype: has no effect on codes, which are integers; leave it out")
        if self.seed and self.store != "sample":
            raise UserError(f"seed: has no effect with store={self.store}; leave it out")
        check_timeout(self.timeout_seconds)
        parse_sizes(self.resolution)
        parse_share(self.share)

    def of_each_size(self: Settings) -> list[tuple[tuple[int, int], Settings]]:
        """(height, width) and the settings of each set: of several sizes, each in a folder of its own."""
        sizes = parse_sizes(self.resolution)
        if len(sizes) == 1:
            return [(sizes[0], self)]
        named = ((size, size_name(size)) for size in sizes)
        return [(size, replace(self, resolution=name, output=str(join(self.output, name)))) for size, name in named]


def parse_sizes(resolution: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of each size in a setting such as 512, 512x768 or 256,512x768. Raises: UserError."""
    sizes = []
    for word in resolution.split(","):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", word.strip())
        if not match or not int(match[1]) or match[2] == "0":
            raise UserError(f"resolution: {word.strip()!r} is no size; give 512, 512x768 (height x width), or 256,512")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    if len(set(sizes)) < len(sizes):
        raise UserError(f"resolution: {resolution} names a size twice; give each once")
    return tuple(sizes)


def size_name(size: tuple[int, int]) -> str:
    """512 or 512x768: how a size is written, and the folder of its set."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def parse_share(share: str | None) -> tuple[int, int]:
    """(number, of how many) shares; (0, 1) is everything. Raises: UserError."""
    if share is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if not match or int(match[2]) < 2 or int(match[1]) >= int(match[2]):
        raise UserError(f"share: {share!r} is no share; give 0/16 to 15/16 to sixteen jobs")
    return int(match[1]), int(match[2])
