"""Embedding requests turn by turn, with a context that counts tokens."""

import json
from collections.abc import Iterable, Sequence

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.embedder import Embedder
from paddler.engine.embeddings import Vector
from paddler.engine.pipe import Embed, Embedded, Finish, Generate
from paddler.engine.sequences import Ids, Prompt

SLOTS, N_BATCH = 3, 10


class CountingContext:
    """Gives each document a vector of its first token and its length; insists on the limits."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def embed(self, documents: Sequence[Ids]) -> list[Vector]:
        lengths = [len(document) for document in documents]
        assert 0 < len(lengths) <= SLOTS
        assert min(lengths) > 0
        assert sum(lengths) <= N_BATCH
        self.batches.append(lengths)
        return [np.array([document[0], len(document)], np.float32) for document in documents]


class LetterReader:
    """A token per letter; texts with an `_` are read aside until `release`."""

    def __init__(self) -> None:
        self.waiting: dict[int, str] = {}
        self._finished: list[tuple[int, Prompt]] = []

    def read(self, command: Generate) -> Prompt | None:
        if "_" in command.prompt:
            self.waiting[command.generation] = command.prompt
            return None
        return Prompt(np.array([ord(letter) for letter in command.prompt], np.int32))

    def forget(self, generation: int) -> None:
        self.waiting.pop(generation, None)

    def release(self) -> None:
        for generation, text in self.waiting.items():
            tokens = np.array([ord(letter) for letter in text], np.int32)
            self._finished.append((generation, Prompt(tokens)))
        self.waiting.clear()

    def finished(self) -> Iterable[tuple[int, Prompt]]:
        finished, self._finished = self._finished, []
        return finished


@attrs.define(slots=False)
class Bench:
    context: CountingContext = attrs.Factory(CountingContext)
    reader: LetterReader = attrs.Factory(LetterReader)
    told: list[Embedded] = attrs.Factory(list)

    def __attrs_post_init__(self) -> None:
        self.embedder = Embedder(self.context, slots=SLOTS, n_batch=N_BATCH, prompts=self.reader)

    def submit(self, generation: int, *texts: str) -> None:
        self.embedder.submit(Embed(generation, texts, "None"))

    def turn(self) -> None:
        self.told += self.embedder.run()

    def run(self) -> None:
        for _ in range(1000):
            if self.embedder.idle:
                return
            self.turn()
            self.reader.release()
        raise AssertionError("it does not end")

    def vectors(self, generation: int) -> list[tuple[int, list[float]]]:
        return [
            (place, json.loads(text))
            for told in self.told
            if told.generation == generation
            for place, text in told.vectors
        ]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_documents_keep_their_order_and_fill_batches_greedily(bench: Bench) -> None:
    bench.submit(1, "aaaa", "bbbbb", "cc", "d", "e", "f", "gggggggggg")
    bench.run()
    assert bench.context.batches == [[4, 5], [2, 1, 1], [1], [10]]
    assert [place for place, _ in bench.vectors(1)] == list(range(7))
    assert bench.vectors(1)[2] == (2, [ord("c"), 2])
    assert [told.finish for told in bench.told] == [None, None, None, Finish.END]


def test_documents_that_cannot_be_computed_never_reach_the_context(bench: Bench) -> None:
    bench.submit(1, "", "x" * 11, "a", "")
    bench.run()
    [told] = bench.told
    assert bench.context.batches == [[1]]
    assert told.oversized == ((1, 11, N_BATCH),)
    assert told.failed == ((0, "is empty"), (3, "is empty"))
    assert told.finish is Finish.END


def test_a_vector_that_is_not_finite_is_told_as_a_failure(bench: Bench) -> None:
    bench.context.embed = lambda _: [np.array([np.nan], np.float32)]  # type: ignore[method-assign, assignment]
    bench.submit(1, "a")
    bench.run()
    assert bench.told[0].failed == ((0, "has no finite vector"),)


def test_a_long_request_does_not_hold_up_a_short_one(bench: Bench) -> None:
    bench.submit(1, *["aaaaaaaaaa"] * 20)
    bench.submit(2, "bbbbbbbbbb")
    bench.turn()
    bench.turn()
    assert bench.vectors(2) == [(0, [ord("b"), 10])]
    assert bench.told[-1].finish is Finish.END


def test_requests_share_a_batch_that_one_does_not_fill(bench: Bench) -> None:
    bench.submit(1, "a")
    bench.submit(2, "b", "c", "d")
    bench.turn()
    assert bench.context.batches == [[1, 1, 1]]
    assert {told.generation: told.finish for told in bench.told} == {1: Finish.END, 2: None}


def test_while_a_long_document_is_read_the_others_go_on(bench: Bench) -> None:
    bench.submit(1, "a_", "b")
    bench.submit(2, "c")
    bench.turn()
    assert bench.vectors(1) == []
    assert bench.vectors(2) == [(0, [ord("c"), 1])]
    assert bench.embedder.reading
    bench.reader.release()
    bench.turn()
    assert [place for place, _ in bench.vectors(1)] == [0, 1]
    assert bench.embedder.idle


def test_a_cancelled_request_is_told_once_and_computed_no_further(bench: Bench) -> None:
    bench.submit(1, *["aaaaaaaaaa"] * 5)
    bench.submit(2, "b_")
    bench.turn()
    for generation in (1, 2, 1, 3):
        bench.embedder.cancel(generation)
    assert not bench.embedder.idle
    bench.turn()
    assert [(told.generation, told.finish) for told in bench.told[1:]] == [
        (1, Finish.STOPPED),
        (2, Finish.STOPPED),
    ]
    assert len(bench.context.batches) == 1
    assert bench.reader.waiting == {}
    assert bench.embedder.idle


@given(st.lists(st.lists(st.integers(0, 13).map("x".__mul__), max_size=12), max_size=5))
def test_every_document_is_told_exactly_once(requests: list[list[str]]) -> None:
    bench = Bench()
    for generation, texts in enumerate(requests):
        bench.submit(generation, *texts)
    bench.run()
    for generation, texts in enumerate(requests):
        told = [told for told in bench.told if told.generation == generation]
        places = [row[0] for news in told for row in (*news.vectors, *news.oversized, *news.failed)]
        assert sorted(places) == list(range(len(texts)))
        assert [news.finish for news in told if news.finish is not None] == [Finish.END]
        assert told[-1].finish is Finish.END
