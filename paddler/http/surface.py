"""What every HTTP surface is made of: its sockets and life, its app, its table of errors.

A surface stops accepting when `stopping` is set, and serves what it has until its block is left.
"""

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import attrs
import trio
from quart import Response, has_request_context, request, websocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException
from werkzeug.routing import WebsocketMismatch

from paddler.config import MAX_JSON_BODY_BYTES, Address
from paddler.errors import (
    AgentGone,
    AnswerTimeout,
    ConfigurationError,
    LocalProtocolError,
    NoSuchAgent,
    PaddlerError,
    RemoteProtocolError,
    StateStoreError,
)
from paddler.http.connection import Server
from paddler.http.cors import CorsPolicy
from paddler.messages import wire

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKLOG: Final = 2048
"""A backlog of 100 delays a burst of a thousand connects by a second."""

BODY_TIMEOUT: Final = 60.0
"""A request's body has to be complete this long after the app asked for it; else 408. The deadline
of the head is HEAD_TIMEOUT."""

GRACEFUL_TIMEOUT: Final = 1.0
"""What is still unsent this long after a surface was told to end is cut."""

USER_TIMEOUT_MS: Final = 10_000
"""A peer that took nothing of what we sent for this long is dropped."""

_KEEP_ALIVE_PROBES: Final = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds, seconds, number: a silent peer behind a dead path is noticed within half a minute."""

ACCEPT_RETRY: Final = 0.1
"""How long to wait for a descriptor to come free; the clients wait in the backlog meanwhile."""

SHORTAGE_MEMORY: Final = 5.0
"""A shortage is over when nothing failed for so long: one that comes and goes is one shortage."""

_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_ERRORS: Final[dict[type[PaddlerError], tuple[int, bool]]] = {
    NoSuchAgent: (404, False),
    AgentGone: (502, False),
    AnswerTimeout: (504, False),
    LocalProtocolError: (500, True),
    StateStoreError: (500, True),
}
"""Status of each error that a request can meet before its answer began, and whether its text is shown."""


@attrs.define(eq=False)
class Refusal(Exception):
    """A request that ends before its stream begins."""

    status: int
    text: str


def text_response(status: int, text: str = "") -> Response:
    """Return a text/plain response; without text it has no body and no type either."""
    response = Response(text, status=status, content_type="text/plain; charset=utf-8")
    if not text:
        del response.headers["Content-Type"]
    if status == 204:
        del response.headers["Content-Length"]  # RFC 9110, 8.6: must not be there, although Quart sets it
    return response


def json_response(text: str) -> Response:
    """Return a JSON response of already encoded text."""
    return Response(text, content_type="application/json")


async def read_json() -> Any:
    """Return the JSON value of the current request's body. Raises Refusal."""
    mimetype = request.mimetype
    if not (
        mimetype == "application/json" or (mimetype.startswith("application/") and mimetype.endswith("+json"))
    ):
        raise Refusal(400, "Content type error")
    body = await request.get_data(cache=False)
    try:
        return wire.parse_json(body)
    except RemoteProtocolError as error:
        raise _json_refusal(error) from None


def structure(value: Any, form: type[T]) -> T:
    """Return a parsed JSON value as a message. Raises Refusal."""
    try:
        return wire.structure(value, form)
    except RemoteProtocolError as error:
        raise _json_refusal(error) from None


def _json_refusal(error: RemoteProtocolError) -> Refusal:
    return Refusal(400, f"Json deserialize error: {error}")


class SurfaceApp(QuartTrio):
    """Quart, as the surfaces need it."""

    logger = log  # Quart's own starts a thread when no handler is configured


def make_app(
    name: str, *, cors_allowed_hosts: tuple[str, ...], body_timeout: float = BODY_TIMEOUT
) -> SurfaceApp:
    """Return an app with what all surfaces share: /health, CORS, limits, the error table."""
    app = SurfaceApp(name, static_folder=None, template_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_JSON_BODY_BYTES
    app.config["BODY_TIMEOUT"] = body_timeout
    app.config["RESPONSE_TIMEOUT"] = None  # streams have deadlines of their own
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False  # an unknown path is 404, never a redirect
    cors = CorsPolicy(frozenset(cors_allowed_hosts))

    @app.before_request
    async def answer_preflight() -> Response | None:
        if not cors.is_preflight(request.method, request.headers):
            # The router knows HEAD wherever it knows GET; the API does not.
            unknown = request.method == "HEAD" or _is_no_path(request.scope["path"])
            return text_response(404) if unknown else None
        objection = cors.objection(request.headers)
        if objection is not None:
            return text_response(400, objection)
        response = text_response(200)
        response.headers.update(cors.grant(request.headers["Origin"]))
        return response

    @app.before_websocket
    async def refuse_unknown_socket() -> Response | None:
        return text_response(404) if _is_no_path(websocket.scope["path"]) else None

    @app.after_request
    async def add_cors_headers(response: Response) -> Response:
        response.headers.update(cors.answer_headers(request.headers.get("Origin")))
        return response

    @app.errorhandler(Refusal)
    async def answer_refusal(error: Refusal) -> Response:
        return text_response(error.status, error.text)

    @app.errorhandler(PaddlerError)
    async def answer_error(error: PaddlerError) -> Response:
        for kind, (status, has_text) in _ERRORS.items():
            if isinstance(error, kind):
                if status == 500:
                    log.warning("%s %s failed: %s", request.method, request.path, error)
                return text_response(status, str(error) if has_text else "")
        raise error

    @app.errorhandler(WebsocketMismatch)
    async def answer_mismatch(_: WebsocketMismatch) -> Response:
        if has_request_context():
            return text_response(400, "This path is served over WebSocket only")
        return text_response(400, "This path is not served over WebSocket")

    @app.errorhandler(HTTPException)
    async def answer_http_error(error: HTTPException) -> Response:
        match error.code:
            case 404 | 405:  # routes are matched on path and method together
                return text_response(404)
            case 408:
                return text_response(408, f"The body was not complete within {body_timeout:g} s")
            case 413:
                return text_response(413, f"The JSON body is larger than {MAX_JSON_BODY_BYTES} bytes")
            case code:
                return text_response(code or 500, error.description or error.name)

    @app.get("/health")
    async def health() -> Response:
        return text_response(200, "OK")

    return app


def _is_no_path(path: str) -> bool:
    """Tell whether werkzeug (3.1) would take this path, or whole URL, for one with fewer slashes in front."""
    return (path if path.startswith("/") else urlsplit(path).path).startswith("//")


@attrs.frozen
class Surface:
    """A surface that is being served; `port` is the real one also when 0 was asked for."""

    host: str
    port: int


@asynccontextmanager
async def open_surface(
    app: QuartTrio,
    *,
    name: str,
    address: Address,
    stopping: trio.Event,
    max_message_bytes: int,
    graceful_timeout: float = GRACEFUL_TIMEOUT,
) -> AsyncIterator[Surface]:
    """Serve `app` on `address` for the duration of the block.

    Nothing new is accepted and idle connections end once `stopping` is set; leaving the block does
    the same, and cuts after `graceful_timeout` what has not ended by then. Raises ConfigurationError
    when the address cannot be bound. Errors of the block arrive in exception groups.
    """
    server = Server(app, max_message_bytes=max_message_bytes)
    with _listen(name, address) as listening:
        host, port = listening.getsockname()[:2]
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        log.info("%s service listens on %s", name, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(_accept_until, stopping, server, listener, connections)
                yield Surface(host=host, port=port)
                accepting.cancel_scope.cancel()
            await server.end_keep_alive()
            connections.cancel_scope.deadline = trio.current_time() + graceful_timeout


async def _accept_until(
    stopping: trio.Event, server: Server, listener: trio.SocketListener, connections: trio.Nursery
) -> None:
    """Accept connections until `stopping`. The listener is closed when this ends."""
    async with listener, trio.open_nursery() as accepting:
        accepting.start_soon(accept_forever, listener, server.serve_stream, connections)
        await stopping.wait()
        accepting.cancel_scope.cancel()
    await server.end_keep_alive()


async def accept_forever(
    listener: trio.abc.Listener[trio.SocketStream],
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    connections: trio.Nursery,
) -> None:
    """Start a task of `connections` for each stream; `serve` closes it.

    In place of trio.serve_listeners, which logs a traceback ten times a second while descriptors are
    short (trio 0.35).
    """
    last_failure: float | None = None
    while True:
        try:
            stream = await listener.accept()
        except OSError as error:
            if error.errno not in _SHORTAGES:
                raise
            if last_failure is None:
                log.warning("new connections have to wait: %s", os.strerror(error.errno))
            last_failure = trio.current_time()
            await trio.sleep(ACCEPT_RETRY)
            continue
        if last_failure is not None and trio.current_time() - last_failure > SHORTAGE_MEMORY:
            last_failure = None
            log.warning("new connections are accepted again")
        connections.start_soon(serve, stream)


def _listen(name: str, address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted sockets inherit all of these there
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
            for option, value in _KEEP_ALIVE_PROBES.items():
                listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        listening.bind((address.host, address.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigurationError(f"{name} service cannot listen on {address}: {reason}") from error
    return listening
