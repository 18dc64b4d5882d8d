"""The explorer's web server: addresses, the files of the page, and the thread that serves them.

    request -> `limits.Guard` -> `Endpoint` -> `answers` gives the work -> `limits.Worker` computes it -> response

Everything is read by GET. Nothing that a client sends is ever part of a file's path: the page's files are read at
start, and a preview is chosen by its step from a listing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from ldm_vae.applications.explorer import answers
from ldm_vae.applications.explorer.answers import PageModel, PageModels, StudyPlan, open_page_model
from ldm_vae.applications.explorer.explored import ExploreConfig, open_models
from ldm_vae.applications.explorer.export import check_export_file, check_exportable, export_page
from ldm_vae.applications.explorer.limits import LARGEST_WHOLE, Guard, Question, Refusal, Turn, Worker, refused
from ldm_vae.applications.explorer.plane import measure_round_trip
from ldm_vae.data.survey import describe_classes
from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes
from ldm_vae.training.watchdog import StopRequest, write_error
from ldm_vae.utils.progress import Progress, begin, end, end_dry_run, open_page, say
from ldm_vae.utils.text import pluralize

PAGE = Path(__file__).parent / "page"
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
FOR_EVER = "public, max-age=31536000, immutable"
HOVER = ("session", "sequence")
CLIENT_LEFT = 499
"""The client has disconnected; the answer is not sent."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Endpoint:
    """One address below /api/.

    Attributes:
        names: of the values that it knows.
        ask: checks them and returns the work.
        at_once: the work takes no time, so that it waits for nothing.
        hovers: it also knows `session` and `sequence`, and only the newest of a session waits.
    """

    names: tuple[str, ...]
    ask: Callable[[PageModels, Question], StudyPlan]
    at_once: bool = False
    hovers: bool = False


ENDPOINTS: Mapping[str, Endpoint] = {
    "explorer": Endpoint((), answers.explorer, at_once=True),
    "map": Endpoint(("model",), answers.latent_map),
    "round_trip": Endpoint(("model",), answers.round_trip, at_once=True),
    "decode": Endpoint(("model", "x", "y", "mode"), answers.decode, hovers=True),
    "image": Endpoint(("index",), answers.original),
    "reconstruction": Endpoint(
        ("model", "index", "noise", "sample", "seed", "channels", "directions"), answers.reconstruction, hovers=True
    ),
    "path": Endpoint(("model", "points", "frames"), answers.path),
    "stages": Endpoint(("model",), answers.architecture),
    "activation": Endpoint(("model", "index", "stage", "noise", "sample", "seed"), answers.activation),
    "training": Endpoint(("model",), answers.training),
    "preview": Endpoint(("model", "step"), answers.preview),
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str
    version: str


def page_files(folder: Path = PAGE) -> dict[str, PageFile]:
    """Name -> file of all that /static/ gives out, plotly's from its package. Raises: UserError without that."""
    package = importlib.util.find_spec("plotly")  # not imported: only one file of it is wanted
    plotly = Path(package.origin).parent / "package_data" / "plotly.min.js" if package and package.origin else None
    if plotly is None or not plotly.is_file():
        raise UserError("explore: plotly is not installed, which draws the page's plots; run `pip install plotly`")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in TYPES and path.is_file()]
    files = {}
    for path in [*paths, plotly]:
        content = path.read_bytes()
        files[path.name] = PageFile(content, TYPES[path.suffix], checksum_bytes(content).split(":")[1][:16])
    return files


def index_page(files: Mapping[str, PageFile], folder: Path = PAGE) -> bytes:
    """index.html with the version of every file in its address, so that a browser may cache it without limit."""

    def versioned(found: re.Match[str]) -> str:
        file = files.get(found[2])
        return f'"{found[1]}{found[2]}?v={file.version}"' if file else found[0]

    text = (folder / "index.html").read_text(encoding="utf-8")
    return re.sub(r'"(/?static/)([\w.-]+)"', versioned, text).encode()


def make_application(models: PageModels, worker: Worker) -> ASGIApp:
    """The ASGI application; `worker` is the caller's to close."""
    files = page_files()
    index = index_page(files)

    async def page(request: Request) -> Response:
        return Response(index, media_type="text/html; charset=utf-8")

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise Refusal(404, "there is no such file of the page; reload it")
        kept = FOR_EVER if request.scope["query_string"] == f"v={file.version}".encode() else "no-cache"
        headers = {"ETag": f'"{file.version}"', "Cache-Control": kept}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    async def api(request: Request) -> Response:
        endpoint = ENDPOINTS.get(request.path_params["name"])
        if endpoint is None:
            raise Refusal(404, f"there is no such address; there are {', '.join(f'/api/{name}' for name in ENDPOINTS)}")
        question = Question(request.scope["query_string"], endpoint.names + (HOVER if endpoint.hovers else ()))
        turn = turn_of(request.path_params["name"], question) if endpoint.hovers else None
        work = endpoint.ask(models, question)
        answer = work() if endpoint.at_once else await unless_gone(request.receive, worker.run(work, turn))
        if answer is None:
            return Response(status_code=CLIENT_LEFT)
        return Response(answer.content, media_type=answer.media_type, headers=dict(answer.headers))

    application = Starlette(
        routes=[Route("/", page), Route("/static/{name}", static), Route("/api/{name}", api)],
        exception_handlers={
            Refusal: answer_refusal,
            UserError: answer_user_error,
            HTTPException: answer_unknown,
            Exception: answer_failure,
        },
    )
    application.router.redirect_slashes = False
    return Guard(application)


def turn_of(address: str, question: Question) -> Turn | None:
    """What of a session is hovered over: a model's map and its sliders do not overtake each other."""
    if "session" not in question and "sequence" not in question:
        return None
    session = (question.name("session"), address, question.text("model"))
    return Turn(session, question.whole("sequence", 0, LARGEST_WHOLE))


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """The result of `work`, or None when the client disconnects first; `work` is then canceled."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error)


async def answer_user_error(request: Request, error: Exception) -> Response:
    """A sentence of the package itself, about a file for instance."""
    return refused(Refusal(400, str(error)))


async def answer_unknown(request: Request, error: Exception) -> Response:
    """What Starlette refuses itself: an address without a route."""
    assert isinstance(error, HTTPException)
    return refused(Refusal(error.status_code, "there is no such address; open /"))


async def answer_failure(request: Request, error: Exception) -> Response:
    """A mistake of this program, reported in its terminal."""
    write_error("".join(traceback.format_exception(error)))
    return refused(Refusal(500, "the explorer made a mistake, see its terminal"))


# Serving the explorer: the socket, the web server's thread, measuring in the background, and ending in time.

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
    """uvicorn's HTTP, but no client holds a connection by being slow, and the number of connections is limited."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._progress: tuple[Any, ...] = ()
        self._next_check = self.loop.call_later(PATIENCE_SECONDS, self._check_progress)
        if len(self.connections) > 2 * MAXIMUM_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_check.cancel()
        super().connection_lost(exc)

    def _check_progress(self) -> None:
        """Cut off a client that we have waited for since the last check."""
        unsent = self.transport.get_write_buffer_size()
        progress = (self.cycle, self.cycle is not None and self.cycle.response_complete, unsent)
        waiting_for_client = unsent > 0 or self.cycle is None or self.cycle.response_complete
        if waiting_for_client and progress == self._progress:
            self.transport.abort()
            return
        self._progress = progress
        self._next_check = self.loop.call_later(PATIENCE_SECONDS, self._check_progress)


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
    raise UserError(f"explore: no answer at {address}; start it again, or give another port=NUMBER")


def explore(config: ExploreConfig, *, overwrite: bool = False, dry_run: bool = False) -> None:
    """Serve the explorer until KeyboardInterrupt, or with `config.export` write its page.

    `dry_run`: open everything, serve and write nothing.

    Raises:
        UserError: the port is not to be had, a file that is there already, or whatever `open_models` refuses.
    """
    if config.export is None and overwrite:
        raise UserError("--overwrite: has no effect without export=FILE; leave it out")
    if config.export is not None:
        check_export_file(config.export, overwrite)
    open_socket(config.port).close()  # refused before the models are read
    explored = open_models(config, None if config.export is None else check_exportable)
    place = f"to {config.export}" if config.export else "served on this machine"
    images = f"{pluralize(len(explored[0].images), 'image')} {describe_classes(explored[0].label_names)}"
    names = " and ".join(one for one in (config.autoencoder, config.compare) if one)
    begin("explore", names, images, f"from {explored[0].origin}", str(explored[0].autoencoder.device), place)
    if dry_run:
        end_dry_run(config.export or "explore", "the page is there at once, its maps are measured meanwhile")
        return
    models = PageModels(*(open_page_model(key, one) for key, one in zip("ab", explored)))
    if config.export is None:
        serve(models, config.port)
        end("explore", "stopped; the same command starts it again")
    else:
        written = export_page(models, config.export, overwrite)
        end(config.export, f"{written / 1e6:.1f} MB, opens in any browser", open_page(config.export))


def serve(models: PageModels, port: int) -> None:
    """Serve until KeyboardInterrupt; prints the URL once it answers. What is being computed then may go on for a while
    in threads that nothing waits for.

    Raises:
        UserError: the port is not to be had.
    """
    worker, stopped = Worker(), threading.Event()
    measuring = threading.Thread(target=measure_round_trips, args=(models.all, stopped, worker), daemon=True)
    try:
        with contextlib.suppress(KeyboardInterrupt), running(make_application(models, worker), port) as url:
            try:
                say(f"{url}\n(Ctrl-C ends it)")
                measuring.start()
                threading.Event().wait()
            finally:
                stopped.set()
                worker.close(0)  # what waits is answered, so that the server can end
    finally:
        worker.close(0)


def measure_round_trips(models: Sequence[PageModel], stopped: threading.Event, worker: Worker) -> None:
    """For every model in turn, until `stopped`; the page shows each from then on. What the worker has to do goes
    first."""
    for model in models:
        name = model.explored.name
        with Progress(f"round trip of {name}", GRID**2, "point", leave=False) as bar:

            def advance(points: int, bar: Progress = bar) -> None:
                bar.advance(points)
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


def explore_until_stopped(config: ExploreConfig, *, overwrite: bool = False, dry_run: bool = False) -> int:
    """`ldm-vae explore`: as `explore`, but a signal ends the process at once. Returns: 0."""
    with StopRequest(at_once=True):
        explore(config, overwrite=overwrite, dry_run=dry_run)
        if config.export is None and not dry_run:
            sys.stdout.flush()
            os._exit(0)  # nothing is left to do, and an interpreter that ends around a thread inside torch may abort
    return 0
