"""What a shard holds for each image: which tensors there are, of which precision and shape.

    moments   posterior mean, then log-variance (2c, h, w): what a trainer samples from anew each epoch
    mean      the mean only (c, h, w): all that a deterministic autoencoder has, or half the bytes of moments
    sample    one posterior sample (c, h, w), drawn once
    indices   codes of a VQ or FSQ autoencoder (h, w)

Everything is unscaled. Owns names, shapes and sizes; the bytes are `shard`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

CONTENTS = ("moments", "mean", "sample", "indices")

LATENT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INDEX_DTYPES = {"uint16": torch.uint16, "int32": torch.int32}
STORED_DTYPES = LATENT_DTYPES | INDEX_DTYPES
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint16": "U16", "int32": "I32"}
FLIPPED = "_flipped"


@dataclass(frozen=True)
class Layout:
    """The tensors of every shard of a set.

    Attributes:
        content: what is stored for each image.
        dtype: of it; a key of `STORED_DTYPES`.
        latent_shape: (c, h, w) of a latent.
        flipped: whether the same is stored for each image's mirror image.
    """

    content: str
    dtype: str
    latent_shape: tuple[int, int, int]
    flipped: bool

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of what is stored for one image."""
        channels, height, width = self.latent_shape
        if self.content == "indices":
            return (height, width)
        return (2 * channels if self.content == "moments" else channels, height, width)

    @property
    def summed_channels(self) -> int:
        """Channels that statistics are taken of; codes have none."""
        return 0 if self.content == "indices" else self.latent_shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors with the content: for example `moments`, `moments_flipped`."""
        return (self.content, self.content + FLIPPED) if self.flipped else (self.content,)

    @property
    def sample_bytes(self) -> int:
        """Bytes that one image takes, label and index not counted."""
        return len(self.names) * prod(self.sample_shape) * STORED_DTYPES[self.dtype].itemsize

    def tensors(self, count: int) -> dict[str, tuple[str, list[int]]]:
        """Name -> (safetensors dtype, shape) of every tensor of a shard of `count` samples."""
        content = (SAFETENSORS_DTYPES[self.dtype], [count, *self.sample_shape])
        return {"index": ("I64", [count]), "label": ("I64", [count])} | dict.fromkeys(self.names, content)


def index_dtype(codebook_size: int) -> str:
    """The smallest precision that holds every code."""
    return "uint16" if codebook_size <= 1 << 16 else "int32"
