"""The answer to an embedding batch: the messages of all its chunks on one stream, as they come."""

from typing import TYPE_CHECKING, Final

import attrs
from quart import Response, request

from paddler.balancer.embedding_batches import serve_chunks
from paddler.http.replies import Envelope, TokenReply, new_request_id, serve_request
from paddler.messages.embeddings import DONE
from paddler.messages.inference import GenerateEmbeddingBatch
from paddler.messages.tokens import StreamError

if TYPE_CHECKING:
    from paddler.balancer.relay import Relay

UNSENT_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""Vectors come in bursts, of all agents at once: a client may lag further behind than with tokens."""


@attrs.frozen(eq=False)
class ChunkReply:
    """Where the messages of one chunk go: all but its own `Done`, which says nothing of the whole batch."""

    stream: TokenReply
    envelope: Envelope

    def piece(
        self,
        agent_name: str | None,
        letter: str,
        text: str,
        *,
        more: bool = False,  # noqa: ARG002  documents are few
    ) -> None:
        if letter != "F" or text != DONE:
            self.stream.feed(self.envelope.message(agent_name, letter, text))

    def error(self, error: StreamError) -> None:
        self.stream.feed(self.envelope.error(error))


def embedding_response(
    relay: "Relay", batch: GenerateEmbeddingBatch, *, agents: int, batch_size: int
) -> Response:
    """Return the response whose body answers this batch, each chunk under an id of its own."""

    async def serve(stream: TokenReply) -> None:
        async def serve_chunk(chunk: GenerateEmbeddingBatch) -> None:
            chunk_id = new_request_id()
            await serve_request(relay, chunk, ChunkReply(stream, Envelope(chunk_id)), request_id=chunk_id)

        await serve_chunks(batch, serve_chunk, agents=agents, batch_size=batch_size)
        stream.feed(Envelope(new_request_id()).message(None, "F", DONE))

    body = TokenReply(
        serve,
        request_id=new_request_id(),
        connection=request.scope["state"]["connection"],
        unsent_limit_bytes=UNSENT_LIMIT_BYTES,
    )
    return Response(body, content_type="application/json", headers={"Cache-Control": "no-cache"})
