"""The server: what the browser may ask, and what is refused.

It listens on the loopback interface alone. Every address begins with a random token, so that
neither another user of the machine nor another page can ask for anything. Requests with another
Host (DNS rebinding) or from another origin (cross-site requests) are refused. Images are named by
their row; no text from the browser becomes the path of a file.
"""

import hmac
import secrets
from importlib.resources import files

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import NotRequired, TypedDict

from simsiam.data.decode import Unreadable
from simsiam.embeddings.copies.facts import file_facts
from simsiam.embeddings.neighbors import Query
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.explore.exports import EXPORTS, Export, make_export
from simsiam.explore.originals import encode_for_browser, read_original
from simsiam.explore.path_table import clean_text
from simsiam.explore.session import Session
from simsiam.utils.typed_json import parse_json

MAX_JSON = 2**24  # bytes of a request
MAX_IMAGE = 2**26  # bytes of a dropped image
TOKEN_BYTES = 24
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SCRIPT, STYLE = "text/javascript", "text/css"
# The files of the page: their packages and types. Nothing else is served from the disk.
PAGE_FILES = {
    "elements.js": ("simsiam.pages", SCRIPT),
    "map.js": ("simsiam.pages", SCRIPT),
    "page.css": ("simsiam.pages", STYLE),
    "explore.css": ("simsiam.explore", STYLE),
    "main.js": ("simsiam.explore", SCRIPT),
    "state.js": ("simsiam.explore", SCRIPT),
    "points.js": ("simsiam.explore", SCRIPT),
    "tiles.js": ("simsiam.explore", SCRIPT),
    "label.js": ("simsiam.explore", SCRIPT),
    "clean.js": ("simsiam.explore", SCRIPT),
    "take.js": ("simsiam.explore", SCRIPT),
}


class LabelRequest(TypedDict):
    """Rows, the label that they get, and all classes in the order of their keys."""

    rows: list[int]
    label: str
    classes: NotRequired[list[str]]


class DecideRequest(TypedDict):
    """The decision of each row."""

    decisions: list[tuple[int, str]]


class UndoRequest(TypedDict):
    """What to take back: "labels" or "decisions"."""

    what: str


class SearchRequest(TypedDict):
    """A row."""

    row: int


class CopiesRequest(TypedDict):
    """The largest distance of copies, and whether to find crops too."""

    threshold: float
    crops: NotRequired[bool]


class Gate:
    """Refuses requests that do not come from the page itself.

    Args:
        app: The application behind the gate.
        token: The secret first part of every path.
        port: The port that the server listens on.
    """

    def __init__(self, app: ASGIApp, token: str, port: int):
        self.app, self.prefix = app, f"/{token}/".encode()
        self.hosts = {f"127.0.0.1:{port}".encode(), f"localhost:{port}".encode()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with the token taken off its path."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        reason = self._refusal(scope)
        if reason:
            await Response(reason, 403, HEADERS, "text/plain")(scope, receive, send)
            return
        path = scope["path"][len(self.prefix) - 1 :]
        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    def _refusal(self, scope: Scope) -> str:
        """Why a request is refused; "" if it is not."""
        headers = scope["headers"]
        named = {
            name: [value for key, value in headers if key == name]
            for name in (b"host", b"origin", b"sec-fetch-site")
        }
        if len(named[b"host"]) != 1 or named[b"host"][0] not in self.hosts:
            return "this server answers to 127.0.0.1 only"
        start = scope["path"].encode("utf-8", "replace")[: len(self.prefix)]
        if not hmac.compare_digest(start, self.prefix):
            return "open the whole address that simsiam explore printed"
        own = b"http://" + named[b"host"][0]
        needs_origin = scope["method"] not in ("GET", "HEAD")
        if named[b"origin"] != [own] and (named[b"origin"] or needs_origin):
            return "requests from other pages are refused"
        # A person may follow a link to the page; nothing else may come from elsewhere.
        is_page = len(scope["path"]) <= len(self.prefix)
        if not is_page and not {*named[b"sec-fetch-site"]} <= {b"same-origin", b"none"}:
            return "requests from other pages are refused"
        return ""


def make_token() -> str:
    """Make the secret part of the address."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def make_app(session: Session, token: str, port: int) -> ASGIApp:
    """Make the web application.

    Args:
        session: What it shows.
        token: The secret first part of every path.
        port: The port that the server listens on.
    """
    handlers = Handlers(session)
    routes = [
        Route("/", handlers.page),
        Route("/{name:str}.{ending:str}", handlers.page_file),
        Route("/data", handlers.data),
        Route("/places", handlers.places),
        Route("/state", handlers.state),
        Route("/predictions", handlers.predictions),
        Route("/thumbnails/{row:int}", handlers.thumbnail),
        Route("/images/{row:int}", handlers.image),
        Route("/facts/{row:int}", handlers.facts),
        Route("/search", handlers.search, methods=["POST"]),
        Route("/search-image", handlers.search_image, methods=["POST"]),
        Route("/label", handlers.label, methods=["POST"]),
        Route("/decide", handlers.decide, methods=["POST"]),
        Route("/undo", handlers.undo, methods=["POST"]),
        Route("/copies", handlers.copies, methods=["POST"]),
        Route("/outliers", handlers.outliers),
        Route("/export", handlers.export, methods=["POST"]),
    ]
    errors = {UsageError: _say_error, WorkFailed: _say_error, Unreadable: _say_gone}
    app = Starlette(routes=routes, exception_handlers={**errors, HTTPException: _say_status})  # type: ignore[dict-item]
    return Gate(app, token, port)


async def _say_error(_: Request, error: Exception) -> Response:
    status = 400 if isinstance(error, UsageError) else 500
    return Response(printable(str(error)), status, HEADERS, "text/plain")


async def _say_gone(_: Request, error: Exception) -> Response:
    text = f"This image cannot be read: {printable(str(error))}"
    return Response(text, 404, HEADERS, "text/plain")


async def _say_status(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(error.detail, error.status_code, HEADERS, "text/plain")


def _json(content: object) -> Response:
    return JSONResponse(content, headers=HEADERS)


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"more than {limit:,} bytes")
    return bytes(body)


class Handlers:
    """Answers to requests.

    Args:
        session: What they show and change.
    """

    def __init__(self, session: Session):
        self.session = session

    def _row(self, request: Request) -> int:
        return self._check([request.path_params["row"]])[0]

    def _check(self, rows: list[int]) -> list[int]:
        if any(not 0 <= row < len(self.session.images) for row in rows):
            raise HTTPException(404, "there is no such image")
        return rows

    def page(self, _: Request) -> Response:
        """Answer with the page."""
        html = (files("simsiam.explore") / "page" / "explore.html").read_bytes()
        return Response(html, headers=HEADERS, media_type="text/html")

    def page_file(self, request: Request) -> Response:
        """Answer with a script or a style of the page."""
        name = f"{request.path_params['name']}.{request.path_params['ending']}"
        if name not in PAGE_FILES:
            raise HTTPException(404, "there is no such file")
        package, kind = PAGE_FILES[name]
        content = (files(package) / "page" / name).read_bytes()
        return Response(content, headers=HEADERS, media_type=kind)

    def data(self, _: Request) -> Response:
        """Answer with what does not change."""
        images, session = self.session.images, self.session
        return _json(
            {
                "file": session.file.name,
                "labelsFile": session.labels.file.name,
                "decisionsFile": session.decisions.file.name,
                "names": [printable(path) for path in images.paths],
                "classes": [printable(label or "") for label in images.labels or []],
                "missing": session.originals.missing,
                "exports": {name: text for name, (text, _) in EXPORTS.items()},
                "thumbnails": images.thumbnails is not None,
            }
        )

    def places(self, _: Request) -> Response:
        """Answer with the places of images on the map, and their clusters."""
        arranged = self.session.is_arranged  # before the places, which may change meanwhile
        clusters, xy = self.session.clusters, self.session.xy
        return _json(
            {
                "layout": self.session.layout,
                "x": np.round(xy[:, 0].astype(float), 4).tolist(),
                "y": np.round(xy[:, 1].astype(float), 4).tolist(),
                "clusters": clusters.tolist() if clusters is not None else None,
                "arranged": arranged,
            }
        )

    def state(self, _: Request) -> Response:
        """Answer with labels, decisions, the queue and the progress."""
        session = self.session
        return _json(
            {
                "version": session.version,
                "arranged": session.is_arranged,
                "clustered": session.clusters is not None,
                "classes": session.classes,
                "labels": list(session.rows_of(session.labels).items()),
                "decisions": list(session.rows_of(session.decisions).items()),
                "undoLabels": session.labels.undo_count,
                "undoDecisions": session.decisions.undo_count,
                "queue": session.queue,
                "fitted": session.fitted_version == session.labels.version,
                "fittedVersion": session.fitted_version,
                "hasPredictions": session.result is not None,
                "progress": session.progress(),
                "problems": session.problems,
            }
        )

    def predictions(self, _: Request) -> Response:
        """Answer with the predicted class of each image, and its confidence in percent."""
        result = self.session.result
        if result is None:
            return _json({"classes": [], "predicted": [], "confidence": []})
        return _json(
            {
                "classes": result.classes,
                "predicted": result.predicted.tolist(),
                "confidence": np.round(100 * result.confidence).astype(int).tolist(),
            }
        )

    def thumbnail(self, request: Request) -> Response:
        """Answer with the thumbnail of an image."""
        row = self._row(request)
        if self.session.images.thumbnails is None:
            raise Unreadable("the file has no thumbnails")
        content = encode_for_browser(self.session.images.thumbnail(row))
        headers = HEADERS | {"Cache-Control": "private, max-age=3600"}
        return Response(content, headers=headers, media_type="image/jpeg")

    def image(self, request: Request) -> Response:
        """Answer with an image in full size."""
        content = read_original(self.session.originals, self._row(request))
        return Response(content, headers=HEADERS, media_type="image/jpeg")

    def facts(self, request: Request) -> Response:
        """Answer with what is known about the file of an image."""
        return _json(file_facts(self.session.originals, self._row(request)))

    async def search(self, request: Request) -> Response:
        """Answer with the images most similar to one of them."""
        given = parse_json(await _read_body(request, MAX_JSON), SearchRequest, "the request")
        return await run_in_threadpool(self._answer_search, self._check([given["row"]])[0])

    async def search_image(self, request: Request) -> Response:
        """Answer with the images most similar to one that was dropped onto the page."""
        content = await _read_body(request, MAX_IMAGE)
        return await run_in_threadpool(self._answer_search, content)

    def _answer_search(self, given: int | bytes) -> Response:
        query: Query = self.session.find_query(given)
        rows, cosine = self.session.search(query)
        return _json(
            {
                "name": printable(query.name),
                "row": query.position,
                "rows": rows,
                "cosines": np.round(cosine.astype(float), 3).tolist(),
            }
        )

    async def label(self, request: Request) -> Response:
        """Label images."""
        given = parse_json(await _read_body(request, MAX_JSON), LabelRequest, "the request")
        rows = self._check(given["rows"])
        classes = [clean_text(name) for name in given.get("classes", [])]
        await run_in_threadpool(self.session.label, rows, given["label"], classes)
        return await run_in_threadpool(self.state, request)

    async def decide(self, request: Request) -> Response:
        """Keep or drop images."""
        given = parse_json(await _read_body(request, MAX_JSON), DecideRequest, "the request")
        decisions = {row: value for row, value in given["decisions"]}
        self._check([*decisions])
        await run_in_threadpool(self.session.decide, decisions)
        return await run_in_threadpool(self.state, request)

    async def undo(self, request: Request) -> Response:
        """Take back the last change."""
        given = parse_json(await _read_body(request, MAX_JSON), UndoRequest, "the request")
        tables = {"labels": self.session.labels, "decisions": self.session.decisions}
        if given["what"] not in tables:
            raise UsageError("undo takes back labels or decisions")
        await run_in_threadpool(self.session.undo, tables[given["what"]])
        return await run_in_threadpool(self.state, request)

    async def copies(self, request: Request) -> Response:
        """Look for copies; answer with the groups, or null while that takes."""
        given = parse_json(await _read_body(request, MAX_JSON), CopiesRequest, "the request")
        if not 0 <= given["threshold"] < 10:
            raise UsageError("the threshold must be from 0 to 10")
        self.session.find_copies(given["threshold"], given.get("crops", False))
        return _json(await run_in_threadpool(self.session.copies))

    def outliers(self, _: Request) -> Response:
        """Answer with the images farthest from all others, or null while that takes."""
        return _json(self.session.outliers())

    async def export(self, request: Request) -> Response:
        """Answer with a file to take along."""
        given = parse_json(await _read_body(request, MAX_JSON), Export, "the request")
        self._check(given["rows"])
        name, made = await run_in_threadpool(make_export, self.session, given)
        headers = HEADERS | {
            "Content-Disposition": f'attachment; filename="{name}"',
            "Left-Out": str(made.left_out),
        }
        return Response(made.content, headers=headers, media_type="application/octet-stream")
