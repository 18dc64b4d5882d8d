"""What the explorer's server refuses: other hosts and sites, anything but reading, and questions out of bounds.

Owns `Guard`, which every request passes first, and `Question`, which reads the values of one. The server listens on
127.0.0.1, but any page that the user's browser shows can send requests there: names of other hosts that lead here
(DNS rebinding) and pages of other sites are turned away.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAXIMUM_QUERY = 4096
"""Characters after the question mark; the longest that the page sends, a path of 32 points, is a third of it."""
MAXIMUM_PATH = 256
"""Characters before it."""
MAXIMUM_NUMBER = 32
"""Characters of one number."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
AMOUNT = re.compile(r"(.+?):([^:,]*)(,|$)", re.DOTALL)
"""One `name:amount` of a list; a name may hold commas and colons."""
NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
LARGEST_WHOLE = 2**53 - 1
"""The largest whole number that JavaScript counts to exactly."""

OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.ASCII | re.IGNORECASE)
"""The own host with any port, since the port may be forwarded by ssh."""
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Scripts are the page's own files, no code is made of text; plotly writes styles of its own into the page."""
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer that does not set its own."""


class Refusal(Exception):
    """A request that gets no answer but a sentence, under an HTTP status."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = headers or {}


def refused(refusal: Refusal) -> Response:
    """The answer that tells it."""
    from starlette.responses import Response

    content = finite_json({"error": refusal.sentence})
    return Response(content, refusal.status, refusal.headers, media_type="application/json")


def quoted(text: str) -> str:
    """What a client sent, short and without control characters."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


class Guard:
    """ASGI middleware: refuses what is not meant for this server before any of it is read, and adds the security
    headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = refusal_of(scope, Headers(scope=scope))
        if refusal is None:
            await self.app(scope, receive, send_secured)
        else:
            refusal.headers["Connection"] = "close"  # a body may be on its way
            await refused(refusal)(scope, receive, send_secured)


def refusal_of(scope: Scope, headers: Headers) -> Refusal | None:
    """Why a request is turned away by its head alone; None if it is not."""
    host = headers.get("host", "")
    if not OWN_HOST.fullmatch(host):
        return Refusal(400, f"Host: {quoted(host)} is not this server; open http://127.0.0.1 with the printed port")
    if foreign := _foreign_site(scope, headers, host):
        return Refusal(403, f"{foreign}; open the printed address itself")
    if scope["method"] not in ("GET", "HEAD"):
        return Refusal(405, f"{quoted(scope['method'])}: the explorer is only read; use GET", {"Allow": "GET, HEAD"})
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        return Refusal(413, "the request has a body; ask by the address alone")
    if len(scope["path"]) > MAXIMUM_PATH:
        return Refusal(414, f"the path has {len(scope['path'])} characters; give at most {MAXIMUM_PATH}")
    if len(scope["query_string"]) > MAXIMUM_QUERY:
        return Refusal(414, f"the query has {len(scope['query_string'])} characters; give at most {MAXIMUM_QUERY}")
    return None


def _foreign_site(scope: Scope, headers: Headers, host: str) -> str:
    """The other site that sent a request; empty if none. A link to the page itself may be anywhere: the site with the
    link learns nothing from it."""
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        return f"Origin: {quoted(origin)} is another site"
    site = headers.get("sec-fetch-site", "none")
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if site in ("none", "same-origin") or (followed and scope["path"] == "/"):
        return ""
    return f"Sec-Fetch-Site: {quoted(site)} is another site"


class Question:
    """The values of one query string, read by name and within bounds. Every method raises `Refusal` (400) with a
    sentence that says what is allowed."""

    def __init__(self, query: bytes, known: Sequence[str]) -> None:
        """`known`: the names that the endpoint knows; another one, or one given twice, is refused."""
        self._values: dict[str, str] = {}
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name not in known:
                raise Refusal(400, f"{quoted(name)}: not known here; {_listed(known)}")
            if name in self._values:
                raise Refusal(400, f"{name}: given twice; give it once")
            self._values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str, default: str | None = None) -> str:
        if name not in self._values and default is None:
            raise Refusal(400, f"{name}: missing; give it")
        return self._values.get(name, default or "")

    def name(self, name: str) -> str:
        """1 to 64 letters, digits, `_` and `-`."""
        value = self.text(name)
        if not NAME.fullmatch(value):
            raise Refusal(400, f"{name}: {quoted(value)} is not a name; use 1 to 64 letters, digits, _ and -")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise Refusal(400, f"{name}: {quoted(value)} is not there; {_listed(allowed)}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite decimal number from `low` to `high`."""
        if name not in self._values and default is not None:
            return default
        return number_in(name, self.text(name), low, high)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`, in plain digits."""
        if name not in self._values and default is not None:
            return default
        value = self.text(name)
        if not re.fullmatch(r"\d{1,16}", value, re.ASCII) or not low <= int(value) <= high:
            allowed = f"give a whole number from {low} to {high}" if low <= high else "there is none"
            raise Refusal(400, f"{name}: {quoted(value)}; {allowed}")
        return int(value)

    def switch(self, name: str, default: bool) -> bool:
        """0 or 1."""
        return self.choice(name, ("0", "1"), str(int(default))) == "1"

    def points(self, name: str, maximum: int, bounds: tuple[float, float, float, float]) -> list[tuple[float, float]]:
        """`x,y;x,y`: 2 to `maximum` of them within `bounds` (x0, x1, y0, y1)."""
        parts = [part.split(",") for part in self.text(name).split(";")]
        if not 2 <= len(parts) <= maximum or any(len(part) != 2 for part in parts):
            raise Refusal(400, f"{name}: give 2 to {maximum} points as x,y;x,y")
        return [(number_in("x", x, *bounds[:2]), number_in("y", y, *bounds[2:])) for x, y in parts]

    def amounts(self, name: str, allowed: Sequence[str], limit: float) -> dict[str, float]:
        """`key:amount,key:amount`, each key of `allowed` once and each amount within -limit to limit; {} if absent."""
        text, found, position = self.text(name, ""), dict[str, float](), 0
        while position < len(text):
            part = AMOUNT.match(text, position)
            if part is None:
                raise Refusal(400, f"{name}: {quoted(text[position:])} has no amount; give name:amount,name:amount")
            key, amount = part[1], part[2]
            if key not in allowed:
                raise Refusal(400, f"{name}: {quoted(key)} is not there; {_listed(allowed)}")
            if key in found:
                raise Refusal(400, f"{name}: {quoted(key)} is given twice; give it once")
            found[key] = number_in(key, amount, -limit, limit)
            position = part.end()
        return found


def number_in(name: str, text: str, low: float, high: float) -> float:
    """A finite decimal number from `low` to `high`. Raises: Refusal."""
    value = float(text) if len(text) <= MAXIMUM_NUMBER and NUMBER.fullmatch(text) else math.nan
    if not low <= value <= high:  # false for NaN
        raise Refusal(400, f"{name}: {quoted(text)}; give a number from {low:.4g} to {high:.4g}")
    return value


def _listed(allowed: Sequence[str]) -> str:
    """The first few of what may be given instead."""
    more = f" and {len(allowed) - 8} more" if len(allowed) > 8 else ""
    return f"there are {', '.join(allowed[:8])}{more}" if allowed else "there are none"


def finite_json(value: Any) -> bytes:
    """UTF-8 JSON in which a number that is not finite is null: a browser reads no NaN."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")  # a file's name may be no UTF-8


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


# One thread that computes for all requests of the explorer, with a short queue in front of it.

MAXIMUM_WAITING = 16
MAXIMUM_SESSIONS = 64
"""Sequences of hovers that are remembered; of more, the one that rested longest is forgotten."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Turn:
    """The place of a hover: `sequence` rises within `session`, which names a page and what it hovers over."""

    session: tuple[str, ...]
    sequence: int


class PendingWork:
    """A piece of work and who waits for it. Only the event loop touches `answer`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self.loop.create_future()

    def settle(self, result: Any, error: BaseException | None) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it who waited
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)


class Worker:
    """Starts its thread at once; `close` ends it."""

    def __init__(self) -> None:
        self._waiting: deque[PendingWork] = deque()
        self._current: PendingWork | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._newest: OrderedDict[tuple[str, ...], tuple[int, PendingWork | None]] = OrderedDict()
        self._thread = threading.Thread(target=self._compute, name="explorer-worker", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], Result], turn: Turn | None = None) -> Result:
        """The result of `work`, computed in the thread. Leaving this early takes back what has not begun.

        Raises:
            Refusal: 409 when a newer hover came, 429 when too much waits, 503 when the server ends; else what `work`
                raises.
        """
        self._check_turn(turn)
        job = PendingWork(work)
        with self._changed:
            if self._closed:
                raise _ending()
            if len(self._waiting) >= MAXIMUM_WAITING:
                sentence = f"{MAXIMUM_WAITING} requests wait already; ask again in a second"
                raise Refusal(429, sentence, {"Retry-After": "1"})
            self._waiting.append(job)
            self._changed.notify_all()
        if turn is not None:
            self._newest[turn.session] = (turn.sequence, job)
        try:
            result: Result = await job.answer
            return result
        finally:
            self._take_back(job)
            if turn is not None and self._newest.get(turn.session) == (turn.sequence, job):
                self._newest[turn.session] = (turn.sequence, None)  # the answer is not kept

    def _check_turn(self, turn: Turn | None) -> None:
        """Refuse a hover that is late already; the one that it overtakes goes. Only the event loop comes here."""
        if turn is None:
            return
        sequence, older = self._newest.pop(turn.session, (-1, None))
        if turn.sequence < sequence:
            self._newest[turn.session] = (sequence, older)
            raise _overtaken()
        self._newest[turn.session] = (turn.sequence, None)
        if len(self._newest) > MAXIMUM_SESSIONS:
            self._newest.popitem(last=False)
        if older is not None and self._take_back(older):
            older.settle(None, _overtaken())

    def _take_back(self, job: PendingWork) -> bool:
        """Whether it had not begun."""
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)
            return True
        return False

    def _compute(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._current = self._waiting.popleft()
            try:
                result, error = job.work(), None
            except Exception as raised:
                result, error = None, raised
            job.settle(result, error)
            del job, result, error  # while it waits for the next, it holds nothing

    def rest(self, seconds: float) -> None:
        """Come back when there is nothing to compute, after `seconds` in any case."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self._waiting or self._current), seconds)

    def close(self, seconds: float) -> bool:
        """Refuse all that waits, and what is being computed; whether the thread ended within `seconds`."""
        with self._changed:
            self._closed = True
            abandoned = [*self._waiting, *([self._current] if self._current else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for job in abandoned:
            job.settle(None, _ending())
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _overtaken() -> Refusal:
    return Refusal(409, "a newer request of this session came; only the newest is answered")


def _ending() -> Refusal:
    return Refusal(503, "the explorer is ending; start it again")
