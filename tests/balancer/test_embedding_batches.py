"""How a batch is cut, and that its chunks live and end together."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from paddler.balancer.embedding_batches import serve_chunks, split
from paddler.messages.inference import EmbeddingDocument, GenerateEmbeddingBatch
from tests.balancer.services import RecordingReply, make_services
from tests.fakes.scripted_agent import connected_agent


def batch(count: int) -> GenerateEmbeddingBatch:
    documents = tuple(EmbeddingDocument(str(index), "text") for index in range(count))
    return GenerateEmbeddingBatch(documents, "L2")


@pytest.mark.parametrize(
    ("count", "agents", "batch_size", "sizes"),
    [
        (12, 1, 256, [12]),
        (12, 2, 256, [6, 6]),
        (3, 4, 256, [1, 1, 1]),
        (10, 4, 256, [3, 3, 2, 2]),
        (600, 2, 256, [200, 200, 200]),
        (16, 4, 1, [1] * 16),
        (0, 4, 256, []),
        (5, 0, 2, [2, 2, 1]),
    ],
)
def test_chunks_are_the_documented_ones(count: int, agents: int, batch_size: int, sizes: list[int]) -> None:
    assert [
        len(chunk.input_batch) for chunk in split(batch(count), agents=agents, batch_size=batch_size)
    ] == sizes


@given(st.integers(0, 300), st.integers(0, 20), st.integers(1, 300))
def test_chunks_keep_every_document_in_order_and_evenly(count: int, agents: int, batch_size: int) -> None:
    whole = batch(count)
    chunks = split(whole, agents=agents, batch_size=batch_size)
    assert tuple(document for chunk in chunks for document in chunk.input_batch) == whole.input_batch
    assert len(chunks) == min(count, max(agents, -(-count // batch_size)))
    sizes = [len(chunk.input_batch) for chunk in chunks]
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or 0 < sizes[-1] <= sizes[0] <= min(sizes[-1] + 1, batch_size)


async def test_each_chunk_takes_a_slot_and_cancelling_stops_them_all(nursery: trio.Nursery) -> None:
    services = make_services()
    replies: list[RecordingReply] = []

    async def serve(chunk: GenerateEmbeddingBatch) -> None:
        replies.append(RecordingReply())
        await services.relay.serve(chunk, replies[-1])

    async with connected_agent(services.links, slots=3) as agent:
        scope = trio.CancelScope()

        async def client() -> None:
            with scope:
                await serve_chunks(batch(5), serve, agents=1, batch_size=2)

        nursery.start_soon(client)
        await wait_all_tasks_blocked()
        assert services.slots() == (3, 3)
        requests = [await agent.next_embedding() for _ in range(3)]
        assert sorted(len(request.body.input_batch) for request in requests) == [1, 2, 2]
        agent.step((requests[0].request, "V", '{"Embedding":{}}'), (requests[0].request, "F", '"Done"'))
        await wait_all_tasks_blocked()
        assert services.slots() == (2, 3)
        assert sorted(reply.letters for reply in replies) == ["", "", "VF"]
        scope.cancel()
        await wait_all_tasks_blocked()
        assert {(await agent.next_stop()).request for _ in range(2)} == {
            request.request for request in requests[1:]
        }
        for request in requests[1:]:
            agent.step((request.request, "F", '"Done"'))
        await wait_all_tasks_blocked()
        assert services.slots() == (0, 3)


async def test_a_long_batch_travels_in_parts(nursery: trio.Nursery) -> None:
    services = make_services()
    document = EmbeddingDocument("long", "text " * 200_000)
    reply = RecordingReply()
    async with connected_agent(services.links) as agent:
        nursery.start_soon(services.relay.serve, GenerateEmbeddingBatch((document,), "None"), reply)
        request = await agent.next_embedding()
        assert request.body.input_batch == (document,)
        agent.step((request.request, "F", '"NoEmbeddingsProduced"'))
        await wait_all_tasks_blocked()
        assert reply.pieces == [("agent-a", "F", '"NoEmbeddingsProduced"')]
