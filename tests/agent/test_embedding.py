"""Embedding requests in slots, with an engine played by the test."""

import json
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from paddler.agent.embedding import EmbeddingAnswer
from paddler.engine.pipe import Advance, Embedded, Finish
from paddler.messages.inference import EmbeddingDocument, GenerateEmbeddingBatch, NormalizationMethod, RmsNorm
from paddler.messages.state import PoolingType
from paddler.messages.tokens import StreamError
from tests.agent.test_slots import RAW, open_house

IDS = ("doc-a", 'quoted "embedding":[]', "doc-c")


def batch(normalization_method: NormalizationMethod = "L2") -> GenerateEmbeddingBatch:
    return GenerateEmbeddingBatch(
        tuple(EmbeddingDocument(name, "text") for name in IDS), normalization_method
    )


def embedded(
    generation: int = 1,
    vectors: tuple[int, ...] = (),
    *,
    oversized: tuple[tuple[int, int, int], ...] = (),
    failed: tuple[tuple[int, str], ...] = (),
    finish: Finish | None = None,
) -> Embedded:
    return Embedded(generation, tuple((place, "[0.5,-1]") for place in vectors), oversized, failed, finish)


def results(answer: EmbeddingAnswer, news: Embedded) -> list[tuple[str, Any]]:
    return [(letter, json.loads(text)) for letter, text in answer.items(news)]


@pytest.mark.parametrize(("method", "written"), [("L2", "L2"), (RmsNorm(0.5), {"RmsNorm": {"epsilon": 0.5}})])
def test_vectors_and_reports_are_the_documented_messages(method: NormalizationMethod, written: Any) -> None:
    answer = EmbeddingAnswer(batch(method), PoolingType.LAST)
    news = embedded(vectors=(1,), oversized=((2, 401, 64),))
    assert results(answer, news) == [
        (
            "V",
            {
                "Embedding": {
                    "embedding": [0.5, -1],
                    "normalization_method": written,
                    "pooling_type": "Last",
                    "source_document_id": IDS[1],
                }
            },
        ),
        (
            "V",
            {
                "DocumentExceedsBatchSize": {
                    "document_tokens": 401,
                    "n_batch": 64,
                    "source_document_id": IDS[2],
                }
            },
        ),
    ]


@pytest.mark.parametrize(
    ("news", "terminal"),
    [
        (embedded(vectors=(0,), finish=Finish.END), "Done"),
        (embedded(finish=Finish.END), "NoEmbeddingsProduced"),
        (embedded(finish=Finish.STOPPED), "Done"),
        (embedded(failed=((0, "is empty"),), finish=Finish.END), {"Error": "document doc-a is empty"}),
        (
            embedded(vectors=(1,), failed=((2, "is empty"), (0, "is empty")), finish=Finish.END),
            {"Error": "document doc-c is empty (and 1 more have no vector)"},
        ),
    ],
)
def test_the_end_says_what_became_of_the_documents(news: Embedded, terminal: Any) -> None:
    answer = EmbeddingAnswer(batch(), PoolingType.MEAN)
    assert results(answer, news)[-1] == ("F", terminal)


def test_what_was_told_in_earlier_turns_counts_at_the_end() -> None:
    answer = EmbeddingAnswer(batch(), PoolingType.MEAN)
    assert [letter for letter, _ in results(answer, embedded(vectors=(0,)))] == ["V"]
    assert results(answer, embedded(failed=((1, "is empty"),))) == []
    assert results(answer, embedded(finish=Finish.END)) == [("F", {"Error": f"document {IDS[1]} is empty"})]


async def test_a_request_goes_to_the_engine_and_each_vector_travels_by_itself() -> None:
    async with open_house(template=None, enable_embeddings=True) as house:
        await house.start(7, batch())
        assert house.engine.embedded == {1: (("text",) * 3, "L2")}
        house.slots.on_embedded(embedded(vectors=(0, 1)))
        house.slots.on_embedded(embedded(vectors=(2,), finish=Finish.END))
        assert [[(number, letter) for number, letter, _ in step] for step in house.steps] == [
            [(7, "V")],
            [(7, "V")],
            [(7, "V")],
            [(7, "F")],
        ]
        assert house.terminal(7) == ("F", "Done")
        with trio.fail_after(1):
            await house.slots.emptied()


async def test_an_agent_for_tokens_refuses_embeddings() -> None:
    async with open_house() as house:
        await house.start(1, batch())
        assert house.terminal(1) == ("F", "EmbeddingsDisabled")
        assert house.engine.embedded == {}


async def test_embeddings_are_refused_beside_a_generation() -> None:
    async with open_house() as house:
        await house.start(1, RAW)
        house.slots.open_door(house.serving(enable_embeddings=True))
        await house.start(2, batch())
        assert house.terminal(2) == ("F", "EmbeddingRejectedDueToActiveTokenGeneration")
        house.slots.on_turn([Advance(1, (), "", Finish.END, "", 1, 0)])
        assert house.terminal(1)[0] == "D"
        await house.start(3, batch())
        assert len(house.engine.embedded) == 1


async def test_a_closed_door_bounces_and_lets_what_was_accepted_end() -> None:
    async with open_house(enable_embeddings=True) as house:
        await house.start(1, batch())
        house.slots.close_door()
        await house.start(2, batch())
        assert house.terminal(2) == ("B", None)
        house.slots.on_embedded(embedded(vectors=(0,), finish=Finish.END))
        assert house.terminal(1) == ("F", "Done")


async def test_a_stopped_request_is_cancelled_and_ends_when_the_engine_says_so() -> None:
    async with open_house(enable_embeddings=True) as house:
        await house.start(1, batch())
        house.slots.stop(1)
        house.slots.stop(1)
        assert house.engine.cancelled == [1]
        house.slots.on_embedded(embedded(finish=Finish.STOPPED))
        assert house.terminal(1) == ("F", "Done")
        house.accept(2, batch())
        house.slots.stop(2)  # before its task ran
        await wait_all_tasks_blocked()
        assert house.terminal(2) == ("F", "Done")
        assert len(house.engine.embedded) == 1


async def test_a_failing_engine_ends_embeddings_as_it_ends_tokens() -> None:
    async with open_house(enable_embeddings=True) as house:
        await house.start(1, batch())
        house.slots.fail(StreamError(502, "Engine stopped: killed"))
        assert house.terminal(1) == ("X", {"code": 502, "description": "Engine stopped: killed"})
        house.slots.on_embedded(embedded(vectors=(0,)))  # nobody waits for it
        assert len(house.pieces) == 1


async def test_an_engine_that_names_no_document_of_the_request_ends_only_it(logged_errors: list[Any]) -> None:
    async with open_house(enable_embeddings=True) as house:
        await house.start(1, batch())
        await house.start(2, batch())
        house.slots.on_embedded(embedded(vectors=(99,)))
        assert house.terminal(1) == ("X", {"code": 500, "description": "Internal server error"})
        assert house.engine.cancelled == [1]
        house.slots.on_embedded(embedded(2, finish=Finish.STOPPED))
        assert house.terminal(2) == ("F", "Done")
        assert len(logged_errors) == 1
        logged_errors.clear()
