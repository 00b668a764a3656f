"""Bodies that are fed: written-through lines for tokens, server-sent events for status.

A token is a plain call here: its line goes to the socket if the kernel takes it now, and only what
it refuses waits for the reply's own task. Nothing in this module waits for a client on behalf of
somebody else.
"""

import logging
import os
import secrets
import string
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final, Self

import trio
from quart import Response, request
from quart.wrappers.response import ResponseBody

from paddler.http.connection import Connection
from paddler.messages import wire
from paddler.messages.agent_socket import TOKEN_LETTERS
from paddler.messages.tokens import TOKEN_VARIANTS, StreamError, error_envelope, response_envelope

if TYPE_CHECKING:
    from types import TracebackType

    from paddler.balancer.changes import Subscription
    from paddler.balancer.relay import Relay
    from paddler.balancer.running_requests import Reply
    from paddler.messages.inference import Request, TokenRequest

log = logging.getLogger(__name__)

UNSENT_LIMIT_BYTES: Final = 1024 * 1024
"""A client that leaves more than this unread is too slow: its reply ends, alone."""

LARGEST_HELD_BYTES: Final = 16 * 1024
"""So much waits for the next message at most: to join a large one costs more than a write."""

KEEP_ALIVE_PERIOD: Final = 4.0
"""Stock clients give up a stream that is silent for 5 s."""

_ID_ALPHABET: Final = string.ascii_letters + string.digits + "_-"


def new_request_id() -> str:
    """Return a nanoid of 21 characters."""
    return "".join([secrets.choice(_ID_ALPHABET) for _ in range(21)])


class Envelope:
    """Writes the messages of one request around JSON that is finished already.

    What stands before and after a piece is the same for every token of one agent, so it is built
    once.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._agent_name: str | None = None
        self._around = self._for_agent(None)

    def message(self, agent_name: str | None, letter: str, text: str) -> str:
        """Return the `Response` with this piece; letters as in messages/agent_socket.py."""
        if agent_name != self._agent_name:
            self._agent_name = agent_name
            self._around = self._for_agent(agent_name)
        before, after = self._around[letter]
        return before + text + after

    def error(self, error: StreamError) -> str:
        return wire.encode(error_envelope(request_id=self._request_id, error=error))

    def _for_agent(self, agent_name: str | None) -> dict[str, tuple[str, str]]:
        def around(result: object, kind: str = "GeneratedToken") -> tuple[str, str]:
            response = {kind: result}
            envelope = wire.encode(
                response_envelope(generated_by=agent_name, request_id=self._request_id, response=response)
            )
            before, _, after = envelope.rpartition("0")  # last: names and ids stand before it
            return before, after

        whole = around(0)
        tokens = {section.value: around({TOKEN_VARIANTS[section]: 0}) for section in TOKEN_VARIANTS}
        assert tokens.keys() == TOKEN_LETTERS
        embedding = around(0, "Embedding")
        return {**tokens, "E": whole, "D": whole, "V": embedding, "F": embedding}


async def serve_request(relay: "Relay", message: "Request", reply: "Reply", *, request_id: str) -> None:
    """Let the relay answer one request; whatever breaks in there breaks this request only."""
    try:
        await relay.serve(message, reply)
    except Exception:  # border: one request
        log.exception("request %s failed", request_id)
        reply.error(StreamError(500, "Internal server error"))


class _Body(ResponseBody, AsyncIterator[bytes]):
    """A body that is its own iterator and owns nothing outside `__anext__`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: "TracebackType | None",
    ) -> None:
        pass


class TokenReply(_Body):
    """The body of one request: a line per message, written through to the socket.

    Quart sends status and headers, then asks for the body once; everything happens within that call.
    HTTP allows to go past h11 there: it keeps no state between the chunks of a body, nor between the
    bytes of a body that the end of the connection ends (HTTP/1.0).

    States: *parked* — nothing is unsent but what waits for the next message, and the flusher sleeps,
    so feeding writes directly; *busy* — feeding only appends and the flusher writes; *failed* —
    everything is dropped and the task is being cancelled. A direct write can therefore never overtake
    or split one of the flusher.
    """

    def __init__(
        self,
        serve: Callable[["TokenReply"], Awaitable[None]],
        *,
        request_id: str,
        connection: Connection,
        unsent_limit_bytes: int = UNSENT_LIMIT_BYTES,
    ) -> None:
        self.request_id = request_id
        self._serve = serve
        self._connection = connection
        self._unsent_limit_bytes = unsent_limit_bytes
        self._chunked = request.http_version == "1.1"
        self._envelope = Envelope(request_id)
        self._held = b""
        self._pending: list[bytes] = []
        self._unsent = 0
        self._parked = False
        self._ended = False
        self._failed = False
        self._wakeup = trio.Event()
        self._scope = trio.CancelScope()

    # Reply: plain calls of the relay

    def piece(self, agent_name: str | None, letter: str, text: str, *, more: bool = False) -> None:
        self.feed(self._envelope.message(agent_name, letter, text), more=more)

    def error(self, error: StreamError) -> None:
        self.feed(self._envelope.error(error))

    def feed(self, message: str, *, more: bool = False) -> None:
        """Take a finished message. A plain call; over the limit, the connection is ended instead.

        It is written with the next one if there is `more`: each write wakes the client.
        """
        if self._failed:
            return
        data = message.encode() + b"\n"
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        data = self._held + data
        self._held = b""
        if more and len(data) < LARGEST_HELD_BYTES:
            self._held = data
            return
        if self._parked:
            try:
                sent = os.write(self._connection.stream.socket.fileno(), data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._fail("its client is gone")
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._pending.append(data)
        self._unsent += len(data)
        if self._unsent > self._unsent_limit_bytes:
            self._fail("its client reads too slowly")
        else:
            self._wake()

    def _fail(self, reason: str) -> None:
        log.info("request %s ends: %s", self.request_id, reason)
        self._failed = True
        self._pending.clear()
        self._scope.cancel()
        self._connection.abort()  # without the last chunk: the client must not take this for the end

    def _wake(self) -> None:
        self._parked = False
        self._wakeup.set()

    # Body: Quart's side

    async def __anext__(self) -> bytes:
        """Answer the request; nothing is left for Quart to write. Cancelling cancels the relay."""
        with self._scope:
            async with trio.open_nursery() as reply:
                reply.start_soon(self._flush)
                await self._serve(self)
                self._ended = True
                self._wake()
        raise StopAsyncIteration

    async def _flush(self) -> None:
        """Write what feeding could not, until the reply has ended."""
        while True:
            if self._pending:
                data = b"".join(self._pending)
                self._pending.clear()
                try:
                    await self._connection.stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    if not self._failed:
                        self._fail("its client is gone")
                    return
                self._unsent -= len(data)
            elif self._ended:
                return
            else:
                self._wakeup = trio.Event()
                self._parked = True
                try:
                    await self._wakeup.wait()
                finally:
                    self._parked = False


def token_response(relay: "Relay", message: "TokenRequest") -> Response:
    """Return the response whose body answers this request."""
    request_id = new_request_id()

    async def serve(reply: TokenReply) -> None:
        await serve_request(relay, message, reply, request_id=request_id)

    connection = request.scope["state"]["connection"]
    body = TokenReply(serve, request_id=request_id, connection=connection)
    return Response(body, content_type="application/json", headers={"Cache-Control": "no-cache"})


class EventStream(_Body):
    """A body of server-sent events: a snapshot at once and after each change, comments in between.

    Ends normally when `stopping` is set.
    """

    def __init__(self, snapshot: Callable[[], str], *, changes: "Subscription", stopping: trio.Event) -> None:
        self._snapshot = snapshot
        self._changes = changes
        self._stopping = stopping
        self._next_comment: float | None = None

    async def __anext__(self) -> bytes:
        if self._next_comment is None:
            self._next_comment = trio.current_time() + KEEP_ALIVE_PERIOD
            return self._event() + b": keep-alive\n\n"
        changed = await self._wait_for_change(until=self._next_comment)
        if self._stopping.is_set():
            raise StopAsyncIteration
        if changed:
            return self._event()
        self._next_comment += KEEP_ALIVE_PERIOD
        return b": keep-alive\n\n"

    def _event(self) -> bytes:
        return b"data: %b\n\n" % self._snapshot().encode()

    async def _wait_for_change(self, *, until: float) -> bool:
        """Return whether a change came; False when it is time for a comment, or to stop."""
        changed = False

        async def wait_for_change(waits: trio.Nursery) -> None:
            nonlocal changed
            await self._changes.wait()
            changed = True
            waits.cancel_scope.cancel()

        with trio.move_on_at(until):
            async with trio.open_nursery() as waits:
                waits.start_soon(wait_for_change, waits)
                await self._stopping.wait()
                waits.cancel_scope.cancel()
        return changed


def event_stream_response(
    snapshot: Callable[[], str], *, changes: "Subscription", stopping: trio.Event
) -> Response:
    """Return the response of an SSE route."""
    return Response(
        EventStream(snapshot, changes=changes, stopping=stopping),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "Content-Encoding": "identity"},
    )
