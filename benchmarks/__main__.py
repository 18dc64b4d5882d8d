"""How fast it is, beside what a user would use instead and beside the limit of the machine, measured in one run.

    python -m benchmarks SUBJECT OUTPUT     # OUTPUT: a folder for results.json, results.md and run.json
    python -m benchmarks all OUTPUT         # every subject, each in a process and a folder of its own
    python -m benchmarks SUBJECT --help     # what can be chosen

The contestants take turns; figures are medians, ratios are taken within a round (benchmarks/rounds.py).
`python -m tools.record_results NAME OUTPUT` puts the tables into docs/results/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.result_folder import check_output, write_results
from ldm_vae.errors import EXIT_USER_ERROR, UserError

SUBJECTS = {
    "train": "train",
    "encode": "codec",
    "decode": "codec",
    "dataset": "dataset",
    "read": "read",
    "generate": "generate",
    "startup": "startup",
    "scaling": "scaling",
    "spaces": "spaces",
    "index": "index",
}
"""Subject -> module in benchmarks/ with SUMMARY, `add_arguments`, `measure`, `text`, and perhaps `draw`."""


def module_of(subject: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{SUBJECTS[subject]}")


def overview() -> str:
    lines = [f"  {name:<10}{module_of(name).SUMMARY}" for name in SUBJECTS]
    return "\n".join([str(__doc__), "subjects:", *lines])


def run_subject(subject: str, words: Sequence[str]) -> None:
    """Measure one subject in this process and write its folder. Raises: UserError."""
    module = module_of(subject)
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {subject}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(subject=subject)
    parser.add_argument("output", type=Path, help="folder for the results")
    module.add_arguments(parser)
    arguments = parser.parse_args(words)
    output = check_output(arguments.output)
    began = time.time()
    found = module.measure(arguments, progress)
    text = module.text(found)
    if hasattr(module, "draw"):
        module.draw(found, output)
    write_results(output, found, text, began)
    print(text)


def run_all(words: Sequence[str]) -> int:
    """Each subject in a fresh process, so that none finds the memory and threads of another. Returns: an exit code."""
    parser = argparse.ArgumentParser(prog="benchmark.py all", description="Every subject with its defaults.")
    parser.add_argument("output", type=Path, help="folder for a folder of each subject")
    output = parser.parse_args(words).output
    for subject in SUBJECTS:
        check_output(output / subject)
    codes = [
        subprocess.run([sys.executable, "-m", "benchmarks", subject, str(output / subject)], check=False).returncode
        for subject in SUBJECTS
    ]
    return max(codes)


def progress(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else EXIT_USER_ERROR
    subject, *rest = words
    try:
        if subject == "all":
            return run_all(rest)
        if subject not in SUBJECTS:
            raise UserError(f"no subject {subject!r}; give one of {', '.join(SUBJECTS)}, or all")
        run_subject(subject, rest)
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
