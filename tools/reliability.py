"""Measure the promises of docs/results/reliability.md, and write the figures there. Nothing is typed by hand.

    python -m tools.reliability          # every promise, the long trials among them: more than an hour on 2 cores
    python -m tools.reliability 1 4      # promises 1 and 4 alone; the rows of the others stay
    python -m tools.reliability 1 -- -m "promise and not slow"     # what follows -- goes to pytest
    python -m tools.reliability --reports a.xml b.xml              # of earlier runs of `pytest --junitxml=a.xml`

Runs the tests marked `promise(number)`. What each recorded while it ran (`record_property("figure", ...)`) is its
row in the table, with the figure of its longest variant; a test that fails says FAILED there, and this program ends
with pytest's exit code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "results" / "reliability.md"
START, END = "<!-- figures: written by tools/reliability.py -->\n", "<!-- end of figures -->\n"
HEADER = "| promise | test | variants | figure of the longest | seconds, all | date |\n|---|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """A line of the table: a test function, with all its variants (parameters) that recorded a figure."""

    promise: int
    test: str
    variants: int
    figure: str
    seconds: int
    day: str

    @property
    def failed(self) -> bool:
        return self.figure.startswith("FAILED")

    def __str__(self) -> str:
        cells = (self.promise, self.test, self.variants, self.figure, self.seconds, self.day)
        return f"| {' | '.join(map(str, cells))} |\n"


@dataclass(frozen=True)
class Case:
    """One variant of a test, as it ran."""

    name: str
    figure: str
    seconds: float


def rows_of_report(report: Path) -> list[Row]:
    """A row for each promise of each test function in a JUnit file that recorded a figure, or failed."""
    suite = ElementTree.parse(report).getroot().find(".//testsuite")
    if suite is None:
        return []
    cases: dict[tuple[int, str], list[Case]] = defaultdict(list)
    for element in suite.iter("testcase"):
        properties = [(item.get("name"), item.get("value", "")) for item in element.iter("property")]
        if element.find("skipped") is not None:
            continue
        failed = element.find("failure") is not None or element.find("error") is not None
        name = element.get("name", "")
        figure = f"FAILED: {name}" if failed else "; ".join(value for key, value in properties if key == "figure")
        if not figure:
            continue
        test = f"`{element.get('classname', '').removeprefix('tests.')}::{name.split('[')[0]}`"
        case = Case(name, figure.replace("|", "\\|"), float(element.get("time", 0)))
        for promise in (int(value) for key, value in properties if key == "promise"):
            cases[promise, test].append(case)
    day = suite.get("timestamp", "")[:10]
    return [row_of_cases(promise, test, variants, day) for (promise, test), variants in cases.items()]


def row_of_cases(promise: int, test: str, cases: Sequence[Case], day: str) -> Row:
    """The longest variant speaks for all, unless one failed."""
    spokesman = max(cases, key=lambda case: (case.figure.startswith("FAILED"), case.seconds))
    return Row(promise, test, len(cases), spokesman.figure, round(sum(case.seconds for case in cases)), day)


def rows_of_document(text: str) -> list[Row]:
    """The rows that an earlier run wrote."""
    lines = text.split(START)[1].split(END)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [
        Row(int(promise), test, int(variants), figure, int(seconds), day)
        for promise, test, variants, figure, seconds, day in cells
    ]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """A test that ran with fewer variants than before, say without the slow ones, does not replace them: unless it
    failed, or they had."""
    rows = {(row.promise, row.test): row for row in old}
    for row in new:
        before = rows.get((row.promise, row.test))
        if before is None or row.failed or before.failed or row.variants >= before.variants:
            rows[row.promise, row.test] = row
    return sorted(rows.values(), key=lambda row: (row.promise, row.test))


def with_rows(text: str, rows: Sequence[Row]) -> str:
    before, rest = text.split(START)
    return before + START + HEADER + "".join(map(str, rows)) + END + rest.split(END)[1]


def record(new: Sequence[Row]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_rows(text, merged(rows_of_document(text), new)), encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)}: {len(new)} figures")


def main() -> int:
    words = sys.argv[1:]
    own, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promises", nargs="*", type=int, help="numbers; all when left out")
    parser.add_argument("--reports", nargs="+", type=Path, help="take the figures of these and run nothing")
    arguments = parser.parse_args(own)
    if arguments.reports:
        for report in arguments.reports:  # a later one knows better
            record(rows_of_report(report))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "promise and not gpu",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        command += [f"--promise={number}" for number in arguments.promises] + further
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        record(rows_of_report(report) if report.exists() else [])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
