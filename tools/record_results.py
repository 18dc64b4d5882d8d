"""Put measured results into docs/results/benchmarks.md, and the headline figures into the README, untouched by hand.

    python -m tools.record_results NAME RESULT_FOLDER [--headline]

RESULT_FOLDER is what `ldm-vae evaluate`, `compare`, `frontier`, `benchmarks/__main__.py` or `measure_synthetic.py`
wrote (a Markdown table, run.json), a set that `ldm-vae encode` made, or a run root of the quickstart (run.json of each
stage). The section NAME of docs/results/benchmarks.md is replaced or added; `--headline` also renews the README's
figures, from an evaluation. Pictures stay out: they may show images that are not ours.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "results" / "benchmarks.md"
README = ROOT / "README.md"


def provenance_lines(record: dict) -> list[str]:
    versions = record["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("commit", "machine"))
    return [
        f"- command: `{typed(record['command'])}`",
        f"- {record['started'][:10]}, {versions['machine']}; {packages}",
    ]


def typed(command: list[str]) -> str:
    program = Path(command[0])
    starts = {"__main__": "python -m benchmarks", "measure_synthetic": "python -m tools.measure_synthetic"}
    start = starts.get(program.stem, f"python scripts/{program.name}") if program.suffix == ".py" else "ldm-vae"
    return f"{start} {shlex.join(map(without_folder, command[1:]))}"


def without_folder(word: str) -> str:
    """A path outside the repository is reduced to its last part, so that no folders of this machine are published."""
    return re.sub(r"(^|[=\[,])(?:\.\.|~|/)[^\s,\]]*/", r"\1", word)


TABLES = ("results.md", "comparison.md", "frontier.md")


def measured_section(table: Path) -> list[str]:
    record = json.loads((table.parent / "run.json").read_text())
    lines = [line for line in table.read_text().strip().splitlines() if not line.startswith(("# ", "!["))]
    return ["\n".join(lines).strip(), "", *provenance_lines(record)]


def encoding_section(folder: Path) -> list[str]:
    record, manifest = (json.loads((folder / name).read_text()) for name in ("run.json", "manifest.json"))
    size = "{height}x{width}".format(**manifest["preprocessing"])
    rate = record["images_per_second"]
    return [
        "| images | size | stored | images/s | model busy | hours a million images | processes | device | precision |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {record['images_encoded']} | {size} | {manifest['content']}, {manifest['dtype']} | {rate:.1f} | "
        f"{record['model_busy']:.0%} | {1e6 / rate / 3600:.1f} | {record['processes']} | {record['device']} | "
        f"{record['precision']} |",
        "",
        *provenance_lines(record),
    ]


def chain_section(root: Path) -> list[str]:
    records = [json.loads(path.read_text()) for path in root.glob("*/run.json")]
    records.sort(key=lambda record: record["started"])
    rows = [f"| {record['command'][1]} | {record['seconds']:.0f} |" for record in records]
    total = sum(record["seconds"] for record in records)
    return [
        "| stage | seconds |",
        "|---|---|",
        *rows,
        f"| sum | {total:.0f} |",
        "",
        "Time inside each command, the start of Python not counted.",
        *provenance_lines(records[0])[1:],
    ]


def replace_section(name: str, lines: list[str]) -> None:
    text = BENCHMARKS.read_text()
    section = f"## {name}\n\n" + "\n".join(lines) + "\n"
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else text.rstrip() + "\n\n" + section
    BENCHMARKS.write_text(text.rstrip() + "\n")


HEADLINE = ("reconstruction", "bits/pixel", "PSNR (dB)", "LPIPS")


def small_table(text: str) -> str:
    """The columns of `HEADLINE` of the first Markdown table in `text`, means without their intervals."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    places = [[cell.strip() for cell in rows[0]].index(name) for name in HEADLINE]
    cells = [[re.sub(r" \[.*\]", "", row[place].strip()) for place in places] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def headline(text: str) -> None:
    """The README's figures, from the Markdown of an evaluation."""
    start, end = "<!-- figures:start -->", "<!-- figures:end -->"
    before, rest = README.read_text().split(start)
    README.write_text(f"{before}{start}\n{small_table(text)}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--headline", action="store_true", help="also renew the README's figures")
    args = parser.parse_args()
    table = next((args.folder / name for name in TABLES if (args.folder / name).is_file()), None)
    if table:
        lines = measured_section(table)
    else:
        is_set = (args.folder / "manifest.json").is_file()
        lines = encoding_section(args.folder) if is_set else chain_section(args.folder)
    replace_section(args.name, lines)
    if args.headline:
        headline((args.folder / "results.md").read_text())


if __name__ == "__main__":
    main()
