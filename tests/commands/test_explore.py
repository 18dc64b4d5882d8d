"""`ldm-vae explore`: starts, answers where it says, ends in time, and refuses in one sentence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR
from tests.applications.explorer.served import ask, small_run

COMMAND = [sys.executable, "-m", "ldm_vae.cli", "explore"]
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("explore") / "run")


@pytest.fixture
def started(run: Path, image_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    words = [str(run), "--data", str(image_folder), "--size", "32", "--device", "cpu"]
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    yield process, url
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_where_it_says_and_ends_at_a_signal(started, number):
    process, url = started
    assert url.startswith("http://127.0.0.1:")
    assert ask(url, "/api/explorer").json["images"]["count"] == 24  # at once, without another try
    with socket.create_connection(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))):  # a client that stays
        asked, used = time.monotonic(), children_seconds()
        process.send_signal(number)
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == 0
    assert "Traceback" not in said
    assert "terminate called" not in said
    print(f"ended in {time.monotonic() - asked:.2f} s, {children_seconds() - used:.2f} s of computing in all")


def children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="listening sockets are read from /proc")
def test_it_listens_on_this_machine_only(started):
    _, url = started
    port = int(url.rstrip("/").rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {row[1] for row in listening if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere"),
        (["--count", "1"], "count: 1 is not between 4"),
        (["--size", "8"], "resolution: 8 is not between 16"),
        (["--port", "70000"], "port: 70000 is not between 0 and 65535"),
        (["--data", "nowhere"], "data: nowhere is neither a folder nor a .parquet file"),
        (["--overwrite"], "--overwrite: has no effect without export=FILE"),
        (["--export", "."], "export: . is a folder"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(run, image_folder, words, said, capsys):
    model = [] if words == ["nowhere"] else [str(run)]
    data = [] if "--data" in words else ["--data", str(image_folder), "--size", "32"]
    data = data[:2] if "--size" in words else data
    assert cli.main(["explore", *model, *words, *data]) == EXIT_USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ldm-vae explore: ")
    assert said in error


def test_what_cannot_be_exported_is_refused_before_an_image_is_read(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()  # read, it would be refused for its emptiness
    words = [str(run), "--data", str(tmp_path / "images"), "--export", str(tmp_path / "page.html")]
    assert cli.main(["explore", *words]) == EXIT_USER_ERROR
    assert f"export: {run} is of class AutoencoderWavelet, and a page can run only" in capsys.readouterr().err


def test_a_port_in_use_is_refused(run, image_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [str(run), "--data", str(image_folder), "--size", "32", "--port", port]
        assert cli.main(["explore", *words]) == EXIT_USER_ERROR
    assert f"port: {port} is in use; give another" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ldm_vae import cli\n"
        "try: cli.main(['explore', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'starlette', 'uvicorn', 'numpy', 'PIL') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("[]")
