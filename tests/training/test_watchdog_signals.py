"""Signals: all processes stop at the same step and save, also when the launcher is what is signalled, or dies."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ldm_vae.errors import EXIT_INTERRUPTED
from ldm_vae.training.watchdog import StopRequest
from tests.training import toy
from tests.training.mishap import start

ENDLESS = ("steps=1000000", "micro=2", "training.save_every=1000000", "training.workers=1")
STOPS = [  # launcher, signal, whether it goes to the whole group as Ctrl-C does
    ("accelerate", signal.SIGKILL, False),
    ("accelerate", signal.SIGTERM, False),
    ("accelerate", signal.SIGINT, True),
    ("accelerate-2", signal.SIGTERM, False),
    ("accelerate-2", signal.SIGKILL, False),
    ("torchrun", signal.SIGTERM, False),
    ("torchrun", signal.SIGINT, True),
    ("torchrun", signal.SIGKILL, False),
    ("torchrun", signal.SIGHUP, False),
]
QUICK = STOPS[0]


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    ("launcher", "number", "group"), [QUICK, *(pytest.param(*s, marks=pytest.mark.slow) for s in STOPS if s != QUICK)]
)
def test_all_processes_save_the_same_step_and_leave(tmp_path, launcher, number, group, record_property):
    output = tmp_path / "run"
    job = start(tmp_path / "job", toy.__file__, str(output), *ENDLESS, launcher=launcher, rank=0)
    job.wait_for(lambda: (output / "metrics.jsonl").exists())
    processes = 2 if "2" in launcher or launcher == "torchrun" else 1
    sent = time.monotonic()
    if group:
        os.killpg(job.process.pid, number)
    else:
        job.process.send_signal(number)
    job.end(seconds=240)
    seconds = time.monotonic() - sent
    assert job.codes() == [EXIT_INTERRUPTED] * processes, job.output
    (saved,) = (output / "checkpoints").glob("step-*")
    assert f"stopped at step {int(saved.name.removeprefix('step-'))} of" in job.output
    where = "its group" if group else "it"
    record_property("figure", f"{launcher}, {number.name} to {where}: {processes} x exit 75 at one step, "
                              f"{seconds:.1f} s")  # fmt: skip


@pytest.mark.promise(2)
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_second_signal_stops_at_once(tmp_path, launcher, record_property):
    """The step that the first one waits for never ends."""
    output = tmp_path / "run"
    job = start(tmp_path / "job", toy.__file__, str(output), *ENDLESS, launcher=launcher, mishap="hangs", rank=0,
                forward_pass=30)  # fmt: skip
    job.wait_for((tmp_path / "job" / "time").exists)
    job.process.send_signal(signal.SIGTERM)
    job.wait_for(lambda: "again to stop at once" in job.output)
    time.sleep(3)  # under a launcher a signal so soon would be the same one
    assert job.process.poll() is None
    sent = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    code = job.end(seconds=60)
    assert code == -signal.SIGTERM or launcher == "torchrun"
    assert not list((output / "checkpoints").glob("step-*"))
    record_property("figure", f"{launcher}, a second SIGTERM: gone after {time.monotonic() - sent:.1f} s")


@pytest.mark.promise(2)
def test_a_signal_cuts_validation_short(tmp_path, monkeypatch, capfd, record_property):
    def validate(self, engine):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)

    monkeypatch.setattr(toy.ToyModel, "validate", validate)
    settings = ("steps=9", "training.validate_every=4", "training.save_every=100")
    assert toy.main(str(tmp_path / "run"), *settings) == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert "SIGTERM: saving after this step" in capfd.readouterr().err
    assert toy.main(str(tmp_path / "run"), *settings) == 0
    assert "continuing from step 4" in capfd.readouterr().out
    record_property("figure", "a signal during validation: saved at that step, exit 75")


@pytest.mark.promise(2)
def test_a_cluster_that_signals_launcher_and_process_asks_once(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_work_that_may_be_left_anywhere_is_left_at_once():
    with StopRequest(at_once=True), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_closed_terminal_is_no_request_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
