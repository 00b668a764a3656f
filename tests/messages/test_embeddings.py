"""What an agent answers to an embedding batch is written as the API documents it."""

import json
from typing import Any

import pytest

from paddler.messages.embeddings import (
    DONE,
    DocumentExceedsBatchSize,
    Embedding,
    EmbeddingResult,
    EmbeddingTerminal,
    Error,
    encode_vector,
)
from paddler.messages.inference import RmsNorm
from paddler.messages.state import PoolingType
from paddler.messages.wire import decode, encode


@pytest.mark.parametrize(
    ("message", "written"),
    [
        (
            Embedding((0.013, -0.2), "L2", PoolingType.LAST, "doc-1"),
            {
                "Embedding": {
                    "embedding": [0.013, -0.2],
                    "normalization_method": "L2",
                    "pooling_type": "Last",
                    "source_document_id": "doc-1",
                }
            },
        ),
        (
            DocumentExceedsBatchSize(401, 64, "doc-2"),
            {
                "DocumentExceedsBatchSize": {
                    "document_tokens": 401,
                    "n_batch": 64,
                    "source_document_id": "doc-2",
                }
            },
        ),
        ("Done", "Done"),
        ("NoEmbeddingsProduced", "NoEmbeddingsProduced"),
        ("EmbeddingsDisabled", "EmbeddingsDisabled"),
        ("EmbeddingRejectedDueToActiveTokenGeneration", "EmbeddingRejectedDueToActiveTokenGeneration"),
        (Error("document doc-1 is empty"), {"Error": "document doc-1 is empty"}),
    ],
)
def test_results_are_the_documented_ones(message: Any, written: Any) -> None:
    text = encode(message, EmbeddingResult)
    assert json.loads(text) == written
    assert decode(text, EmbeddingResult) == message  # type: ignore[arg-type]  # a union


def test_the_terminal_that_chunks_keep_to_themselves_is_written_as_it_is_compared() -> None:
    assert encode("Done", EmbeddingTerminal) == DONE


def test_a_vector_is_put_into_its_place_only() -> None:
    name = '"embedding":[]'
    frame = encode(Embedding((), RmsNorm(0.5), PoolingType.MEAN, name), EmbeddingResult)
    message = json.loads(encode_vector(frame, "[1,2.5]"))["Embedding"]
    assert message["embedding"] == [1, 2.5]
    assert message["source_document_id"] == name
