"""An HTTP client for bodies that are read piece by piece and left in the middle.

httpx reads them through nested generators, which on Trio outlive a response that is closed before
its end, and its socket with them; here nothing outlives the block.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import h11
import trio


class StreamedResponse:
    """A response whose head has arrived; it is its own iterator over the lines of the body."""

    def __init__(self, connection: h11.Connection, stream: trio.SocketStream) -> None:
        self.status_code = 0
        self.headers: dict[str, str] = {}
        self._connection = connection
        self._stream = stream
        self._buffer = b""
        self._ended = False

    async def read_head(self) -> None:
        response = await self._next_event()
        assert isinstance(response, h11.Response)
        self.status_code = response.status_code
        self.headers = {name.decode(): value.decode() for name, value in response.headers}

    def __aiter__(self) -> "StreamedResponse":
        return self

    async def __anext__(self) -> str:
        while b"\n" not in self._buffer:
            if self._ended:
                raise StopAsyncIteration
            await self._read_piece()
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    async def text(self) -> str:
        """Read what is left of the body."""
        while not self._ended:
            await self._read_piece()
        return self._buffer.decode()

    async def messages(self) -> list[dict[str, Any]]:
        """Read what is left of a body of one JSON message per line."""
        return [json.loads(line) async for line in self]

    async def message(self) -> dict[str, Any]:
        """Read the next line as a JSON message."""
        message: dict[str, Any] = json.loads(await anext(self))
        return message

    async def event(self) -> Any:
        """Read the next server-sent event and return its JSON."""
        while True:
            line = await anext(self)
            if line.startswith("data: "):
                return json.loads(line.removeprefix("data: "))

    async def _read_piece(self) -> None:
        match await self._next_event():
            case h11.Data(data=data):
                self._buffer += data
            case h11.EndOfMessage():
                self._ended = True

    async def _next_event(self) -> object:
        """Return the next event; a body that breaks off raises h11.RemoteProtocolError."""
        while True:
            event = self._connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._connection.receive_data(await self._stream.receive_some(65536))


@asynccontextmanager
async def open_stream(method: str, url: str, body: object = None) -> AsyncIterator[StreamedResponse]:
    """Send a request on a connection of its own; leaving the block leaves the server."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    payload = b"" if body is None else json.dumps(body).encode()
    headers = [("Host", parts.netloc), ("Content-Length", str(len(payload)))]
    if body is not None:
        headers.append(("Content-Type", "application/json"))
    connection = h11.Connection(h11.CLIENT)
    async with await trio.open_tcp_stream(parts.hostname, parts.port) as stream:
        request = h11.Request(method=method, target=parts.path, headers=headers)
        data = [connection.send(event) for event in (request, h11.Data(data=payload), h11.EndOfMessage())]
        await stream.send_all(b"".join(piece for piece in data if piece))
        response = StreamedResponse(connection, stream)
        await response.read_head()
        yield response
