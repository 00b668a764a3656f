"""The WebSocket itself, against real servers on the loopback device."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket
from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionType
from wsproto.events import TextMessage

from paddler.agent.balancer_link import WriteThrough, new_agent_id, stay_connected, text_frame
from paddler.agent.link_session import Connection
from paddler.config import MAX_LINK_MESSAGE_BYTES, Address

pytestmark = pytest.mark.slow

Handler = Callable[[WebSocketRequest], Awaitable[None]]


@pytest.fixture
def patient_clock() -> MockClock:
    """An autojumping clock that waits until data on the loopback device has arrived."""
    return MockClock(autojump_threshold=0.02)


class Sessions:
    """Scripted sessions: each says hello, then echoes until the connection is closed."""

    def __init__(self) -> None:
        self.count = 0
        self.reason = "the connection was closed"

    def open(self, connection: Connection) -> "EchoSession":
        self.count += 1
        return EchoSession(connection, self.reason)


class EchoSession:
    was_accepted = True

    def __init__(self, connection: Connection, reason: str) -> None:
        self._connection = connection
        self._reason = reason

    async def run(self) -> str:
        try:
            self._connection.write("hello")
            while True:
                await self._connection.flush()
                self._connection.write(await self._connection.receive())
        except EOFError:
            return self._reason


def address_of(port: int) -> Address:
    return Address("127.0.0.1", port, f"localhost:{port}")


def connect(sessions: Sessions, port: int) -> Callable[[], Awaitable[None]]:
    return partial(
        stay_connected,
        sessions.open,
        address=address_of(port),
        agent_id="an-agent",
        connect_timeout=5.0,
        disconnect_timeout=1.0,
    )


@asynccontextmanager
async def web_socket_server(handler: Handler) -> AsyncIterator[int]:
    async with trio.open_nursery() as server:
        serve = partial(
            serve_websocket,
            handler,
            "127.0.0.1",
            0,
            ssl_context=None,
            max_message_size=MAX_LINK_MESSAGE_BYTES,
        )
        serving = await server.start(serve)
        yield serving.port
        server.cancel_scope.cancel()


@asynccontextmanager
async def tcp_server(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    async with trio.open_nursery() as server:
        [listener] = await server.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        server.cancel_scope.cancel()


def test_agent_ids_are_nanoids() -> None:
    ids = {new_agent_id() for _ in range(100)}
    assert len(ids) == 100
    assert {len(agent_id) for agent_id in ids} == {21}
    assert all(agent_id.replace("_", "").replace("-", "").isalnum() for agent_id in ids)


async def test_text_goes_both_ways_and_the_path_names_the_agent() -> None:
    done = trio.Event()

    async def balancer(request: WebSocketRequest) -> None:
        assert request.path == "/api/v1/agent_socket/an-agent"
        websocket = await request.accept()
        assert await websocket.get_message() == "hello"
        await websocket.send_message("grüß dich " * 200_000)
        assert await websocket.get_message() == "grüß dich " * 200_000
        done.set()
        with pytest.raises(ConnectionClosed):
            await websocket.get_message()

    sessions = Sessions()
    async with web_socket_server(balancer) as port, trio.open_nursery() as agent:
        agent.start_soon(connect(sessions, port))
        with trio.fail_after(20):
            await done.wait()
        agent.cancel_scope.cancel()
    assert sessions.count == 1


@pytest.mark.parametrize("text", ["", "x" * 125, "x" * 126, "ü" * 40_000, "{}\n"])
def test_text_frames_are_what_a_websocket_server_reads(text: str) -> None:
    server = WebSocket(ConnectionType.SERVER)
    server.receive_data(text_frame(text.encode(), mask=b"\x00\xff\x37\x91"))
    assert "".join(event.data for event in server.events() if isinstance(event, TextMessage)) == text


@asynccontextmanager
async def jammed_pair() -> AsyncIterator[tuple[WriteThrough, trio.SocketStream, bytes]]:
    """A stream whose kernel takes no more, its other end, and what was written so far."""
    own, other = trio.socket.socketpair()
    stream = WriteThrough(trio.SocketStream(own))
    written = b""
    number = 0
    while True:
        number += 1
        data = b"%07d" % number * 1000
        written += data
        if not stream.write(data):
            break
    async with stream, trio.SocketStream(other) as peer:
        yield stream, peer, written


async def test_bytes_keep_their_order_whoever_writes_them(nursery: trio.Nursery) -> None:
    async with jammed_pair() as (stream, peer, written):
        assert not stream.write(b"plain call")
        nursery.start_soon(stream.send_all, b"library" * 50_000)
        await wait_all_tasks_blocked()
        assert not stream.write(b"plain call again")
        with trio.move_on_after(0):
            await stream.flush()
        received = b""
        expected = written + b"plain call" + b"library" * 50_000 + b"plain call again"
        while len(received) < len(expected):
            received += await peer.receive_some()
        assert received == expected
        assert stream.write(b"direct")
        assert await peer.receive_some() == b"direct"


async def test_a_flush_that_is_cancelled_leaves_the_rest_to_the_next() -> None:
    async with jammed_pair() as (stream, peer, written):
        received = b""
        with trio.fail_after(5):
            while len(received) < len(written):
                with trio.move_on_after(0.001):
                    await stream.flush()
                with trio.move_on_after(0.001):
                    received += await peer.receive_some(10_000)
        assert received == written


async def test_writing_to_a_peer_that_left_says_so() -> None:
    async with jammed_pair() as (stream, peer, _):
        await peer.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await stream.flush()
    own, other = trio.socket.socketpair()
    other.close()
    stream = WriteThrough(trio.SocketStream(own))
    with pytest.raises(trio.BrokenResourceError):
        stream.write(b"x")
    await stream.aclose()
    with pytest.raises(trio.BrokenResourceError):
        stream.write(b"x")


async def test_pings_are_answered_among_messages_that_go_past_the_library() -> None:
    """The library shares the socket; were it to send beside us, frames would be torn."""
    answered = 0

    class Flood(Sessions):
        def open(self, connection: Connection) -> EchoSession:
            return FloodingSession(connection, self.reason)

    class FloodingSession(EchoSession):
        async def run(self) -> str:
            for number in range(300):
                self._connection.write(f"{number} " * 10_000)
                await self._connection.flush()
            return await super().run()

    done = trio.Event()

    async def balancer(request: WebSocketRequest) -> None:
        nonlocal answered
        websocket = await request.accept()

        async def ping() -> None:
            nonlocal answered
            while True:
                await websocket.ping()
                answered += 1

        async with trio.open_nursery() as pinging:
            pinging.start_soon(ping)
            for number in range(300):
                assert await websocket.get_message() == f"{number} " * 10_000
            pinging.cancel_scope.cancel()
        done.set()
        with pytest.raises(ConnectionClosed):
            await read_on(websocket)

    async with web_socket_server(balancer) as port, trio.open_nursery() as agent:
        agent.start_soon(connect(Flood(), port))
        with trio.fail_after(20):
            await done.wait()
        agent.cancel_scope.cancel()
    assert answered > 10


async def read_on(websocket: WebSocketConnection) -> None:
    while True:
        await websocket.get_message()


class ClosingBalancer:
    """Welcomes each agent and closes the link after `life` seconds; notes when links came and went."""

    def __init__(self, *, life: float) -> None:
        self.life = life
        self.came: list[float] = []
        self.went: list[float] = []

    async def serve(self, request: WebSocketRequest) -> None:
        websocket = await request.accept()
        self.came.append(trio.current_time())
        await trio.sleep(self.life)
        self.went.append(trio.current_time())
        await websocket.aclose(1001)

    async def meet_an_agent(self, *, duration: float) -> list[float]:
        """Return how long each link was away."""
        async with web_socket_server(self.serve) as port, trio.open_nursery() as agent:
            agent.start_soon(connect(Sessions(), port))
            await trio.sleep(duration)
            agent.cancel_scope.cancel()
        return [came - went for went, came in zip(self.went, self.came[1:], strict=False)]


async def test_a_lost_link_comes_back_within_two_seconds_each_time(
    patient_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "paddler")
    away = await ClosingBalancer(life=3.0).meet_an_agent(duration=16)
    assert len(away) >= 4
    assert max(away) <= 0.2
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert len(caplog.records) > 3  # each time is news
    assert caplog.messages[0].startswith("link to the balancer at localhost:")
    assert caplog.messages[0].endswith(" ended: the connection was closed; reconnecting")


async def test_a_balancer_that_closes_every_link_at_once_is_tried_less_and_less_often(
    patient_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "paddler")
    away = await ClosingBalancer(life=0.0).meet_an_agent(duration=20)
    assert away[0] <= 0.2
    assert 10 <= len(away) <= 20
    assert 1.0 <= max(away) <= 2.1
    assert min(away[5:]) >= 1.0
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.scenario("SH-13")
async def test_nobody_listens_and_one_line_says_so(
    patient_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    sessions = Sessions()
    with caplog.at_level(logging.INFO), trio.move_on_after(10):
        await connect(sessions, port)()
    assert sessions.count == 0
    assert len(caplog.records) == 1
    assert f"localhost:{port}" in caplog.text


async def test_a_balancer_that_starts_late_is_found(patient_clock: MockClock) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    came = trio.Event()

    async def balancer(request: WebSocketRequest) -> None:
        await request.accept()
        came.set()

    async with trio.open_nursery() as agent:
        agent.start_soon(connect(Sessions(), port))
        await trio.sleep(5)
        agent.start_soon(partial(serve_websocket, balancer, "127.0.0.1", port, ssl_context=None))
        with trio.fail_after(2.1):
            await came.wait()
        agent.cancel_scope.cancel()


@pytest.mark.scenario("SH-12")
async def test_a_server_that_accepts_and_never_answers_is_tried_again_and_left_at_once(
    patient_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[float] = []

    async def mute(_: trio.SocketStream) -> None:
        tries.append(trio.current_time())
        await trio.sleep_forever()

    async with tcp_server(mute) as port, trio.open_nursery() as agent:
        agent.start_soon(connect(Sessions(), port))
        await trio.sleep(18)
        before = trio.current_time()
        agent.cancel_scope.cancel()
    assert trio.current_time() - before < 1
    assert len(tries) == 4
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "it did not answer the WebSocket handshake within 5 s; trying again"
    ]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
            "it answered 404 instead of a WebSocket: is this the management service?",
        ),
        (
            b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n",
            "it answered 502 instead of a WebSocket",
        ),
        (b"SSH-2.0-whatever\r\n", "it did not answer the WebSocket handshake within 5 s"),
        (b"", "it did not answer the WebSocket handshake within 5 s"),
    ],
)
async def test_a_server_of_another_kind_is_no_balancer(
    patient_clock: MockClock, caplog: pytest.LogCaptureFixture, reply: bytes, words: str
) -> None:
    async def stranger(stream: trio.SocketStream) -> None:
        await stream.receive_some(1024)
        await stream.send_all(reply)
        await stream.aclose()

    sessions = Sessions()
    async with tcp_server(stranger) as port, trio.open_nursery() as agent:
        agent.start_soon(connect(sessions, port))
        await trio.sleep(8)
        agent.cancel_scope.cancel()
    assert sessions.count == 0
    assert caplog.messages == [f"no link to the balancer at localhost:{port}: {words}; trying again"]


async def test_pings_while_the_agent_leaves_do_no_harm(patient_clock: MockClock) -> None:
    """trio-websocket 0.12.2 may answer one in a state in which it must not; then its reader raises."""
    pinged = trio.Event()

    async def ping_for_ever(websocket: WebSocketConnection) -> None:
        while True:
            await websocket.ping()
            pinged.set()

    async def balancer(request: WebSocketRequest) -> None:
        with pytest.raises(ConnectionClosed):
            await ping_for_ever(await request.accept())

    async with web_socket_server(balancer) as port, trio.open_nursery() as agent:
        agent.start_soon(connect(Sessions(), port))
        await pinged.wait()
        agent.cancel_scope.cancel()


async def test_a_session_that_breaks_ends_its_link_only(
    patient_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Sessions):
        def open(self, connection: Connection) -> EchoSession:
            super().open(connection)
            raise LookupError("a bug")

    async def balancer(request: WebSocketRequest) -> None:
        websocket = await request.accept()
        with pytest.raises(ConnectionClosed):
            await websocket.get_message()

    sessions = Broken()
    async with web_socket_server(balancer) as port, trio.open_nursery() as agent:
        agent.start_soon(connect(sessions, port))
        await trio.sleep(1)
        agent.cancel_scope.cancel()
    assert sessions.count > 1
    assert "a bug" in caplog.text
