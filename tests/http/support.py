"""Surfaces on real sockets with scripted services behind them, and clients that speak raw bytes."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from quart_trio import QuartTrio
from wsproto.connection import Connection as Frames
from wsproto.connection import ConnectionType
from wsproto.events import CloseConnection, Event, Ping, Pong, TextMessage

from paddler.balancer.changes import Changes
from paddler.balancer.running_requests import Reply
from paddler.config import MAX_CLIENT_MESSAGE_BYTES, Address
from paddler.http.inference import make_inference_app
from paddler.http.surface import Surface, open_surface
from paddler.messages.inference import TokenRequest
from paddler.messages.state import DEFAULT_DESIRED_STATE, ApplicableState, DesiredState
from paddler.messages.tokens import StreamError
from paddler.routing.fleet import Fleet

LOOPBACK = Address("127.0.0.1", 0, "127.0.0.1:0")
DONE = '{"Done":{"usage":{}}}'
RAW_PROMPT = b'{"max_tokens": 3, "raw_prompt": "Once"}'

Script = Callable[[TokenRequest, Reply], Awaitable[None]]


async def answer_one(_request: TokenRequest, reply: Reply) -> None:
    reply.piece("agent-a", "C", '"Hi"')
    reply.piece("agent-a", "D", DONE)


class ScriptedRelay:
    """Answers each request by its script; knows how many run and how many were cancelled."""

    def __init__(self, script: Script = answer_one) -> None:
        self.script = script
        self.running = 0
        self.cancelled = 0
        self.changes = Changes()
        self.stopping = trio.Event()

    async def serve(self, request: TokenRequest, reply: Reply) -> None:
        self.running += 1
        self.changes.notify()
        try:
            await self.script(request, reply)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.changes.notify()

    def shut_down(self) -> None:
        self.stopping.set()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        changes = self.changes.subscribe()
        with trio.fail_after(5):
            while not condition():
                await changes.wait()


class FakeReconciliation:
    """Holds the states it is told."""

    def __init__(self, state: ApplicableState | None = None) -> None:
        self.applicable_state = state
        self.changes = Changes()
        self.stored: DesiredState = DEFAULT_DESIRED_STATE
        self.failure: Exception | None = None

    def apply(self, state: ApplicableState) -> None:
        self.applicable_state = state
        self.changes.notify()

    async def desired_state(self) -> DesiredState:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        return self.stored

    async def put(self, state: DesiredState) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.stored = state


def applicable(**parameters: Any) -> ApplicableState:
    """Return an applicable state with these inference parameters."""
    state = DEFAULT_DESIRED_STATE.applicable()
    return attrs.evolve(state, inference_parameters=attrs.evolve(state.inference_parameters, **parameters))


@attrs.define
class InferenceRoom:
    """An inference surface and what stands behind it."""

    relay: ScriptedRelay
    reconciliation: FakeReconciliation
    fleet: Fleet
    stopping: trio.Event
    surface: Surface

    async def connect(self) -> "RawClient":
        return await connect(self.surface.port)

    def stop(self) -> None:
        self.stopping.set()
        self.relay.shut_down()


@asynccontextmanager
async def inference_room(
    script: Script = answer_one,
    *,
    state: ApplicableState | None = None,
    cors: tuple[str, ...] = (),
    max_message_bytes: int = MAX_CLIENT_MESSAGE_BYTES,
) -> AsyncIterator[InferenceRoom]:
    relay, reconciliation, fleet = ScriptedRelay(script), FakeReconciliation(state), Fleet(lambda: None)
    stopping = trio.Event()
    app = make_inference_app(
        relay=relay,  # type: ignore[arg-type]  # a fake with the same signatures
        reconciliation=reconciliation,  # type: ignore[arg-type]
        fleet=fleet,
        cors_allowed_hosts=cors,
        stopping=stopping,
    )
    async with serving(app, stopping=stopping, max_message_bytes=max_message_bytes) as surface:
        yield InferenceRoom(relay, reconciliation, fleet, stopping, surface)


@asynccontextmanager
async def serving(
    app: QuartTrio, *, stopping: trio.Event, max_message_bytes: int = MAX_CLIENT_MESSAGE_BYTES
) -> AsyncIterator[Surface]:
    """Serve an app on a free port; at the end of the block all connections are cut at once."""
    async with open_surface(
        app,
        name="test",
        address=LOOPBACK,
        stopping=stopping,
        max_message_bytes=max_message_bytes,
        graceful_timeout=0.05,
    ) as surface:
        yield surface


@attrs.frozen
class Answer:
    """An HTTP response, taken apart."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class RawClient:
    """One TCP connection to a surface; every wait ends after five seconds."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def __aenter__(self) -> "RawClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await trio.aclose_forcefully(self.stream)

    async def send(self, data: bytes) -> None:
        with trio.fail_after(5):
            await self.stream.send_all(data)

    async def request(
        self, method: str, path: str, body: bytes | None = None, *headers: str, version: str = "1.1"
    ) -> Answer:
        """Send a request and read its whole answer."""
        await self.send(http_request(method, path, body, *headers, version=version))
        return await self.answer(has_body=method != "HEAD")

    async def generate(self, body: bytes = RAW_PROMPT, *headers: str, version: str = "1.1") -> None:
        """Send a token request; its answer is not awaited."""
        await self.send(
            http_request("POST", "/api/v1/continue_from_raw_prompt", body, *headers, version=version)
        )

    async def answer(self, *, has_body: bool = True) -> Answer:
        status, headers = await self.head()
        if not has_body or status == 204:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join([chunk async for chunk in self.chunks()])
        elif "content-length" in headers:
            body = await self._read(int(headers["content-length"]))
        else:
            body = await self.rest()
        return Answer(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read status line and headers."""
        lines = (await self._read_until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(": ") for line in lines[1:] if line]
        return int(lines[0].split(" ")[1]), {name.lower(): value for name, _, value in pairs}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Read the chunks of a body, up to and with the last one."""
        while True:
            chunk = await self.chunk()
            if not chunk:
                return
            yield chunk

    async def chunk(self) -> bytes:
        size = int((await self._read_until(b"\r\n"))[:-2], 16)
        return (await self._read(size + 2))[:-2]

    async def rest(self) -> bytes:
        """Read until the server ends the connection."""
        while await self._receive():
            pass
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    async def ends(self) -> bool:
        """Wait for the end of the connection, orderly or not; tell whether nothing came before."""
        try:
            return not await self._receive()
        except trio.BrokenResourceError:
            return True

    async def _receive(self) -> bytes:
        with trio.fail_after(5):
            data = bytes(await self.stream.receive_some(65536))
        self._buffer += data
        return data

    async def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if not await self._receive():
                raise EOFError(bytes(self._buffer))
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            if not await self._receive():
                raise EOFError(bytes(self._buffer))
        return await self._read(self._buffer.index(mark) + len(mark))


async def connect(port: int) -> RawClient:
    return RawClient(await trio.open_tcp_stream("127.0.0.1", port))


def http_request(
    method: str, path: str, body: bytes | None = None, *headers: str, version: str = "1.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: test", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
        if not any(header.lower().startswith("content-type") for header in headers):
            lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


class SocketClient:
    """A WebSocket client; pings are collected apart from messages."""

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self.pings = 0
        self.pongs: list[bytes] = []
        self.closed: CloseConnection | None = None
        self._frames = Frames(ConnectionType.CLIENT)
        self._events: list[Event] = []

    async def send_event(self, event: Event) -> None:
        await self.raw.send(self._frames.send(event))

    async def send(self, message: object) -> None:
        """Send a message as JSON, or text as it is."""
        text = message if isinstance(message, str) else json.dumps(message)
        await self.send_event(TextMessage(data=text))

    async def ask(self, request_id: str, **changes: Any) -> None:
        """Send a raw prompt request."""
        prompt = {"max_tokens": 3, "raw_prompt": "Once", **changes}
        await self.send({"Request": {"id": request_id, "request": {"ContinueFromRawPrompt": prompt}}})

    async def receive(self) -> Any:
        """Return the next message, parsed; None when the server closed."""
        text = ""
        while True:
            event = await self._next_event()
            if event is None or isinstance(event, CloseConnection):
                self.closed = event
                return None
            if isinstance(event, Ping):
                self.pings += 1
            elif isinstance(event, Pong):
                self.pongs.append(bytes(event.payload))
            elif isinstance(event, TextMessage):
                text += event.data
                if event.message_finished:
                    return json.loads(text)

    async def _next_event(self) -> Event | None:
        while not self._events:
            with trio.fail_after(5):
                data = await self.raw.stream.receive_some(65536)
            if not data:
                return None
            self._frames.receive_data(bytes(data))
            self._events = list(self._frames.events())
        return self._events.pop(0)


async def open_socket(raw: RawClient, path: str = "/api/v1/inference_socket", *headers: str) -> SocketClient:
    """Upgrade a raw connection to a WebSocket."""
    await raw.send(http_request("GET", path, None, *UPGRADE, *headers))
    status, answered = await raw.head()
    assert status == 101, status
    assert "sec-websocket-extensions" not in answered
    client = SocketClient(raw)
    client._frames.receive_data(bytes(raw._buffer))
    client._events = list(client._frames.events())
    return client


def messages(body: bytes) -> list[Any]:
    """Parse an NDJSON body."""
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


def stream_error(message: Any) -> StreamError:
    error = message["Error"]["error"]
    return StreamError(error["code"], error["description"])
