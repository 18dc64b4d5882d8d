"""The folder that a benchmark script writes: results.json, results.md and run.json, as `record_results.py` reads it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ldm_vae.errors import UserError
from ldm_vae.files import write_json, write_text
from ldm_vae.provenance import write_run_record


def check_output(output: Path | None) -> Path:
    """The folder. Raises: UserError where none was given, or results are there already."""
    if output is None:
        raise UserError("give a folder for the results")
    if (output / "results.json").exists():
        raise UserError(f"{output}: holds results already; give another folder")
    return output


def write_results(output: Path, found: Any, text: str, began: float) -> None:
    """`found`: JSON-able figures; `text`: the same in Markdown; `began`: `time.time()` at the start."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.md", text)
    write_run_record(output, None, began, time.time() - began)
    write_json(output / "results.json", found)
