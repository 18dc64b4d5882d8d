"""One-off programs of this project, run from a clone: `python -m tools.NAME --help`."""
