"""What is to be seen in image i: one object, where, how large, which colour, texture and light.

Owns the random draws, nothing of pixels. Lengths are in units of the image side: a scene has no resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ldm_vae.random import numpy_rng

LABELS = ("ball", "cube", "donut", "star", "heart", "moon", "flower", "tree", "mushroom", "gem")
TEXTURES = ("plain", "stripes", "dots", "marble", "wood")
DEFECTS = ("none", "scratch", "spot", "missing", "blob")

ROLL = dict.fromkeys(("ball", "star", "heart", "moon"), 0.22) | {"donut": 0.14, "flower": 0.12, "gem": 0.14}
SPINS = ("cube", "donut", "flower", "mushroom", "gem")
UNFIT = {("mushroom", "dots"), *(("gem", texture) for texture in TEXTURES)}


@dataclass(frozen=True)
class Scene:
    """One image's content. What has no effect on the object (see ROLL, SPINS, UNFIT) is 0.

    Attributes:
        label: Index into LABELS.
        x, y: Centre of the object, from the left and the top edge.
        size: Half the object's extent.
        roll: Turn in the image plane, radians, counter-clockwise.
        spin: Turn about the object's own axis, in [0, 1) of the range that the shape allows.
        hue: Of the object, in turns of OKLCH (0.08 red, 0.3 yellow, 0.4 green, 0.7 blue).
        background_hue: Likewise; at least a quarter turn away from `hue`.
        light: Where the light stands, -1 left to 1 right; never straight in front, where it would flatten.
        texture: Index into TEXTURES.
        phase: Shifts the texture, in [0, 1).
        defect: Index into DEFECTS.
    """

    label: int
    x: float
    y: float
    size: float
    roll: float
    spin: float
    hue: float
    background_hue: float
    light: float
    texture: int
    phase: float
    defect: int


def label_of(seed: int, index: int) -> int:
    """Every ten consecutive images hold each label once, in an order of their own."""
    block, place = divmod(index, len(LABELS))
    return int(numpy_rng(seed, "synthetic-labels", block).permutation(len(LABELS))[place])


def draw_scene(seed: int, index: int, defects: float, textured: float) -> Scene:
    """The scene of one image.

    `textured` is the chance of a texture other than plain; `defects` decides only whether there is a defect: with 0 it
    is the clean twin.
    """
    rng = numpy_rng(seed, "synthetic-scene", index)
    uniform = rng.uniform
    label = label_of(seed, index)
    name = LABELS[label]
    hue = uniform()
    texture = int(rng.choice(len(TEXTURES), p=(1 - textured, *[textured / 4] * 4)))
    texture = 0 if (name, TEXTURES[texture]) in UNFIT else texture
    scene = Scene(
        label=label,
        x=uniform(0.45, 0.55),
        y=uniform(0.45, 0.52),
        size=uniform(0.30, 0.37),
        roll=uniform(-1.0, 1.0) * ROLL.get(name, 0.0) + 0.0,  # no -0.0
        spin=uniform() * (name in SPINS),
        hue=hue,
        background_hue=(hue + uniform(0.25, 0.75)) % 1.0,
        light=float(rng.choice((-1.0, 1.0))) * uniform(0.35, 1.0),
        texture=texture,
        phase=uniform() * (texture > 0),
        defect=0,
    )
    draw = numpy_rng(seed, "synthetic-defect", index)
    return replace(scene, defect=int(draw.integers(1, len(DEFECTS)))) if draw.uniform() < defects else scene
