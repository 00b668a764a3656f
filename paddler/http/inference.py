"""The inference surface: token streams, embedding batches, and the door of the inference socket.

A handler only decodes and refuses; waiting for a slot and everything after it happens in the body,
so that status and headers are out at once.
"""

from typing import TYPE_CHECKING, Any, Final

import trio
from quart import Response, websocket

from paddler.http.admission import invalid_parameters, is_embeddings_mode
from paddler.http.embeddings import embedding_response
from paddler.http.inference_socket import serve_inference_socket
from paddler.http.replies import token_response
from paddler.http.surface import Refusal, SurfaceApp, make_app, read_json, structure
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    GenerateEmbeddingBatch,
    TokenRequest,
)
from paddler.messages.tokens import TOKEN_GENERATION_DISABLED_TEXT

if TYPE_CHECKING:
    from paddler.balancer.reconciliation import Reconciliation
    from paddler.balancer.relay import Relay
    from paddler.routing.fleet import Fleet

NO_STATE_TEXT: Final = "Balancer applicable state is not yet set"
EMBEDDINGS_OFF_TEXT: Final = "Embedding generation is not enabled in the inference parameters"
NO_AGENTS_TEXT: Final = "No agents are currently connected"
NO_BATCH_SIZE_TEXT: Final = "embedding_batch_size is zero despite validation"


def make_inference_app(
    *,
    relay: "Relay",
    reconciliation: "Reconciliation",
    fleet: "Fleet",
    cors_allowed_hosts: tuple[str, ...],
    stopping: trio.Event,
) -> SurfaceApp:
    """Return the app of the inference service; its WebSockets say goodbye once `stopping` is set."""
    app = make_app("inference", cors_allowed_hosts=cors_allowed_hosts)

    async def continue_from(form: type[TokenRequest]) -> Response:
        message: TokenRequest = structure(await read_json(), form)
        if is_embeddings_mode(reconciliation.applicable_state):
            raise Refusal(501, TOKEN_GENERATION_DISABLED_TEXT)
        objection = invalid_parameters(message)
        if objection is not None:
            raise Refusal(400, objection)
        return token_response(relay, message)

    @app.post("/api/v1/continue_from_conversation_history")
    async def continue_from_conversation_history() -> Response:
        return await continue_from(ContinueFromConversationHistory)

    @app.post("/api/v1/continue_from_raw_prompt")
    async def continue_from_raw_prompt() -> Response:
        return await continue_from(ContinueFromRawPrompt)

    @app.post("/api/v1/generate_embedding_batch")
    async def generate_embedding_batch() -> Response:
        batch = structure(_with_input_batch(await read_json()), GenerateEmbeddingBatch)
        state = reconciliation.applicable_state
        if state is None:
            raise Refusal(503, NO_STATE_TEXT)
        if not is_embeddings_mode(state):
            raise Refusal(501, EMBEDDINGS_OFF_TEXT)
        if len(fleet) == 0:
            raise Refusal(503, NO_AGENTS_TEXT)
        batch_size = state.inference_parameters.embedding_batch_size
        if batch_size == 0:
            raise Refusal(500, NO_BATCH_SIZE_TEXT)
        return embedding_response(relay, batch, agents=len(fleet), batch_size=batch_size)

    @app.websocket("/api/v1/inference_socket")
    async def inference_socket() -> None:
        await serve_inference_socket(websocket, relay=relay, reconciliation=reconciliation, stopping=stopping)

    return app


def _with_input_batch(body: Any) -> Any:
    """Accept the name that the stock JavaScript client gives to `input_batch`."""
    if isinstance(body, dict) and "input_documents" in body and "input_batch" not in body:
        return {("input_batch" if name == "input_documents" else name): body[name] for name in body}
    return body
