"""Serving the explorer: the socket, the web server's thread, measuring in the background, and ending in time.

uvicorn runs in a thread of its own; signals stay with the main thread, which only waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ldm_vae.applications.explorer.answers import Model, Models
from ldm_vae.applications.explorer.round_trip import measure_round_trip
from ldm_vae.applications.explorer.server import make_application
from ldm_vae.applications.explorer.worker import Worker
from ldm_vae.errors import UserError
from ldm_vae.training.signals import write_error

ADDRESS = "127.0.0.1"
MAXIMUM_CONNECTIONS = 64
"""A browser opens six."""
MAXIMUM_HEAD_BYTES = 16_384
PATIENCE_SECONDS = 10.0
"""A client that neither ends its request nor takes its answer is cut off within twice that."""
ENDING_SECONDS = 2.0
START_SECONDS = 60.0
GIVE_WAY_SECONDS = 0.5
"""So long the round trip waits for hovers, after every few points."""
GRID = 24
"""Points along each axis whose round trip is measured."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, but no client holds a connection by being slow, and there are only so many connections."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._progress: tuple[Any, ...] = ()
        self._look = self.loop.call_later(PATIENCE_SECONDS, self._look_after)
        if len(self.connections) > 2 * MAXIMUM_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _look_after(self) -> None:
        """Cut off a client that we have waited for since the last look."""
        unsent = self.transport.get_write_buffer_size()
        progress = (self.cycle, self.cycle is not None and self.cycle.response_complete, unsent)
        waiting_for_client = unsent > 0 or self.cycle is None or self.cycle.response_complete
        if waiting_for_client and progress == self._progress:
            self.transport.abort()
            return
        self._progress = progress
        self._look = self.loop.call_later(PATIENCE_SECONDS, self._look_after)


def open_socket(port: int) -> socket.socket:
    """Bound to this machine's own address; port 0 takes a free one. Raises: UserError when it is not to be had."""
    if not 0 <= port <= 65_535:
        raise UserError(f"port: {port} is not between 0 and 65535; leave it out for a free one")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((ADDRESS, port))
    except OSError as error:
        listening.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise UserError(f"port: {port} {reason}; give another, or leave it out for a free one") from error
    return listening


@contextlib.contextmanager
def running(application: ASGIApp, port: int = 0) -> Iterator[str]:
    """Serve from a thread while inside; gives the URL once it answers. Raises: UserError for a port not to be had."""
    listening = open_socket(port)
    settings = uvicorn.Config(
        application, loop="asyncio", http=PatientProtocol, ws="none", lifespan="off", log_config=None,
        log_level="critical", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MAXIMUM_CONNECTIONS, h11_max_incomplete_event_size=MAXIMUM_HEAD_BYTES,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    address: str = "{}:{}".format(*listening.getsockname())
    thread = threading.Thread(target=server.run, args=([listening],), name="explorer-server", daemon=True)
    thread.start()
    try:
        _wait_until_it_answers(address, thread)
        yield f"http://{address}/"
    finally:
        server.should_exit = True
        thread.join(ENDING_SECONDS)


def _wait_until_it_answers(address: str, thread: threading.Thread) -> None:
    started = time.monotonic()
    while thread.is_alive() and time.monotonic() < started + START_SECONDS:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(address, timeout=START_SECONDS)
            connection.request("HEAD", "/")
            connection.getresponse()
            connection.close()
            return
        time.sleep(0.02)
    raise UserError(f"explore: no answer at {address}; start it again, or give another --port")


def serve(models: Models, port: int) -> None:
    """Serve until KeyboardInterrupt; prints the URL once it answers. What is being computed then may go on for a while
    in threads that hold up nobody.

    Raises:
        UserError: the port is not to be had.
    """
    worker, stopped = Worker(), threading.Event()
    measuring = threading.Thread(target=measure_round_trips, args=(models.all, stopped, worker), daemon=True)
    try:
        with contextlib.suppress(KeyboardInterrupt), running(make_application(models, worker), port) as url:
            try:
                print(f"{url}\n(Ctrl-C ends it)", flush=True)
                measuring.start()
                threading.Event().wait()
            finally:
                stopped.set()
                worker.close(0)  # what waits is answered, so that the server can end
    finally:
        worker.close(0)


def measure_round_trips(models: Sequence[Model], stopped: threading.Event, worker: Worker) -> None:
    """For every model in turn, until `stopped`; the page shows each from then on. What the worker has to do goes
    first."""
    from tqdm import tqdm

    for model in models:
        name = model.explored.name
        with tqdm(total=GRID**2, desc=f"round trip of {name}", unit="point", leave=False) as progress:

            def advance(points: int, progress: Any = progress) -> None:
                progress.update(points)
                worker.rest(GIVE_WAY_SECONDS)
                if stopped.is_set():
                    raise _Stopped

            try:
                found = measure_round_trip(model.explored, model.plane, GRID, advance)
            except _Stopped:
                return
        model.round_trip = found
        holes = "" if found.share_in_holes is None else f" ({found.share_in_holes:.0%} in cells without an image)"
        write_error(
            f"{name}: {found.share:.0%} of the map inside the images' outline encodes back to its place{holes}\n"
        )


class _Stopped(Exception):
    """The server ends."""
