"""The agent's WebSocket to the balancer: connect, serve a session, try again for ever.

The only importer of trio_websocket here; what is said on the link is in link_session.py.
"""

import logging
import os
import random
import secrets
import string
from collections.abc import Callable
from typing import Protocol

import attrs
import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)

from paddler.agent.link_session import Connection
from paddler.config import MAX_LINK_MESSAGE_BYTES, Address

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
"""Between tries, doubled each time: requests wait only some ten seconds for an agent."""

GOOD_TIME = 2.0
"""A link that lived so long is tried anew without a pause; others may end at once every time."""

MESSAGE_QUEUE_SIZE = 64
"""With the library's 1, two unread messages keep it from answering pings."""

RECEIVE_BUFFER_BYTES = 65536
SEND_BYTES = 65536
"""At most so much of what waits to be sent is offered to the kernel at a time."""

_ID_LENGTH = 21
_ID_ALPHABET = string.ascii_letters + string.digits + "_-"

logger = logging.getLogger(__name__)


class Session(Protocol):
    """What runs on one connection; see LinkSession."""

    was_accepted: bool

    async def run(self) -> str: ...


def new_agent_id() -> str:
    """Return a fresh id (a nanoid); an agent keeps it for the life of its process."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))


async def stay_connected(
    open_session: Callable[[Connection], Session],
    *,
    address: Address,
    agent_id: str,
    connect_timeout: float,
    disconnect_timeout: float,
) -> None:
    """Keep one session with the balancer at this address, reconnecting with backoff, until cancelled.

    Logs when a link goes, and once for each new reason why none comes, or none stays.
    """
    pause = FIRST_PAUSE
    last_problem = ""
    while True:
        attempt = _Attempt(open_session, connect_timeout, disconnect_timeout)
        await attempt.run(address, f"/api/v1/agent_socket/{agent_id}")
        was_linked = attempt.session is not None and attempt.session.was_accepted
        if was_linked and attempt.session_time >= GOOD_TIME:
            pause, last_problem = FIRST_PAUSE, ""
        if attempt.problem != last_problem:
            if was_linked:  # balancers come and go
                logger.info("link to the balancer at %s ended: %s; reconnecting", address, attempt.problem)
            else:
                logger.warning("no link to the balancer at %s: %s; trying again", address, attempt.problem)
            last_problem = attempt.problem
        await trio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 spreads agents, hides nothing
        pause = min(2 * pause, LONGEST_PAUSE)


@attrs.define
class _Attempt:
    """One connection, from the first packet to the last; `problem` says why it is no more."""

    open_session: Callable[[Connection], Session]
    connect_timeout: float
    disconnect_timeout: float
    session: Session | None = None
    session_time: float = 0.0
    problem: str = ""

    async def run(self, address: Address, resource: str) -> None:
        try:
            with trio.fail_after(self.connect_timeout):
                stream = await trio.open_tcp_stream(address.host, address.port)
        except trio.TooSlowError:
            self.problem = f"it did not answer within {self.connect_timeout:g} s"
            return
        except OSError as error:
            self.problem = str(error)
            return
        try:
            await self._run_on(stream, f"{address.host}:{address.port}", resource)
        except* HandshakeError as group:
            self.problem = _refusal(group.exceptions[0])
        except* Exception as group:  # border: one link; the library's tasks raise whatever went wrong
            # Usually a ping that came while the library closed (trio-websocket #184); the line that the link
            # ended names it.
            logger.debug("the library under the link failed", exc_info=group)
            self.problem = repr(group.exceptions[0])

    async def _run_on(self, stream: trio.SocketStream, host: str, resource: str) -> None:
        """Shake hands and serve. The stream is closed and the library's reader gone when this returns.

        The library's own open_websocket() may wait for ever for a peer that accepts and never answers.
        """
        socket = WriteThrough(stream)
        async with stream, trio.open_nursery() as library:
            with trio.move_on_after(self.connect_timeout) as handshake:
                websocket = await wrap_client_stream(
                    library,
                    socket,  # type: ignore[arg-type]  # it says sockets, and uses what all streams have
                    host,
                    resource,
                    message_queue_size=MESSAGE_QUEUE_SIZE,
                    max_message_size=MAX_LINK_MESSAGE_BYTES,
                    receive_buffer_size=RECEIVE_BUFFER_BYTES,
                )
            if handshake.cancelled_caught:
                self.problem = f"it did not answer the WebSocket handshake within {self.connect_timeout:g} s"
            else:
                self.session = self.open_session(_LinkConnection(websocket, socket))
                began = trio.current_time()
                try:
                    self.problem = await self.session.run()
                finally:
                    self.session_time = trio.current_time() - began
                with trio.move_on_after(self.disconnect_timeout):
                    await websocket.aclose()
            library.cancel_scope.cancel()


def _refusal(error: BaseException) -> str:
    """Say what a server did that did not agree to a WebSocket."""
    match error:
        case ConnectionRejected(status_code=status):
            question = ": is this the management service?" if status < 500 else ""
            return f"it answered {status} instead of a WebSocket{question}"
        case _:
            return f"it refused the WebSocket: {error!r}"


@attrs.frozen
class _LinkConnection:
    """Text over a WebSocket; a closed one raises EOFError.

    Messages go past the library: its send costs three rounds of the event loop, ours none while the
    kernel takes them. What the library sends of itself, pongs and the end, takes the same way below it.
    """

    websocket: WebSocketConnection
    socket: "WriteThrough"

    async def receive(self) -> str:
        try:
            message = await self.websocket.get_message()
        except ConnectionClosed:
            raise EOFError from None
        return message if isinstance(message, str) else message.decode(errors="replace")

    def write(self, text: str) -> bool:
        if self.websocket.closed is not None:  # set before its last frame is sent, which nothing may follow
            raise EOFError
        try:
            return self.socket.write(text_frame(text.encode(), mask=os.urandom(4)))
        except trio.BrokenResourceError:
            raise EOFError from None

    async def flush(self) -> None:
        try:
            await self.socket.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise EOFError from None


class WriteThrough(trio.abc.Stream):
    """A TCP stream that can also be written to by plain calls.

    All bytes leave in the order in which they were written, whoever wrote them: what the kernel does not
    take is kept and goes first. Cancelling a send or a flush leaves the rest to the next one.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._unsent = bytearray()
        self._flushing = trio.Lock()

    def write(self, data: bytes) -> bool:
        """Take data without a limit; say whether nothing is left to flush. Raises BrokenResourceError."""
        if not self._unsent:
            try:
                sent = os.write(self._stream.socket.fileno(), data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise trio.BrokenResourceError from error
            if sent == len(data):
                return True
            data = data[sent:]
        self._unsent += data
        return False

    async def flush(self) -> None:
        """Wait until the kernel has taken all. Raises BrokenResourceError, ClosedResourceError."""
        async with self._flushing:
            while self._unsent:
                # Of the two ways to send, the one that tells what it sent; a cancelled one sent nothing.
                try:
                    sent = await self._stream.socket.send(bytes(self._unsent[:SEND_BYTES]))
                except OSError as error:
                    raise trio.BrokenResourceError from error
                del self._unsent[:sent]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.write(bytes(data))
        await self.flush()

    async def wait_send_all_might_not_block(self) -> None:
        await self.flush()
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


def text_frame(text: bytes, *, mask: bytes) -> bytes:
    """Return a client's WebSocket frame with a whole text message in UTF-8 (RFC 6455, 5.2)."""
    size = len(text)
    if size < 126:
        head = bytes((0x81, 0x80 | size))
    elif size < 1 << 16:
        head = b"\x81\xfe" + size.to_bytes(2)
    else:
        head = b"\x81\xff" + size.to_bytes(8)
    key = (mask * (size // 4 + 1))[:size]
    masked = int.from_bytes(text) ^ int.from_bytes(key)  # one operation, however many bytes
    return head + mask + masked.to_bytes(size)
