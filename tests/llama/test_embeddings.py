"""Vectors of real models: bundled, BERT-like, and rerankers."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio

from paddler.engine.handle import Engine, open_engine
from paddler.engine.pipe import Embedded, Finish
from paddler.errors import ModelUnavailable
from paddler.messages.inference import NormalizationMethod
from paddler.messages.state import PoolingType, SlotCannotStart
from tests.cluster import FIXTURES
from tests.llama.engines import PATIENCE, SHORT, accept_model, ignore_progress, settings
from tests.llama.tiny_bert import CONTEXT, write_bert

pytestmark = pytest.mark.slow

BUNDLED = FIXTURES / "paddler-tiny-embed.gguf"
SENTENCES = (
    "The cat is asleep on the sofa.",
    "A cat is taking a nap on the couch.",
    "The stock price fell sharply.",
)
Vectors = dict[int, npt.NDArray[np.float64]]


class Embeddings:
    """The embedding requests of one engine and what became of them."""

    def __init__(self) -> None:
        self.engine: Engine
        self.told: dict[int, list[Embedded]] = {}
        self._news = trio.Event()

    def take(self, embedded: Embedded) -> None:
        self.told[embedded.generation].append(embedded)
        self._news.set()

    def start(self, *texts: str, method: NormalizationMethod = "None") -> int:
        generation = len(self.told) + 1
        self.told[generation] = []
        self.engine.embed(generation, documents=texts, normalization_method=method)
        return generation

    async def end(self, generation: int) -> list[Embedded]:
        told = self.told[generation]
        await self.wait_until(lambda: bool(told) and told[-1].finish is not None)
        return told

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():
                self._news = trio.Event()
                await self._news.wait()

    async def vectors(self, *texts: str, method: NormalizationMethod = "None") -> Vectors:
        told = await self.end(self.start(*texts, method=method))
        return {place: np.array(json.loads(text)) for news in told for place, text in news.vectors}


@asynccontextmanager
async def embedding(path: Path = BUNDLED, **changes: Any) -> AsyncIterator[Embeddings]:
    embeddings = Embeddings()
    async with open_engine(
        settings(model_path=str(path), enable_embeddings=True, **changes),
        timeouts=SHORT,
        on_model=accept_model,
        on_progress=ignore_progress,
        on_turn=lambda _: None,
        on_embedded=embeddings.take,
    ) as engine:
        embeddings.engine = engine
        yield embeddings


def cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize(
    ("pooling", "similar", "unrelated"),
    [
        (PoolingType.MEAN, 0.648, -0.074),
        (PoolingType.UNSPECIFIED, 0.648, -0.074),
        (PoolingType.LAST, 0.06, 0.046),
        (PoolingType.NONE, 0.06, 0.046),
        (PoolingType.CLS, 0.353, 1.0),
    ],
)
async def test_a_vector_per_document_by_every_pooling(
    pooling: PoolingType, similar: float, unrelated: float
) -> None:
    async with embedding(pooling_type=pooling) as embeddings:
        together = await embeddings.vectors(*SENTENCES)
        assert {len(vector) for vector in together.values()} == {128}
        assert cosine(together[0], together[1]) == pytest.approx(similar, abs=0.01)
        assert cosine(together[0], together[2]) == pytest.approx(unrelated, abs=0.01)
        for place, sentence in enumerate(SENTENCES):
            alone = await embeddings.vectors(sentence)
            assert cosine(alone[0], together[place]) == pytest.approx(1, abs=1e-4)


async def test_batches_of_any_fill_give_the_vectors_of_single_documents() -> None:
    texts = [" ".join(["The cat is asleep."] * (1 + index % 9)) for index in range(40)]
    async with embedding(pooling_type=PoolingType.MEAN, n_batch=64, slots=3) as embeddings:
        together = await embeddings.vectors(*texts, method="L2")
        assert len(together) == len(texts)
        for place in (0, 7, 8, 39):
            alone = await embeddings.vectors(texts[place], method="L2")
            assert cosine(alone[0], together[place]) == pytest.approx(1, abs=1e-4)


async def test_documents_without_a_vector_do_not_disturb_the_others() -> None:
    async with embedding(n_batch=64) as embeddings:
        long = "The stock price fell. " * 2000  # read aside
        told = await embeddings.end(embeddings.start("", "Hi.", long, "", "Hello."))
        assert sorted(place for news in told for place, _ in news.vectors) == [1, 4]
        [(place, tokens, n_batch)] = [row for news in told for row in news.oversized]
        assert (place, n_batch) == (2, 64)
        assert tokens > 2000
        assert [row for news in told for row in news.failed] == [(0, "is empty"), (3, "is empty")]
        assert told[-1].finish is Finish.END
        assert embeddings.engine.open_generations == set()


async def test_a_request_is_stopped_between_its_batches() -> None:
    async with embedding() as embeddings:
        generation = embeddings.start(*["The cat is asleep on the sofa. " * 20] * 2000)
        await embeddings.wait_until(lambda: len(embeddings.told[generation]) > 2)
        embeddings.engine.cancel(generation)
        told = await embeddings.end(generation)
        assert told[-1].finish is Finish.STOPPED
        assert sum(len(news.vectors) for news in told) < 1500
        assert len(await embeddings.vectors("Hello.")) == 1


@pytest.mark.parametrize("pooling", [PoolingType.UNSPECIFIED, PoolingType.CLS, PoolingType.NONE])
async def test_an_encoder_embeds_up_to_the_context_it_was_trained_on(
    tmp_path: Path, pooling: PoolingType
) -> None:
    model = write_bert(tmp_path / "bert.gguf")
    async with embedding(model, pooling_type=pooling, n_batch=512) as embeddings:
        told = await embeddings.end(embeddings.start("the cat is on the sofa", "", "cat " * 100, "cat " * 62))
        places = [place for news in told for place, _ in news.vectors]
        assert places == [0, 1, 3], "its marks make a document of nothing, too"
        assert [row for news in told for row in news.oversized] == [(2, 102, CONTEXT)]
        together = await embeddings.vectors("the cat is on the sofa", "stock price fell", "a dog")
        alone = await embeddings.vectors("stock price fell")
        assert cosine(alone[0], together[1]) == pytest.approx(1, abs=1e-4)
        assert cosine(together[0], together[1]) < 0.999


async def test_a_reranker_gives_each_document_its_score(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "reranker.gguf", ranks=True)
    async with embedding(model, pooling_type=PoolingType.RANK) as embeddings:
        scores = await embeddings.vectors("the cat[SEP]a cat is on the sofa", "the cat[SEP]stock price fell")
        assert [len(score) for score in scores.values()] == [1, 1]
        assert scores[0] != scores[1]
        [again] = (await embeddings.vectors("the cat[SEP]stock price fell")).values()
        assert again == pytest.approx(scores[1], abs=1e-4)


async def test_a_model_without_a_classification_head_cannot_rank(tmp_path: Path) -> None:
    for model in (BUNDLED, write_bert(tmp_path / "bert.gguf")):
        with pytest.raises(ModelUnavailable) as caught:
            async with embedding(model, pooling_type=PoolingType.RANK):
                raise AssertionError("it serves")
        assert caught.value.issues[0] == SlotCannotStart(
            "the model has no classification head: it cannot rank (pooling_type Rank)", 0
        )
