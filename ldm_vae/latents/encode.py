"""`ldm-vae encode`: encode every image of a dataset once, into shards, with any number of processes.

    image_loader         encode_batch               OpenShard, Writer            Output
    images -> batches -> moments, mean, codes ... -> shard-N.safetensors, .jsonl -> index, manifest

A work unit is a fixed range of source indices and becomes one shard. The processes share the units and need no
communication while they work. A second run makes only the missing shards.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ldm_vae import provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.weights import describe_architecture
from ldm_vae.config import check_positive, plain_settings
from ldm_vae.data import transforms
from ldm_vae.data.folder import report_newer_images
from ldm_vae.data.sources import DataConfig, labels_from
from ldm_vae.data.split import Part
from ldm_vae.data.survey import describe_classes, look_at
from ldm_vae.data.transforms import preprocessing_record
from ldm_vae.errors import UserError
from ldm_vae.files import readable_json
from ldm_vae.latents.format import FLIPPED, LATENT_DTYPES, MANIFEST, Manifest, Origin, index_dtype, planned_shards
from ldm_vae.latents.image_loader import ImageBatch, Images, RandomAccessImages, Units, load_batches, open_images
from ldm_vae.latents.writer import OpenShard, Output, Writer, lock_name
from ldm_vae.random import generator
from ldm_vae.runtime import compute_device, gigamacs
from ldm_vae.storage.base import is_url, join
from ldm_vae.training import watchdog
from ldm_vae.training.distributed import (
    TIMEOUT_SECONDS,
    check_same_data,
    check_timeout,
    close_accelerator,
    open_accelerator,
    run_on_main,
    wait_for_all,
)
from ldm_vae.training.loader import lost_worker
from ldm_vae.training.watchdog import StopRequest, Watchdog
from ldm_vae.utils.concurrency import in_order
from ldm_vae.utils.progress import Progress, begin, beside, end, end_dry_run, say
from ldm_vae.utils.text import duration_text, pluralize, size_text

MOST_THREADS = 8
"""Default limit of `threads`, since each thread holds a batch and its activations."""

LEAST_IMAGES = 1000
"""Images of a stream of unknown length before `maximum_rejected` can stop the job."""

Settings = TypeVar("Settings", bound="EncodeConfig")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncodeConfig:
    """`ldm-vae encode`: encode all images once, with one or many processes.

    The same command continues an interrupted job and makes only the missing shards. It does not change a finished set.

      ldm-vae encode runs/mine data=~/images output=latents/mine
      torchrun --nproc_per_node 4 scripts/encode_dataset.py runs/mine data=~/images output=latents/mine resolution=256

    Args:
        autoencoder: a diffusers directory, a run of `train-vae`, or a hub id.
        output: folder for the shards, or an fsspec URL such as s3://bucket/latents.
        resolution: size in pixels: the side of square images, HEIGHTxWIDTH, or several sizes with commas (256,512x768),
            which makes a set of each size in a folder of that name.
        store: `moments` (posterior mean and log-variance), `mean`, `sample` (one posterior sample), `indices` (codes
            of a VQ or FSQ autoencoder); `auto`: moments if there is a posterior, else mean.
        dtype: precision of the stored values: float16 has 11 significant bits, bfloat16 8. null: float16; for codes
            the smallest sufficient type.
        flip: store each mirror image too; encoding does not commute with flipping.
        batch: images per forward pass. Recorded with the set, because the last bits of a latent depend on it.
        shard_size: images per shard. An interruption loses at most one shard of each process (of each worker, for a
            stream of files).
        part: all images, or one part of the split that `data.held_out` defines: train, held_out, or its halves
            validation and test.
        maximum_rejected: share of unreadable images (0 to 1) above which the job stops; null: never.
        seed: seed of the noise of store=sample.
        share: for independent jobs on a cluster: `3/16` makes the fourth of 16 shares of the shards (counted from 0).
            The same command without it completes the set.
        workers: image decoding processes for each encoding process.
        threads: CPU only: number of batches computed in parallel, each on one core; null: one per core, up to 8.
        precision: precision of the computation; bf16 is faster, with an error of about 0.4 % of each activation.
        device: auto, cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.
        processes: required number of launched processes; null: any number.
        timeout_seconds: the longest wait for a batch of images or for another process. Work of the first process for
            all (counting files, publishing) may take twelve times as long.
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
        check_positive(self, "batch", "shard_size", "threads")
        if self.workers < 0:
            raise UserError(f"workers: {self.workers} is negative; 0 decodes in the encoding process itself")
        if self.shard_size % self.batch:
            raise UserError(
                f"shard_size: {self.shard_size} is not a multiple of batch ({self.batch}), so the last batch of every "
                "shard would be padded; change one of them"
            )
        if self.maximum_rejected is not None and not 0 <= self.maximum_rejected < 1:
            raise UserError(f"maximum_rejected: {self.maximum_rejected} is not a share; give 0 or more, below 1")
        if self.data.cache_megabytes:
            raise UserError("data.cache_megabytes: has no effect, since each image is read once; leave it out")
        if self.store == "indices" and self.dtype is not None:
            raise UserError("dtype: has no effect on codes, which are integers; leave it out")
        if self.seed and self.store != "sample":
            raise UserError(f"seed: has no effect with store={self.store}; leave it out")
        check_timeout(self.timeout_seconds)
        parse_sizes(self.resolution)
        parse_share(self.share)

    def of_each_size(self: Settings) -> list[tuple[tuple[int, int], Settings]]:
        """(height, width) and the settings of each set; with several sizes, each set has its own folder."""
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
            raise UserError(
                f"resolution: {word.strip()!r} is not a size; give 512, 512x768 (height x width), or 256,512"
            )
        sizes.append((int(match[1]), int(match[2] or match[1])))
    if len(set(sizes)) < len(sizes):
        raise UserError(f"resolution: {resolution} names a size twice; give each once")
    return tuple(sizes)


def size_name(size: tuple[int, int]) -> str:
    """A size as text, `512` or `512x768`; also the name of the folder of its set."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def parse_share(share: str | None) -> tuple[int, int]:
    """(number, of how many) shares; (0, 1) is everything. Raises: UserError."""
    if share is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if not match or int(match[2]) < 2 or int(match[1]) >= int(match[2]):
        raise UserError(f"share: {share!r} is not a share; give 0/16 to 15/16 to sixteen jobs")
    return int(match[1]), int(match[2])


def encode_dataset(config: EncodeConfig, *, dry_run: bool = False) -> EncodeResult | list[EncodePreview]:
    """Encode the images of `config.data` into a set of latent shards at `config.output`, one set for each size.

    A finished set does not change, and an interrupted job is continued. With several processes, each calls this.

        encode_dataset(EncodeConfig("runs/vae", "latents", data=DataConfig(source="folder", path="images")))
        dataset = LatentDataset("latents")

    Args:
        dry_run: open everything and time a few batches of noise; write nothing.

    Returns: the sets; with `dry_run` the expected result for each size.

    Raises:
        UserError: a setting, the images or the output are not usable, or a latent is not finite.
    """
    config = plain_settings(config)
    if dry_run:
        accelerator = make_accelerator(config)
        return [preview_and_say(one, accelerator, size) for size, one in config.of_each_size()]
    return run_job(config, encode_all_sizes)


def preview_and_say(config: EncodeConfig, accelerator: Any, size: tuple[int, int]) -> EncodePreview:
    """`--dry-run` of one size: check the images and the output, time a few batches of noise, print the result."""
    job = prepare(config, accelerator, size)
    begin_encoding("encode", job, config.output)
    state = run_on_main(accelerator, Output(config.output, job.origin).check)
    found = preview_encoding(job)
    if isinstance(job.images, RandomAccessImages):
        look = look_at(job.images.source, range(job.images.count), size)
        found = replace(found, seconds_of_reading=look.seconds)
        for line in look.lines():
            say(line)
    say("\n".join(found.lines()))
    end_dry_run(config.output, f"{state}; {found.expected(config.workers)}")
    return found


def encode_all_sizes(config: EncodeConfig, accelerator: Any) -> EncodeResult:
    """`encode_dataset` with an open accelerator. For all processes."""
    job, made = None, []
    for size, one in config.of_each_size():
        job = prepare(one, accelerator, size, job)
        begin_encoding("encode", job, one.output)
        made.append(encode_segment(job, Output(one.output, job.origin)))
    return EncodeResult(tuple(made))


def begin_encoding(command: str, job: Job, output: str) -> None:
    """The first line of a command that encodes images."""
    origin, images = job.origin, job.images
    count = "a stream of images" if images.count is None else pluralize(images.count, "image")
    shape = "x".join(map(str, origin.layout.sample_shape))
    share = f"share {job.config.share}" if job.config.share else ""
    begin(
        command, f"{count} {describe_classes(images.label_names, labels_from(images))}",
        f"{size_name(job.size)} pixels",
        f"{origin.content} of {shape} in {origin.dtype}", job.config.autoencoder,
        f"{job.accelerator.device}, {job.config.precision}", share, f"to {output}",
    )  # fmt: skip


def next_words(job: Job, latents: str) -> list[str]:
    """The words of the next command after encoding."""
    return training_words(latents, job.origin.content, job.config.autoencoder, job.autoencoder)


def training_words(latents: str, content: str, path: str, autoencoder: Autoencoder) -> list[str]:
    """The words of the command that trains on a set of latents, or shows statistics if they cannot be trained on.

    Args:
        path: path of the autoencoder that made them.
    """
    if content == "indices" or autoencoder.only_side is not None:
        return ["ldm-vae", "latents", "stats", latents]
    output = "runs/diffusion" if is_url(latents) else beside(latents.removesuffix("-latents"), "diffusion")
    return ["ldm-vae", "train-diffusion", latents, f"autoencoder={path}", f"output={output}"]


@dataclass(frozen=True)
class EncodeResult:
    """The result of an encoding job: the manifest of the set of each size; None if only a share was made."""

    manifests: tuple[Manifest | None, ...]

    @property
    def exit_code(self) -> int:
        return 0


def run_job(config: Settings, job: Callable[[Settings, Any], Result]) -> Result:
    """Run `job(config, accelerator)` on the configured device and processes."""
    config = plain_settings(config)
    with StopRequest(at_once=True):  # files are published atomically, so stopping is always safe
        accelerator = make_accelerator(config)
        with Watchdog(accelerator, config.timeout_seconds):
            failure: BaseException | None = None
            try:
                return job(config, accelerator)
            except BaseException as error:
                failure = lost_worker(error) or error
                if failure is error:
                    raise
                raise failure from error
            finally:
                close_accelerator(accelerator, failure)


def make_accelerator(config: EncodeConfig) -> Any:
    """An Accelerator on the configured device. Raises: UserError if device or processes are not available."""
    if config.threads and compute_device(config.device).type != "cpu":
        raise UserError("threads: has no effect on a GPU; leave it out, or set device=cpu")
    return open_accelerator(config)


@dataclass(frozen=True)
class Job:
    """An encoding job of one size, the same in every process."""

    config: EncodeConfig
    accelerator: Any
    autoencoder: Autoencoder
    images: Images
    size: tuple[int, int]
    origin: Origin


def prepare(
    config: EncodeConfig, accelerator: Any, size: tuple[int, int] | None = None, like: Job | None = None
) -> Job:
    """Open the autoencoder and the images, for the first size unless another one is given. `like`: a job of another
    size with the same settings, whose autoencoder and images are reused.

    Raises:
        UserError: for all settings that cannot work, before anything is written.
    """
    size = size or parse_sizes(config.resolution)[0]
    autoencoder = like.autoencoder if like else load_autoencoder(config.autoencoder)
    factor = autoencoder.downsampling
    for side in size:
        autoencoder.check_side("resolution:", side)
        if side % factor:
            below = side // factor * factor
            raise UserError(
                f"resolution: {side} is not a multiple of {factor}, the downsampling of the autoencoder; "
                f"give {below or factor} or {below + factor}"
            )
    images = like.images if like else open_images(config.data, config.part, partial(run_on_main, accelerator))
    if like is None:
        check_same_data(accelerator, images.fingerprint())
    origin = plan_origin(config, autoencoder, images, size)
    return Job(config, accelerator, autoencoder.to(accelerator.device), images, size, origin)


def plan_origin(config: EncodeConfig, autoencoder: Autoencoder, images: Images, size: tuple[int, int]) -> Origin:
    """The plan of a first segment. Raises: UserError if the autoencoder does not have the data to store."""
    if config.store == "indices" and not autoencoder.has_codes:
        raise UserError("store: this autoencoder has no codes; use store=moments, or an autoencoder of kind vq or fsq")
    if config.store in ("moments", "sample") and autoencoder.deterministic:
        raise UserError("store: this autoencoder is deterministic, so its latents have no variance; use store=mean")
    content = config.store if config.store != "auto" else "mean" if autoencoder.deterministic else "moments"
    record = {"fingerprint": autoencoder.fingerprint(), "encoder_fingerprint": autoencoder.encoder_fingerprint()}
    encoding: dict[str, Any] = {
        "batch": config.batch, "shard_size": config.shard_size, "precision": config.precision,
    }  # fmt: skip
    dtype: str = config.dtype or "float16"
    if content == "indices":
        record["token_fingerprint"] = autoencoder.token_fingerprint()
        assert autoencoder.codebook_size is not None
        encoding["codebook_size"] = autoencoder.codebook_size
        dtype = index_dtype(autoencoder.codebook_size)
    if content == "sample":
        encoding["seed"] = config.seed
    factor = autoencoder.downsampling
    return Origin(
        autoencoder=record | describe_architecture(autoencoder),
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
        latent_shape=(autoencoder.latent_channels, size[0] // factor, size[1] // factor),
        flipped=config.flip,
        encoding=encoding,
    )


def encode_segment(job: Job, output: Output) -> Manifest | None:
    """Make the missing shards of the segment of `output`, and then the set's manifest.

    Returns: the manifest; None if only a share of the shards is made.
    """
    config, accelerator, started = job.config, job.accelerator, time.time()
    share = parse_share(config.share)
    with contextlib.ExitStack() as stack:

        def take() -> tuple[Manifest | frozenset[int], Origin]:
            """The manifest of a finished set, else the finished units; and the current plan."""
            stack.enter_context(output.open(share))
            manifest = output.finished_manifest()
            if manifest:
                report_newer_images(config.data, f"{config.output}/{MANIFEST}")
                end(output.where, f"finished already: {summary(manifest)}", next_words(job, output.where))
            return replace(manifest) if manifest else output.finished_units(share), output.origin

        found, output.origin = run_on_main(accelerator, take)
        if isinstance(found, Manifest):
            return found
        job = replace(job, origin=output.origin)
        if accelerator.is_main_process:
            announce(job, output, found)
        else:
            stack.enter_context(output.folder.watch(lock_name(share)))
        encoding_started = time.monotonic()
        work = encode_units(job, output, found)
        wait_for_all(accelerator)
        counted = torch.tensor([work.images, work.enlarged], device=accelerator.device)
        encoded, enlarged = map(int, accelerator.reduce(counted, "sum"))
        work = replace(work, images=encoded, enlarged=enlarged)
        speed = encoded / (time.monotonic() - encoding_started)

        def complete() -> Manifest | None:
            if enlarged:
                say(
                    f"{output.where}: {enlarged} of the {pluralize(encoded, 'image')} of this job "
                    f"{'is' if enlarged == 1 else 'are'} smaller than {size_name(job.size)} pixels and enlarged; set a "
                    "smaller resolution, or leave small images out"
                )
            if share == (0, 1):
                return _complete(job, output, work, speed, started)
            end(output.where, f"share {config.share} is made; the same command without share completes the set")
            return None

        return run_on_main(accelerator, complete)


def _complete(job: Job, output: Output, work: Work, images_per_second: float, started: float) -> Manifest:
    """Publish the manifest of a set with all its shards, and the record of the job."""
    config, accelerator, planned = job.config, job.accelerator, planned_shards(job.origin)
    completed = output.complete(planned)
    manifest = completed.manifest
    rejected = completed.index.columns["rejected"][job.origin.first_shard :][:planned]
    check_rejected(config, int(rejected.sum()), manifest.datasets[output.segment]["count"])
    record = provenance.run_record(
        None, started, time.time() - started, images=manifest.count, images_encoded=work.images,
        images_per_second=round(images_per_second, 3), model_busy=round(work.busy, 3),
        waited_for_images_seconds=round(work.waited_seconds, 3),
        processes=accelerator.num_processes, device=accelerator.device.type, precision=config.precision,
    )  # fmt: skip
    if work.enlarged:
        record["images_enlarged"] = work.enlarged
    completed.files[provenance.RUN_RECORD] = readable_json(record).encode()
    output.publish(completed)
    speed = f"; {images_per_second:.1f} images/s" if work.images else ""
    end(output.where, f"{summary(manifest)}{speed}", next_words(job, output.where))
    return replace(manifest)  # without its index, which may be large, since it is sent to all processes


def announce(job: Job, output: Output, finished: frozenset[int]) -> None:
    """Print what exists already, and a warning if the rest does not fit on the disk."""
    planned = planned_shards(job.origin)
    if finished:
        known = planned and not job.config.share
        whole = f"{planned:,}" if known else "its"
        is_there = "is" if len(finished) == 1 else "are"
        say(f"{output.where}: {len(finished):,} of {whole} shards {is_there} there; continuing")
    free_bytes, images = output.folder.free_bytes(), images_of_share(job)
    if images is None or free_bytes is None:
        return
    needed = max(0, images - len(finished) * job.config.shard_size) * job.origin.layout.sample_bytes
    if needed > free_bytes:
        say(
            f"{output.where}: the set still needs {needed / 1e9:.3g} GB and {free_bytes / 1e9:.3g} GB are free; "
            "free some space; finished shards are kept, and the same command continues"
        )


def images_of_share(job: Job) -> int | None:
    """Number of images in all units of this job's share; None for a stream of unknown length."""
    count, size = job.images.count, job.config.shard_size
    if count is None:
        return None
    place, shares = parse_share(job.config.share)
    return sum(min(size, count - number * size) for number in range(place, -(-count // size), shares))


@dataclass(frozen=True)
class Work:
    """Totals of a process: encoded images, seconds of waiting for decoded images, share of time that the model was
    busy, and number of images smaller than their crop."""

    images: int
    waited_seconds: float
    busy: float
    enlarged: int


def encode_units(job: Job, output: Output, finished: frozenset[int]) -> Work:
    """Make this process's share of the missing shards."""
    config, accelerator = job.config, job.accelerator
    units = Units(finished, accelerator.process_index, accelerator.num_processes, parse_share(config.share))
    batches = load_batches(
        job.images, units, unit=config.shard_size, batch=config.batch, size=job.size, workers=config.workers,
        pin=accelerator.device.type == "cuda", timeout_seconds=config.timeout_seconds,
    )  # fmt: skip
    busy = BusyTime(accelerator.device, lanes(job))
    opened: dict[int, OpenShard] = {}
    progress = EncodingProgress(images_of_share(job), len(finished) * config.shard_size, accelerator, busy)
    with contextlib.closing(batches), progress, Writer(output) as writer:
        for batch, stored in encoded_batches(job, progress.timed(batches), busy):
            shard = opened.setdefault(batch.unit, OpenShard(batch.unit, job.origin))
            shard.add(batch, stored)
            progress.advance(batch)
            watchdog.advance(progress.encoded + progress.rejected)
            total = job.images.count or max(LEAST_IMAGES, progress.encoded + progress.rejected)
            check_rejected(config, progress.rejected, total)
            if batch.last:
                writer.publish(opened.pop(batch.unit))
    assert not opened, "the last batch of every unit is marked as such"
    return Work(progress.encoded, progress.waited_seconds, busy.fraction(), progress.enlarged)


def check_rejected(config: EncodeConfig, rejected: int, images: int) -> None:
    """Raises: UserError if more images were rejected than `maximum_rejected` allows."""
    if config.maximum_rejected is not None and rejected > config.maximum_rejected * images:
        raise UserError(
            f"data: {rejected} of {images} images cannot be read, more than maximum_rejected={config.maximum_rejected} "
            "allows; allow more, or repair the images and encode them to another output"
        )


def lanes(job: Job) -> int:
    """Number of batches computed in parallel. On CPU, several batches with one thread each: this is faster than several
    threads for one batch, which wait for each other at every layer, and the last bits do not depend on the number of
    threads."""
    if job.accelerator.device.type != "cpu":
        return 1
    return job.config.threads or min(torch.get_num_threads(), MOST_THREADS)


def encoded_batches(
    job: Job, batches: Iterable[ImageBatch], busy: BusyTime
) -> Iterator[tuple[ImageBatch, dict[str, Tensor]]]:
    """The batches in order, each with its result of `encode_batch`."""

    def encode(batch: ImageBatch) -> dict[str, Tensor]:
        with busy.measure():
            return encode_batch(job, batch)

    if job.accelerator.device.type != "cpu":
        yield from ((batch, encode(batch)) for batch in batches)
        return
    threads, torch_threads = lanes(job), torch.get_num_threads()
    torch.set_num_threads(1)  # new threads inherit it
    try:
        yield from in_order(encode, batches, threads=threads, ahead=threads)
    finally:
        torch.set_num_threads(torch_threads)


def encode_batch(job: Job, batch: ImageBatch) -> dict[str, Tensor]:
    """Tensor name -> rows (batch, ...) of the images and, with `flip`, of their mirror images; on the device."""
    images = transforms.from_uint8(batch.images.to(job.accelerator.device, non_blocking=True))
    content = job.origin.content
    stored = {content: encode_content(job, images, batch, "plain")}
    if job.origin.flipped:
        stored[content + FLIPPED] = encode_content(job, images.flip(-1), batch, "flipped")
    return stored


def encode_content(job: Job, images: Tensor, batch: ImageBatch, side: str) -> Tensor:
    """The stored values for images (batch, 3, h, w) in [-1, 1], in the stored precision; codes are int64."""
    origin = job.origin
    with torch.autocast(images.device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
        if origin.content == "indices":
            return job.autoencoder.token_indices(images)
        mean, logvar = job.autoencoder.encode_moments(images)
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
    left_out = f", {pluralize(manifest.rejected, 'image')} left out (see quarantine.jsonl)" if manifest.rejected else ""
    size = size_text(manifest.shard_index.size_bytes)
    return f"{pluralize(manifest.count, kind)} of {shape} in {pluralize(manifest.shards, 'shard')}, {size}{left_out}"


# The progress of a job: images, their rate, the time left, and the share of time that the model was busy.

SHOWN_REJECTIONS = 20


class BusyTime:
    """The time that the model computes. On a GPU it uses the GPU's clock and does not wait for it.

    `lanes`: number of batches computed in parallel.
    """

    def __init__(self, device: torch.device, lanes: int) -> None:
        self.device, self.lanes = device, lanes
        self.started = time.monotonic()
        self._seconds = 0.0
        self._lock = threading.Lock()
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        before = time.monotonic()
        yield
        with self._lock:
            self._seconds += time.monotonic() - before

    def fraction(self) -> float:
        """Share of the time since the start, 0 to 1."""
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        return min(1.0, self._seconds / self.lanes / max(1e-9, time.monotonic() - self.started))


class EncodingProgress:
    """The bar of the main process: images of all processes, assuming that the others are as fast as this one."""

    def __init__(self, total: int | None, done: int, accelerator: Any, busy: BusyTime, title: str = "encode") -> None:
        """`total`: images of the job, None if unknown; `done`: images of finished shards."""
        self.processes = accelerator.num_processes
        self.encoded = self.rejected = self.enlarged = 0
        self.waited_seconds = 0.0
        self.total, self.busy = total, busy
        done = done if total is None else min(done, total)
        self.bar = Progress(title, total, done=done, shown=accelerator.is_main_process)

    def timed(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches, while the time of waiting for them is added up."""
        source = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(source, None)
            self.waited_seconds += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def advance(self, batch: ImageBatch) -> None:
        for number, rejection in enumerate(batch.rejected, self.rejected):
            if number < SHOWN_REJECTIONS:
                say(f"{rejection.id}: left out: {rejection.message}")
            elif number == SHOWN_REJECTIONS:
                say("and more are left out; quarantine.jsonl will list them all")
        count = len(batch.rows) + len(batch.rejected)
        self.encoded += len(batch.rows)
        self.rejected += len(batch.rejected)
        self.enlarged += batch.enlarged
        step = count * self.processes
        left_out = f", {self.rejected} left out" if self.rejected else ""
        note = f"model busy {self.busy.fraction():.0%}{left_out}"
        self.bar.advance(step if self.total is None else min(step, self.total - self.bar.done), note)

    def __enter__(self) -> EncodingProgress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.total is not None:
            self.bar.advance_to(self.total)
        self.bar.close(kind is None)


# A dry run: the expected result of an encoding job, from its plan and a few batches of noise.

TIMED_BATCHES = 8


@dataclass(frozen=True)
class EncodePreview:
    """The expected result of an encoding job for one size.

    Attributes:
        images: None for a stream of unknown length.
        gigamacs: multiply-accumulates per image, in billions.
        images_per_second: rate of one process, without decoding the images.
        seconds: lower bound for the whole job; None for a stream.
        seconds_of_reading: time of reading one image; None if it was not measured.
    """

    origin: Origin
    size: tuple[int, int]
    parameters: int
    images: int | None
    gigamacs: float
    images_per_second: float
    seconds: float | None
    device: str
    seconds_of_reading: float | None = None

    def lines(self) -> list[str]:
        layout, shape = self.origin.layout, "x".join(map(str, self.origin.layout.sample_shape))
        made = []
        if self.images is not None:
            size_bytes = self.images * layout.sample_bytes
            made = [f"set          {planned_shards(self.origin)} shards, {size_bytes / 1e6:.1f} MB"]
        speed = self.images_per_second
        return [
            f"autoencoder  {self.origin.autoencoder['class']}, {self.parameters / 1e6:.2f} M parameters",
            f"             {self.origin.autoencoder['fingerprint']}",
            f"images       {'a stream' if self.images is None else self.images} at {size_name(self.size)}",
            f"stored       {layout.content}, {shape}, {layout.sample_bytes / 1024:.1f} KiB each in {layout.dtype}",
            *made,
            f"cost         {self.gigamacs:.2f} GMAC an image",
            f"speed        {speed:.1f} images/s ({speed * self.gigamacs / 500:.2f} TFLOP/s) in batches of "
            f"{self.origin.encoding['batch']} on {self.device}, decoding not counted",
        ]

    def expected(self, workers: int) -> str:
        """The time of the job, as text. `workers`: number of processes that read images meanwhile."""
        if self.seconds is None or self.images is None:
            return "the time is not known, since a stream does not tell its number of images"
        reading = (self.seconds_of_reading or 0) * self.images / max(1, workers)
        seconds = max(self.seconds, reading) if workers else self.seconds + reading
        return f"about {duration_text(seconds)}"


def preview_encoding(job: Job) -> EncodePreview:
    """The expected result of a job, from encoding noise."""
    config, accelerator, size = job.config, job.accelerator, job.size
    noise = torch.randint(0, 256, (config.batch, 3, *size), dtype=torch.uint8)
    batch = ImageBatch(0, noise, list(range(config.batch)), list(range(config.batch)), [], [], [], last=False)
    cost = gigamacs(lambda: encode_batch(job, batch)) / config.batch
    for batches in (1, TIMED_BATCHES):  # the first pass also prepares kernels
        started = time.monotonic()
        *_, (_, stored) = encoded_batches(job, [batch] * batches, BusyTime(accelerator.device, lanes(job)))
        stored[job.origin.content].cpu()  # waits for a GPU
    speed = TIMED_BATCHES * config.batch / (time.monotonic() - started)
    count, parameters = job.images.count, sum(parameter.numel() for parameter in job.autoencoder.parameters())
    seconds = None if count is None else count / speed / accelerator.num_processes
    return EncodePreview(job.origin, size, parameters, count, cost, speed, seconds, str(accelerator.device))
