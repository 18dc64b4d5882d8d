"""The explorer's web application: addresses, the files of the page, and what travels around an answer.

Everything is read by GET. Nothing that a client sends is ever part of a file's path: the page's files are read at
start, and a preview is chosen by its step from a listing. What is refused is the business of `limits`, whose turn it
is that of `worker`, what is answered that of `answers`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from ldm_vae.applications.explorer import answers
from ldm_vae.applications.explorer.answers import Models, Work
from ldm_vae.applications.explorer.limits import LARGEST_WHOLE, Guard, Question, Refusal, refused
from ldm_vae.applications.explorer.worker import Turn, Worker
from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes
from ldm_vae.training.signals import write_error

PAGE = Path(__file__).parent / "page"
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
FOR_EVER = "public, max-age=31536000, immutable"
HOVER = ("session", "sequence")
CLIENT_LEFT = 499
"""Nobody reads this answer."""

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
    ask: Callable[[Models, Question], Work]
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
    """index.html with the version of every file in its address, so that a browser may keep it for ever."""

    def versioned(found: re.Match[str]) -> str:
        file = files.get(found[2])
        return f'"{found[1]}{found[2]}?v={file.version}"' if file else found[0]

    text = (folder / "index.html").read_text(encoding="utf-8")
    return re.sub(r'"(/?static/)([\w.-]+)"', versioned, text).encode()


def make_application(models: Models, worker: Worker) -> ASGIApp:
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
            Refusal: told, UserError: told_to_the_user, HTTPException: unknown, Exception: failed,
        },
    )  # fmt: skip
    application.router.redirect_slashes = False
    return Guard(application)


def turn_of(address: str, question: Question) -> Turn | None:
    """What of a session is hovered over: a model's map and its sliders do not overtake each other."""
    if "session" not in question and "sequence" not in question:
        return None
    session = (question.name("session"), address, question.text("model"))
    return Turn(session, question.whole("sequence", 0, LARGEST_WHOLE))


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """The result of `work`, or None when the client disconnects first; `work` is then cancelled."""

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


async def told(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error)


async def told_to_the_user(request: Request, error: Exception) -> Response:
    """A sentence of the package itself, about a file for instance."""
    return refused(Refusal(400, str(error)))


async def unknown(request: Request, error: Exception) -> Response:
    """What Starlette refuses itself: an address without a route."""
    assert isinstance(error, HTTPException)
    return refused(Refusal(error.status_code, "there is no such address; open /"))


async def failed(request: Request, error: Exception) -> Response:
    """A mistake of ours, told where the program was started."""
    write_error("".join(traceback.format_exception(error)))
    return refused(Refusal(500, "the explorer made a mistake, which its terminal tells"))
