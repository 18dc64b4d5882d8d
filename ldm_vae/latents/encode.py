"""Encoding a dataset: every image once through the autoencoder, into shards, on any number of processes.

A work unit is a fixed range of source indices and becomes one shard, so the processes share the units and never talk
while they work; a rerun makes only the shards that are missing. Owns the job; settings, formats, the folder and the
filling of shards live beside it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.autoencoder.fingerprint import architecture, encoder_fingerprint, fingerprint, token_fingerprint
from ldm_vae.autoencoder.interface import encode_moments, is_deterministic
from ldm_vae.autoencoder.models import check_side, downsampling, latent_channels, load_autoencoder
from ldm_vae.autoencoder.quantized import AutoencoderQuantized, token_indices
from ldm_vae.data import pixels
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json
from ldm_vae.latents.ahead import in_order
from ldm_vae.latents.contents import FLIPPED, LATENT_DTYPES, index_dtype
from ldm_vae.latents.filling import OpenShard, Writer
from ldm_vae.latents.images import ImageBatch, Images, Units, load_batches, open_images
from ldm_vae.latents.manifest import Manifest, Origin, planned_shards
from ldm_vae.latents.output import Output
from ldm_vae.latents.progress import BusyTime, Progress
from ldm_vae.latents.settings import EncodeConfig, parse_share, parse_sizes
from ldm_vae.latents.words import counted, size_text
from ldm_vae.random import generator
from ldm_vae.training import watchdog
from ldm_vae.training.processes import is_on_cpu, main_decides, open_accelerator, wait_for_all

MOST_THREADS = 8
"""Unless more are asked for: each thread holds a batch and its activations."""

JUDGED_IMAGES = 1000
"""Of a stream, whose length is unknown, before `maximum_rejected` can stop the job on the way."""


def make_accelerator(config: EncodeConfig) -> Any:
    """An Accelerator on the device asked for. Raises: UserError when the device or the processes are not there."""
    if config.threads and not is_on_cpu(config):
        raise UserError("threads: has no effect on a GPU; leave it out, or set device=cpu")
    return open_accelerator(config)


@dataclass(frozen=True)
class Job:
    """What every process holds of a job: one size of one set."""

    config: EncodeConfig
    accelerator: Any
    autoencoder: Any
    images: Images
    size: tuple[int, int]
    origin: Origin


def prepare(
    config: EncodeConfig, accelerator: Any, size: tuple[int, int] | None = None, like: Job | None = None
) -> Job:
    """Open the autoencoder and the images, for the first size unless another one is given. `like`: a job of another
    size with the same settings, whose autoencoder and images are taken.

    Raises:
        UserError: for whatever cannot work, before anything is written.
    """
    size = size or parse_sizes(config.resolution)[0]
    autoencoder = like.autoencoder if like else load_autoencoder(config.autoencoder)
    factor = downsampling(autoencoder)
    for side in size:
        check_side("resolution:", side, autoencoder)
        if side % factor:
            below = side // factor * factor
            raise UserError(
                f"resolution: {side} is not a multiple of {factor}, by which the autoencoder divides it; "
                f"take {below or factor} or {below + factor}"
            )
    images = like.images if like else open_images(config.data, config.part, partial(main_decides, accelerator))
    origin = plan_origin(config, autoencoder, images, size)
    return Job(config, accelerator, autoencoder.to(accelerator.device), images, size, origin)


def plan_origin(config: EncodeConfig, autoencoder: Any, images: Images, size: tuple[int, int]) -> Origin:
    """The plan of a first segment. Raises: UserError when the autoencoder does not have what is to be stored."""
    has_codes = isinstance(autoencoder, AutoencoderQuantized)
    if config.store == "indices" and not has_codes:
        raise UserError(
            f"store: {type(autoencoder).__name__} has no codes; use store=moments, or an autoencoder of kind vq or fsq"
        )
    if config.store in ("moments", "sample") and is_deterministic(autoencoder):
        raise UserError(
            f"store: {type(autoencoder).__name__} is deterministic, its latents have no spread; use store=mean"
        )
    content = config.store if config.store != "auto" else "mean" if is_deterministic(autoencoder) else "moments"
    record = {"fingerprint": fingerprint(autoencoder), "encoder_fingerprint": encoder_fingerprint(autoencoder)}
    encoding: dict[str, Any] = {
        "batch": config.batch, "shard_size": config.shard_size, "precision": config.precision,
    }  # fmt: skip
    dtype: str = config.dtype or "float16"
    if content == "indices":
        record["token_fingerprint"] = token_fingerprint(autoencoder)
        encoding["codebook_size"] = autoencoder.codebook_size
        dtype = index_dtype(autoencoder.codebook_size)
    if content == "sample":
        encoding["seed"] = config.seed
    factor = downsampling(autoencoder)
    return Origin(
        autoencoder=record | architecture(autoencoder),
        preprocessing=preprocessing_record(size),
        dataset={
            "source": config.data.source,
            "part": config.part,
            "held_out": None if config.part == "all" else config.data.held_out,
            "fingerprint": images.fingerprint(),
            "label_names": list(images.label_names),
            "count": images.count,
        },
        content=content,
        dtype=dtype,
        latent_shape=(latent_channels(autoencoder), size[0] // factor, size[1] // factor),
        flipped=config.flip,
        encoding=encoding,
    )


def encode_dataset(config: EncodeConfig, accelerator: Any) -> int:
    """Make every shard that is missing, then the manifest, for each size asked for. A finished set is left as it is.

    Returns: 0.

    Raises:
        UserError: a setting, the images or the output are not usable, or a latent is not finite.
    """
    job = None
    for size, one in config.of_each_size():
        job = prepare(one, accelerator, size, job)
        encode_segment(job, Output(one.output, job.origin))
    return 0


def encode_segment(job: Job, output: Output) -> None:
    """Make the missing shards of the segment that `output` is open for, and then the set's manifest."""
    config, accelerator, started = job.config, job.accelerator, time.time()
    share = parse_share(config.share)
    with contextlib.ExitStack() as stack:

        def take() -> tuple[frozenset[int] | None, Origin]:
            """The finished units, None when there is nothing left to do; and the plan as it stands."""
            stack.enter_context(output.open(share))
            manifest = output.finished_manifest()
            if manifest:
                print(f"{output.where}: finished already: {summary(manifest)}")
            return None if manifest else output.finished_units(share), output.origin

        finished, output.origin = main_decides(accelerator, take)
        if finished is None:
            return
        job = replace(job, origin=output.origin)
        if accelerator.is_main_process:
            announce(job, output, finished)
        encoding_started = time.monotonic()
        figures = encode_units(job, output, finished)
        wait_for_all(accelerator)
        encoded = int(accelerator.reduce(torch.tensor(figures["images"], device=accelerator.device), "sum"))
        images_per_second = encoded / (time.monotonic() - encoding_started)

        def complete() -> None:
            if share != (0, 1):
                print(f"{output.where}: share {config.share} is made; the same command without share completes the set")
                return
            planned = planned_shards(job.origin)
            completed = output.complete(planned)
            manifest = completed.manifest
            rejected = completed.index.columns["rejected"][job.origin.first_shard :][:planned]
            check_rejected(config, int(rejected.sum()), manifest.datasets[output.segment]["count"])
            record = provenance.run_record(
                None, started, time.time() - started, images=manifest.count, images_encoded=encoded,
                images_per_second=round(images_per_second, 3), model_busy=round(figures["busy"], 3),
                waited_for_images_seconds=round(figures["waited_seconds"], 3),
                processes=accelerator.num_processes, device=accelerator.device.type, precision=config.precision,
            )  # fmt: skip
            completed.files[provenance.RUN_RECORD] = readable_json(record).encode()
            output.publish(completed)
            speed = f"; {images_per_second:.1f} images/s" if encoded else ""
            print(f"{output.where}: {summary(manifest)}{speed}")

        main_decides(accelerator, complete)


def announce(job: Job, output: Output, finished: frozenset[int]) -> None:
    """Say what is there already, and whether the rest will fit on the disk."""
    planned = planned_shards(job.origin)
    if finished:
        known = planned and not job.config.share
        print(f"{output.where}: {len(finished)} of {planned if known else 'its'} shards are there; continuing")
    free_bytes, images = output.folder.free_bytes(), images_of_share(job)
    if images is None or free_bytes is None:
        return
    needed = max(0, images - len(finished) * job.config.shard_size) * job.origin.layout.sample_bytes
    if needed > free_bytes:
        print(
            f"{output.where}: the set still needs {needed / 1e9:.3g} GB and {free_bytes / 1e9:.3g} GB are free; "
            "finished shards will stay, and the same command continues after space was made"
        )


def images_of_share(job: Job) -> int | None:
    """Images in all units of this job's share; None for a stream of unknown length."""
    count, size = job.images.count, job.config.shard_size
    if count is None:
        return None
    place, shares = parse_share(job.config.share)
    return sum(min(size, count - number * size) for number in range(place, -(-count // size), shares))


def encode_units(job: Job, output: Output, finished: frozenset[int]) -> dict[str, Any]:
    """Make this process's share of the missing shards.

    Returns: `images` that it encoded, `waited_seconds` for decoded images, `busy`, the fraction of time the model
        computed.
    """
    config, accelerator = job.config, job.accelerator
    units = Units(finished, accelerator.process_index, accelerator.num_processes, parse_share(config.share))
    batches = load_batches(
        job.images, units, unit=config.shard_size, batch=config.batch, size=job.size, workers=config.workers,
        pin=accelerator.device.type == "cuda", timeout_seconds=config.timeout_seconds,
    )  # fmt: skip
    busy = BusyTime(accelerator.device, lanes(job))
    opened: dict[int, OpenShard] = {}
    progress = Progress(images_of_share(job), len(finished) * config.shard_size, accelerator, busy)
    with contextlib.closing(batches), progress, Writer(output) as writer:
        for batch, stored in encoded_batches(job, progress.timed(batches), busy):
            shard = opened.setdefault(batch.unit, OpenShard(batch.unit, job.origin))
            shard.add(batch, stored)
            progress.advance(batch)
            watchdog.advance(progress.encoded + progress.rejected)
            total = job.images.count or max(JUDGED_IMAGES, progress.encoded + progress.rejected)
            check_rejected(config, progress.rejected, total)
            if batch.last:
                writer.publish(opened.pop(batch.unit))
    assert not opened, "every unit ends with a batch that says so"
    return {"images": progress.encoded, "waited_seconds": progress.waited_seconds, "busy": busy.fraction()}


def check_rejected(config: EncodeConfig, rejected: int, images: int) -> None:
    """Raises: UserError when more images than `maximum_rejected` allows were left out."""
    if config.maximum_rejected is not None and rejected > config.maximum_rejected * images:
        raise UserError(
            f"data: {rejected} of {images} images cannot be read, more than maximum_rejected={config.maximum_rejected} "
            "allows; allow more, or mend the images and encode them to another output"
        )


def lanes(job: Job) -> int:
    """Batches computed at once. On CPU several, each by one thread: that is faster than several threads for one batch
    (they wait for each other at every layer), and the last bits do not depend on the number of threads."""
    if job.accelerator.device.type != "cpu":
        return 1
    return job.config.threads or min(torch.get_num_threads(), MOST_THREADS)


def encoded_batches(
    job: Job, batches: Iterable[ImageBatch], busy: BusyTime
) -> Iterator[tuple[ImageBatch, dict[str, Tensor]]]:
    """The batches in order, each with what `encode_batch` makes of it."""

    def encode(batch: ImageBatch) -> dict[str, Tensor]:
        with busy.measure():
            return encode_batch(job, batch)

    if job.accelerator.device.type != "cpu":
        yield from ((batch, encode(batch)) for batch in batches)
        return
    threads, torch_threads = lanes(job), torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take it over
    try:
        yield from in_order(encode, batches, threads=threads, ahead=threads)
    finally:
        torch.set_num_threads(torch_threads)


def encode_batch(job: Job, batch: ImageBatch) -> dict[str, Tensor]:
    """Tensor name -> rows (batch, ...) of the images and, where asked for, of their mirror images; on the device."""
    images = pixels.from_uint8(batch.images.to(job.accelerator.device, non_blocking=True))
    content = job.origin.content
    stored = {content: encode_content(job, images, batch, "plain")}
    if job.origin.flipped:
        stored[content + FLIPPED] = encode_content(job, images.flip(-1), batch, "flipped")
    return stored


def encode_content(job: Job, images: Tensor, batch: ImageBatch, side: str) -> Tensor:
    """What is stored of images (batch, 3, h, w) in [-1, 1]; in the stored precision, but for codes, which are int64."""
    origin = job.origin
    with torch.autocast(images.device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
        if origin.content == "indices":
            return token_indices(job.autoencoder, images)
        mean, logvar = encode_moments(job.autoencoder, images)
    if origin.content == "moments":
        mean = torch.cat([mean, logvar], dim=1)
    if origin.content == "sample":
        noise = torch.zeros(mean.shape)
        for row, index in zip(batch.rows, batch.indices):
            rng = generator(origin.encoding["seed"], "stored sample", side, origin.first_index + index)
            noise[row] = torch.randn(origin.latent_shape, generator=rng)
        mean = mean + torch.exp(0.5 * logvar) * noise.to(mean.device)
    return mean.to(LATENT_DTYPES[origin.dtype])


def summary(manifest: Manifest) -> str:
    """For example `1998 latents of 4x64x64 in 8 shards, 131.0 MB, 2 images left out (see quarantine.jsonl)`."""
    shape = "x".join(map(str, manifest.latent_shape))
    kinds = {"moments": "latent", "mean": "mean latent", "sample": "latent sample", "indices": "token map"}
    kind = kinds[manifest.content]
    left_out = f", {counted(manifest.rejected, 'image')} left out (see quarantine.jsonl)" if manifest.rejected else ""
    size = size_text(manifest.shard_index.size_bytes)
    return f"{counted(manifest.count, kind)} of {shape} in {counted(manifest.shards, 'shard')}, {size}{left_out}"
