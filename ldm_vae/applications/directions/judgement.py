"""What the edits changed, in words and figures: change of the target, drift of the others, monotonicity, a verdict.

Pure functions of measured values. A change is in standard deviations of the attribute over unedited images, for a
strength of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ldm_vae.applications.directions.fitting import Direction
from ldm_vae.evaluation.metrics import bootstrap_interval

LEAST_CHANGE = 0.1
"""Standard deviations for a strength of 1; what is below is no edit."""
STEADY = 0.9
"""Spearman correlation of strength and attribute, mean over images."""
TOGETHER = 0.5
"""Correlation over unedited images from which two attributes are called the same thing, not drift."""
TOLD = {"AUROC": 0.75, "R2": 0.2}
"""From here on pooled latents are said to tell an attribute."""


@dataclass(frozen=True)
class Row:
    """One direction.

    Attributes:
        target: its attribute; without labels the one that it changes most; None where that one cannot be measured.
        change: of the target, mean over images, with its 95 % interval.
        monotonicity: Spearman correlation of strength and target, mean over images.
        drift: attribute -> rms change over images, for those that do not go together with the target.
        along: attributes that do.
        verdict: one of the keys of VERDICTS.
    """

    name: str
    target: str | None
    told: dict[str, Any]
    change: float | None
    interval: tuple[float, float] | None
    monotonicity: float | None
    drift: dict[str, float]
    along: list[str]
    verdict: str

    @property
    def worst(self) -> tuple[str, float] | None:
        """The attribute that drifts most."""
        name = max(self.drift, key=self.drift.__getitem__, default=None)
        return None if name is None else (name, self.drift[name])


VERDICTS = {
    "works": "moves its attribute steadily, and more than any other",
    "entangled": "moves its attribute steadily, but another one at least as much",
    "unsteady": "moves its attribute, but not in every image the same way: up in one, down in another",
    "not told": "does not move it: pooled latents do not tell it, it lies in the arrangement of positions",
    "not moved": (
        "does not move it, although pooled latents tell it: by what goes along with it, or because one shift "
        "raises it here and lowers it there"
    ),
    "wrong way": "moves its attribute the wrong way",
    "unread": "cannot be judged: nobody reads this attribute off edited images well enough",
    "unnamed": "was fitted without labels; the target is what it changes most",
}


def slopes(values: np.ndarray, strengths: Sequence[float], deviations: np.ndarray) -> np.ndarray:
    """Values (n, s, k) of n images at s strengths -> change for a strength of 1 (n, k), least squares over strengths,
    in `deviations` (k,)."""
    s = np.asarray(strengths) - np.mean(strengths)
    return np.einsum("s,nsk->nk", s, values) / (s @ s) / deviations


def monotonicity(values: np.ndarray, strengths: Sequence[float]) -> float:
    """Mean over images of Spearman's correlation of strengths (s,) and values (n, s); a constant row counts 0."""
    x = rankdata(strengths)
    x = x - x.mean()
    found = []
    for row in values:
        y = rankdata(row)
        y = y - y.mean()
        found.append(float(x @ y / np.sqrt((x @ x) * (y @ y))) if y.any() else 0.0)
    return float(np.mean(found))


def judge(
    direction: Direction,
    names: Sequence[str],
    values: np.ndarray,
    strengths: Sequence[float],
    deviations: np.ndarray,
    correlations: np.ndarray,
) -> Row:
    """Values (n, s, k) of the attributes `names` at s strengths; `correlations` (k, k) over unedited images."""
    change = slopes(values, strengths, deviations)
    means, sizes = change.mean(axis=0), np.sqrt(np.square(change).mean(axis=0))
    if direction.attribute is not None and direction.attribute not in names:
        return Row(direction.name, direction.attribute, direction.told, None, None, None, {}, [], "unread")
    target = int(np.abs(means).argmax()) if direction.attribute is None else list(names).index(direction.attribute)
    along = [name for k, name in enumerate(names) if k != target and abs(correlations[target, k]) >= TOGETHER]
    drift = {name: float(sizes[k]) for k, name in enumerate(names) if k != target and name not in along}
    row = Row(
        direction.name, names[target], direction.told, float(means[target]), bootstrap_interval(change[:, target]),
        monotonicity(values[:, :, target], strengths), drift, along, "",
    )  # fmt: skip
    return Row(**{**vars(row), "verdict": _verdict(row, direction.attribute is not None)})


def _verdict(row: Row, labelled: bool) -> str:
    assert row.change is not None
    assert row.monotonicity is not None
    if not labelled:
        return "unnamed"
    if abs(row.change) < LEAST_CHANGE:
        return "not moved" if row.told["value"] >= TOLD[row.told["measure"]] else "not told"
    if row.change < 0:
        return "wrong way"
    if row.monotonicity < STEADY:
        return "unsteady"
    return "entangled" if row.worst is not None and row.worst[1] >= row.change else "works"


HEADINGS = [
    "direction", "target", "told by pooled latents", "change of target", "monotonicity", "largest drift", "verdict",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row of a table, as text."""
    told = f"{row.told['measure']} {row.told['value']:.2f}"
    if row.change is None or row.interval is None:
        return [row.name, row.target or "", told, "", "", "", row.verdict]
    low, high = row.interval
    change = f"{row.change:+.2f} ({low:+.2f} to {high:+.2f})"
    worst = "" if row.worst is None else f"{row.worst[0]} {row.worst[1]:.2f}"
    return [row.name, row.target or "", told, change, f"{row.monotonicity:+.2f}", worst, row.verdict]


def sentences(rows: Sequence[Row]) -> list[str]:
    """Each verdict that occurs, what it means, and the directions that have it."""
    found = []
    for verdict, meaning in VERDICTS.items():
        having = [row.name for row in rows if row.verdict == verdict]
        if having:
            found.append(f"{verdict}: {meaning}. {', '.join(having)}.")
    return found
