"""What an encoding job would make, from its plan and a few batches of noise. Writes nothing."""

from __future__ import annotations

import time
from math import prod
from typing import Any

import torch

from ldm_vae.latents.encode import EncodeConfig, encoded_batches, prepare
from ldm_vae.latents.images import ImageBatch
from ldm_vae.latents.shard import STORED_DTYPES

BATCHES = 8


def dry_run(config: EncodeConfig, accelerator: Any) -> int:
    """Open everything, encode noise, print the shapes, sizes and time. Returns: 0."""
    job = prepare(config, accelerator)
    noise = torch.randint(0, 256, (config.batch, 3, config.resolution, config.resolution), dtype=torch.uint8)
    batch = ImageBatch(0, noise, list(range(config.batch)), [], [], [], [])
    for batches in (1, BATCHES):  # the first pass also prepares kernels
        started = time.monotonic()
        *_, (_, moments, _) = encoded_batches(job, [batch] * batches)
        moments.cpu()  # waits for a GPU
    rate = BATCHES * config.batch / (time.monotonic() - started)
    count, shape = job.images.count, job.origin.latent_shape
    sample_bytes = 2 * prod(shape) * STORED_DTYPES[config.dtype].itemsize * (2 if config.flip else 1)
    parameters = sum(parameter.numel() for parameter in job.autoencoder.parameters())
    lines = [
        f"autoencoder  {type(job.autoencoder).__name__}, {parameters / 1e6:.2f} M parameters",
        f"             {job.origin.autoencoder['fingerprint']}",
        f"images       {'a stream' if count is None else count} at {config.resolution}x{config.resolution}",
        f"latents      {'x'.join(map(str, shape))}, {sample_bytes / 1024:.0f} KiB each in {config.dtype}",
        f"speed        {rate:.1f} images/s in batches of {config.batch} on {accelerator.device}, decoding not counted",
    ]
    if count is not None:
        lines.insert(4, f"set          {job.units} shards, {count * sample_bytes / 1e6:.1f} MB")
        lines.append(f"time         at least {count / rate / accelerator.num_processes:.0f} s")
    accelerator.print("\n".join(lines))
    return 0
