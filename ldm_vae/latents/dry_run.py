"""What an encoding job would make, from its plan and a few batches of noise. Writes nothing."""

from __future__ import annotations

import time
from typing import Any

import torch

from ldm_vae.costs import gigamacs
from ldm_vae.latents.encode import encode_batch, encoded_batches, lanes, prepare
from ldm_vae.latents.images import ImageBatch
from ldm_vae.latents.manifest import planned_shards
from ldm_vae.latents.progress import BusyTime
from ldm_vae.latents.settings import EncodeConfig, parse_sizes, size_name

BATCHES = 8


def dry_run(config: EncodeConfig, accelerator: Any) -> int:
    """Open everything, encode noise, print the shapes, sizes and time. Returns: 0."""
    for size in parse_sizes(config.resolution):
        accelerator.print("\n".join(describe(config, accelerator, size)))
    return 0


def describe(config: EncodeConfig, accelerator: Any, size: tuple[int, int]) -> list[str]:
    """The lines for one size."""
    job = prepare(config, accelerator, size)
    noise = torch.randint(0, 256, (config.batch, 3, *size), dtype=torch.uint8)
    batch = ImageBatch(0, noise, list(range(config.batch)), list(range(config.batch)), [], [], [], last=False)
    cost = gigamacs(lambda: encode_batch(job, batch)) / config.batch
    for batches in (1, BATCHES):  # the first pass also prepares kernels
        started = time.monotonic()
        *_, (_, stored) = encoded_batches(job, [batch] * batches, BusyTime(accelerator.device, lanes(job)))
        stored[job.origin.content].cpu()  # waits for a GPU
    rate = BATCHES * config.batch / (time.monotonic() - started)
    count, layout = job.images.count, job.origin.layout
    parameters = sum(parameter.numel() for parameter in job.autoencoder.parameters())
    shape = "x".join(map(str, layout.sample_shape))
    lines = [
        f"autoencoder  {type(job.autoencoder).__name__}, {parameters / 1e6:.2f} M parameters",
        f"             {job.origin.autoencoder['fingerprint']}",
        f"images       {'a stream' if count is None else count} at {size_name(size)}",
        f"stored       {layout.content}, {shape}, {layout.sample_bytes / 1024:.1f} KiB each in {layout.dtype}",
        f"cost         {cost:.2f} GMAC an image",
        f"speed        {rate:.1f} images/s ({rate * cost / 500:.2f} TFLOP/s) in batches of {config.batch} on "
        f"{accelerator.device}, decoding not counted",
    ]
    if count is not None:
        lines.insert(4, f"set          {planned_shards(job.origin)} shards, {count * layout.sample_bytes / 1e6:.1f} MB")
        lines.append(f"time         at least {count / rate / accelerator.num_processes:.0f} s")
    return lines
