"""Reading latents: a plain PyTorch dataset over a finished set, memory-mapped, random access at memory speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_vae.data.split import Part, part_of
from ldm_vae.errors import UserError
from ldm_vae.latents.manifest import read_manifest
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.latents.shard import STORED_DTYPES, OpenShard, open_shard, read_sidecar
from ldm_vae.random import generator


class LatentDataset(Dataset):
    """The samples of a set that `ldm-vae encode` wrote, as posterior samples, *not* normalised.

    Use `self.normalizer` before training on them. Shards are opened, and compared with their checksums, when a
    sample of them is first asked for, in each process on its own: safe in data loader workers.

    Args:
        path: the folder with `manifest.json`.
        seed: of the posterior noise.
        posterior: `sample` draws from the posterior, and where the set holds mirror images, takes one half of the time;
            `mean` gives the mean of the image as it is.
        part: all samples, or the part that the hash of their ids puts them in, as `data.split` does.
        held_out: fraction of ids that are held out; needed with `part`.
        verify: compare each shard with its checksum (about 10 GB/s) before its first use.

    Raises:
        UserError: no finished set, a damaged manifest, or an empty part; on first use: a damaged shard.
    """

    def __init__(
        self,
        path: str | Path,
        seed: int = 0,
        posterior: Literal["sample", "mean"] = "sample",
        *,
        part: Part = "all",
        held_out: float = 0.0,
        verify: bool = True,
    ) -> None:
        self.path, self.seed, self.posterior, self.verify = Path(path), seed, posterior, verify
        self.manifest = read_manifest(path)
        self.normalizer: LatentNormalizer = self.manifest.normalizer
        self._ends = np.cumsum([shard.count for shard in self.manifest.shards])
        self._rows = self._select(part, held_out)
        self._open: dict[int, OpenShard] = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Sample `i`, its posterior noise a function of (seed, epoch, source index); see `set_epoch`.

        Returns:
            latent: float32 (c, h, w); label: int, -1 for none; index: int, the place in the image source.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.path}: sample {i} of {len(self)}")
        return self._sample(i, "epoch", int(self._epoch))

    def sample(self, index: int, position: int, size: int | None = None) -> dict[str, Any]:
        """Sample `index` as the training sample at global `position`: the noise is a function of (seed, position).

        What `training.loader` asks for. `size` has no meaning here.
        """
        return self._sample(index, "position", position)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch gives other posterior samples (for `__getitem__`; workers see it at once)."""
        self._epoch.fill_(epoch)

    def id(self, i: int) -> str:
        """The id of sample `i` in the image source; reads a sidecar."""
        number, row = self._place(i)
        return self._ids(number)[row]

    def _sample(self, i: int, *key: int | str) -> dict[str, Any]:
        number, row = self._place(i)
        shard = self._shard(number)
        index = int(shard.index[row])
        moments = shard.moments
        if self.posterior == "mean":
            latent = self._tensor(moments[row, : self.manifest.latent_shape[0]])
        else:
            rng = generator(self.seed, "posterior", *key, *([index] if key[0] == "epoch" else []))
            noise = torch.randn(self.manifest.latent_shape, generator=rng)
            if shard.moments_flipped is not None and torch.rand((), generator=rng) < 0.5:
                moments = shard.moments_flipped
            mean, logvar = self._tensor(moments[row]).chunk(2)
            latent = mean + torch.exp(0.5 * logvar) * noise
        return {"latent": latent, "label": int(shard.label[row]), "index": index}

    def _tensor(self, stored: np.ndarray) -> Tensor:
        """A copy as float32."""
        return torch.from_numpy(np.array(stored)).view(STORED_DTYPES[self.manifest.dtype]).float()

    def _place(self, i: int) -> tuple[int, int]:
        """(shard number, row in it) of sample `i`."""
        place = int(self._rows[i])
        number = int(np.searchsorted(self._ends, place, side="right"))
        return number, place - int(self._ends[number]) + self.manifest.shards[number].count

    def _shard(self, number: int) -> OpenShard:
        if number not in self._open:
            manifest, record = self.manifest, self.manifest.shards[number]
            self._open[number] = open_shard(
                self.path / record.file, record, manifest.latent_shape, manifest.dtype,
                flipped=manifest.flipped, verify=self.verify,
            )  # fmt: skip
        return self._open[number]

    def _ids(self, number: int) -> list[str]:
        record = self.manifest.shards[number]
        path = (self.path / record.file).with_suffix(".json")
        sidecar = read_sidecar(path)
        if sidecar.record != record or len(sidecar.ids) != record.count:
            raise UserError(f"{path}: is not of the shard that the manifest describes; encode that shard again")
        return sidecar.ids

    def _select(self, part: Part, held_out: float) -> Sequence[int] | np.ndarray:
        count = self.manifest.count
        if part == "all":
            return range(count)
        ids = (id for number in range(len(self.manifest.shards)) for id in self._ids(number))
        rows = np.array([row for row, id in enumerate(ids) if part_of(id, held_out) == part], np.int64)
        if not len(rows):
            raise UserError(
                f"{self.path}: none of {count} samples falls into the {part} part at held_out={held_out}; "
                "change held_out or encode more images"
            )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Mapped files are opened anew in the process that unpickles this; they would travel as copies."""
        return self.__dict__ | {"_open": {}}
