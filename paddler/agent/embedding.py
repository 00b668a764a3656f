"""One embedding request on the agent: what the engine says of its documents becomes pieces. Pure."""

from collections.abc import Iterator

from paddler.engine.pipe import Embedded, Finish
from paddler.messages import embeddings
from paddler.messages.embeddings import (
    DocumentExceedsBatchSize,
    Embedding,
    EmbeddingResult,
    EmbeddingTerminal,
    encode_vector,
)
from paddler.messages.inference import GenerateEmbeddingBatch
from paddler.messages.state import PoolingType
from paddler.messages.wire import encode

Item = tuple[str, str]
"""(letter, JSON text) of messages/agent_socket.py."""


def embedding_terminal(terminal: EmbeddingTerminal) -> Item:
    """Return the item that ends an embedding request."""
    return ("F", encode(terminal, EmbeddingTerminal))


class EmbeddingAnswer:
    """What was told of one request so far. Failed documents are told at its end, in one error."""

    def __init__(self, body: GenerateEmbeddingBatch, pooling_type: PoolingType) -> None:
        self._body = body
        self._pooling_type = pooling_type
        self._vectors = 0
        self._failures = 0
        self._first_failure = ""

    def items(self, embedded: Embedded) -> Iterator[Item]:
        """Yield what one turn gave, with the terminal if it was the last."""
        for place, vector in embedded.vectors:
            yield ("V", encode_vector(self._without_numbers(place), vector))
        for place, tokens, n_batch in embedded.oversized:
            report = DocumentExceedsBatchSize(tokens, n_batch, self._id(place))
            yield ("V", encode(report, EmbeddingResult))
        self._vectors += len(embedded.vectors)
        for place, reason in embedded.failed:
            self._failures += 1
            self._first_failure = self._first_failure or f"document {self._id(place)} {reason}"
        if embedded.finish is not None:
            yield embedding_terminal(self._terminal(embedded.finish))

    def _terminal(self, finish: Finish) -> EmbeddingTerminal:
        if finish is Finish.STOPPED:
            return "Done"
        if self._failures > 1:
            return embeddings.Error(f"{self._first_failure} (and {self._failures - 1} more have no vector)")
        if self._failures:
            return embeddings.Error(self._first_failure)
        return "Done" if self._vectors else "NoEmbeddingsProduced"

    def _without_numbers(self, place: int) -> str:
        method = self._body.normalization_method
        return encode(Embedding((), method, self._pooling_type, self._id(place)), EmbeddingResult)

    def _id(self, place: int) -> str:
        return self._body.input_batch[place].id
