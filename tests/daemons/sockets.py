"""Clients below the level of a library: a raw HTTP/1.1 request, and the inference WebSocket."""

import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio
from trio_websocket import WebSocketConnection, wrap_client_stream

from tests.cluster import LOAD_WAIT, Cluster, Message, request_path


@attrs.define(eq=False)
class RawClient:
    """A TCP client that has posted a request and reads what comes."""

    stream: trio.SocketStream
    received: bytes = b""

    async def read_until(self, text: bytes) -> bytes:
        """Read until the text has arrived; return everything so far."""
        with trio.fail_after(LOAD_WAIT):
            while text not in self.received:
                data = await self.stream.receive_some(65536)
                assert data, self.received
                self.received += data
        return self.received

    async def read_to_end(self) -> bytes:
        with trio.fail_after(LOAD_WAIT):
            async for data in self.stream:
                self.received += data
        return self.received

    async def half_close(self) -> None:
        await self.stream.send_eof()

    async def reset(self) -> None:
        """Leave with a RST instead of a FIN."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()


def post_bytes(body: Message) -> bytes:
    """Return a complete HTTP/1.1 POST of this request."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {request_path(body)} HTTP/1.1\r\nHost: paddler\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


@asynccontextmanager
async def raw_post(port: int, body: Message) -> AsyncIterator[RawClient]:
    """Post a request over a plain TCP connection."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(post_bytes(body))
        yield RawClient(stream)


@attrs.define(eq=False)
class SocketClient:
    """The inference WebSocket as a client sees it."""

    connection: WebSocketConnection

    async def request(self, request_id: str, body: Message) -> None:
        variant = "ContinueFromRawPrompt" if "raw_prompt" in body else "ContinueFromConversationHistory"
        await self.send({"Request": {"id": request_id, "request": {variant: body}}})

    async def cancel(self, request_id: str) -> None:
        await self.send({"Notification": {"StopRespondingTo": request_id}})

    async def send(self, message: Message) -> None:
        await self.connection.send_message(json.dumps(message))

    async def receive(self, *, within: float = LOAD_WAIT) -> Message:
        with trio.fail_after(within):
            message: Message = json.loads(await self.connection.get_message())
            return message

    async def receive_until_terminal(self, request_id: str) -> list[Message]:
        """Return the messages of this request up to its terminal; those of others are dropped."""
        messages = []
        while True:
            message = await self.receive()
            if message_id(message) != request_id:
                continue
            messages.append(message)
            if is_terminal(message):
                return messages

    async def received_so_far(self) -> list[Message]:
        """Return what has arrived and not been read, until the server is silent."""
        messages = []
        with trio.move_on_after(LOAD_WAIT):
            while True:
                with trio.move_on_after(0.3) as silence:
                    messages.append(json.loads(await self.connection.get_message()))
                if silence.cancelled_caught:
                    break
        return messages

    async def silent_for(self, seconds: float) -> bool:
        """Tell whether nothing arrives for so long."""
        with trio.move_on_after(seconds) as silence:
            await self.connection.get_message()
        return silence.cancelled_caught


def message_id(message: Message) -> str | None:
    for kind in ("Response", "Error"):
        if kind in message:
            request_id: str = message[kind]["request_id"]
            return request_id
    return None


def is_terminal(message: Message) -> bool:
    if "Error" in message:
        return True
    value = message["Response"]["response"]["GeneratedToken"]
    return next(iter(value)) not in ("ContentToken", "ReasoningToken", "ToolCallToken", "UndeterminableToken")


@asynccontextmanager
async def inference_socket(cluster: Cluster) -> AsyncIterator[SocketClient]:
    port = cluster.inference_port
    # The library's own open_websocket() forgets its socket when the server resets it during the goodbye.
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as library:
        resource = "/api/v1/inference_socket"
        connection = await wrap_client_stream(library, stream, f"127.0.0.1:{port}", resource)
        yield SocketClient(connection)
        with trio.move_on_after(1):
            await connection.aclose()
        library.cancel_scope.cancel()
