"""Many requests over one WebSocket.

Whatever has something to say to the client puts it into the outbox, a plain call; one task writes.
A client that stops reading fills its own outbox and loses its own socket, nothing else.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio
from quart.wrappers import Websocket

from paddler.balancer.relay import SHUTTING_DOWN
from paddler.errors import RemoteProtocolError
from paddler.http.admission import invalid_parameters, is_embeddings_mode
from paddler.http.connection import Connection
from paddler.http.replies import Envelope, serve_request
from paddler.messages import wire
from paddler.messages.agent_socket import TERMINAL_LETTERS
from paddler.messages.inference_socket import (
    ClientFrame,
    Error,
    Notification,
    Request,
    ServerNotification,
)
from paddler.messages.tokens import (
    TOKEN_GENERATION_DISABLED_TEXT,
    StreamError,
    Terminal,
    TokenGenerationDisabled,
    error_envelope,
)

if TYPE_CHECKING:
    from paddler.balancer.changes import Subscription
    from paddler.balancer.reconciliation import Reconciliation
    from paddler.balancer.relay import Relay

log = logging.getLogger(__name__)

OUTBOX_BYTES: Final = 1024 * 1024
"""What a socket may leave unread …"""

OUTBOX_BYTES_PER_REQUEST: Final = 64 * 1024
"""… and how much more for each request that runs on it."""

MAX_ID_LENGTH: Final = 4096
"""In characters. The id comes back with every token: a long one would fill the outbox by itself."""

FAREWELL_TIMEOUT: Final = 0.7
"""How long the last messages and the close frame may take at shutdown; within the surface's grace."""

GOING_AWAY: Final = 1001


async def serve_inference_socket(
    websocket: Websocket, *, relay: "Relay", reconciliation: "Reconciliation", stopping: trio.Event
) -> None:
    """Serve one client's WebSocket until it ends or `stopping` is set. Cancelling cancels its requests."""
    await websocket.accept()
    connection: Connection = websocket.scope["state"]["connection"]
    async with trio.open_nursery() as socket:
        outbox = Outbox(on_overflow=connection.abort)
        socket.start_soon(_write_forever, outbox, connection)
        client = SocketClient(outbox, requests=socket, relay=relay, reconciliation=reconciliation)
        changes = reconciliation.changes.subscribe()
        client.notify_mode()  # before anything else that the client may get
        socket.start_soon(_notify_forever, changes, client)
        socket.start_soon(_read_forever, websocket, client)
        await stopping.wait()
        client.end_requests(SHUTTING_DOWN)
        with trio.move_on_after(FAREWELL_TIMEOUT):
            await outbox.wait_until_sent()
            await websocket.close(GOING_AWAY, "Server shutting down")
        socket.cancel_scope.cancel()


async def _read_forever(websocket: Websocket, client: "SocketClient") -> None:
    while True:
        message: str | bytes | None = await websocket.receive()
        if isinstance(message, str):
            client.take(message)
        else:  # an empty binary message comes as None
            log.info("ignored a binary message of a client")


async def _notify_forever(changes: "Subscription", client: "SocketClient") -> None:
    while True:
        await changes.wait()
        client.notify_mode()


async def _write_forever(outbox: "Outbox", connection: Connection) -> None:
    try:
        await outbox.drain_forever(connection.send_texts)
    except trio.ClosedResourceError:
        connection.abort()  # the client left; the reader learns it too, and cancels all of this


class Outbox:
    """Messages on their way to one client, limited in bytes.

    A limit that falls takes effect only as bytes leave: several requests may end within one tick,
    and what they left unread was within bounds when it was put.
    """

    def __init__(self, *, on_overflow: Callable[[], None]) -> None:
        self._limit_bytes = self._next_limit_bytes = OUTBOX_BYTES
        self._on_overflow = on_overflow
        self._messages: list[str] = []
        self._unsent = 0
        self._overflowed = False
        self._filled = trio.Event()
        self._emptied = trio.Event()

    def set_limit(self, limit_bytes: int) -> None:
        """Raise the limit at once, or lower it byte by byte with what leaves."""
        self._next_limit_bytes = limit_bytes
        self._lower_limit(0)

    def put(self, message: str) -> None:
        """Queue a message. A plain call; over the limit, the socket is ended instead."""
        if self._overflowed:
            return
        self._messages.append(message)
        self._unsent += len(message)
        if self._unsent > self._limit_bytes:
            self._overflowed = True
            log.info("an inference socket ends: its client reads too slowly")
            self._messages.clear()
            self._on_overflow()
        self._filled.set()

    async def drain_forever(self, send: Callable[[list[str]], Awaitable[None]]) -> None:
        """Send what is put, all that has accumulated at a time."""
        while True:
            await self._filled.wait()
            self._filled = trio.Event()
            messages, self._messages = self._messages, []
            await send(messages)
            sent = sum(map(len, messages))
            self._unsent -= sent
            self._lower_limit(sent)
            if not self._unsent:
                self._emptied.set()
                self._emptied = trio.Event()

    async def wait_until_sent(self) -> None:
        while self._unsent:
            await self._emptied.wait()

    def _lower_limit(self, sent: int) -> None:
        left = self._limit_bytes - sent if self._unsent else 0
        self._limit_bytes = max(self._next_limit_bytes, left)


class SocketClient:
    """One client's requests, by the ids it chose."""

    def __init__(
        self, outbox: Outbox, *, requests: trio.Nursery, relay: "Relay", reconciliation: "Reconciliation"
    ) -> None:
        self._outbox = outbox
        self._requests = requests
        self._relay = relay
        self._reconciliation = reconciliation
        self._running: dict[str, SocketReply] = {}
        self._refuse_all: StreamError | None = None
        self._told_embeddings = False

    def take(self, text: str) -> None:
        """Act on one message of the client. What cannot be understood is ignored."""
        try:
            message = wire.parse_json(text)
        except RemoteProtocolError as reason:
            log.info("ignored a message of a client: %s", reason)
            return
        try:
            frame: ClientFrame = wire.structure(message, ClientFrame)  # type: ignore[arg-type]  # a union
        except RemoteProtocolError as reason:
            log.info("a message of a client cannot be understood: %s", reason)
            self._refuse_misshapen(message, reason)
            return
        match frame:
            case Request(id=request_id):
                self._start(request_id, frame)
            case Notification(payload=stop):
                reply = self._running.get(stop.payload)
                if reply is not None:
                    reply.cancel()
            case Error(request_id=request_id, error=reported):
                log.info(
                    "a client reports for %.100r: %d %.200r", request_id, reported.code, reported.description
                )

    def end_requests(self, error: StreamError) -> None:
        """End every request, running or still to come, with this error."""
        self._refuse_all = error
        for reply in list(self._running.values()):
            reply.error(error)
            reply.cancel()

    def notify_mode(self) -> None:
        """Tell the client that the cluster turned to embeddings, or back, if it does not know yet."""
        embeddings = is_embeddings_mode(self._reconciliation.applicable_state)
        if embeddings == self._told_embeddings:
            return
        self._told_embeddings = embeddings
        disabled = ServerNotification.TOKEN_GENERATION_DISABLED
        enabled = ServerNotification.TOKEN_GENERATION_ENABLED
        self._outbox.put(wire.encode({"Notification": (disabled if embeddings else enabled).value}))

    def _refuse_misshapen(self, message: Any, reason: RemoteProtocolError) -> None:
        """Tell a client what is wrong with its request, if it is one with an id: it would wait for ever."""
        description = f"Json deserialize error: {reason}"
        match message:
            case {"Request": {"id": str(request_id)}} | {"id": str(request_id)}:
                pass
            case {"Request": {"id": int() | float() as number}} if not isinstance(number, bool):
                request_id = wire.encode(number)
                description = "Request id must be a text, not a number"
            case _:
                return
        if len(request_id) <= MAX_ID_LENGTH:
            misshapen = StreamError(400, description)
            self._outbox.put(wire.encode(error_envelope(request_id=request_id, error=misshapen)))

    def _start(self, request_id: str, frame: Request) -> None:
        if len(request_id) > MAX_ID_LENGTH:
            too_long = StreamError(400, f"Request id is longer than {MAX_ID_LENGTH} characters")
            message = wire.encode(error_envelope(request_id=request_id, error=too_long))
            if len(message) < OUTBOX_BYTES:
                self._outbox.put(message)
            else:
                log.info("ignored a request: its id is too long even for an answer")
            return
        envelope = Envelope(request_id)
        if request_id in self._running:
            description = f'Request id "{request_id}" is already in flight on this connection'
            self._outbox.put(envelope.error(StreamError(400, description)))
        elif self._refuse_all is not None:
            self._outbox.put(envelope.error(self._refuse_all))
        elif is_embeddings_mode(self._reconciliation.applicable_state):
            disabled = wire.encode(TokenGenerationDisabled(TOKEN_GENERATION_DISABLED_TEXT), Terminal)
            self._outbox.put(envelope.message(None, "D", disabled))
        elif (objection := invalid_parameters(frame.request)) is not None:
            self._outbox.put(envelope.error(StreamError(400, objection)))
        else:
            reply = SocketReply(envelope, self._outbox, on_end=lambda: self._forget(request_id))
            self._running[request_id] = reply
            self._limit_outbox()
            self._requests.start_soon(self._run, frame, reply)

    async def _run(self, frame: Request, reply: "SocketReply") -> None:
        with reply.scope:
            await serve_request(self._relay, frame.request, reply, request_id=frame.id)
        reply.end()

    def _forget(self, request_id: str) -> None:
        del self._running[request_id]
        self._limit_outbox()

    def _limit_outbox(self) -> None:
        self._outbox.set_limit(OUTBOX_BYTES + OUTBOX_BYTES_PER_REQUEST * len(self._running))


class SocketReply:
    """Where the messages of one request of a socket go.

    Its id is free again with the terminal message, not only when the relay has returned.
    """

    def __init__(self, envelope: Envelope, outbox: Outbox, *, on_end: Callable[[], None]) -> None:
        self.scope = trio.CancelScope()
        self._envelope = envelope
        self._outbox = outbox
        self._on_end = on_end
        self._ended = False

    def piece(
        self,
        agent_name: str | None,
        letter: str,
        text: str,
        *,
        more: bool = False,  # noqa: ARG002  the outbox sends all that it has
    ) -> None:
        if self._ended:
            return
        self._outbox.put(self._envelope.message(agent_name, letter, text))
        if letter in TERMINAL_LETTERS:
            self.end()

    def error(self, error: StreamError) -> None:
        if self._ended:
            return
        self._outbox.put(self._envelope.error(error))
        self.end()

    def cancel(self) -> None:
        """Stop the request without another word to the client."""
        self.end()
        self.scope.cancel()

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end()
