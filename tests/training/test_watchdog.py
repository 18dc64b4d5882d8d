"""The watchdog ends a process that stands still, and leaves one alone that gets on, works alone or waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ldm_vae.errors import EXIT_STUCK
from ldm_vae.training.watchdog import Heartbeats
from tests.waiting import wait_until

PROGRAM = """
import signal, sys, threading, time
from types import SimpleNamespace
from ldm_vae.training import watchdog

watchdog.GRACE_SECONDS, watchdog.TICK_SECONDS = 0, 0.1
with watchdog.Watchdog(SimpleNamespace(process_index=0, num_processes=1), timeout_seconds=1.5):
    {body}
print("at the end")
"""


def run(body: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.promise(3)
def test_a_step_without_end_is_ended_with_all_stacks(record_property):
    process = run("watchdog.advance(1); threading.Event().wait()")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == EXIT_STUCK
    assert f"rank 0 of 1 (process {process.pid}) ends: no progress for" in errors
    assert 'File "<string>", line 8' in errors  # where it waits
    record_property("figure", "a step without end: all stacks, exit 70")


@pytest.mark.slow
def test_who_gets_on_works_alone_or_waits_is_left_alone():
    process = run(
        "[(watchdog.advance(step), time.sleep(0.2)) for step in range(10)]\n"
        "    with watchdog.solo(): time.sleep(2)\n"
        "    watchdog.advance(10)\n"
        "    with watchdog.waiting(): time.sleep(2)"
    )
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output) == (0, "at the end\n"), errors


@pytest.mark.slow
def test_a_process_that_was_suspended_goes_on():
    """Ctrl-Z, and later fg."""
    process = run("watchdog.advance(1); print('there', flush=True); time.sleep(0.5); watchdog.advance(2)")
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output) == (0, "at the end\n"), errors


@pytest.fixture
def two_processes(monkeypatch):
    """The heartbeats of two, in this process."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr("ldm_vae.training.watchdog.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("ldm_vae.training.watchdog.SILENCE_SECONDS", 1.0)
    beats = []
    for rank in range(2):
        beats.append(Heartbeats(rank, 2, "job"))
    wait_until(lambda: all(beat.others for beat in beats))
    yield beats
    for beat in beats:
        beat.end("")
    del server


def test_processes_that_live_are_not_taken_for_dead(two_processes):
    first, number = two_processes[0], two_processes[0].others[1].number
    two_processes[1].at_step(3)
    wait_until(lambda: first.others[1].step == 3 and first.others[1].number > number + 3)
    assert first.lost(silent=20) == []
    host = os.uname().nodename
    assert f"rank 1 of 2 (process {os.getpid()} on {host}) is in step 3" in two_processes[0].explanation()


def test_a_process_that_ended_with_an_error_says_so(two_processes):
    two_processes[0].end("ValueError: a mishap")
    wait_until(lambda: two_processes[1].others[0].exit_reason)
    assert two_processes[1].explanation().endswith("ended: ValueError: a mishap")


def test_a_process_that_is_silent_is_named(two_processes):
    two_processes[1]._ended.set()
    wait_until(lambda: two_processes[0].silent_seconds[1] >= 1.0)
    assert "gives no sign of life" in two_processes[0].explanation()
    two_processes[0].end("")
