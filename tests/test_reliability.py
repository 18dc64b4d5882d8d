"""The table of docs/results/reliability.md is made of what tests recorded, never of anything else."""

from __future__ import annotations

from pathlib import Path

from tools import reliability
from tools.reliability import END, START, Row, merged, rows_of_document, rows_of_report, with_rows

CASE = """<testcase classname="tests.training.test_kills" name="{name}" time="{seconds}"><properties>
<property name="promise" value="1"/><property name="figure" value="{figure}"/></properties>{outcome}</testcase>"""


def report(path: Path, *cases: tuple[str, float, str, str]) -> Path:
    keys = ("name", "seconds", "figure", "outcome")
    body = "".join(CASE.format(**dict(zip(keys, case))) for case in cases)
    path.write_text(f'<testsuites><testsuite timestamp="2026-01-02T03:04:05">{body}</testsuite></testsuites>')
    return path


def test_the_longest_variant_speaks_for_a_test(tmp_path):
    file = report(tmp_path / "a.xml", ("test_kill[1]", 2.4, "1 kill", ""), ("test_kill[30]", 60.4, "30 kills", ""))
    assert rows_of_report(file) == [Row(1, "`training.test_kills::test_kill`", 2, "30 kills", 63, "2026-01-02")]


def test_a_failure_speaks_before_all_others_and_a_skipped_test_not_at_all(tmp_path):
    failed = ("test_kill[1]", 2.0, "", "<failure/>")
    file = report(tmp_path / "a.xml", failed, ("test_kill[30]", 60.0, "30 kills", ""))
    (row,) = rows_of_report(file)
    assert row.failed
    assert row.figure == "FAILED: test_kill[1]"
    assert rows_of_report(report(tmp_path / "b.xml", ("test_kill[1]", 0.0, "1 kill", "<skipped/>"))) == []


def test_a_short_run_does_not_replace_the_long_trials_unless_it_failed():
    long = Row(1, "`a::b`", 2, "30 kills", 63, "2026-01-02")
    short = Row(1, "`a::b`", 1, "1 kill", 2, "2026-01-03")
    broken = Row(1, "`a::b`", 1, "FAILED: b[1]", 2, "2026-01-03")
    assert merged([long], [short]) == [long]
    assert merged([long], [broken]) == [broken]
    assert merged([broken], [short]) == [short]
    assert merged([short], [long]) == [long]


def test_the_document_keeps_its_words_and_its_other_rows():
    text = with_rows(f"before\n{START}{END}after\n", [Row(2, "`c::d`", 1, "x", 0, "2026-01-01")])
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert rows_of_document(text)[0].test == "`c::d`"
    document = reliability.DOCUMENT.read_text()
    assert with_rows(document, rows_of_document(document)) == document
