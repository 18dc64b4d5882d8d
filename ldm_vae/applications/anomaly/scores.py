"""The scores: their names, what they look at, and what each of them can miss. Measuring them is `measurement`'s.

A score is higher for what is more anomalous. Those with a heat map come twice: the mean of the map, and its highest
value as `NAME_peak`, which a small defect raises and the mean hides.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ldm_vae.errors import UserError

FLOW_TIMES = (0.3, 0.5)
"""Of the flow loss: enough noise to hide details, not the arrangement."""

Kind = Literal["reconstruction", "posterior", "likelihood", "latent", "flow"]


@dataclass(frozen=True)
class Score:
    """What a score is. `kind`: what it looks at; `local`: whether it has a heat map; `needs`: beside an autoencoder."""

    title: str
    kind: Kind
    local: bool = True
    needs: str = ""


POSTERIOR, REGRET, PERCEPTUAL, FLOW = "a posterior", "a posterior and regret_steps", "perceptual_net", "pipeline"

MEASURED = {
    "l1": Score("L1 of the reconstruction", "reconstruction"),
    "ms_ssim": Score("structural dissimilarity of the reconstruction, three scales", "reconstruction"),
    "perceptual": Score("LPIPS of the reconstruction", "reconstruction", needs=PERCEPTUAL),
    "kl": Score("KL of the posterior", "posterior", needs=POSTERIOR),
    "elbo": Score("negative ELBO, sigma-VAE", "likelihood", needs=POSTERIOR),
    "regret": Score("likelihood regret", "likelihood", local=False, needs=REGRET),
    "mahalanobis": Score("Mahalanobis distance of latent positions", "latent"),
    "mahalanobis_pooled": Score("Mahalanobis distance of pooled latents", "latent", local=False),
    **{f"flow_t{time}": Score(f"flow loss at t = {time}", "flow", needs=FLOW) for time in FLOW_TIMES},
}
PEAK = "_peak"


def names(deterministic: bool, perceptual: bool, regret: bool, flow: bool) -> list[str]:
    """The scores that the models at hand allow, peaks included. Latents that are points have no posterior to judge."""
    there = {"": True, POSTERIOR: not deterministic, REGRET: regret, PERCEPTUAL: perceptual, FLOW: flow}
    found = []
    for name, score in MEASURED.items():
        if there[score.needs]:
            found += [name, name + PEAK] if score.local else [name]
    return found


def base(name: str) -> str:
    """The measured quantity of a score: itself, or that whose peak it is."""
    return name.removesuffix(PEAK)


def title(name: str) -> str:
    """In words."""
    return f"{MEASURED[base(name)].title}{', peak' if name.endswith(PEAK) else ''}"


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises: UserError for a score that is not among the `known`, saying what it needs or which was probably meant."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    if name in names(False, True, True, True):
        hint = f"it needs {MEASURED[base(name)].needs} when a detector is fitted; there are: {', '.join(known)}"
    raise UserError(f"by: {name!r} is no score here; {hint}")
