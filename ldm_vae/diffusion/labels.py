"""Class labels as people write them: names, ids, and mixtures of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_vae.data.sources import WHOLE_NUMBER
from ldm_vae.diffusion.guidance import Classes
from ldm_vae.errors import UserError
from ldm_vae.latents.words import counted

Label = str | int
Mixture = Mapping[Any, float]
"""Labels and their shares."""
Wanted = Label | Mixture | Sequence[Label | Mixture] | None


def class_shares(wanted: Wanted, count: int, names: Sequence[str]) -> Classes | None:
    """The classes of `count` images, what is wanted being repeated in turn; None for any class.

    Raises:
        UserError: an unknown label, more labels than images, or a mixture without a positive sum.
    """
    if wanted is None:
        return None
    each = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if not each or count < len(each):
        raise UserError(
            f"labels: {len(each)} of them for {counted(count, 'image')}; ask for at least one image per label"
        )
    mixtures = [label if isinstance(label, Mapping) else {label: 1.0} for label in each]
    width = max(len(mixture) for mixture in mixtures)
    ids, shares = torch.zeros(len(each), width, dtype=torch.long), torch.zeros(len(each), width)
    for row, mixture in enumerate(mixtures):
        total = sum(mixture.values())
        if total <= 0 or min(mixture.values()) < 0:
            raise UserError(f"labels: the shares of {dict(mixture)} must be positive; give for instance one half each")
        for column, (label, share) in enumerate(mixture.items()):
            ids[row, column] = find_label(label, names)
            shares[row, column] = share / total
    turn = torch.arange(count) % len(each)
    return Classes(ids[turn], shares[turn])


def find_label(label: Label, names: Sequence[str]) -> int:
    """The class id of a name, of an id, or of an id written as text. Names win over ids; case does not matter.

    Raises:
        UserError: an unknown label, with the nearest known one.
    """
    if not names:
        raise UserError(f"label {label!r}: this model is unconditional, it has no labels; leave it out")
    if isinstance(label, str):
        by_name = {name.casefold(): number for number, name in reversed(list(enumerate(names)))}
        if label in names:
            return list(names).index(label)
        if label.casefold() in by_name:
            return by_name[label.casefold()]
    number = int(label) if isinstance(label, int) or WHOLE_NUMBER.fullmatch(label) else None
    if number is not None and 0 <= number < len(names):
        return number
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"label {label!r}: unknown; {hint}known labels: {known}; or an id from 0 to {len(names) - 1}")
