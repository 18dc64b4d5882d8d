"""Batches of latents become shards: rows are gathered on the device, checked once a shard, published in a thread.

Owns what happens between the forward pass and the finished file; the file is `shard`'s.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from ldm_vae.errors import UserError
from ldm_vae.latents.contents import STORED_DTYPES
from ldm_vae.latents.images import ImageBatch
from ldm_vae.latents.manifest import Origin
from ldm_vae.latents.output import Output
from ldm_vae.latents.shard import Shard, write_shard
from ldm_vae.training import watchdog


class OpenShard:
    """A shard that is being filled. Its rows stay on the device until it is closed: one copy, one wait a shard."""

    def __init__(self, unit: int, origin: Origin) -> None:
        self.unit, self.origin = unit, origin
        self.batches: list[ImageBatch] = []
        self.tensors: dict[str, list[Tensor]] = {name: [] for name in origin.layout.names}

    def add(self, batch: ImageBatch, stored: dict[str, Tensor]) -> None:
        """`stored`: for each name of the layout a row for each row of the batch, on any device."""
        for name, tensor in stored.items():
            self.tensors[name].append(tensor)
        self.batches.append(replace(batch, images=batch.images.new_empty(0)))  # the pixels are not needed any more

    def close(self) -> Shard:
        """Raises: UserError that names the first image whose latent is not finite."""
        size, first_index = self.origin.encoding["batch"], self.origin.first_index
        rows = torch.tensor([size * i + row for i, batch in enumerate(self.batches) for row in batch.rows]).long()
        ids = [id for batch in self.batches for id in batch.ids]
        rejected = [rejection for batch in self.batches for rejection in batch.rejected]
        indices = [index for batch in self.batches for index in batch.indices]
        tensors = {name: self._stored(torch.cat(parts).cpu()[rows], ids) for name, parts in self.tensors.items()}
        return Shard(
            first_index=first_index + self.unit * self.origin.encoding["shard_size"],
            last_index=first_index + max([*indices, *(rejection.index for rejection in rejected)]),
            tensors=tensors,
            labels=[label for batch in self.batches for label in batch.labels],
            indices=[first_index + index for index in indices],
            ids=ids,
            rejected=[replace(rejection, index=first_index + rejection.index) for rejection in rejected],
        )

    def _stored(self, tensor: Tensor, ids: list[str]) -> Tensor:
        dtype = STORED_DTYPES[self.origin.dtype]
        if not dtype.is_floating_point:
            return torch.from_numpy(tensor.numpy().astype(self.origin.dtype))
        tensor = tensor.to(dtype)
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(
                f"{ids[bad]}: its latent is not finite in {self.origin.dtype}; check the autoencoder on this image "
                "with `ldm-vae reconstruct`, or try precision=fp32 and dtype=float32 with another output"
            )
        return tensor


class Writer:
    """Closes and publishes shards in the order given, in a thread of its own, at most one behind the encoding."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def publish(self, shard: OpenShard) -> None:
        """Raises: what went wrong with the shard before."""
        self._wait()
        self.pending = self.thread.submit(self._publish, shard)

    def _publish(self, shard: OpenShard) -> None:
        origin = self.output.origin
        write_shard(
            self.output.folder, origin.first_shard + shard.unit, shard.close(), origin.layout, origin.digest
        )  # fmt: skip

    def _wait(self) -> None:
        if self.pending is not None:
            with watchdog.solo():  # to a remote folder a shard may have a long way
                self.pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with watchdog.solo():
            self.thread.shutdown()
        if kind is None:
            self._wait()
