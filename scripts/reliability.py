"""Measure the promises of docs/reliability.md, and write the figures there. Nothing is typed by hand.

    python scripts/reliability.py          # every promise, the long trials among them: more than an hour on 2 cores
    python scripts/reliability.py 1 4      # promises 1 and 4 alone; the rows of the others stay
    python scripts/reliability.py 1 -- -m "promise and not slow"     # what follows -- goes to pytest
    python scripts/reliability.py --reports a.xml b.xml              # of earlier runs of `pytest --junitxml=a.xml`

Runs the tests marked `promise(number)`. What each recorded while it ran (`record_property("figure", ...)`) is its
row in the table; a test that fails says FAILED there, and this program ends with pytest's exit code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
START, END = "<!-- figures: written by scripts/reliability.py -->\n", "<!-- end of figures -->\n"
HEADER = "| promise | test | last figure | seconds | date |\n|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    promise: int
    test: str
    figure: str
    seconds: str
    day: str

    def __str__(self) -> str:
        return f"| {self.promise} | {self.test} | {self.figure} | {self.seconds} | {self.day} |\n"


def rows_of_report(report: Path) -> list[Row]:
    """A row for each promise of each test in a JUnit file that recorded a figure, or failed."""
    rows: list[Row] = []
    suite = ElementTree.parse(report).getroot().find(".//testsuite")
    if suite is None:
        return rows
    day = suite.get("timestamp", "")[:10]
    for case in suite.iter("testcase"):
        properties = [(item.get("name"), item.get("value", "")) for item in case.iter("property")]
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        figure = "FAILED" if failed else "; ".join(value for name, value in properties if name == "figure")
        if not figure:
            continue
        test = f"`{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}`"
        rows += [
            Row(int(value), test, figure.replace("|", "\\|"), f"{float(case.get('time', 0)):.0f}", day)
            for name, value in properties
            if name == "promise"
        ]
    return rows


def rows_of_document(text: str) -> list[Row]:
    """The rows that an earlier run wrote."""
    lines = text.split(START)[1].split(END)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [Row(int(promise), *rest) for promise, *rest in cells]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of tests that ran replace their own; those of tests that did not run stay."""
    ran = {(row.promise, row.test) for row in new}
    return sorted(
        [*new, *(row for row in old if (row.promise, row.test) not in ran)], key=lambda row: (row.promise, row.test)
    )


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
