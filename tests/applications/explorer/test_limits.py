"""What a request may be: hosts, sites, methods, lengths, and values within bounds."""

from __future__ import annotations

import json
import math
from urllib.parse import quote, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from ldm_vae.applications.explorer.limits import MAXIMUM_PATH, MAXIMUM_QUERY, Question, Refusal, finite_json, refusal_of

BOUNDS = (-1.0, 1.0, 0.0, 2.0)


def status(path: str = "/", method: str = "GET", query: bytes = b"", **headers: str) -> int | None:
    """Under which status the head of a request is refused; None if it is not."""
    scope = {"type": "http", "method": method, "path": path, "query_string": query}
    fields = {"host": "127.0.0.1:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    refusal = refusal_of(scope, Headers(fields))
    return None if refusal is None else refusal.status


def asked(query: str, *known: str) -> Question:
    return Question(query.encode(), known or ("x",))


def sentence(query: str, read: str, *arguments: object) -> str:
    """Why a method of Question refuses the value of `x`."""
    with pytest.raises(Refusal) as caught:
        getattr(asked(query), read)("x", *arguments)
    assert caught.value.status == 400
    return caught.value.sentence


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "localhost:65535", "LOCALHOST:1"])
def test_own_names_pass(host):
    assert status(host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
        "127.0.0.1:8000@evil", "evil@127.0.0.1:8000", "127.0.0.1:80:80", "127.0.0.1:", "0.0.0.0:8000", "[::1]:8000",
        "127.0.0.2", "2130706433", "localhost ", " localhost", "localhost,evil.example", "127.0.0.1\x00", "127.0.0.1\n",
    ],
)  # fmt: skip
def test_other_names_are_refused(host):
    assert status(host=host) == 400


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"sec_fetch_site": "same-origin"}, None),
        ({"sec_fetch_site": "none"}, None),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "anything"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, None),
        ({"origin": "http://127.0.0.1:8001"}, 403),
        ({"origin": "https://127.0.0.1:8000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"}, 403),
    ],
)
def test_other_sites_are_refused(headers, expected):
    assert status("/api/map", **headers) == status("/", **headers) == expected


def test_a_link_elsewhere_opens_the_page_and_nothing_else():
    followed = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert status("/", **followed) is None
    assert status("/api/map", **followed) == 403


def test_only_short_reading_requests_without_a_body_pass():
    assert status(method="HEAD") is None
    assert [status(method=method) for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "")] == [405] * 7
    assert status(content_length="0") is None
    assert status(content_length="1") == status(content_length="-1") == status(transfer_encoding="chunked") == 413
    assert status(query=b"x" * MAXIMUM_QUERY) is None
    assert status(query=b"x" * (MAXIMUM_QUERY + 1)) == status(path="/" + "x" * MAXIMUM_PATH) == 414


def test_values_are_read():
    question = asked("x=-1.5e-3&n=7&s=0&c=b", "x", "n", "s", "c")
    assert question.number("x", -1, 1) == -0.0015
    assert question.whole("n", 0, 7) == 7
    assert question.switch("s", True) is False
    assert question.choice("c", ("a", "b")) == "b"
    assert (asked("").number("x", 0, 9, 4.0), asked("").whole("x", 0, 9, 5), asked("").switch("x", True)) == (
        4,
        5,
        True,
    )


@pytest.mark.parametrize(
    "value",
    ["nan", "inf", "-inf", "1e400", "-1e400", "1.0001", "-2", "", " 1", "1_0", "0x1", "٣", "1e", "1" * 33],
)
def test_numbers_out_of_bounds_are_refused(value):
    assert "give a number from -1 to 1" in sentence(urlencode({"x": value}), "number", -1, 1)


@pytest.mark.parametrize("value", ["-1", "8", "1.0", "+1", "", "nan", "9" * 5000, "٣", " 1", "1e0"])
def test_whole_numbers_out_of_bounds_are_refused(value):
    assert "give a whole number from 0 to 7" in sentence(urlencode({"x": value}), "whole", 0, 7)


def test_sentences_say_what_is_allowed():
    assert sentence("", "number", 0, 1) == "x: missing; give it"
    assert sentence("x=c", "choice", ("a", "b")) == "x: 'c' is not there; there are a, b"
    assert "there are 0, 1" in sentence("x=2", "switch", True)
    assert "1 to 64 letters" in sentence("x=a%20b", "name")
    with pytest.raises(Refusal, match="'y': not known here; there are x"):
        asked("y=1")
    with pytest.raises(Refusal, match="x: given twice"):
        asked("x=1&x=1")


def test_points_of_a_path():
    assert asked("x=0,1;-1,2").points("x", 32, BOUNDS) == [(0, 1), (-1, 2)]
    for bad in ("", "0,1", "0,1;", "0,1;2", "0,1;1,2,3", ";".join(["0,1"] * 33)):
        assert "give 2 to 32 points" in sentence(urlencode({"x": bad}), "points", 32, BOUNDS)
    assert "from -1 to 1" in sentence("x=0,1;1.5,1", "points", 32, BOUNDS)
    assert "from 0 to 2" in sentence("x=0,1;0,nan", "points", 32, BOUNDS)


def test_amounts_of_names_that_hold_anything():
    names = ("a/probe", "b, of c: d", "2")
    query = f"x={quote('a/probe:-1.5,b, of c: d:2,2:0')}"
    assert asked(query).amounts("x", names, 3) == {"a/probe": -1.5, "b, of c: d": 2, "2": 0}
    assert asked("").amounts("x", names, 3) == asked("x=").amounts("x", names, 3) == {}
    bad = {
        "2": "no amount", "2:4": "from -3 to 3", "1:1": "there are a/probe", "2:1,2:1": "twice", ":": "no amount",
        "2:nan": "from -3 to 3", "2:": "give a number",
    }  # fmt: skip
    for value, said in bad.items():
        assert said in sentence(urlencode({"x": value}), "amounts", names, 3)


@given(st.binary(max_size=200))
@example(b"\xff=%ff&%00=1")
def test_any_query_is_read_or_refused(query):
    refusals = []
    try:
        question = Question(query, ("x", "model"))
        question.amounts("x", ("1", "2"), 3)
        question.points("x", 4, BOUNDS)
    except Refusal as refusal:
        refusals.append(refusal)
    assert all(refusal.status == 400 for refusal in refusals)
    assert all(len(refusal.sentence) < 400 and refusal.sentence.isprintable() for refusal in refusals)


@given(st.text(max_size=40))
def test_a_number_that_passes_is_finite_and_within(text):
    try:
        value = asked(urlencode({"x": text})).number("x", -1, 1)
    except Refusal:
        return
    assert math.isfinite(value)
    assert -1 <= value <= 1


def test_json_for_browsers():
    value = {"a": [1.5, math.nan, (math.inf, "\udc80é")], "b": {"c": -math.inf}}
    assert json.loads(finite_json(value)) == {"a": [1.5, None, [None, "?é"]], "b": {"c": None}}
