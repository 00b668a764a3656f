import inspect
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import WebsocketBuffer, WSStream
from hypercorn.trio.tcp_server import TCPServer
from wsproto.events import BytesMessage, CloseConnection, TextMessage

from paddler.balancer.running_requests import Reply
from paddler.http.connection import (
    HEAD_TIMEOUT,
    KEEP_ALIVE_TIMEOUT,
    Connection,
    Http1,
    MessageBuffer,
    Server,
    WebSocket,
)
from paddler.messages.inference import TokenRequest
from tests.http.support import (
    RAW_PROMPT,
    UPGRADE,
    InferenceRoom,
    RawClient,
    http_request,
    inference_room,
    open_socket,
)

RAW = "/api/v1/continue_from_raw_prompt"
SOCKET = "/api/v1/inference_socket"


def upgrade(*headers: str, path: str = SOCKET) -> bytes:
    return http_request("GET", path, None, *UPGRADE, *headers)


def masked(first_byte: int, payload: bytes) -> bytes:
    return bytes([first_byte, 0x80 | len(payload), 0, 0, 0, 0]) + payload


HOSTILE = {
    "frame before the upgrade is accepted": upgrade() + masked(0x81, b"{}"),
    "upgrade with a body": upgrade("Content-Length: 5") + b"hello",
    "upgrade with a chunked body": upgrade("Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    "upgrade without a key": http_request("GET", SOCKET, None, *UPGRADE[:-1]),
    "upgrade of an old version": http_request("GET", SOCKET, None, *UPGRADE[:2], UPGRADE[3]),
    "upgrade over HTTP/1.0": http_request("GET", SOCKET, None, *UPGRADE, version="1.0"),
    "upgrade of another path": upgrade(path="/api/v1/nothing"),
    "upgrade of an HTTP route": upgrade(path="/health"),
    "protocol that is not ASCII": upgrade("Sec-WebSocket-Protocol: \xff"),
    "extension that is not ASCII": upgrade("Sec-WebSocket-Extensions: \xff"),
    "connection header that is not ASCII": http_request(
        "GET", SOCKET, None, "Connection: upgrade, \xff", *UPGRADE[1:]
    ),
    "impossible window bits": upgrade(
        "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=abc"
    ),
    "h2c with bad settings": http_request(
        "GET", "/health", None, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAM"
    ),
    "h2c with settings that are not base64": http_request(
        "GET", "/health", None, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: \xff"
    ),
    "HTTP/2 by prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "target without a path": b"GET ?x HTTP/1.1\r\nHost: a\r\n\r\n",
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "zero bytes": b"\0" * 100,
    "header without a name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "negative length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "bad chunk size": http_request(
        "POST", RAW, None, "Transfer-Encoding: chunked", "Content-Type: application/json"
    )
    + b"zz\r\n",
    "endless header": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000,
    "connect": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "body shorter than announced": http_request("POST", RAW, None, "Content-Length: 10") + b"{",
}

HOSTILE_FRAMES = {
    "unmasked": b"\x81\x02{}",
    "reserved opcode": masked(0x83, b"a"),
    "reserved bit": masked(0xC1, b"a"),
    "continuation of nothing": masked(0x80, b"a"),
    "text that is not UTF-8": masked(0x81, b"\xff"),
    "long ping": bytes([0x89, 0xFE, 0, 200, 0, 0, 0, 0]) + b"a" * 200,
    "close of one byte": masked(0x88, b"\0"),
    "close with a bad code": masked(0x88, b"\0\1"),
    "data after a close": masked(0x88, b"\x03\xe8") + masked(0x81, b"{}"),
}


async def settled(tasks: int) -> None:
    """Wait until no more tasks live than this."""
    with trio.fail_after(5):
        while trio.lowlevel.current_statistics().tasks_living > tasks:  # noqa: ASYNC110 nobody announces it
            await trio.sleep(0.005)


async def living_tasks() -> int:
    await trio.testing.wait_all_tasks_blocked()  # the surface has begun to accept
    return trio.lowlevel.current_statistics().tasks_living


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def is_healthy(room: InferenceRoom) -> bool:
    async with await room.connect() as client:
        return (await client.request("GET", "/health")).text == "OK"


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_request_ends_only_its_connection(name: str) -> None:
    async with inference_room() as room:
        tasks = await living_tasks()
        async with await room.connect() as client:
            await client.send(HOSTILE[name])
            assert await is_healthy(room)
            await client.stream.send_eof()
            await client.ends()
        await settled(tasks)
        assert await is_healthy(room)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "upgrade" in name])
async def test_a_refused_upgrade_is_answered_and_the_connection_ends(name: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        await client.send(HOSTILE[name])
        status, _ = await client.head()
        assert status in (400, 404)
        await client.rest()


@pytest.mark.parametrize("name", HOSTILE_FRAMES)
async def test_a_hostile_frame_ends_only_its_connection(name: str) -> None:
    async with inference_room() as room:
        tasks = await living_tasks()
        async with await room.connect() as client:
            await open_socket(client)
            await client.send(HOSTILE_FRAMES[name])
            rest = await client.rest()
            assert rest[rest.rindex(b"\x88")] == 0x88  # a close frame is among the last words
        await settled(tasks)
        assert await is_healthy(room)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/nothing", None, 404),
        ("POST", RAW, b'{"a": "%b"}' % (b"a" * 3_000_000), 413),
        ("POST", RAW, b"{}", 400),
        ("POST", RAW, RAW_PROMPT, 200),
    ],
)
async def test_connection_close_is_honoured_after_every_answer(
    method: str, path: str, body: bytes | None, status: int
) -> None:
    async with inference_room() as room:
        tasks = await living_tasks()
        async with await room.connect() as client:
            answer = await client.request(method, path, body, "Connection: close")
            assert answer.status == status
            assert answer.headers["connection"] == "close"
            assert await client.ends()
        await settled(tasks)


async def test_connection_close_is_honoured_after_a_failure(logged_errors: list[object]) -> None:
    async with inference_room() as room:
        room.reconciliation.applicable_state = "broken"  # type: ignore[assignment]
        async with await room.connect() as client:
            answer = await client.request("POST", RAW, RAW_PROMPT, "Connection: close")
            assert answer.status == 500
            assert await client.ends()
        assert logged_errors


async def test_a_connection_is_used_again_after_every_kind_of_answer() -> None:
    async with inference_room() as room, await room.connect() as client:
        for _ in range(3):
            assert (await client.request("GET", "/health")).status == 200
            assert (await client.request("GET", "/nothing")).status == 404
            assert (await client.request("POST", RAW, b"{}")).status == 400
            assert (await client.request("POST", RAW, RAW_PROMPT)).status == 200


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with inference_room() as room, await room.connect() as client:
        await client.send(http_request("GET", "/nothing") + http_request("GET", "/health"))
        assert (await client.answer()).status == 404
        assert (await client.answer()).text == "OK"


REQUEST = http_request("GET", "/")


async def answer_empty(scope: dict[str, str], _: object, send: Callable[[object], Awaitable[None]]) -> None:
    """An app; its answer is a stream where the path says so."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": b"a", "more_body": scope["path"] == "/stream"})
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def served_by(server: Server, nursery: trio.Nursery) -> AsyncIterator[RawClient]:
    ours, theirs = await _stream_pair()
    nursery.start_soon(server.serve_stream, ours)
    async with RawClient(theirs) as client:
        yield client


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """An autojumping clock that waits until data on the loopback device has arrived."""
    return trio.testing.MockClock(autojump_threshold=0.02)


async def end_of(client: RawClient) -> float:
    """Return when the server ended the connection, without another word."""
    assert await client.stream.receive_some(1) == b""
    return trio.current_time()


@pytest.mark.parametrize("head", [b"", b"G", b"GET / HT"])
async def test_the_first_request_of_a_connection_has_the_time_of_a_head(
    patient_clock: trio.testing.MockClock, nursery: trio.Nursery, head: bytes
) -> None:
    async with served_by(Server(answer_empty, max_message_bytes=1000), nursery) as client:
        began = trio.current_time()
        await trio.sleep(2)
        if head:
            await client.send(head)
        assert await end_of(client) - began == pytest.approx(HEAD_TIMEOUT, abs=0.5)


@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_a_connection_waits_long_for_another_request(
    patient_clock: trio.testing.MockClock, nursery: trio.Nursery, path: str
) -> None:
    async with served_by(Server(answer_empty, max_message_bytes=1000), nursery) as client:
        for pause in (0, 15, 60):  # so long clients keep connections
            await trio.sleep(pause)
            assert (await client.request("GET", path)).status == 200
        began = trio.current_time()
        assert await end_of(client) - began == pytest.approx(KEEP_ALIVE_TIMEOUT, abs=0.5)


@pytest.mark.parametrize("idle", [0, 10, 60])
async def test_the_head_of_another_request_has_its_time_from_the_first_byte_on(
    patient_clock: trio.testing.MockClock, nursery: trio.Nursery, idle: float
) -> None:
    async with served_by(Server(answer_empty, max_message_bytes=1000), nursery) as client:
        assert (await client.request("GET", "/")).status == 200
        await trio.sleep(idle)
        began = trio.current_time()
        await client.send(b"G")
        await trio.sleep(HEAD_TIMEOUT - 2)
        await client.send(b"E")  # does not put off the end
        assert await end_of(client) - began == pytest.approx(HEAD_TIMEOUT, abs=0.5)


async def test_a_head_that_is_complete_in_time_is_served(
    patient_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    async with served_by(Server(answer_empty, max_message_bytes=1000), nursery) as client:
        for _ in range(3):
            await client.send(REQUEST[:5])
            await trio.sleep(HEAD_TIMEOUT - 1)
            await client.send(REQUEST[5:])
            assert (await client.answer()).status == 200


async def test_half_a_head_behind_a_request_has_its_time_from_the_answer_on(
    patient_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    async with served_by(Server(answer_empty, max_message_bytes=1000), nursery) as client:
        await client.send(REQUEST + REQUEST[:5])
        assert (await client.answer()).status == 200
        began = trio.current_time()
        assert await end_of(client) - began == pytest.approx(HEAD_TIMEOUT, abs=0.5)


async def test_of_too_many_idle_connections_the_longest_idle_ends(nursery: trio.Nursery) -> None:
    server = Server(answer_empty, max_message_bytes=1000, max_idle=2)
    async with (
        served_by(server, nursery) as first,
        served_by(server, nursery) as second,
        served_by(server, nursery) as third,
    ):
        for client in (first, second, first, third):
            assert (await client.request("GET", "/")).status == 200
        assert await second.ends()
        await third.send(REQUEST[:5])  # is idle no more, so there is room again
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with served_by(server, nursery) as fourth:
            for client in (fourth, first, fourth):
                assert (await client.request("GET", "/")).status == 200
            await third.send(REQUEST[5:])
            assert (await third.answer()).status == 200
            assert await first.ends()


async def test_the_end_of_keep_alive_closes_idle_and_new_connections_at_once(nursery: trio.Nursery) -> None:
    server = Server(answer_empty, max_message_bytes=1000)
    async with served_by(server, nursery) as idle, served_by(server, nursery) as new:
        assert (await idle.request("GET", "/")).status == 200
        await trio.testing.wait_all_tasks_blocked(0.01)
        await server.end_keep_alive()
        with trio.fail_after(1):
            assert await idle.ends()
            assert await new.ends()


async def _stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        theirs = await trio.open_tcp_stream(*listener.socket.getsockname())
        return await listener.accept(), theirs


async def silent(_: TokenRequest, reply: Reply) -> None:
    await trio.sleep_forever()


async def one_then_silent(_: TokenRequest, reply: Reply) -> None:
    reply.piece("a", "C", '"1"')
    await trio.sleep_forever()


async def streaming(_: TokenRequest, reply: Reply) -> None:
    while True:
        reply.piece("a", "C", '"token"')
        await trio.sleep(0.001)


def send_fin(stream: trio.SocketStream) -> None:
    stream.socket.close()


def send_rst(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stream.socket.close()


def half_close(stream: trio.SocketStream) -> None:
    stream.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [send_fin, send_rst, half_close])
@pytest.mark.parametrize("script", [silent, one_then_silent, streaming])
@pytest.mark.parametrize("over_websocket", [False, True])
async def test_a_client_that_leaves_cancels_its_request(
    leave: Callable[[trio.SocketStream], None],
    script: Callable[[TokenRequest, Reply], Awaitable[None]],
    over_websocket: bool,
) -> None:
    async with inference_room(script) as room:
        tasks, files = await living_tasks(), open_files()
        async with await room.connect() as client:
            if over_websocket:
                await (await open_socket(client)).ask("1")
            else:
                await client.generate()
                await client.head()
                if script is not silent:
                    await client.chunk()
            await room.relay.wait_until(lambda: room.relay.running == 1)
            leave(client.stream)
            await room.relay.wait_until(lambda: room.relay.cancelled == 1)
        await settled(tasks)
        assert open_files() == files
        assert await is_healthy(room)


EXTRAS = {
    "an empty line": b"\r\n",
    "a letter": b"G",
    "a second request": http_request("POST", RAW, RAW_PROMPT),
}


@pytest.mark.parametrize("leave", [send_fin, send_rst, half_close])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_client_that_sent_more_than_its_request_and_leaves_cancels_it(
    leave: Callable[[trio.SocketStream], None], extra: str, at_once: bool
) -> None:
    served = 0

    async def script(_: TokenRequest, reply: Reply) -> None:
        nonlocal served
        served += 1
        await trio.sleep_forever()

    async with inference_room(script) as room:
        tasks, files = await living_tasks(), open_files()
        async with await room.connect() as client:
            if at_once:
                await client.send(http_request("POST", RAW, RAW_PROMPT) + EXTRAS[extra])
                await client.head()
            else:
                await client.generate()
                await client.head()
                for piece in (EXTRAS[extra][:1], EXTRAS[extra][1:]):
                    await client.send(piece)
                    await trio.testing.wait_all_tasks_blocked(0.005)
            await room.relay.wait_until(lambda: room.relay.running == 1)
            leave(client.stream)
            await room.relay.wait_until(lambda: room.relay.cancelled == 1)
        await settled(tasks)
        assert open_files() == files
        assert served == 1, "of the second request nobody wants to know"
        assert await is_healthy(room)


async def test_a_request_behind_a_reply_that_was_cut_is_not_started() -> None:
    served = 0

    async def script(_: TokenRequest, reply: Reply) -> None:
        nonlocal served
        served += 1
        while True:
            reply.piece("a", "C", '"%s"' % ("x" * 100_000))
            await trio.lowlevel.checkpoint()

    async with inference_room(script) as room:
        tasks = await living_tasks()
        async with await room.connect() as client:
            await client.send(http_request("POST", RAW, RAW_PROMPT) * 2)
            await room.relay.wait_until(lambda: room.relay.cancelled == 1)  # it reads too slowly
            await settled(tasks)
        assert served == 1


async def test_a_pipelining_client_that_stays_gets_all_answers_in_order() -> None:
    turns: list[trio.Event] = []

    async def script(request: TokenRequest, reply: Reply) -> None:
        turns.append(trio.Event())
        await turns[-1].wait()
        reply.piece("a", "C", str(request.max_tokens))

    async with inference_room(script) as room, await room.connect() as client:
        for number in (1, 2):
            body = b'{"max_tokens": %d, "raw_prompt": "%b"}' % (number, b"x" * 100_000)
            await client.send(http_request("POST", RAW, body))  # more than is received in advance
        await client.send(http_request("GET", "/health"))
        for number in (1, 2):
            await room.relay.wait_until(lambda number=number: len(turns) == number)  # type: ignore[misc]
            await trio.testing.wait_all_tasks_blocked(0.005)
            assert len(turns) == number
            turns[-1].set()
            assert b'{"ContentToken":%d}' % number in (await client.answer()).body
        assert (await client.answer()).text == "OK"
        assert (await client.request("GET", "/health")).text == "OK"


@pytest.mark.parametrize("leave", [send_fin, half_close])
async def test_the_last_messages_of_a_websocket_count(leave: Callable[[trio.SocketStream], None]) -> None:
    served = 0

    async def script(_: TokenRequest, reply: Reply) -> None:
        nonlocal served
        served += 1

    async with inference_room(script) as room, await room.connect() as client:
        tasks = await living_tasks()
        websocket = await open_socket(client)
        for number in range(100):  # more than fit into the queues between hypercorn and the app
            await websocket.ask(str(number), raw_prompt="x" * 2000)
        leave(client.stream)
        await settled(tasks)
    assert served > 0


@pytest.mark.parametrize("leave", [send_fin, send_rst, half_close])
async def test_a_client_that_leaves_after_its_stream_ended_leaves_nothing_behind(
    leave: Callable[[trio.SocketStream], None],
) -> None:
    async with inference_room() as room:
        tasks, files = await living_tasks(), open_files()
        async with await room.connect() as client:
            assert (await client.request("POST", RAW, RAW_PROMPT)).status == 200
            leave(client.stream)
        await settled(tasks)
        assert open_files() == files
        assert room.relay.cancelled == 0


async def test_a_message_over_the_limit_closes_with_1009_and_is_not_kept() -> None:
    async with inference_room(max_message_bytes=1000) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send("é" * 501)
        assert await websocket.receive() is None
        assert websocket.closed == CloseConnection(1009, "messages are limited to 1000 bytes")


async def test_fragments_count_as_one_message() -> None:
    async with inference_room(max_message_bytes=1000) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send("a" * 1000)
        for _ in range(11):
            await websocket.send_event(BytesMessage(data=b"a" * 100, message_finished=False))
        assert await websocket.receive() is None
        assert websocket.closed is not None
        assert websocket.closed.code == 1009


@pytest.mark.slow
async def test_a_client_that_goes_on_sending_too_much_costs_no_memory() -> None:
    async with inference_room(max_message_bytes=1_000_000) as room, await room.connect() as client:
        websocket = await open_socket(client)
        before = resident_bytes()
        block = TextMessage(data="a" * 1_000_000, message_finished=False)
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):  # noqa: PT012
            for _ in range(1000):
                await websocket.send_event(block)
        assert resident_bytes() - before < 20_000_000
        assert await is_healthy(room)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_compression_is_never_agreed_to() -> None:
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client, SOCKET, "Sec-WebSocket-Extensions: permessage-deflate")
        await client.send(masked(0xC1, b"\x01\x00"))  # a compressed frame
        assert await websocket.receive() is None
        assert websocket.closed is not None
        assert websocket.closed.code == 1002


async def test_hypercorn_still_has_the_seams_that_are_replaced() -> None:
    replaced = {
        (Connection, TCPServer): ("run", "protocol_send", "_idle_timeout"),
        (Http1, H11Protocol): ("handle", "_check_protocol", "_create_stream"),
        (WebSocket, WSStream): ("handle", "_handle_events", "_send_pings"),
        (MessageBuffer, WebsocketBuffer): ("extend", "clear"),
    }
    for (ours, theirs), names in replaced.items():
        for name in names:
            mine, upstream = getattr(ours, name), getattr(theirs, name)
            assert [*inspect.signature(mine).parameters] == [*inspect.signature(upstream).parameters]
    # What the replacements rely on, by name.
    source = inspect.getsource(TCPServer)
    assert "self.idle_task = TrioSingleTask()" in source
    assert "self.send_lock = trio.Lock()" in source
    assert "await self._check_protocol(event)" in inspect.getsource(H11Protocol)
    assert "await self._create_stream(event)" in inspect.getsource(H11Protocol)
    assert "self.task_group.spawn(self._send_pings)" in inspect.getsource(WSStream)
