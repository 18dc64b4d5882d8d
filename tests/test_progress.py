"""What a person sees while it works: bars and lines, first and last lines, and that no other module prints."""

from __future__ import annotations

import ast
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR
from ldm_vae.utils import progress
from ldm_vae.utils.progress import LineHandler, Progress, begin, end, inside, say, track
from ldm_vae.utils.text import csv_cell, duration_text, markdown_name, pluralize, python_text, rate_text

PACKAGE = Path(__file__).parents[1] / "ldm_vae"
PRINTING = {"cli.py", "utils/progress.py"}
"""The command line prints help, settings and errors itself."""


class Terminal(io.StringIO):
    """Standard output or error of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds; add to it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def prints_or_draws(code: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "print":
            found.append("print")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "tqdm" in ast.unparse(node):
            found.append("tqdm")
    return found


def test_one_module_prints_and_draws_bars():
    found = {str(path.relative_to(PACKAGE)): prints_or_draws(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: what for name, what in found.items() if what and name not in PRINTING} == {}
    assert prints_or_draws("from tqdm import tqdm\naccelerator.print(1)\nprint(2)") == ["tqdm", "print", "print"]


def test_in_a_log_file_a_bar_is_a_line_now_and_then(clock, capsys):
    with Progress("encode", 1000) as bar:
        for _ in range(1000):
            clock[0] += 0.125
            bar.advance(1, "model busy 80%")
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines() == [
        "encode: 240 of 1,000 images, 1 min 35 s left, 8.0 images/s, model busy 80%",
        "encode: 480 of 1,000 images, 1 min 5 s left, 8.0 images/s, model busy 80%",
        "encode: 720 of 1,000 images, 35 s left, 8.0 images/s, model busy 80%",
        "encode: 960 of 1,000 images, 5.0 s left, 8.0 images/s, model busy 80%",
        "encode: 1,000 images in 2 min 5 s, 8.0 images/s, model busy 80%",
    ]


def test_the_rate_is_that_of_this_attempt(clock, capsys):
    with Progress("train-vae", 100, "step", done=90) as bar:
        for _ in range(10):
            clock[0] += 4
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "train-vae: 98 of 100 steps, 8.0 s left, 4.0 s/step",
        "train-vae: 100 steps, 10 of them in 40 s, 4.0 s/step",
    ]


@pytest.mark.parametrize("total", [None, 3_000_000])
def test_bytes_and_unknown_totals(total, clock, capsys):
    with Progress("verify", total, "byte") as bar:
        clock[0] += 31
        bar.advance(2_000_000)
    line, last = capsys.readouterr().err.splitlines()
    assert line == ("verify: 2 MB, 64.52 kB/s" if total is None else "verify: 2 MB of 3 MB, 16 s left, 64.52 kB/s")
    assert last == "verify: 2 MB in 31 s, 64.52 kB/s"


def interrupted_after(bar: Progress) -> None:
    bar.advance()
    raise KeyboardInterrupt


def test_work_that_breaks_off_or_had_nothing_to_do_says_nothing(capsys):
    with pytest.raises(KeyboardInterrupt), Progress("encode", 4) as bar:
        interrupted_after(bar)
    with Progress("encode", 4, done=4):
        pass
    list(track(range(4), "a part of it"))
    with Progress("encode", 4, shown=False) as bar:
        bar.advance(4)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_sentences_do_not_stick_to_the_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with Progress("train-vae", 4, "step") as bar:
        for number in range(4):
            bar.advance(1, f"loss {number}")
            bar._bar.refresh()
            say(f"step {number}: a sentence")
    say("the end")
    shown = screen.getvalue()
    assert "train-vae: 100%" in shown
    assert "4/4" in shown
    assert "steps/s, loss 3" in shown
    for sentence in [*(f"step {number}: a sentence" for number in range(4)), "the end"]:
        before, after = shown.split(sentence)
        assert before[-1] in "\r\n"
        assert after[0] == "\n"


def test_only_the_main_process_speaks(monkeypatch, capsys, clock):
    monkeypatch.setenv("RANK", "1")
    begin("encode", "everything")
    with Progress("encode", 4) as bar:
        clock[0] += 100
        bar.advance(4)
    end("here", "made")
    assert capsys.readouterr() == ("", "")


def test_first_and_last_line(capsys):
    begin("encode", "4 images", "", "to here")
    end("runs/a b", "4 latents", ["ldm-vae", "latents", "verify", "runs/a b"])
    with inside():
        begin("generate", "nothing")
        end("runs", "nothing")
    end("runs", "nothing more to do")
    assert capsys.readouterr().out.splitlines() == [
        "encode: 4 images; to here",
        "runs/a b: 4 latents; next: ldm-vae latents verify 'runs/a b'",
        "runs: nothing more to do",
    ]


def test_warnings_of_the_package_are_lines(capsys):
    LineHandler().emit(logging.makeLogRecord({"msg": "%d files are left out", "args": (3,)}))
    assert capsys.readouterr().err == "3 files are left out\n"


def test_the_empty_warning_of_diffusers_alone_is_left_out():
    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    logger, heard = logging.getLogger("diffusers.models.modeling_utils"), io.StringIO()
    handler = logging.StreamHandler(heard)
    logger.addHandler(handler)
    try:
        build_autoencoder(AutoencoderConfig(preset="pico")).to(torch.float64)
        logger.warning("There are modules in X that should be kept in float32: ['norm'].")
    finally:
        logger.removeHandler(handler)
    assert heard.getvalue() == "There are modules in X that should be kept in float32: ['norm'].\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"),
     (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_times(seconds, text):
    assert duration_text(seconds) == text


def test_counts_and_rates():
    assert [pluralize(number, "image") for number in (0, 1, 2, 2000)] == [
        "0 images",
        "1 image",
        "2 images",
        "2,000 images",
    ]
    assert pluralize(2, "batch") == "2 batches"
    assert pluralize(2, "class") == "2 classes"
    assert rate_text(2.5, "batch") == "2.5 batches/s"
    assert rate_text(0.25, "step") == "4.0 s/step"


class Gone(io.StringIO):
    """A stream whose reader has gone away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Gone(), None])
def test_a_reader_that_goes_away_costs_no_work(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    begin("train-vae", "three images")
    say("a sentence")
    say("another", error=True)
    assert sum(1 for _ in track(range(3), "train-vae")) == 3
    end("runs/vae", "the autoencoder")


def test_a_command_whose_output_nobody_reads_ends_as_usual(tmp_path):
    """As with `| head -1`; closed streams too. The process says nothing of broken pipes, and its exit code is 0."""
    script = f"exec {sys.executable} -m ldm_vae.cli synth images output={tmp_path}/$1 count=40 resolution=32 workers=1"
    for name, closed in (("pipe", " 2>&1 | true; exit ${PIPESTATUS[0]}"), ("closed", " >&- 2>&-")):
        command = script + closed if closed.startswith(" >") else script.removeprefix("exec ") + closed
        done = subprocess.run(["bash", "-c", command, "bash", name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(list((tmp_path / name).rglob("*.png"))) == 40


def test_names_from_outside_do_not_move_the_cursor(capsys):
    name = "a\x1b[2J\x1b]0;title\x07\u202egnp.exe\r\x9b31m"
    begin("encode", name)
    say(name, error=True)
    assert cli.main(["evaluate", name]) == EXIT_USER_ERROR
    shown = "".join(capsys.readouterr())
    assert "a\\x1b[2J" in shown
    assert set(shown) & set("\x1b\x07\u202e\r\x9b") == set()


def test_names_in_tables_and_cards_are_text():
    assert [csv_cell(value) for value in ("=1+1", "@x", "-a.png", "+b", "a=1", -1.5)] == [
        "'=1+1", "'@x", "'-a.png", "'+b", "a=1", -1.5
    ]  # fmt: skip
    assert markdown_name("a|b`c`\n# <img>") == "a\\|b\\`c\\` \\# \\<img\\>"
    for name in ("heart", 'a"b', "a\nb", "\\", "'", '"""', "\u202e"):
        literal = python_text(name)
        assert ast.literal_eval(literal) == name
        assert literal.isprintable()
    assert python_text("heart") == '"heart"'
