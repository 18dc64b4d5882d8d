"""The explorer's server on a real port: every address, every refusal, nothing that grows."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_vae.applications.explorer import answers
from ldm_vae.applications.explorer import server as server_module
from ldm_vae.applications.explorer.limits import MAXIMUM_QUERY, MAXIMUM_WAITING
from ldm_vae.applications.explorer.server import ENDPOINTS, measure_round_trips
from tests.applications.explorer.served import DIRECTION, PREVIEW_STEP, Reply, Server, ask, decode_path, small_server
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Iterator[Server]:
    with small_server(tmp_path_factory.mktemp("explored"), image_folder) as server:
        yield server


@pytest.fixture
def held(server: Server) -> Iterator[threading.Event]:
    """The first model's network is taken, until the event is set."""
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with server.explored.lock:
            taken.set()
            let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    yield let_go
    let_go.set()
    thread.join(60)


def test_the_page_and_its_files(server):
    page = ask(server.url, "/")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    found = [part.split('"')[0] for part in page.body.decode().split('="static/')[1:]]
    assert "plotly.min.js" in {name.split("?")[0] for name in found}
    for name in found:
        file = ask(server.url, f"/static/{name}")
        assert (file.status, file.headers["cache-control"]) == (200, "public, max-age=31536000, immutable"), name
        plain = ask(server.url, f"/static/{name.split('?')[0]}")
        assert (plain.body, plain.headers["cache-control"]) == (file.body, "no-cache")
    again = ask(server.url, f"/static/{found[0]}", if_none_match=file.headers["etag"])
    assert again.status == 200  # the tag of another file
    assert ask(server.url, f"/static/{found[-1]}", if_none_match=file.headers["etag"]).status == 304


def test_every_answer_is_guarded(server):
    for path in ("/", "/static/plotly.min.js", "/api/explorer", "/api/nothing", "/nothing", "/api/decode?x=nan"):
        headers = ask(server.url, path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe-eval" not in headers["content-security-policy"]
        assert "script-src" not in headers["content-security-policy"]  # 'self' alone
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    assert ask(server.url, decode_path()).headers["cache-control"] == "no-store"


def test_explorer_describes_both_models(server):
    found = server("explorer").json
    first, second = found["models"]
    assert [first["key"], second["key"]] == ["a", "b"]
    assert (first["name"], first["kind"], second["kind"]) == (server.explored.name, "kl", "ae")
    assert first["deterministic"] is False
    assert second["deterministic"] is True
    assert (first["latent_shape"], first["image_size"], first["downsampling"]) == ([3, 4, 4], [32, 32], 8)
    assert first["fingerprint"] == server.explored.fingerprint
    assert first["plane"]["kind"] == "pca"
    assert 0 < sum(first["plane"]["explained"]) <= 1
    assert first["training"] is second["training"] is True
    assert first["directions"] is True
    assert second["directions"] is False, "they were fitted to the encoder of the first"
    assert found["images"]["count"] == 24
    assert found["images"]["label_names"] == ["a", "b"]
    assert [one["name"] for one in found["directions"]] == [DIRECTION]
    assert found["channels"] == 3


def test_map_holds_every_image_in_order(server):
    for model in server.models.all:
        found = server("map", model=model.key).json
        points = torch.tensor([found["x"], found["y"]]).T
        assert torch.allclose(points, model.plane.points, rtol=1e-3, atol=1e-6)
        assert found["label"] == server.explored.labels.tolist()
        assert found["id"] == list(server.explored.ids)


def test_round_trip_comes_when_it_is_measured(server, monkeypatch, capfd):
    asked = server("round_trip", model="b")
    assert (asked.status, asked.headers["retry-after"]) == (409, "2")
    assert server("explorer").json["models"][1]["round_trip"] is None
    monkeypatch.setattr(server_module, "GRID", 5)
    measure_round_trips(server.models.all[1:], threading.Event(), server.worker)
    assert "outline encodes back to its place" in capfd.readouterr().err
    found, described = server("round_trip", model="b").json, server("explorer").json["models"][1]["round_trip"]
    assert {key: found[key] for key in described} == described
    assert (found["grid"], [len(row) for row in found["errors"]]) == (5, [5] * 5)
    assert found["bounds"] == list(server.models.all[1].plane.bounds)
    errors, inside = torch.tensor(found["errors"]), torch.tensor(found["inside"])
    assert float((errors[inside] <= found["tolerance"]).float().mean()) == pytest.approx(found["share"])


def test_decode_is_what_the_model_decodes_there(server):
    for model in server.models.all:
        for x, y in ((0.0, 0.0), (1.5, -2.0), tuple(model.plane.points[3].tolist())):
            reply = ask(server.url, decode_path(x, y, model=model.key))
            wanted = model.explored.decode(model.plane.latent_at(torch.tensor([[x, y]])))[0]
            assert torch.equal(reply.picture, wanted)
            assert int(reply.headers["x-nearest"]) == model.plane.nearest(x, y)[0]
            assert [float(value) for value in reply.headers["x-point"].split(",")] == [x, y]


def test_decode_shows_the_nearest_image(server):
    model = server.models.all[0]
    x, y = model.plane.points[7].tolist()
    reply = ask(server.url, decode_path(x + 1e-4, y, mode="nearest"))
    assert reply.headers["x-nearest"] == "7"
    assert reply.headers["x-point"] == f"{x},{y}"
    assert torch.equal(reply.picture, model.explored.decode(model.explored.mean[7:8])[0])


def test_pictures_of_an_image(server):
    explored = server.explored
    assert torch.equal(server("image", index=5).picture, explored.images[5])
    plain = server("reconstruction", model="a", index=5, sample=0)
    assert torch.equal(plain.picture, explored.decode(explored.mean[5:6])[0])
    wanted = answers.edited_reconstruction(explored, 5, 0.5, True, 3, {0: 1.5, 2: -1.0}, {DIRECTION: 2.0})
    moved = server(
        "reconstruction", model="a", index=5, noise=0.5, sample=1, seed=3, channels="0:1.5,2:-1",
        directions=f"{DIRECTION}:2",
    )  # fmt: skip
    assert torch.equal(moved.picture, wanted)
    assert not torch.equal(moved.picture, plain.picture)


def test_a_path_is_a_strip(server):
    strip = server("path", model="a", points="0,0;1,1;2,0", frames=5)
    model = server.models.all[0]
    wanted = answers.path_strip(model.explored, model.plane, torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]), 5)
    assert strip.picture.shape == (3, 32, 5 * 32)
    assert torch.equal(strip.picture, wanted)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def test_every_stage_has_activations(server):
    stages = server("stages", model="a").json["stages"]
    assert [stage["name"] for stage in stages][:1] == ["input"]
    assert set(stages[0]) == {"name", "title", "what", "shape_in", "shape_out", "parameters", "gmacs"}
    for stage in stages:
        found = server("activation", model="a", index=2, stage=stage["name"]).json
        assert (found["stage"], found["shape"]) == (stage["name"], stage["shape_out"])
        assert found["minimum"] <= found["mean"] <= found["maximum"]
        assert min(decoded(found["picture"]).size) > 1
    sampled = [
        server("activation", model="a", index=2, stage="sample", sample=sample, seed=1).json for sample in (0, 1)
    ]
    assert sampled[0]["picture"] != sampled[1]["picture"]


def test_training_and_its_previews(server):
    found = server("training", model="a").json
    assert {"Reconstruction loss", "KL loss, as a rate"} <= {panel["title"] for panel in found["panels"]}
    assert found["panels"][0]["series"][0]["steps"] == [5, PREVIEW_STEP]
    assert found["alarms"] == [{"step": PREVIEW_STEP, "text": "rate_miss: the rate fell"}]
    assert found["previews"] == [{"step": PREVIEW_STEP}]
    preview = server("preview", model="a", step=PREVIEW_STEP)
    assert preview.headers["content-type"] == "image/webp"
    assert preview.picture[:, 0, 0].tolist() == [200, 100, 0]
    assert server("preview", model="a", step=11).status == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("decode", 400, "model: missing"),
        ("decode?model=c&x=0&y=0", 400, "there are a, b"),
        ("decode?model=a&x=nan&y=0", 400, "give a number from"),
        ("decode?model=a&x=0&y=-inf", 400, "give a number from"),
        ("decode?model=a&x=1e30&y=0", 400, "give a number from"),
        ("decode?model=a&x=0&y=0&mode=other", 400, "there are inverse, nearest"),
        ("decode?model=a&x=0&y=0&color=1", 400, "not known here"),
        ("decode?model=a&x=0&x=1&y=0", 400, "given twice"),
        ("decode?model=a&x=0&y=0&sequence=1", 400, "session: missing"),
        ("decode?model=a&x=0&y=0&session=s&sequence=-1", 400, "whole number"),
        ("decode?model=a&x=0&y=0&session=..%2Fs&sequence=1", 400, "1 to 64 letters"),
        ("image?index=24", 400, "from 0 to 23"),
        ("image?index=-1", 400, "from 0 to 23"),
        ("reconstruction?model=a&index=0&noise=3.1", 400, "from 0 to 3"),
        ("reconstruction?model=a&index=0&seed=1.5", 400, "whole number"),
        ("reconstruction?model=a&index=0&channels=3:1", 400, "there are 0, 1, 2"),
        ("reconstruction?model=a&index=0&channels=0:99", 400, "from -10 to 10"),
        ("reconstruction?model=b&index=0&directions=nothing:1", 400, "there are none"),
        ("path?model=a&points=0,0", 400, "2 to 32 points"),
        ("path?model=a&points=0,0;0,1&frames=25", 400, "from 2 to 24"),
        ("activation?model=a&index=0&stage=nothing", 404, "there are input"),
        ("preview?model=a&step=../../config.yaml", 400, "whole number"),
        ("preview?model=a&step=3", 404, "no preview of step 3"),
        ("nothing", 404, "no such address"),
        ("map/", 404, "no such address"),
        (f"map?model={'a' * MAXIMUM_QUERY}", 414, "give at most"),
    ],
)  # fmt: skip
def test_questions_out_of_bounds_get_a_sentence(server, path, status, said):
    reply = ask(server.url, f"/api/{path}")
    assert reply.status == status
    assert said in reply.json["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 400), ({"host": "evil.example:80"}, 400), ({"origin": "http://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403), ({"content_length": "5"}, 413),
        ({"transfer_encoding": "chunked"}, 413),
    ],
)  # fmt: skip
def test_other_sites_and_bodies_are_refused(server, headers, status):
    reply = ask(server.url, "/api/map?model=a", **headers)
    assert reply.status == status
    assert reply.json["error"]
    assert reply.headers["connection"] == "close"


def test_only_reading_is_allowed(server):
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"):
        reply = ask(server.url, "/api/map?model=a", method, b"x" * 10 if method == "POST" else None)
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
    head = ask(server.url, decode_path(), "HEAD")
    assert (head.status, head.body, head.headers["content-type"]) == (200, b"", "image/png")


TRAVERSALS = (
    "../server.py", "..%2fserver.py", "%2e%2e/server.py", "%2e%2e%2fserver.py", "..%252fserver.py", "..\\server.py",
    "..%5cserver.py", "....//server.py", "..;/server.py", "%c0%ae%c0%ae/server.py", "/etc/passwd", "%2fetc%2fpasswd",
    "//etc/passwd", "style.css/../../server.py", "plotly.min.js%00", "style.css%00.png", "./style.css", "~root",
    "\uff0e\uff0e/server.py", "%uff0e%uff0e/server.py", "index.html", "STYLE.CSS", "style.css/", "style.css%20",
)  # fmt: skip


@pytest.mark.promise(9)
@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_path_leads_out_of_the_page(server, name, record_property):
    for prefix in ("/static/", "/", "/api/", "/static/../", "http://127.0.0.1/static/"):
        reply = ask(server.url, quote(prefix + name, safe="/%\\.;~:"))
        assert reply.status in (400, 404), prefix
        assert "error" in reply.json
    record_property("figure", f"{len(TRAVERSALS)} names in 5 places of the explorer's server: 0 answered with a file")


def raw(url: str, data: bytes, seconds: float = 60) -> bytes:
    """What comes back for bytes that need not be HTTP."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while block := connection.recv(65536):
            found += block
        return found


def test_what_is_no_http_is_refused(server):
    assert raw(server.url, b"\x16\x03\x01\x00\xff nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw(server.url, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")  # no Host
    twice = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert raw(server.url, twice).startswith(b"HTTP/1.1 400")
    long = b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert raw(server.url, long)[9:12] in (b"400", b"414")  # whether it came in one piece or in several
    upgrade = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert b"101" not in raw(server.url, upgrade).split(b"\r\n")[0]
    assert ask(server.url, "/").status == 200


def test_only_the_newest_hover_waits(server, held):
    with ThreadPoolExecutor(8) as clients:

        def hover(number: int, session: str = "s") -> Reply:
            return ask(server.url, decode_path(0.1 * number, 0, session=session, sequence=number))

        begun = clients.submit(ask, server.url, decode_path())
        wait_until(lambda: server.worker._current is not None)
        replies = []
        for number in (1, 2, 3):
            replies.append(clients.submit(hover, number))
            wait_until(lambda number=number: newest(server) == number)
        assert [replies[0].result(60).status, replies[1].result(60).status] == [409, 409]  # the network is still taken
        assert hover(2).status == 409
        held.set()
        assert (begun.result(60).status, replies[2].result(60).status) == (200, 200)
        assert hover(3).status == hover(1, "another").status == 200


def newest(server: Server) -> int:
    return max(
        (sequence for (session, *_), (sequence, _) in server.worker._newest.items() if session == "s"), default=0
    )


def test_too_many_waiting_are_told_to_come_again(server, held):
    with ThreadPoolExecutor(MAXIMUM_WAITING + 1) as clients:
        waiting = [clients.submit(ask, server.url, decode_path(y=0.01 * n)) for n in range(MAXIMUM_WAITING + 1)]
        wait_until(lambda: len(server.worker._waiting) == MAXIMUM_WAITING)
        refused = ask(server.url, decode_path())
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert server("explorer").status == 200  # facts need no turn
        held.set()
        assert {one.result(60).status for one in waiting} == {200}


def test_what_a_client_left_behind_is_not_decoded(server, held):
    host, port = server.url.removeprefix("http://").rstrip("/").split(":")
    clients = []
    for number in range(3):
        clients.append(socket.create_connection((host, int(port)), timeout=60))
        clients[-1].sendall(f"GET {decode_path(0.1 * number)} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    wait_until(lambda: len(server.worker._waiting) == 2)
    for client in clients:
        client.close()
    wait_until(lambda: len(server.worker._waiting) == 0)


ADDRESSES = tuple(f"/api/{name}" for name in ENDPOINTS)
NAMES = sorted({name for endpoint in ENDPOINTS.values() for name in endpoint.names} | {"session", "sequence"})
VALUES = st.one_of(
    st.sampled_from(["a", "b", "0", "1", "3", "nan", "-1", "1e9", "0:1", "0,0;1,1", "input", "sample", "s", "nearest"]),
    st.text(max_size=12),
    st.floats().map(repr),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(ADDRESSES), st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6))
@example("/api/decode", [("model", "a"), ("x", "0"), ("y", "1e-320")])
def test_no_question_makes_a_mistake(server, address, values):
    reply = ask(server.url, f"{address}?{urlencode(values, errors='replace')}")
    assert reply.status in (200, 400, 404, 409)
    if reply.status != 200:
        assert reply.json["error"].isprintable()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=30), st.binary(max_size=30))
def test_no_path_makes_a_mistake(server, path, query):
    reply = ask(server.url, f"/{quote(path, errors='replace')}?{quote(query)}")
    assert reply.status in (200, 400, 404)
