"""Encoding a dataset: every image once through the autoencoder, into shards, on any number of processes.

A work unit is a fixed range of source indices and becomes one shard, so the processes share the units and never talk
while they work; a rerun makes only the shards that are missing. Owns the job; formats are `shard`'s and `manifest`'s.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.autoencoder.fingerprint import architecture, encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.interface import encode_moments
from ldm_vae.autoencoder.models import downsampling, latent_channels, load_autoencoder
from ldm_vae.data import pixels
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.split import Part
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.images import ImageBatch, Images, load_batches, open_images
from ldm_vae.latents.manifest import Manifest, Origin, write_manifest
from ldm_vae.latents.output import Output
from ldm_vae.latents.progress import Progress
from ldm_vae.latents.shard import STORED_DTYPES, Shard, write_shard

LONGEST_WAIT = timedelta(hours=24)
"""How long a process that has finished its share waits for the slowest one."""

MOST_THREADS = 8
"""Unless more are asked for: each thread holds a batch and its activations."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class EncodeConfig:
    """`ldm-vae encode`.

    Args:
        autoencoder: directory of a diffusers autoencoder, or of a finished `train-vae` run.
        output: folder for the shards.
        resolution: side of the square images in pixels.
        batch: images a forward pass. Part of the plan: the last bits of a latent depend on it.
        shard_size: images a shard; what an interruption can cost each process.
        dtype: of the stored moments. float16 keeps 11 significant bits, bfloat16 8.
        flip: store the moments of each mirror image too; encoding does not commute with flipping.
        part: all images, or one part of the split that `data.held_out` defines.
        workers: image decoding processes for each encoding process.
        threads: CPU only: batches computed at once, each on one core; null: one for each core, up to 8.
        precision: of the computation; bf16 is faster and errs by about 0.4 % of each activation.
        processes: how many processes must have been launched; null: any number.
    """

    autoencoder: str = "???"
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    resolution: int = 512
    batch: int = 8
    shard_size: int = 256
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    flip: bool = False
    part: Part = "all"
    workers: int = 2
    threads: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "shard_size", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is below 1")
        if self.workers < 0:
            raise UserError(f"workers: {self.workers} is negative; 0 decodes in the encoding process itself")
        if self.shard_size % self.batch:
            raise UserError(
                f"shard_size: {self.shard_size} is not a multiple of batch ({self.batch}), so the last batch of every "
                "shard would be padded; change one of them"
            )
        if self.data.cache_megabytes:
            raise UserError("data.cache_megabytes: has no effect here, each image is read once; leave it out")


def make_accelerator(config: EncodeConfig) -> Any:
    """An Accelerator on the device asked for. Raises: UserError when the device or the processes are not there."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if config.processes is not None and config.processes != launched:
        raise UserError(
            f"processes: {config.processes} were asked for, {launched} started; launch with `torchrun "
            f"--nproc_per_node {config.processes} scripts/encode_dataset.py ...`"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, and torch sees no CUDA device; set device=auto")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.threads and not on_cpu:
        raise UserError("threads: has no effect on a GPU; leave it out, or set device=cpu")
    return Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


@dataclass(frozen=True)
class Job:
    """What every process holds of a job."""

    config: EncodeConfig
    accelerator: Any
    autoencoder: Any
    images: Images
    origin: Origin

    @property
    def units(self) -> int | None:
        """Number of shards; None for a stream."""
        return None if self.images.count is None else math.ceil(self.images.count / self.config.shard_size)


def prepare(config: EncodeConfig, accelerator: Any) -> Job:
    """Open the autoencoder and the images. Raises: UserError for whatever cannot work, before anything is written."""
    autoencoder = load_autoencoder(config.autoencoder)
    factor = downsampling(autoencoder)
    if config.resolution % factor:
        below = config.resolution // factor * factor
        raise UserError(
            f"resolution: {config.resolution} is not a multiple of {factor}, by which the autoencoder divides it; "
            f"take {below or factor} or {below + factor}"
        )
    images = open_images(config.data, config.part)
    side = config.resolution // factor
    origin = Origin(
        autoencoder={
            "fingerprint": fingerprint(autoencoder),
            "encoder_fingerprint": encoder_fingerprint(autoencoder),
            **architecture(autoencoder),
        },
        preprocessing=preprocessing_record(config.resolution),
        dataset={
            "source": config.data.source,
            "part": config.part,
            "fingerprint": images.fingerprint(),
            "label_names": list(images.label_names),
            "count": images.count,
        },
        dtype=config.dtype,
        latent_shape=(latent_channels(autoencoder), side, side),
        flipped=config.flip,
        encoding={"batch": config.batch, "shard_size": config.shard_size, "precision": config.precision},
    )
    return Job(config, accelerator, autoencoder.to(accelerator.device), images, origin)


def encode_dataset(config: EncodeConfig, accelerator: Any) -> int:
    """Make every shard that is missing, then the manifest. A finished set is left as it is.

    Returns: 0.

    Raises:
        UserError: a setting, the images or the output are not usable, or a latent is not finite.
    """
    started = time.time()
    job = prepare(config, accelerator)
    output = Output(config.output, job.origin)
    with contextlib.ExitStack() as stack:

        def take() -> frozenset[int] | None:
            """The finished shards; None when there is nothing left to do."""
            stack.enter_context(output.open())
            manifest = output.finished_manifest()
            if manifest:
                print(f"{output.path}: finished already: {summary(output.path, manifest)}")
            return None if manifest else output.finished_units()

        finished = _main_decides(accelerator, take)
        if finished is None:
            return 0
        if finished:
            accelerator.print(f"{output.path}: {len(finished)} of {job.units or 'its'} shards are there; continuing")
        encoding_started = time.monotonic()
        encoded, waited_seconds = encode_units(job, output, finished)
        accelerator.wait_for_everyone()
        encoded = int(accelerator.reduce(torch.tensor(encoded, device=accelerator.device), "sum"))
        images_per_second = encoded / (time.monotonic() - encoding_started)

        def complete() -> None:
            manifest = output.complete(output.sidecars(job.units))
            provenance.write_run_record(
                output.path, None, started, time.time() - started, images=manifest.count, images_encoded=encoded,
                images_per_second=round(images_per_second, 3), waited_for_images_seconds=round(waited_seconds, 3),
                processes=accelerator.num_processes, device=accelerator.device.type, precision=config.precision,
            )  # fmt: skip
            write_manifest(output.path, manifest)
            print(f"{output.path}: {summary(output.path, manifest)}; {images_per_second:.1f} images/s")

        _main_decides(accelerator, complete)
    return 0


def encode_units(job: Job, output: Output, finished: frozenset[int]) -> tuple[int, float]:
    """Make this process's share of the missing shards. Returns the images it went through, and its seconds of waiting
    for decoded images."""
    config, accelerator = job.config, job.accelerator
    groups = partial(
        job.images.groups, finished, accelerator.process_index, accelerator.num_processes,
        config.shard_size, config.batch,
    )  # fmt: skip
    on_cuda = accelerator.device.type == "cuda"
    batches = load_batches(
        groups, batch=config.batch, resolution=config.resolution, workers=config.workers, pin=on_cuda
    )
    open_shard: _OpenShard | None = None
    done = len(finished) * config.shard_size
    with Progress(job.images.count, done, accelerator) as progress, _Writer(output) as writer:
        for batch, moments, flipped in encoded_batches(job, progress.timed(batches)):
            if open_shard is not None and open_shard.number != batch.unit:
                writer.publish(open_shard.number, open_shard.close())
                open_shard = None
            if open_shard is None:
                open_shard = _OpenShard(batch.unit, config)
            open_shard.add(batch, moments, flipped)
            progress.advance(batch)
        if open_shard is not None:
            writer.publish(open_shard.number, open_shard.close())
    return progress.encoded, progress.waited_seconds


def encoded_batches(job: Job, batches: Iterable[ImageBatch]) -> Iterator[tuple[ImageBatch, Tensor, Tensor | None]]:
    """The batches in order, each with what `encode_batch` makes of it.

    On CPU, several batches are computed at once, each by one thread: that is faster than several threads for one batch
    (they wait for each other at every layer), and the last bits do not depend on the number of threads.
    """
    if job.accelerator.device.type != "cpu":
        yield from ((batch, *encode_batch(job, batch)) for batch in batches)
        return
    torch_threads = torch.get_num_threads()
    threads = job.config.threads or min(torch_threads, MOST_THREADS)
    torch.set_num_threads(1)  # new threads take it over
    pending: deque[tuple[ImageBatch, Future]] = deque()
    try:
        with ThreadPoolExecutor(threads) as pool:
            for batch in batches:
                pending.append((batch, pool.submit(encode_batch, job, batch)))
                if len(pending) > threads:
                    batch, future = pending.popleft()
                    yield batch, *future.result()
            while pending:
                batch, future = pending.popleft()
                yield batch, *future.result()
    finally:
        torch.set_num_threads(torch_threads)


def encode_batch(job: Job, batch: ImageBatch) -> tuple[Tensor, Tensor | None]:
    """Moments (batch, 2c, h, w) of the images and, where asked for, of their mirror images; on the device."""
    device = job.accelerator.device
    images = pixels.from_uint8(batch.images.to(device, non_blocking=True))

    def moments(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
            return torch.cat(encode_moments(job.autoencoder, images), dim=1)

    return moments(images), moments(images.flip(-1)) if job.config.flip else None


class _OpenShard:
    """A shard that is being filled. Its moments stay on the device until it is closed: one copy, one wait a shard."""

    def __init__(self, number: int, config: EncodeConfig) -> None:
        self.number, self.config = number, config
        self.batches: list[ImageBatch] = []
        self.moments: list[Tensor] = []
        self.flipped: list[Tensor] = []

    def add(self, batch: ImageBatch, moments: Tensor, flipped: Tensor | None) -> None:
        dtype = STORED_DTYPES[self.config.dtype]
        self.moments.append(moments.to(dtype))
        if flipped is not None:
            self.flipped.append(flipped.to(dtype))
        self.batches.append(replace(batch, images=batch.images.new_empty(0)))  # the pixels are not needed any more

    def close(self) -> Shard:
        """Raises: UserError that names the first image whose latent is not finite."""
        size = self.config.batch
        rows = torch.tensor([size * i + row for i, batch in enumerate(self.batches) for row in batch.rows]).long()
        indices = [index for batch in self.batches for index in batch.indices]
        rejected = [rejection for batch in self.batches for rejection in batch.rejected]
        ids = [id for batch in self.batches for id in batch.ids]
        moments = torch.cat(self.moments).cpu()[rows]
        flipped = torch.cat(self.flipped).cpu()[rows] if self.flipped else None
        for stored in (moments, flipped):
            if stored is not None and not bool(stored.isfinite().all()):
                bad = int((~stored.isfinite()).flatten(1).any(1).nonzero()[0])
                raise UserError(
                    f"{ids[bad]}: its latent is not finite in {self.config.dtype}; check the autoencoder on this image "
                    "with `ldm-vae reconstruct`, or try precision=fp32 and dtype=float32 with another output"
                )
        return Shard(
            first_index=self.number * self.config.shard_size,
            last_index=max([*indices, *(rejection.index for rejection in rejected)]),
            moments=moments,
            moments_flipped=flipped,
            labels=[label for batch in self.batches for label in batch.labels],
            indices=indices,
            ids=ids,
            rejected=rejected,
        )


class _Writer:
    """Publishes shards in order in a thread of its own, at most one ahead of the encoding."""

    def __init__(self, output: Output) -> None:
        self.output, self.origin = output, output.origin.digest
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def publish(self, number: int, shard: Shard) -> None:
        """Raises: what went wrong with the shard before."""
        self._wait()
        self.pending = self.thread.submit(write_shard, self.output.path, number, shard, self.origin)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self._wait()


def _main_decides(accelerator: Any, decide: Callable[[], Answer]) -> Answer:
    """Run `decide` in the main process and tell all of them the answer. Its error ends them all, and is shown once."""
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = decide()
        except UserError as error:
            told[1] = str(error)
    broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1]) if accelerator.is_main_process else SystemExit(EXIT_USER_ERROR)
    return told[0]


def summary(path: Path, manifest: Manifest) -> str:
    """For example `1998 latents of 4x64x64 in 8 shards, 131.0 MB, 2 images left out (see quarantine.jsonl)`."""
    shape = "x".join(map(str, manifest.latent_shape))
    size_bytes = sum((path / shard.file).stat().st_size for shard in manifest.shards)
    left_out = f", {manifest.rejected} images left out (see quarantine.jsonl)" if manifest.rejected else ""
    return f"{manifest.count} latents of {shape} in {len(manifest.shards)} shards, {size_bytes / 1e6:.1f} MB{left_out}"
