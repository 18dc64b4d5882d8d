"""The synthetic set: ten kinds of toy objects, rendered on demand from (seed, index).

Owns nothing but the two names that others use: the settings and the image source. A picture is made in the
siblings: `scene` draws what is to be seen, `solids` and `figures` hold the shapes, `textures` and `palette` their
colors, `render` the light and the pixels, `defects` the faults; `export` writes files.
"""

from __future__ import annotations

from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource

__all__ = ["SyntheticConfig", "SyntheticSource"]
