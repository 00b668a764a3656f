"""Embedding batches: the whole cluster with the bundled embedding model."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from paddler.messages.state import DEFAULT_PARAMETERS, DesiredState, LocalModel, PoolingType
from tests.cluster import FIXTURES, Cluster, Message, cluster, raw_prompt, state
from tests.streams import open_stream

pytestmark = pytest.mark.slow

MODEL = LocalModel(str(FIXTURES / "paddler-tiny-embed.gguf"))
DIMENSIONS = 128
DONE = {"Embedding": "Done"}


def embedding_state(**changes: Any) -> DesiredState:
    parameters = {"enable_embeddings": True, "context_size": 2048, **changes}
    return state(MODEL, attrs.evolve(DEFAULT_PARAMETERS, **parameters))


def documents(count: int, prefix: str = "doc") -> dict[str, str]:
    return {f"{prefix}-{index}": f"This is sentence number {index}." for index in range(count)}


@attrs.frozen
class Outcome:
    """All messages of one batch but the final `Done`, by kind."""

    vectors: dict[str, list[float]]
    messages: list[Message]
    oversized: list[Message]
    others: list[Any]
    errors: list[Message]

    @property
    def agents(self) -> set[str]:
        return {message["Response"]["generated_by"] for message in self.messages if "Response" in message}


def batch(texts: dict[str, str], normalization_method: Any = "None") -> Message:
    pairs = [{"id": name, "content": content} for name, content in texts.items()]
    return {"input_batch": pairs, "normalization_method": normalization_method}


@asynccontextmanager
async def posted(running: Cluster, body: Message) -> AsyncIterator[Any]:
    url = f"{running.inference_url}/api/v1/generate_embedding_batch"
    async with open_stream("POST", url, body) as response:
        assert response.status_code == 200, await response.text()
        yield response


async def embed(running: Cluster, texts: dict[str, str], normalization_method: Any = "None") -> Outcome:
    """Send a batch; see that it ends with the one final message, whose id is its own."""
    async with posted(running, batch(texts, normalization_method)) as response:
        *messages, last = await response.messages()
    assert last["Response"]["response"] == DONE
    assert last["Response"]["generated_by"] is None
    outcome = Outcome({}, messages, [], [], [])
    for message in messages:
        if "Error" in message:
            outcome.errors.append(message["Error"]["error"])
            continue
        assert message["Response"]["request_id"] != last["Response"]["request_id"]
        result = message["Response"]["response"]["Embedding"]
        match result:
            case {"Embedding": vector}:
                assert vector["source_document_id"] not in outcome.vectors
                assert vector["normalization_method"] == normalization_method
                outcome.vectors[vector["source_document_id"]] = vector["embedding"]
            case {"DocumentExceedsBatchSize": report}:
                outcome.oversized.append(report)
            case _:
                outcome.others.append(result)
    return outcome


def assert_complete(outcome: Outcome, texts: dict[str, str]) -> None:
    """Check that every document has its vector, and that there is nothing else."""
    assert outcome.vectors.keys() == texts.keys()
    assert {len(vector) for vector in outcome.vectors.values()} == {DIMENSIONS}
    assert (outcome.oversized, outcome.others, outcome.errors) == ([], [], [])


@pytest.mark.scenario("EM-1", "EM-6", "EM-7", "EM-8", "EM-9", "EM-10", "EM-12")
async def test_documents_of_one_agent_and_their_normalisations() -> None:
    async with cluster(slots=1, desired=embedding_state()) as running:
        two = documents(2)
        assert_complete(await embed(running, two), two)
        lengths = {"short": "Hi.", "middle": "A cat on the sofa.", "long": "The stock price fell. " * 20}
        raw = await embed(running, lengths)
        assert_complete(raw, lengths)
        twins = await embed(running, {"a": "The same text.", "b": "The same text."})
        assert twins.vectors["a"] == twins.vectors["b"]
        unit = await embed(running, lengths, "L2")
        for name, vector in unit.vectors.items():
            assert math.hypot(*vector) == pytest.approx(1, abs=1e-4)
            length = math.hypot(*raw.vectors[name])
            assert vector == pytest.approx([number / length for number in raw.vectors[name]], abs=1e-3)
        even = await embed(running, lengths, {"RmsNorm": {"epsilon": 1e-6}})
        for vector in even.vectors.values():
            assert sum(number * number for number in vector) / DIMENSIONS == pytest.approx(1, abs=1e-3)
        message = even.messages[0]["Response"]["response"]["Embedding"]["Embedding"]
        assert message["pooling_type"] == "Last"


@pytest.mark.scenario("EM-2", "EM-11")
async def test_each_of_four_clients_gets_the_vectors_of_its_own_documents() -> None:
    async with cluster(slots=4, desired=embedding_state()) as running:
        twelve = documents(12)
        assert_complete(await embed(running, twelve), twelve)
        assert (await embed(running, {})).messages == []

        async def client(name: str) -> None:
            texts = documents(3, name)
            assert_complete(await embed(running, texts), texts)

        async with trio.open_nursery() as clients:
            for name in "abcd":
                clients.start_soon(client, name)


@pytest.mark.scenario("EM-3", "EM-4", "EM-5")
async def test_documents_that_are_too_long_are_reported_and_the_others_embedded() -> None:
    async with cluster(slots=4, desired=embedding_state(n_batch=64, context_size=512)) as running:
        four = documents(4)
        outcome = await embed(running, four)
        assert_complete(outcome, four)
        huge = "The stock price fell sharply. " * 100
        outcome = await embed(running, {"tiny": "Hello.", "huge": huge})
        assert outcome.vectors.keys() == {"tiny"}
        [report] = outcome.oversized
        assert report["document_tokens"] > 64
        assert report | {"document_tokens": 0} == {
            "document_tokens": 0,
            "n_batch": 64,
            "source_document_id": "huge",
        }
        assert (outcome.others, outcome.errors) == ([], [])
        outcome = await embed(running, {"one": huge, "two": huge})
        assert outcome.vectors == {}
        assert len(outcome.oversized) == 2
        assert outcome.others == ["NoEmbeddingsProduced"]


async def test_an_empty_document_is_named_after_the_vectors_of_the_others() -> None:
    async with cluster(slots=2, desired=embedding_state()) as running:
        outcome = await embed(running, {"a": "One.", "b": "", "c": "Two."})
        assert outcome.vectors.keys() == {"a", "c"}
        assert outcome.others == [{"Error": "document b is empty"}]
        assert outcome.messages[-1]["Response"]["response"]["Embedding"] == outcome.others[0]
        again = documents(3)
        assert_complete(await embed(running, again), again)


@pytest.mark.scenario("EM-13", "EM-14", "EM-15")
@pytest.mark.parametrize(
    ("slots", "count"),
    [((4, 4), 12), ((2, 2, 2, 2), 16), ((4, 1, 2, 1), 8)],
    ids=["2x4", "4x2", "uneven"],
)
async def test_every_agent_gets_a_share_of_a_batch(slots: tuple[int, ...], count: int) -> None:
    async with cluster(agents=0, desired=embedding_state()) as running:
        for number in slots:
            await running.start_agent(number)
        await running.wait_until_serving()
        texts = documents(count)
        outcome = await embed(running, texts)
        assert_complete(outcome, texts)
        assert outcome.agents == {agent.name for agent in running.agents}


@pytest.mark.scenario("EM-16")
async def test_eight_clients_at_once_use_every_agent() -> None:
    async with cluster(
        agents=4,
        slots=2,
        desired=embedding_state(),
        buffered_request_timeout=60.0,
        max_buffered_requests=32,
    ) as running:
        served: set[str] = set()

        async def client(name: str) -> None:
            texts = documents(4, name)
            outcome = await embed(running, texts)
            assert_complete(outcome, texts)
            served.update(outcome.agents)

        async with trio.open_nursery() as clients:
            for index in range(8):
                clients.start_soon(client, f"client-{index}")
        assert served == {agent.name for agent in running.agents}


@pytest.mark.scenario("EM-17")
async def test_a_batch_that_overflows_the_buffer_accounts_for_every_document() -> None:
    async with cluster(
        agents=4,
        slots=1,
        desired=embedding_state(embedding_batch_size=1),
        buffered_request_timeout=2.0,
        max_buffered_requests=4,
    ) as running:
        with trio.fail_after(15):
            outcome = await embed(running, documents(16))
        assert {"code": 503, "description": "Buffered requests overflow"} in outcome.errors
        assert len(outcome.vectors) + len(outcome.errors) == 16
        assert outcome.others == []


async def test_a_client_that_leaves_ends_all_chunks_of_its_batch() -> None:
    parameters = embedding_state(embedding_batch_size=1000)
    async with cluster(agents=2, slots=1, desired=parameters) as running:
        texts = {f"{index}": "The cat is asleep on the sofa. " * 20 for index in range(2000)}
        async with posted(running, batch(texts)) as response:
            assert "Response" in await response.message()
            await running.wait_for_slots(2)
        await running.wait_for_slots(0)
        few = documents(3)
        assert_complete(await embed(running, few), few)


async def test_embedding_requests_wait_while_the_cluster_turns_to_embeddings() -> None:
    async with cluster(slots=2, desired=state()) as running:
        assert (await running.generate(raw_prompt()))[-1]["Response"]
        assert (await running.put_state(embedding_state())).status_code == 204
        texts = documents(4)
        assert_complete(await embed(running, texts), texts)


@pytest.mark.parametrize("pooling", [PoolingType.MEAN, PoolingType.NONE])
async def test_the_configured_pooling_is_named(pooling: PoolingType) -> None:
    async with cluster(slots=1, desired=embedding_state(pooling_type=pooling)) as running:
        outcome = await embed(running, documents(1))
        [message] = outcome.messages
        assert message["Response"]["response"]["Embedding"]["Embedding"]["pooling_type"] == pooling.value


async def test_a_model_that_cannot_rank_is_an_issue() -> None:
    desired = embedding_state(pooling_type=PoolingType.RANK)
    async with cluster(slots=1, desired=desired, serving=False) as running:
        [agent] = await running.wait_for_agents(lambda agents: any(agent["issues"] for agent in agents))
        [issue] = agent["issues"]
        assert "no classification head" in issue["SlotCannotStart"]["error"]
