import json
import select
import socket

import pytest
import trio
import trio.testing
from quart import Response

from paddler.balancer.changes import Changes
from paddler.balancer.running_requests import Reply
from paddler.config import MAX_CLIENT_MESSAGE_BYTES
from paddler.http.replies import LARGEST_HELD_BYTES, Envelope, EventStream, new_request_id
from paddler.http.surface import make_app, open_surface
from paddler.messages.inference import ContinueFromRawPrompt, TokenRequest
from paddler.messages.tokens import StreamError
from tests.http.support import (
    DONE,
    LOOPBACK,
    InferenceRoom,
    RawClient,
    inference_room,
    messages,
    open_socket,
)


async def connect_with_small_window(port: int) -> RawClient:
    """Return a client whose kernel takes a few kilobytes of what it does not read."""
    raw = trio.socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await raw.connect(("127.0.0.1", port))
    return RawClient(trio.SocketStream(raw))


def prompt(**changes: object) -> bytes:
    return json.dumps({"max_tokens": 1, "raw_prompt": "a", **changes}).encode()


def test_request_ids_are_unlike_each_other() -> None:
    assert len({new_request_id() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("name", ["agent", None, "0", 'quoted "0"', "é\n"])
def test_an_envelope_is_the_documented_message(name: str | None) -> None:
    envelope = Envelope("00")
    for letter, result in (
        ("C", {"ContentToken": "x"}),
        ("R", {"ReasoningToken": "x"}),
        ("T", {"ToolCallToken": "x"}),
        ("U", {"UndeterminableToken": "x"}),
    ):
        assert json.loads(envelope.message(name, letter, '"x"')) == {
            "Response": {"generated_by": name, "request_id": "00", "response": {"GeneratedToken": result}}
        }
    for letter in "ED":
        message = json.loads(envelope.message(name, letter, '{"a": [0]}'))
        assert message["Response"]["response"] == {"GeneratedToken": {"a": [0]}}
    for letter in "VF":
        message = json.loads(envelope.message(name, letter, '"Done"'))
        assert message["Response"]["response"] == {"Embedding": "Done"}
    assert json.loads(envelope.error(StreamError(502, "gone"))) == {
        "Error": {"request_id": "00", "error": {"code": 502, "description": "gone"}}
    }


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_pieces_of_a_step_are_one_write_unless_they_are_large(version: str) -> None:
    looked = [trio.Event() for _ in range(3)]

    async def script(_: TokenRequest, reply: Reply) -> None:
        reply.piece("a", "C", '"first"')
        await looked[0].wait()
        reply.piece("a", "C", '"one"', more=True)
        reply.piece("a", "C", '"two"', more=True)
        await looked[1].wait()
        reply.piece("a", "C", '"three"')
        await looked[2].wait()
        reply.piece("a", "C", '"%s"' % ("x" * LARGEST_HELD_BYTES), more=True)
        await trio.sleep_forever()

    def has_more(client: RawClient) -> bool:
        return bool(select.select([client.stream.socket.fileno()], [], [], 0)[0])

    async with inference_room(script) as room, await room.connect() as client:
        await client.generate(version=version)
        received = b""
        while b"first" not in received:
            received += await client.stream.receive_some(65536)
        looked[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert not has_more(client)
        looked[1].set()
        await trio.testing.wait_all_tasks_blocked()
        together = await client.stream.receive_some(65536)
        assert [together.count(text) for text in (b"one", b"two", b"three")] == [1, 1, 1]
        looked[2].set()
        await trio.testing.wait_all_tasks_blocked()
        assert has_more(client)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_slow_readers_get_every_byte_in_order(version: str) -> None:
    tokens = 1000

    async def script(request: TokenRequest, reply: Reply) -> None:
        for number in range(tokens):
            reply.piece("a", "C", f'"{number} {"x" * (number % 97)}"', more=number % 3 == 0)
            if number % (1 + request.max_tokens) == 0:
                await trio.lowlevel.checkpoint()
        reply.piece("a", "D", DONE)

    async def read_slowly(port: int, burst: int) -> None:
        async with await connect_with_small_window(port) as client:
            await client.generate(prompt(max_tokens=burst), version=version)
            await trio.sleep(0.02 * (burst % 3))
            lines = messages((await client.answer()).body)
            texts = [line["Response"]["response"]["GeneratedToken"] for line in lines]
            assert texts.pop() == {"Done": {"usage": {}}}
            expected = [{"ContentToken": f"{number} {'x' * (number % 97)}"} for number in range(tokens)]
            assert texts == expected

    async with inference_room(script) as room, trio.open_nursery() as readers:
        for burst in range(12):
            readers.start_soon(read_slowly, room.surface.port, burst)


async def flood(request: TokenRequest, reply: Reply) -> None:
    """Send four kilobytes for ever, or as often as the request says."""
    for _ in range(request.max_tokens):
        reply.piece("a", "C", '"%s"' % ("x" * 4096))
        await trio.lowlevel.checkpoint()
    reply.piece("a", "D", DONE)


@pytest.mark.slow
@pytest.mark.parametrize("over_websocket", [False, True])
async def test_a_stopped_reader_ends_alone(over_websocket: bool) -> None:
    sent = 0

    async def script(request: TokenRequest, reply: Reply) -> None:
        nonlocal sent
        if request == ContinueFromRawPrompt(max_tokens=1, raw_prompt="neighbour"):
            await neighbour(reply)
            return
        while True:
            reply.piece("a", "C", '"%s"' % ("x" * 4096))
            sent += 4096
            await trio.lowlevel.checkpoint()

    async def neighbour(reply: Reply) -> None:
        for number in range(200):
            reply.piece("a", "C", str(number))
            await trio.sleep(0.001)
        reply.piece("a", "D", DONE)

    async def read(room: InferenceRoom) -> None:
        async with await room.connect() as client:
            await client.generate(prompt(raw_prompt="neighbour"))
            assert len(messages((await client.answer()).body)) == 201

    async with inference_room(script) as room:
        async with await connect_with_small_window(room.surface.port) as client:
            async with trio.open_nursery() as neighbours:
                for _ in range(3):
                    neighbours.start_soon(read, room)
                if over_websocket:
                    await (await open_socket(client)).ask("1")
                else:
                    await client.generate()
                await room.relay.wait_until(lambda: room.relay.cancelled == 1)
            assert 1_000_000 < sent < 2_000_000
            if not over_websocket:
                try:
                    assert not (await client.rest()).endswith(b"0\r\n\r\n")
                except trio.BrokenResourceError:
                    pass  # the end of the connection as well
        assert room.relay.cancelled == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "socket", "events"])
async def test_clients_that_never_read_do_not_hold_up_the_end(kind: str) -> None:
    clients: list[RawClient] = []
    with trio.fail_after(60) as end:
        async with inference_room(flood) as room:
            app = make_app("events", cors_allowed_hosts=())

            @app.get("/events")
            async def events() -> Response:
                changes = Changes()
                body = EventStream(lambda: "x" * 900_000, changes=changes.subscribe(), stopping=trio.Event())
                return Response(body, content_type="text/event-stream")

            async with open_surface(
                app,
                name="events",
                address=LOOPBACK,
                stopping=room.stopping,
                max_message_bytes=MAX_CLIENT_MESSAGE_BYTES,
            ) as surface:
                port = surface.port if kind == "events" else room.surface.port
                for _ in range(3):
                    client = await connect_with_small_window(port)
                    clients.append(client)
                    match kind:
                        case "tokens":
                            await client.generate(prompt(max_tokens=100))
                        case "socket":
                            await (await open_socket(client)).ask("1", max_tokens=100)
                        case _:
                            await client.send(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
                await trio.sleep(0.2)
                end.deadline = trio.current_time() + 4  # without a cut, USER_TIMEOUT_MS is what ends it
                room.stop()
            # The other surface's block is left here; its grace is over sooner.
    for client in clients:
        await trio.aclose_forcefully(client.stream)


async def test_a_waiting_request_is_told_of_the_shutdown_and_its_stream_ends_well() -> None:
    async def script(_: TokenRequest, reply: Reply) -> None:
        await room.relay.stopping.wait()
        reply.error(StreamError(503, "balancer is shutting down"))

    async with inference_room(script) as room, await room.connect() as client:
        await client.generate()
        await client.head()
        room.stop()
        lines = [json.loads(chunk) async for chunk in client.chunks()]
        assert [line["Error"]["error"]["code"] for line in lines] == [503]
        assert await client.ends()
        with pytest.raises(OSError, match="all attempts to connect"):
            await room.connect()


async def test_a_snapshot_and_a_comment_come_first_and_comments_every_4_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    changes = Changes()
    stream = EventStream(lambda: "{}", changes=changes.subscribe(), stopping=trio.Event())
    started = trio.current_time()
    assert await stream.__anext__() == b"data: {}\n\n: keep-alive\n\n"
    assert trio.current_time() == started
    await trio.sleep(1)
    changes.notify()
    assert await stream.__anext__() == b"data: {}\n\n"  # does not put off the comment
    for number in (1, 2, 3):
        assert await stream.__anext__() == b": keep-alive\n\n"
        assert trio.current_time() - started == pytest.approx(4 * number)


async def test_changes_before_the_writer_runs_are_merged_and_none_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    changes, value = Changes(), 0
    stream = EventStream(lambda: str(value), changes=changes.subscribe(), stopping=trio.Event())
    await stream.__anext__()
    for value in range(1, 5):  # noqa: B007 read by the snapshot
        changes.notify()
    assert await stream.__anext__() == b"data: 4\n\n"
    assert await stream.__anext__() == b": keep-alive\n\n"


@pytest.mark.parametrize("when", ["before", "while waiting"])
async def test_a_stopping_surface_ends_its_event_streams(
    when: str, autojump_clock: trio.testing.MockClock
) -> None:
    stopping = trio.Event()
    stream = EventStream(lambda: "", changes=Changes().subscribe(), stopping=stopping)
    await stream.__anext__()
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            if when != "before":
                await trio.sleep(1)
            stopping.set()

        nursery.start_soon(stop)
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
