from typing import Any

import pytest
import trio
import trio.testing
from wsproto.events import BytesMessage, CloseConnection
from wsproto.events import Ping as PingFrame

from paddler.balancer.running_requests import Reply
from paddler.http.inference_socket import OUTBOX_BYTES, Outbox
from paddler.messages.inference import TokenRequest
from paddler.messages.tokens import StreamError
from tests.http.support import (
    DONE,
    RAW_PROMPT,
    applicable,
    http_request,
    inference_room,
    open_socket,
    stream_error,
)

PATH = "/api/v1/inference_socket"
DISABLED = {"Notification": "TokenGenerationDisabled"}
ENABLED = {"Notification": "TokenGenerationEnabled"}


async def endless(_: TokenRequest, reply: Reply) -> None:
    reply.piece("a", "C", '"1"')
    await trio.sleep_forever()


async def echo(request: TokenRequest, reply: Reply) -> None:
    assert hasattr(request, "raw_prompt")
    for word in request.raw_prompt.split():
        reply.piece("a", "C", f'"{word}"')
        await trio.lowlevel.checkpoint()
    reply.piece("a", "D", DONE)


def request_id(message: Any) -> str:
    [content] = message.values()
    identifier: str = content["request_id"]
    return identifier


def result(message: Any) -> Any:
    return message["Response"]["response"]["GeneratedToken"]


async def test_many_requests_run_side_by_side() -> None:
    async with inference_room(echo) as room, await room.connect() as client:
        websocket = await open_socket(client)
        for number in range(5):
            await websocket.ask(f"r-{number}", raw_prompt=f"one two {number}")
        received: dict[str, list[Any]] = {}
        for _ in range(20):
            message = await websocket.receive()
            received.setdefault(request_id(message), []).append(result(message))
    assert received == {
        f"r-{number}": [
            {"ContentToken": "one"},
            {"ContentToken": "two"},
            {"ContentToken": str(number)},
            {"Done": {"usage": {}}},
        ]
        for number in range(5)
    }


async def test_a_conversation_is_served_too() -> None:
    conversation = {
        "add_generation_prompt": True,
        "conversation_history": [{"role": "user", "content": "hi"}],
        "enable_thinking": False,
        "max_tokens": 1,
    }
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send(
            {"Request": {"id": "1", "request": {"ContinueFromConversationHistory": conversation}}}
        )
        assert result(await websocket.receive()) == {"ContentToken": "Hi"}


async def test_an_id_in_use_is_refused_and_its_request_goes_on() -> None:
    go_on = trio.Event()

    async def script(_: TokenRequest, reply: Reply) -> None:
        await go_on.wait()
        reply.piece("a", "D", DONE)
        await trio.sleep_forever()  # the id is free although the relay has not returned

    async with inference_room(script) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.ask("1")
        await websocket.ask("1")
        refused = await websocket.receive()
        assert request_id(refused) == "1"
        assert stream_error(refused) == StreamError(
            400, 'Request id "1" is already in flight on this connection'
        )
        go_on.set()
        assert result(await websocket.receive()) == {"Done": {"usage": {}}}
        await websocket.ask("1")
        assert result(await websocket.receive()) == {"Done": {"usage": {}}}


async def test_stop_responding_is_silent_and_leaves_the_siblings_alone() -> None:
    async with inference_room(endless) as room, await room.connect() as client:
        websocket = await open_socket(client)
        for name in ("1", "2"):
            await websocket.ask(name)
            assert request_id(await websocket.receive()) == name
        for name in ("unknown", "1", "1"):
            await websocket.send({"Notification": {"StopRespondingTo": name}})
        await room.relay.wait_until(lambda: room.relay.cancelled == 1)
        assert room.relay.running == 1
        room.relay.script = echo
        await websocket.ask("1", raw_prompt="again")
        message = await websocket.receive()
        assert (request_id(message), result(message)) == ("1", {"ContentToken": "again"})


async def test_a_socket_opened_in_embeddings_mode_is_told_first_and_requests_end_at_once() -> None:
    state = applicable(enable_embeddings=True)
    async with inference_room(state=state) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.ask("1")
        assert await websocket.receive() == DISABLED
        message = await websocket.receive()
        assert message["Response"]["generated_by"] is None
        assert result(message) == {
            "TokenGenerationDisabled": "Token generation is disabled while the cluster is configured "
            "for embeddings"
        }
        room.reconciliation.apply(applicable())
        assert await websocket.receive() == ENABLED
        await websocket.ask("1")
        assert result(await websocket.receive()) == {"ContentToken": "Hi"}


async def test_every_change_of_mode_gives_one_notification_and_other_changes_none() -> None:
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client)
        for embeddings, expected in ((True, DISABLED), (False, ENABLED), (True, DISABLED)):
            room.reconciliation.apply(applicable(enable_embeddings=embeddings))
            assert await websocket.receive() == expected
            room.reconciliation.apply(applicable(enable_embeddings=embeddings, top_k=1))
            await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "description": "",
                            "parameters": {"type": "object", "properties": {}, "required": ["x"]},
                        },
                    }
                ]
            },
            "Invalid request parameters: Required field 'x' not found in properties",
        ),
        (
            {"tool_choice": "required"},
            "Invalid request parameters: `tool_choice` requires a call, but there are no tools",
        ),
        (
            {"sampling": {"temperature": -1}},
            "Invalid request parameters: `sampling.temperature` must be between 0 and 100",
        ),
    ],
)
async def test_invalid_parameters_are_an_error_of_their_id_only(changes: dict[str, Any], text: str) -> None:
    conversation = {
        "add_generation_prompt": True,
        "conversation_history": [],
        "enable_thinking": False,
        "max_tokens": 1,
        **changes,
    }
    async with inference_room(endless) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.ask("1")
        await websocket.receive()
        await websocket.send(
            {"Request": {"id": "2", "request": {"ContinueFromConversationHistory": conversation}}}
        )
        refused = await websocket.receive()
        assert (request_id(refused), stream_error(refused)) == ("2", StreamError(400, text))
        assert room.relay.running == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[" * 100_000,
        '"Request"',
        '{"Request": {"id": null}}',
        '{"Request": {"id": true, "request": {}}}',
        '{"Request": {"id": ["1"]}}',
        '{"id": 1}',
        '{"Request": {"request": {}}}',
        '{"Notification": "Unknown"}',
        '{"Notification": {"StopRespondingTo": 5}}',
        '{"Error": {"request_id": "1", "error": {"code": 1, "description": "text"}}}',
        '{"New": {}}',
        '"\\ud800"',
    ],
)
async def test_what_cannot_be_understood_is_ignored(text: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send(text)
        await websocket.send_event(BytesMessage(data=text.encode()))
        await websocket.ask("1")
        assert result(await websocket.receive()) == {"ContentToken": "Hi"}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            {"ContinueFromRawPrompt": {"max_tokens": 1, "raw_prompt": "a", "sampling": {"topk": 1}}},
            "unknown field `topk`",
        ),
        ({"GenerateEmbeddingBatch": {}}, "unknown variant `GenerateEmbeddingBatch`"),
    ],
)
async def test_a_request_of_a_wrong_shape_is_an_error_of_its_id(request_: Any, words: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send({"Request": {"id": "1", "request": request_}})
        refusal = await websocket.receive()
        assert refusal["Error"]["request_id"] == "1"
        error = stream_error(refusal)
        assert error.code == 400
        assert words in error.description
        await websocket.ask("1")
        assert result(await websocket.receive()) == {"ContentToken": "Hi"}


@pytest.mark.parametrize(("number", "text"), [("6", "6"), ("-1.5", "-1.5"), ("9" * 4000, "9" * 4000)])
async def test_an_id_that_is_a_number_is_an_error_of_its_text(number: str, text: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client)
        raw_prompt = RAW_PROMPT.decode()
        await websocket.send(
            f'{{"Request": {{"id": {number}, "request": {{"ContinueFromRawPrompt": {raw_prompt}}}}}}}'
        )
        with trio.fail_after(5):
            refusal = await websocket.receive()
        assert request_id(refusal) == text
        error = stream_error(refusal)
        assert (error.code, error.description) == (400, "Request id must be a text, not a number")


async def test_a_request_without_its_envelope_is_an_error_of_its_id() -> None:
    async with inference_room() as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send({"id": "1", "request": {"ContinueFromRawPrompt": {}}})
        with trio.fail_after(5):
            refusal = await websocket.receive()
        assert request_id(refusal) == "1"
        assert stream_error(refusal) == StreamError(
            400,
            "Json deserialize error: expected an object with exactly one key, one of "
            "`Error`, `Notification`, `Request`",
        )


async def test_a_request_that_breaks_the_relay_ends_with_an_error_of_its_own(
    logged_errors: list[object],
) -> None:
    async def script(_: TokenRequest, reply: Reply) -> None:
        raise RuntimeError("a bug")

    async with inference_room(script) as room, await room.connect() as client:
        websocket = await open_socket(client)
        for name in ("1", "2"):
            await websocket.ask(name)
            assert stream_error(await websocket.receive()) == StreamError(500, "Internal server error")
    assert len(logged_errors) == 2


@pytest.mark.parametrize("relay_first", [True, False])
async def test_shutdown_tells_every_request_and_then_closes(relay_first: bool) -> None:
    async def script(_: TokenRequest, reply: Reply) -> None:
        await room.relay.stopping.wait()
        reply.error(StreamError(503, "balancer is shutting down"))

    async with inference_room(script) as room, await room.connect() as client:
        websocket = await open_socket(client)
        for name in ("1", "2", "3"):
            await websocket.ask(name)
        await room.relay.wait_until(lambda: room.relay.running == 3)
        if relay_first:
            room.relay.shut_down()
            await trio.lowlevel.checkpoint()
        room.stop()
        errors = [await websocket.receive() for _ in range(3)]
        assert sorted(map(request_id, errors)) == ["1", "2", "3"]
        assert {stream_error(error) for error in errors} == {StreamError(503, "balancer is shutting down")}
        assert await websocket.receive() is None
        assert websocket.closed == CloseConnection(1001, "Server shutting down")
        assert await client.ends()


async def test_the_limit_of_an_outbox_falls_with_what_leaves() -> None:
    overflows: list[int] = []
    go_on = trio.Event()

    async def send(_: list[str]) -> None:
        await go_on.wait()

    outbox = Outbox(on_overflow=lambda: overflows.append(1))
    outbox.set_limit(OUTBOX_BYTES + 100)
    outbox.put("a" * OUTBOX_BYTES)
    async with trio.open_nursery() as writer:
        writer.start_soon(outbox.drain_forever, send)
        await trio.testing.wait_all_tasks_blocked()
        outbox.set_limit(50)  # requests ended
        outbox.put("b" * 90)
        assert not overflows, "it was within bounds a moment ago"
        go_on.set()
        await outbox.wait_until_sent()
        outbox.put("c" * 51)
        assert overflows == [1]
        outbox.put("d")
        assert overflows == [1]
        writer.cancel_scope.cancel()


async def test_the_limit_of_an_outbox_does_not_fall_below_its_headroom_at_once() -> None:
    overflows: list[int] = []
    sent = trio.Event()

    async def send(messages: list[str]) -> None:
        outbox.put("b" * 80)  # while these are on their way
        sent.set()
        if messages != ["a" * 80]:
            await trio.sleep_forever()

    outbox = Outbox(on_overflow=lambda: overflows.append(1))
    outbox.set_limit(300)  # falls at once while nothing waits
    outbox.put("a" * 80)
    outbox.set_limit(100)
    async with trio.open_nursery() as writer:
        writer.start_soon(outbox.drain_forever, send)
        await trio.testing.wait_all_tasks_blocked()
        assert not overflows  # 300 - 80 is what it may hold now, of which 160 are put
        outbox.put("c" * 60)
        assert not overflows
        outbox.put("c")
        assert overflows == [1]
        writer.cancel_scope.cancel()


@pytest.mark.parametrize("length", [4096, 4097, 400_000])
async def test_a_long_id_is_refused_and_the_others_go_on(length: int) -> None:
    async with inference_room(endless) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.ask("1")
        assert request_id(await websocket.receive()) == "1"
        name = "x" * length
        await websocket.ask("y" * 2_000_000)  # not even an answer fits
        await websocket.ask(name)
        message = await websocket.receive()
        assert request_id(message) == name
        if length > 4096:
            assert stream_error(message) == StreamError(400, "Request id is longer than 4096 characters")
            assert room.relay.running == 1
        else:
            assert room.relay.running == 2


async def test_a_close_frame_is_answered_and_cancels_the_requests() -> None:
    async with inference_room(endless) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.ask("1")
        await websocket.receive()
        await websocket.send_event(CloseConnection(code=1000, reason="bye"))
        assert await websocket.receive() is None
        assert websocket.closed == CloseConnection(1000, "bye")
        await room.relay.wait_until(lambda: room.relay.cancelled == 1)


async def test_the_server_pings_at_once_and_answers_pings() -> None:
    async with inference_room(endless) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.send_event(PingFrame(payload=b"are you there"))
        await websocket.ask("1")
        await websocket.receive()
        assert websocket.pings == 1
        assert b"are you there" in websocket.pongs


async def test_without_an_upgrade_it_is_a_bad_request() -> None:
    async with inference_room() as room, await room.connect() as client:
        text = "This path is served over WebSocket only"
        answer = await client.request("GET", PATH)
        assert (answer.status, answer.text) == (400, text)
        await client.send(http_request("GET", PATH, None, "Connection: upgrade", "Upgrade: other"))
        answer = await client.answer()
        assert (answer.status, answer.text) == (400, text)


@pytest.mark.slow
async def test_a_long_message_comes_whole() -> None:
    async def script(request: TokenRequest, reply: Reply) -> None:
        assert hasattr(request, "raw_prompt")
        reply.piece("a", "C", f'"{len(request.raw_prompt)}"')

    async with inference_room(script) as room, await room.connect() as client:
        websocket = await open_socket(client)
        await websocket.ask("1", raw_prompt="a" * 5_000_000)
        assert result(await websocket.receive()) == {"ContentToken": "5000000"}
