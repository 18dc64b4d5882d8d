"""Signs of life: every process of a job tells the store of its process group how it is, and learns how the others are.

Rank 0 listens to all and the others to rank 0, so that the traffic grows with the number of processes and not with its
square. Nothing is decided here; `watchdog.py` does.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

BEAT_SECONDS = 1.0

SILENCE_SECONDS = 3.0
"""Without a beat a process counts as gone when another one asks why a message did not arrive."""

ENDING_SECONDS = 2.0
"""So long the last word may wait for the beat before it."""

CONNECT_SECONDS = 30
SHOWN_RANKS = 4


@dataclass(frozen=True)
class Beat:
    """What a process says of itself. `farewell`: None while it is at work, else how it ended ("" for well)."""

    rank: int
    pid: int
    host: str
    number: int = 0
    step: int = 0
    farewell: str | None = None

    def words(self, processes: int) -> str:
        return f"rank {self.rank} of {processes} (process {self.pid} on {self.host})"


class Heartbeats:
    """Beats from the first to the last moment of a job, in a thread of its own: a store that hangs stops nothing else.

    Seconds of silence are counted in beats of our own, so that a job that was stopped as a whole and goes on later
    takes nobody for dead.
    """

    def __init__(self, rank: int, processes: int, job: str) -> None:
        """`job`: a name that is new, and the same in all processes: the store may hold beats of earlier ones."""
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.processes, self.step = rank, processes, 0
        self.own = Beat(rank, os.getpid(), socket.gethostname())
        self.heard: dict[int, Beat] = {}
        self.silent_seconds: dict[int, float] = {}
        self.listens_to_all = rank == 0
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
        self._store: Any = PrefixStore(f"ldm_vae/{job}", store)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def at_step(self, step: int) -> None:
        """Told with the next beat; only the thread changes `own`, or a step could be lost between two of its lines."""
        self.step = step

    def end(self, farewell: str) -> None:
        """Say the last word. Without waiting long: the store may be gone, with the launcher."""
        self._ended.set()
        self._thread.join(ENDING_SECONDS)
        if not self._thread.is_alive():
            self.own = replace(self.own, farewell=farewell)
            try:
                self._tell()
            except RuntimeError:
                return

    def lost(self, silent: float, ended: float = 0.0) -> list[str]:
        """A sentence for each other process that is silent for so many seconds, or ended with an error so long ago."""
        sentences = []
        for rank, beat in sorted(self.heard.items()):
            who = beat.words(self.processes)
            if beat.farewell and self.silent_seconds[rank] >= ended:
                sentences.append(f"{who} ended: {beat.farewell}")
            elif beat.farewell is None and self.silent_seconds[rank] >= silent:
                sentences.append(f"{who} gives no sign of life after step {beat.step}: it was killed or stopped")
        return sentences

    def explanation(self) -> str:
        """Why a message did not arrive: who is gone, else where everyone is. Takes up to SILENCE_SECONDS and a half."""
        self.listens_to_all = True
        deadline = time.monotonic() + 1.5 * SILENCE_SECONDS
        lost: list[str] = []
        while not lost and time.monotonic() < deadline and self._thread.is_alive():
            lost = self.lost(SILENCE_SECONDS)
            time.sleep(BEAT_SECONDS / 5)
        beats = sorted(self.heard.values(), key=lambda beat: (beat.step, beat.rank))
        places = [f"{beat.words(self.processes)} is in step {beat.step}" for beat in beats]
        shown = lost or [f"a message of another process did not come in time to step {self.step}", *places]
        return "; ".join(shown[:SHOWN_RANKS]) + ("; and more" if len(shown) > SHOWN_RANKS else "")

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                self._tell()
                self._listen(min(now - last, 2 * BEAT_SECONDS))
            except RuntimeError:  # the store is gone with the launcher; whoever outlives it ends by other means
                return
            last = now
            if self._ended.wait(BEAT_SECONDS):
                return

    def _tell(self) -> None:
        self.own = replace(self.own, number=self.own.number + 1, step=self.step)
        self._store.set(str(self.rank), json.dumps(asdict(self.own)))

    def _listen(self, seconds: float) -> None:
        ranks = range(self.processes) if self.listens_to_all else range(1)
        ranks_there = [r for r in ranks if r != self.rank and (r in self.heard or self._store.check([str(r)]))]
        if not ranks_there:
            return
        for rank, text in zip(ranks_there, self._store.multi_get([str(rank) for rank in ranks_there])):
            beat = Beat(**json.loads(text))
            same = rank in self.heard and beat == self.heard[rank]
            self.silent_seconds[rank] = self.silent_seconds[rank] + seconds if same else 0.0
            self.heard[rank] = beat
