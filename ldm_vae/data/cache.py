"""Decoded images kept in memory, so that many crops come from one decoding."""

from __future__ import annotations

import numpy as np

from ldm_vae.data.sources import ImageSource


class CachedSource:
    """Another source whose images stay decoded until `limit_bytes` are used.

    Nothing is evicted: in the uniformly random order of training, the first images that fit are as good as
    any other choice, and nothing thrashes. Each worker process has its own cache.
    """

    def __init__(self, source: ImageSource, limit_bytes: int) -> None:
        self.source, self.free_bytes = source, limit_bytes
        self.label_names = source.label_names
        self.images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.source)

    def id(self, i: int) -> str:
        return self.source.id(i)

    def label(self, i: int) -> int:
        return self.source.label(i)

    def read(self, i: int) -> np.ndarray:
        if i in self.images:
            return self.images[i]
        image = self.source.read(i)
        if image.nbytes <= self.free_bytes:
            image.flags.writeable = False
            self.images[i] = image
            self.free_bytes -= image.nbytes
        return image

    def fingerprint(self) -> str:
        return self.source.fingerprint()
