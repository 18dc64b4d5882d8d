"""The synthetic set: ten kinds of toy objects, rendered on demand from (seed, index).

Exports the settings and the image source. `source` has ids, labels and the export to files; `render` draws a scene's
parameters and renders surfaces, light and pixels; `figures` has the ten shapes and the defects.
"""

from __future__ import annotations

from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource

__all__ = ["SyntheticConfig", "SyntheticSource"]
