"""One embedding batch as several requests: chunks of its documents, each with a slot of its own."""

from collections.abc import Awaitable, Callable
from itertools import pairwise

import attrs
import trio

from paddler.messages.inference import GenerateEmbeddingBatch

_STARTS_PER_TICK = 64
"""A batch may have tens of thousands of chunks; others get their turn in between."""


def split(batch: GenerateEmbeddingBatch, *, agents: int, batch_size: int) -> list[GenerateEmbeddingBatch]:
    """Cut a batch so that every agent gets something and no chunk has more than `batch_size` documents.

    Documents keep their order; sizes differ by at most one, the larger chunks come first. O(documents).
    """
    documents = batch.input_batch
    count = min(len(documents), max(agents, -(-len(documents) // batch_size)))
    if not count:
        return []
    size, larger = divmod(len(documents), count)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return [attrs.evolve(batch, input_batch=documents[start:end]) for start, end in pairwise(starts)]


async def serve_chunks(
    batch: GenerateEmbeddingBatch,
    serve: Callable[[GenerateEmbeddingBatch], Awaitable[None]],
    *,
    agents: int,
    batch_size: int,
) -> None:
    """Serve a batch by serving its chunks at the same time, each to its end. Cancelling cancels all."""
    async with trio.open_nursery() as chunks:
        for index, chunk in enumerate(split(batch, agents=agents, batch_size=batch_size), start=1):
            chunks.start_soon(serve, chunk)
            if index % _STARTS_PER_TICK == 0:
                await trio.lowlevel.checkpoint()
