"""Serving the explorer: it answers where it says, ends at a signal, and no slow client holds it."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from starlette.responses import Response

from ldm_vae.applications.explorer import server
from ldm_vae.applications.explorer.answers import PageModels, open_page_model
from ldm_vae.applications.explorer.limits import Worker
from ldm_vae.applications.explorer.server import PatientProtocol, measure_round_trips, open_socket, running, serve
from ldm_vae.errors import UserError
from ldm_vae.training.watchdog import StopRequest
from tests.applications.explorer.served import ask, small_explored
from tests.waiting import wait_until

LARGE = b"x" * 16_000_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> PageModels:
    explored = small_explored(tmp_path_factory.mktemp("explored"), image_folder)
    return PageModels(*(open_page_model(key, one) for key, one in zip("ab", explored)))


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server with little patience and long answers."""
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.2)
    with running(Response(LARGE)) as url:
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        yield host, int(port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_where_it_says_and_ends_at_a_signal(models, number, monkeypatch):
    terminal, visits = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", terminal)

    def visit() -> None:
        try:
            while "Ctrl-C" not in terminal.getvalue():
                time.sleep(0.01)
            url = terminal.getvalue().splitlines()[0]
            visits.append((url, ask(url, "/api/explorer").status))  # the first try
            host, port = url.removeprefix("http://").rstrip("/").split(":")
            clients.append(socket.create_connection((host, int(port))))  # says nothing, and stays
        finally:
            os.kill(os.getpid(), number)

    clients: list[socket.socket] = []
    visitor = threading.Thread(target=visit)
    visitor.start()
    with StopRequest(at_once=True):
        serve(models, 0)
    visitor.join(60)
    [(url, status)] = visits
    assert url.startswith("http://127.0.0.1:")
    assert status == 200
    wait_until(lambda: refuses(url))  # the thread that serves has another two seconds, and more on a busy machine
    clients[0].close()


def refuses(url: str) -> bool:
    try:
        ask(url, "/")
    except ConnectionError:
        return True
    return False


def test_the_url_answers_without_another_try():
    for _ in range(3):
        with running(Response(b"here")) as url:
            assert ask(url, "/").body == b"here"


def test_only_this_machine_is_listened_to():
    with open_socket(0) as found:
        assert found.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_that_do_not_exist_are_refused(port):
    with pytest.raises(UserError, match=f"port: {port} is not between 0 and 65535"):
        open_socket(port)


def test_a_port_in_use_is_refused():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="in use; give another"),
        running(Response(b""), taken.getsockname()[1]),
    ):
        pass


def test_an_unfinished_request_is_cut_off(address):
    for said in (b"", b"GET / HTTP/1.1\r\nHost: 127."):
        with socket.create_connection(address, timeout=60) as silent:
            silent.sendall(said)  # and no more
            with suppress(ConnectionError):
                assert silent.recv(100) == b""


def test_dripping_does_not_help(address):
    with socket.create_connection(address, timeout=60) as dripping:
        dripping.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        deadline, open_still = time.monotonic() + 60, True
        while open_still:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            try:
                dripping.sendall(b"x")
            except ConnectionError:
                open_still = False


def test_an_answer_that_is_not_taken_is_cut_off(address, monkeypatch):
    many, cut_off, lost = 4, threading.Event(), PatientProtocol.connection_lost

    def told(protocol: PatientProtocol, error: Exception | None) -> None:
        lost(protocol, error)
        if protocol.client == deaf.getsockname():
            cut_off.set()

    monkeypatch.setattr(PatientProtocol, "connection_lost", told)
    with socket.socket() as deaf:
        deaf.settimeout(60)
        deaf.connect(address)
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * many)
        assert cut_off.wait(60)  # and reads nothing until then
        received = 0
        with suppress(ConnectionError):
            while block := deaf.recv(1 << 20):
                received += len(block)
        assert received < many * len(LARGE) / 2


def test_a_slow_reader_who_reads_gets_everything(address, monkeypatch):
    """Of the answer most waits for the reader, for longer than there is patience; a busy machine may stop both."""
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 1.0)
    with socket.create_connection(address, timeout=60) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        received = 0
        while block := slow.recv(1 << 18):
            received += len(block)
            time.sleep(0.04)
    assert received > len(LARGE)


def test_connections_are_counted(monkeypatch):
    monkeypatch.setattr(server, "MAXIMUM_CONNECTIONS", 4)
    with running(Response(b"here")) as url, ExitStack() as open_ones:
        address = url.removeprefix("http://").rstrip("/").split(":")
        for _ in range(5):
            open_ones.enter_context(socket.create_connection((address[0], int(address[1])), timeout=60))
        assert ask(url, "/").status == 503
        open_ones.close()
        wait_until(lambda: ask(url, "/").status == 200)


def test_measuring_ends_when_the_server_does(models):
    stopped, worker = threading.Event(), Worker()
    models.all[0].round_trip = None
    thread = threading.Thread(target=measure_round_trips, args=(models.all, stopped, worker))
    with models.all[0].explored.lock:  # it cannot begin
        thread.start()
        stopped.set()
    thread.join(60)
    assert not thread.is_alive()
    assert models.all[0].round_trip is None
    worker.close(60)
