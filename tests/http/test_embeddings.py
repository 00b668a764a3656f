"""The stream of an embedding batch, with a scripted relay behind it."""

import json
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from paddler.balancer.running_requests import Reply
from paddler.config import MAX_LINK_MESSAGE_BYTES
from paddler.messages.inference import GenerateEmbeddingBatch, Request
from paddler.messages.tokens import StreamError
from tests.balancer.services import PROMPT, RecordingReply, make_services
from tests.fakes.scripted_agent import agent_status, connected_agent
from tests.http.support import (
    InferenceRoom,
    Script,
    applicable,
    http_request,
    inference_room,
    messages,
    stream_error,
)

PATH = "/api/v1/generate_embedding_batch"
FINAL = {"Embedding": "Done"}


def body(count: int, key: str = "input_batch", text: str = "text") -> bytes:
    documents = [{"id": str(index), "content": text} for index in range(count)]
    return json.dumps({key: documents, "normalization_method": "L2"}).encode()


def with_agents(room: InferenceRoom, count: int) -> None:
    for index in range(count):
        room.fleet.register(f"agent-{index}", None, agent_status(slots=0))


async def ask(script: Script, batch: bytes, *, agents: int = 2, batch_size: int = 256) -> list[Any]:
    """Send a batch and return the messages of its answer."""
    state = applicable(enable_embeddings=True, embedding_batch_size=batch_size)
    async with inference_room(script, state=state) as room, await room.connect() as client:
        with_agents(room, agents)
        answer = await client.request("POST", PATH, batch)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-cache"
    return messages(answer.body)


def response_of(message: Any) -> Any:
    return message["Response"]["response"]


async def echo(request: Request, reply: Reply) -> None:
    assert isinstance(request, GenerateEmbeddingBatch)
    for document in request.input_batch:
        await trio.lowlevel.checkpoint()
        reply.piece("agent-a", "V", json.dumps({"id": document.id}))
    reply.piece("agent-a", "F", '"Done"')


@pytest.mark.parametrize("key", ["input_batch", "input_documents"])
async def test_chunks_share_a_stream_that_ends_with_one_done(key: str) -> None:
    *vectors, last = await ask(echo, body(5, key))
    assert sorted(response_of(message)["Embedding"]["id"] for message in vectors) == list("01234")
    assert {message["Response"]["generated_by"] for message in vectors} == {"agent-a"}
    ids = {message["Response"]["request_id"] for message in vectors}
    assert len(ids) == 2
    assert response_of(last) == FINAL
    assert last["Response"]["generated_by"] is None
    assert last["Response"]["request_id"] not in ids


async def test_an_empty_batch_is_done_at_once() -> None:
    [message] = await ask(echo, body(0))
    assert response_of(message) == FINAL


async def test_other_terminals_and_errors_of_chunks_are_passed_on_and_end_nothing() -> None:
    async def script(request: Request, reply: Reply) -> None:
        assert isinstance(request, GenerateEmbeddingBatch)
        await trio.lowlevel.checkpoint()
        match request.input_batch[0].id:
            case "0":
                reply.error(StreamError(503, "Buffered requests overflow"))
            case "1":
                reply.piece("agent-a", "F", '"NoEmbeddingsProduced"')
            case "2":
                reply.piece("agent-a", "F", '{"Error":"document 2 is empty"}')
            case _:
                await echo(request, reply)

    answers = await ask(script, body(4), batch_size=1)
    [error] = [message for message in answers if "Error" in message]
    assert stream_error(error) == StreamError(503, "Buffered requests overflow")
    results = [response_of(message)["Embedding"] for message in answers if "Response" in message]
    assert sorted(results, key=str) == sorted(
        ["NoEmbeddingsProduced", {"Error": "document 2 is empty"}, {"id": "3"}, "Done"], key=str
    )
    assert results[-1] == "Done"


async def test_a_chunk_that_breaks_breaks_only_itself(logged_errors: list[Any]) -> None:
    async def script(request: Request, reply: Reply) -> None:
        assert isinstance(request, GenerateEmbeddingBatch)
        if request.input_batch[0].id == "0":
            raise ZeroDivisionError
        await echo(request, reply)

    answers = await ask(script, body(2))
    assert [stream_error(message).code for message in answers if "Error" in message] == [500]
    assert response_of(answers[-1]) == FINAL
    assert len(answers) == 3
    assert len(logged_errors) == 1
    logged_errors.clear()


async def test_a_client_that_leaves_cancels_all_chunks() -> None:
    async def script(_request: Request, _reply: Reply) -> None:
        await trio.sleep_forever()

    state = applicable(enable_embeddings=True)
    async with inference_room(script, state=state) as room:
        with_agents(room, 3)
        async with await room.connect() as client:
            await client.send(http_request("POST", PATH, body(6)))
            assert (await client.head())[0] == 200
            await room.relay.wait_until(lambda: room.relay.running == 3)
        await room.relay.wait_until(lambda: room.relay.cancelled == 3)


@pytest.mark.scenario("EM-21")
async def test_a_stored_batch_size_of_zero_is_an_error() -> None:
    state = applicable(enable_embeddings=True, embedding_batch_size=0)
    async with inference_room(echo, state=state) as room, await room.connect() as client:
        with_agents(room, 1)
        answer = await client.request("POST", PATH, body(1))
    assert (answer.status, answer.text) == (500, "embedding_batch_size is zero despite validation")


@pytest.mark.slow
@pytest.mark.scenario("EM-20")
async def test_a_dead_link_of_the_only_agent_is_an_error_within_the_stream(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2, unread_frames=1):
        huge = attrs.evolve(PROMPT, raw_prompt="x" * (MAX_LINK_MESSAGE_BYTES - 200))
        nursery.start_soon(services.relay.serve, huge, RecordingReply())
        await wait_all_tasks_blocked()
        error, last = await ask(services.relay.serve, body(1, text="x" * 1024 * 1024), agents=1)
        assert stream_error(error) == StreamError(500, "Failed to generate response")
        assert response_of(last) == FINAL
        nursery.cancel_scope.cancel()
