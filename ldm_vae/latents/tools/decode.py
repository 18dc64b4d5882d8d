"""`ldm-vae latents decode`: samples of a set as pictures again, each named by its number, label and id.

Owns the choice of samples and the decoding; the sheet is `data.sheets`', the autoencoder is given.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.autoencoder import interface
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint, token_fingerprint
from ldm_vae.data import pixels
from ldm_vae.data.sheets import labelled_sheet
from ldm_vae.errors import UserError
from ldm_vae.latents.contents import FLIPPED, STORED_DTYPES
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.manifest import Manifest, short
from ldm_vae.latents.shard import open_shard
from ldm_vae.latents.tools.samples import evenly, label_text, read_labels, spread
from ldm_vae.random import generator

LEAST_SIDE = 128
"""Smaller pictures are enlarged to it on the sheet, so that there is room for their names."""


@dataclass(frozen=True)
class Decoded:
    """A sample as a picture. `label` is empty for none."""

    number: int
    label: str
    id: str
    image: Image.Image

    @property
    def caption(self) -> str:
        """Two lines: number and label, the last part of the id."""
        return f"{self.number} {self.label}".rstrip() + "\n" + self.id.rsplit("/", 1)[-1]


def check_autoencoder(manifest: Manifest, autoencoder: Any, where: str) -> None:
    """Raises: UserError unless this autoencoder made the latents; for codes its quantizer counts too."""
    if manifest.content != "indices":
        manifest.check_autoencoder(encoder_fingerprint(autoencoder), where)
        return
    found, made_by = token_fingerprint(autoencoder), manifest.autoencoder.get("token_fingerprint")
    if found != made_by:
        raise UserError(
            f"{where}: its token_fingerprint is {short(found)}, but the codes were made by {short(made_by)}; "
            "give the autoencoder that made them, or encode again with this one"
        )


def choose(manifest: Manifest, count: int, samples: Sequence[int] = (), label: str | None = None) -> list[int]:
    """The numbers of samples to decode: `samples`, or `count` of them evenly spread over the set or over a class.

    Raises:
        UserError: no such sample, an unknown label (with the nearest known one), or none with this label.
    """
    if samples:
        for number in samples:
            if not 0 <= number < manifest.count:
                raise UserError(f"--samples: there is no sample {number}; numbers go from 0 to {manifest.count - 1}")
        return list(samples)
    if count < 1:
        raise UserError(f"--count: {count} is below 1")
    if label is None:
        return spread(manifest.shard_index.counts, count)
    names = list(manifest.label_names)
    if label not in names:
        near = difflib.get_close_matches(label, names, n=1, cutoff=0.5)
        known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {known}" if names else "it has no labels"
        raise UserError(f"--label: {label!r} is no class of {manifest.where.location}; {hint}")
    members = np.flatnonzero(read_labels(manifest) == names.index(label))
    if not len(members):
        raise UserError(f"--label: no sample of {manifest.where.location} is {label!r}; choose another class")
    return members[evenly(len(members), count)].tolist()


def decode_samples(
    dataset: LatentDataset, autoencoder: Any, numbers: Sequence[int], *, flipped: bool = False,
    posterior: Literal["mean", "sample"] | None = None,
) -> list[Decoded]:  # fmt: skip
    """Decode samples of a set, one at a time.

    Args:
        autoencoder: on the device that is to decode; `check_autoencoder` says whether it is the right one.
        flipped: the stored mirror images instead.
        posterior: of stored moments, default the mean; a sample's noise is a function of its number.

    Raises:
        UserError: no mirror images or moments are stored, or a shard is damaged.
    """
    manifest, where = dataset.manifest, dataset.where
    if flipped and not manifest.flipped:
        raise UserError(f"--flipped: {where} holds no mirror images; leave it out, or encode with flip=true")
    if posterior and manifest.content != "moments":
        raise UserError(
            f"--posterior: {where} holds {manifest.content}, which leaves no choice; leave it out, or encode with "
            "store=moments"
        )
    found = []
    for number in numbers:
        place, row = dataset.place(number)
        shard = open_shard(manifest.where, place, dataset.index[place], manifest.layout, verify=True)
        stored = torch.from_numpy(shard[manifest.content + (FLIPPED if flipped else "")][row].copy())
        label = label_text(manifest, int(shard["label"][row]))
        image = _decode(manifest, autoencoder, stored.view(STORED_DTYPES[manifest.dtype]), number, posterior)
        found.append(Decoded(number, label, dataset.id(number), pixels.to_pil(image)[0]))
    return found


@torch.no_grad()
def _decode(manifest: Manifest, autoencoder: Any, stored: Tensor, number: int, posterior: str | None) -> Tensor:
    """One sample as it is stored -> an image (1, 3, H, W) in [-1, 1]."""
    if manifest.content == "indices":
        codes = stored.int()[None].to(autoencoder.device)
        return autoencoder.decode_indices(codes).sample.float().clamp(-1, 1)
    latents = stored.float()
    if manifest.content == "moments":
        latents, logvar = latents.chunk(2)
        if posterior == "sample":
            noise = torch.randn(latents.shape, generator=generator(0, "decode", number))
            latents = latents + torch.exp(0.5 * logvar) * noise
    return interface.decode(autoencoder, latents[None].to(autoencoder.device))


def contact_sheet(decoded: Sequence[Decoded]) -> Image.Image:
    """All of them on one page, with their captions."""
    images = []
    for sample in decoded:
        factor = max(1, -(-LEAST_SIDE // max(sample.image.size)))
        size = (sample.image.width * factor, sample.image.height * factor)
        images.append(sample.image.resize(size, Image.Resampling.NEAREST))
    columns = math.ceil(math.sqrt(len(images)))  # near a square, not one long row
    return labelled_sheet(images, [sample.caption for sample in decoded], maximum_columns=columns)
