"""The networks of a saved pipeline, read more strictly than diffusers reads them. Owns nothing of what they do."""

from __future__ import annotations

import json
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from torch import nn

from ldm_vae.autoencoder.weights import load_weights
from ldm_vae.errors import UserError

INDEX = "model_index.json"


def load_parts(directory: Path, except_parts: Container[str] = (), variant: str | None = None) -> dict[str, Any]:
    """Name -> network of each that `model_index.json` names, float32, in eval mode.

    Args:
        directory: of the pipeline.
        except_parts: names that the caller has in another way.
        variant: of the files of weights, as in diffusers.

    Raises:
        UserError: an unreadable file, or weights that are not exactly those of their class.
    """
    where = directory / INDEX
    try:
        index = dict(json.loads(where.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error}); give a pipeline") from error
    found = {}
    for name, entry in index.items():
        if name in except_parts or not name.isidentifier():  # the name of a folder in it, and of nothing outside
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and (directory / name).is_dir()):
            continue
        # what diffusers looks among, too: no module is imported because a file says so
        part = getattr(sys.modules.get(str(entry[0])), str(entry[1]), None)
        if isinstance(part, type) and issubclass(part, nn.Module):
            found[name] = load_weights(part, directory / name, variant=variant)
    return found
