"""One HTTP/1.1 connection on hypercorn; the only door into hypercorn, h11 and wsproto.

hypercorn's protocol classes are used as they are where they hold; what is replaced here are the
places where one client could end the daemon, keep a connection for ever, or stall a shutdown. It
never knows what is served.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Data, Request, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from wsproto.connection import ConnectionState as WebSocketState
from wsproto.events import CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

from paddler.http.idle_connections import IdleConnections, most_idle
from paddler.http.reading import Reader
from paddler.http.text_frames import TextFrames

log = logging.getLogger(__name__)

KEEP_ALIVE_TIMEOUT: Final = 75.0
"""How long a connection may wait for another request. Clients let go of theirs earlier, many after 5 or
60 seconds: whoever ends one first must not be us, or a request on its way is lost."""

HEAD_TIMEOUT: Final = 5.0
"""For a request's head, from its first byte on; for a connection's first one, from the connection on."""

PING_INTERVAL: Final = 3.0
"""WebSockets are pinged at once, then this often; clients may count on it."""

FAREWELL_TIMEOUT: Final = 1.0
"""How long bookkeeping after a response may take although its request was cancelled."""

LINGER: Final = 1.0
"""How long a connection that we close is still read: data that arrives at a closed socket resets
it, and the reset may overtake our last words."""

SHUTDOWN_LINGER: Final = 0.2
"""The same while the daemon stops, which has to be done within a second."""

LAST_MESSAGES_TIMEOUT: Final = 1.0
"""How long the app may take to accept what a WebSocket's peer said before it left."""

_OFFERS: Final = frozenset({b"sec-websocket-extensions", b"sec-websocket-protocol"})
"""Headers of an upgrade that hypercorn must not see: it would agree to compression without a bound,
and does not survive a byte in them that is not ASCII. We take none of these offers."""


class Server:
    """Serve an ASGI app on streams that somebody else accepts."""

    def __init__(self, app: Any, *, max_message_bytes: int, max_idle: int | None = None) -> None:
        config = Config()
        config.accesslog = None
        config.errorlog = log
        config.include_server_header = False
        config.websocket_max_message_size = max_message_bytes
        config.websocket_ping_interval = PING_INTERVAL
        self._config = config
        self._app = ASGIWrapper(app)
        self._context = WorkerContext(max_requests=None)
        self._idle = IdleConnections(most_idle() if max_idle is None else max_idle)

    async def serve_stream(self, stream: trio.SocketStream) -> None:
        """Serve one connection until either side ends it. Closes the stream; never raises an Exception."""
        await Connection(self._app, self._config, self._context, stream, idle=self._idle).run()

    async def end_keep_alive(self) -> None:
        """Close idle connections now, and the others once their response is complete."""
        await self._context.terminated.set()


class Connection(TCPServer):
    """hypercorn's connection, such that its end is only its own.

    Differs from hypercorn 0.18.0 in this: no exception leaves `run`; writes can be cancelled, and a
    write cut in the middle closes the socket; what hypercorn does after the last byte survives the
    cancellation of the request; a connection that we end is read a little longer; a client that
    leaves is noticed also when it sent more than one request. Apps find this object as
    `scope["state"]["connection"]`.
    """

    stream: trio.SocketStream  # type: ignore[assignment]  # upstream knows TLS, we do not

    def __init__(
        self,
        app: ASGIWrapper,
        config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
        *,
        idle: IdleConnections,
    ) -> None:
        super().__init__(app, config, context, {}, stream)  # type: ignore[arg-type]  # as above
        self._idle = idle
        self._request_wait = trio.CancelScope()

    async def run(self) -> None:
        self._reader = Reader(self.stream, self._handle_data, patience=self._patience)
        self._ending = False
        try:
            await self._serve()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as gone:
            log.debug("connection ended: %r", gone)
        except* Exception:
            log.exception("connection failed")
        finally:
            self.abort()

    async def _serve(self) -> None:
        socket = self.stream.socket
        client = parse_socket_addr(socket.family, socket.getpeername())
        server = parse_socket_addr(socket.family, socket.getsockname())
        state = ConnectionState({**self.state, "connection": self})
        async with TaskGroup() as tasks:
            self._task_group = tasks
            self.protocol: Http1 = Http1(  # type: ignore[assignment]  # upstream's wrapper only adds HTTP/2
                self.app,
                self.config,
                self.context,
                tasks,
                state,
                False,
                client,
                server,
                self.protocol_send,
            )
            self._request_wait = _wait_of(HEAD_TIMEOUT)
            await self.idle_task.restart(tasks, self._idle_timeout)
            await self._reader.run()
            self._ending = True
            await self.protocol.handle(Closed())
            await self.idle_task.stop()  # upstream would keep a gone peer until keep_alive_timeout
            # Whoever still works for this client has been told; the rest is tidying up.
            assert tasks._nursery is not None
            tasks._nursery.cancel_scope.deadline = trio.current_time() + FAREWELL_TIMEOUT

    async def _handle_data(self, data: bytes) -> None:
        stream = self.protocol.stream
        if data and isinstance(stream, WebSocket) and stream.is_diverted:
            await stream.receive_diverted(data)
        else:
            # If a request was waited for, its head has begun; if not, that wait is over and has no deadline.
            self._request_wait.deadline = min(self._request_wait.deadline, trio.current_time() + HEAD_TIMEOUT)
            self._idle.discard(self)
            await self.protocol.handle(RawData(data))

    def _patience(self) -> float:
        # The last words of a WebSocket count; of a request, whose client waits for no answer, none do.
        return LAST_MESSAGES_TIMEOUT if isinstance(self.protocol.stream, WebSocket) else 0

    async def protocol_send(self, event: Event) -> None:
        match event:
            case RawData(data=data):
                if data:
                    await self._write(data)
            case Closed():
                # quart-trio cancels a request while hypercorn still ends its response; without the
                # shield neither the end of the connection nor the idle timer below would come.
                with _farewell():
                    await self._say_goodbye()
                    await self.protocol.handle(event)
            case Updated(idle=is_idle):
                with _farewell():
                    if not self._ending:  # else a timer would start that nobody stops
                        if is_idle:
                            self._wait_for_another_request()
                        await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        try:
            self.send_lock.acquire_nowait()  # a round of the scheduler cheaper than acquire()
        except trio.WouldBlock:
            await self.send_lock.acquire()
        try:
            # After our goodbye this raises ClosedResourceError, as for any other end.
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            self.abort()
        except trio.ClosedResourceError:
            pass
        except trio.Cancelled:
            self.abort()  # half of the data may be out, so nothing may follow
            raise
        else:
            return
        finally:
            self.send_lock.release()
        await trio.lowlevel.checkpoint()  # so that no loop around a send freezes the process
        await self.protocol.handle(Closed())

    async def _say_goodbye(self) -> None:
        """End our direction and let the reader wait, not too long, for the peer to end its own."""
        self._ending = True
        self._reader.drop_rest(within=SHUTDOWN_LINGER if self.context.terminated.is_set() else LINGER)
        try:
            async with self.send_lock:
                await self.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone already

    def _wait_for_another_request(self) -> None:
        assert isinstance(self.protocol.connection, h11.Connection)  # a WebSocket is never idle
        if self.protocol.connection.trailing_data[0]:
            self._request_wait = _wait_of(HEAD_TIMEOUT)  # its head came while we answered
        else:
            self._request_wait = _wait_of(KEEP_ALIVE_TIMEOUT)
            self._idle.add(self)

    async def _idle_timeout(self) -> None:
        with self._request_wait:
            await self.context.terminated.wait()
        self.abort()

    def abort(self) -> None:
        """Close the socket and end the reader at once; every task that uses them learns so. Plain call."""
        self._idle.discard(self)
        self.stream.socket.close()
        self._reader.cancel()  # it may be waiting for something else than the socket

    def divert_texts(self) -> None:
        """Keep this WebSocket's messages from the app's queue, for `read_texts`. Call it before accepting."""
        assert isinstance(self.protocol.stream, WebSocket)
        self.protocol.stream.divert()
        self._reader.handle_at_once()

    async def read_texts(self, take: Callable[[str], None]) -> None:
        """Hand every text message to a plain call, which never raises, within the step that read it.

        Returns never: at the end of the WebSocket the app's call is cancelled, as ever.
        """
        assert isinstance(self.protocol.stream, WebSocket)
        self.protocol.stream.deliver_to(take)
        await trio.sleep_forever()

    async def send_texts(self, texts: list[str]) -> None:
        """Send WebSocket text messages, all in one write. Raises ClosedResourceError when that is over.

        A cancelled call may leave half a message behind and therefore closes the connection.
        """
        stream = self.protocol.stream
        if not isinstance(stream, WebSocket) or not stream.is_open:
            # hypercorn returns from a send on a dead WebSocket without a checkpoint, so that a loop
            # around it would freeze the process.
            raise trio.ClosedResourceError("this WebSocket is closed")
        frame = stream.connection.send
        await self._write(b"".join([frame(TextMessage(data=text)) for text in texts]))


def _wait_of(seconds: float) -> trio.CancelScope:
    return trio.CancelScope(deadline=trio.current_time() + seconds)


def _farewell() -> trio.CancelScope:
    return trio.CancelScope(deadline=trio.current_time() + FAREWELL_TIMEOUT, shield=True)


class Http1(H11Protocol):
    """hypercorn's HTTP/1.1 without ways into HTTP/2, and with our WebSocket."""

    async def handle(self, event: Event) -> None:
        try:
            await super().handle(event)
        except h11.RemoteProtocolError as error:  # from the checks of this module
            log.info("refused a request: %s", error)
            try:
                await self._send_error_response(error.error_status_hint)
            except h11.LocalProtocolError:
                pass  # the app's own response has begun
            await self.send(Closed())

    async def _close_stream(self) -> None:
        # The app must hear that its client left, also when the task that says so is cancelled for that.
        with _farewell():
            await super()._close_stream()

    async def _check_protocol(self, event: h11.Request) -> None:
        # A client that left while this request waited behind another one must not have it started.
        await trio.lowlevel.checkpoint_if_cancelled()
        # In place of upstream's switches to HTTP/2.
        if event.method == b"PRI":
            raise h11.RemoteProtocolError("HTTP/2 is not served here")
        if event.target.partition(b"?")[0] == b"":
            raise h11.RemoteProtocolError("the request target has no path")

    async def _create_stream(self, request: h11.Request) -> None:
        if not _asks_for_websocket(request):
            await super()._create_stream(request)
            return
        self.stream = WebSocket(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        assert isinstance(self.connection, h11.Connection)
        self.connection = H11WSConnection(self.connection)
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=[(name, value) for name, value in request.headers if name not in _OFFERS],
                http_version=request.http_version.decode(),
                method="GET",
                raw_path=request.target,
                state=self.connection_state,
            )
        )


def _asks_for_websocket(request: h11.Request) -> bool:
    """Tell whether upstream's `_create_stream` would make a WebSocket of this request."""
    headers = {name: value for name, value in request.headers if name in (b"connection", b"upgrade")}
    connection = headers.get(b"connection", b"")
    tokens = [token.strip() for token in connection.lower().split(b",")]
    upgrade = headers.get(b"upgrade", b"").lower().strip()
    if not (request.method == b"GET" and upgrade == b"websocket" and b"upgrade" in tokens):
        return False
    if not connection.isascii():
        raise h11.RemoteProtocolError("the Connection header is not ASCII")
    return True


class WebSocket(WSStream):
    """hypercorn's WebSocket, such that it ends where it should.

    Differs from hypercorn 0.18.0 in this: a message over the limit and a broken frame close the
    connection, with a code and a reason, instead of being read on; a refused handshake closes it;
    pings end with the peer.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.buffer = MessageBuffer(self.config.websocket_max_message_size)
        self.is_diverted = False
        self._pinging = trio.CancelScope()
        self._text_frames = TextFrames()
        self._take: Callable[[str], None] | None = None
        self._taker_came = trio.Event()

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent; of a peer that left before it was accepted, never."""
        return not self.closed and self.connection.state is WebSocketState.OPEN

    def divert(self) -> None:
        """Give text messages to the call that `deliver_to` brings, and wait for it; drop the others."""
        self.is_diverted = True

    def deliver_to(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._taker_came.set()

    async def receive_diverted(self, data: bytes) -> None:
        """Handle data, but for the upgrade, as upstream does by detours."""
        for part in self._text_frames.feed(data):
            if isinstance(part, bytes):
                await self.handle(Data(stream_id=STREAM_ID, data=part))
            elif self.is_open:
                await self._give(part)

    async def handle(self, event: StreamEvent) -> None:
        if isinstance(event, (Body, Data)) and not self.closed and not self.handshake.accepted:
            await super().handle(StreamClosed(stream_id=self.stream_id))  # it is too late to accept
            raise h11.RemoteProtocolError("data before the WebSocket was accepted")
        await super().handle(event)
        if isinstance(event, Request) and self.closed:
            await self.send(StreamClosed(stream_id=self.stream_id))  # upstream forgets it
        elif isinstance(event, StreamClosed):
            self._pinging.cancel()

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            match event:
                case Message():
                    try:
                        self.buffer.extend(event)
                    except FrameTooLargeError:
                        reason = f"messages are limited to {self.buffer.max_length} bytes"
                        await self._close(CloseConnection(CloseReason.MESSAGE_TOO_BIG, reason))
                        return
                    if event.message_finished:
                        message = self.buffer.to_message()
                        self.buffer.clear()
                        await self._deliver(message)
                case Ping():
                    await self._send_wsproto_event(event.response())
                case CloseConnection():
                    # Open still: not the peer's word but wsproto's, about what the peer broke.
                    is_open = self.connection.state is WebSocketState.OPEN
                    await self._close(event if is_open else event.response())
                    return

    async def _deliver(self, message: dict[str, Any]) -> None:
        if not self.is_diverted:
            assert self.app_put is not None
            await self.app_put(message)
            return
        if message["text"] is not None:
            await self._give(message["text"])

    async def _give(self, text: str) -> None:
        if self._take is None:
            await self._taker_came.wait()
            assert self._take is not None
        self._take(text)

    async def _close(self, event: CloseConnection) -> None:
        self.buffer.clear()
        await self._send_wsproto_event(event)  # nothing when the closing handshake is complete
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_pings(self) -> None:
        with self._pinging:
            await super()._send_pings()


class MessageBuffer(WebsocketBuffer):
    """Collects one message; counts bytes, and refuses before it stores."""

    def extend(self, event: Message[Any]) -> None:
        data = event.data
        size = len(data) if not isinstance(data, str) or data.isascii() else len(data.encode())
        if self._bytes + size > self.max_length:
            raise FrameTooLargeError
        self._bytes += size
        super().extend(event)

    def clear(self) -> None:
        super().clear()
        self._bytes = 0

    _bytes = 0
