"""What an agent answers to an embedding batch: vectors, reports of documents without one, terminals.

Vectors are many numbers and never built as objects there: encode_vector() puts their finished JSON
into its place.
"""

from typing import Literal

import attrs

from paddler.messages.inference import NormalizationMethod
from paddler.messages.numbers import Int32, Unsigned
from paddler.messages.state import PoolingType


@attrs.frozen
class Embedding:
    """One document's vector; method and pooling as they were asked for and configured."""

    embedding: tuple[float, ...]
    normalization_method: NormalizationMethod
    pooling_type: PoolingType
    source_document_id: str


@attrs.frozen
class DocumentExceedsBatchSize:
    """The document was skipped: it has more tokens than fit into one batch."""

    document_tokens: Unsigned
    n_batch: Int32
    source_document_id: str


@attrs.frozen
class Error:
    """Terminal: documents without a vector, and why."""

    payload: str


EmbeddingTerminal = (
    Error
    | Literal[
        "Done",
        "NoEmbeddingsProduced",
        "EmbeddingsDisabled",
        "EmbeddingRejectedDueToActiveTokenGeneration",
    ]
)

EmbeddingResult = Embedding | DocumentExceedsBatchSize | EmbeddingTerminal

DONE = '"Done"'
"""The terminal of a batch without trouble, as JSON."""


def encode_vector(frame: str, vector: str) -> str:
    """Put a vector's JSON into the JSON of an `Embedding` with no numbers."""
    return frame.replace('"embedding":[]', f'"embedding":{vector}', 1)
