"""The explorer's server under a minute of hovering: its memory does not grow."""

from __future__ import annotations

import http.client
import threading
import time
from pathlib import Path

import pytest

from tests.applications.explorer.served import Server, decode_path, small_server


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def hover_for(server: Server, seconds: float, rate: float) -> tuple[int, int]:
    """(answered, refused as overtaken) of so many requests a second over four connections, as a browser sends them."""
    counts = {200: 0, 409: 0}
    started, lock, numbers = time.monotonic(), threading.Lock(), iter(range(1 << 30))

    def client() -> None:
        connection = http.client.HTTPConnection(server.url[len("http://") : -1], timeout=120)
        while True:
            with lock:
                number = next(numbers)
            due = started + number / rate
            if due > started + seconds:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            connection.request(
                "GET", decode_path(number % 50 / 50, 0, session=f"s{number % 100 // 50}", sequence=number)
            )
            response = connection.getresponse()
            response.read()
            with lock:
                counts[response.status] += 1
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts[200], counts[409]


@pytest.mark.slow
@pytest.mark.promise(10)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_under_hovering(tmp_path, image_folder, record_property):
    with small_server(tmp_path, image_folder) as server:
        hover_for(server, 10, 50)  # buffers and caches fill
        before, started = resident_bytes(), time.monotonic()
        answered, overtaken = hover_for(server, 60, 50)
        grown, seconds = resident_bytes() - before, time.monotonic() - started
    said = (
        f"{answered + overtaken} hovers in {seconds:.0f} s ({overtaken} overtaken), resident memory "
        f"{before / 1e6:.0f} MB, {grown / 1e6:+.1f} MB after"
    )
    print(said)
    record_property("figure", said)
    assert answered + overtaken == pytest.approx(3000, abs=5)
    assert grown < 8_000_000
