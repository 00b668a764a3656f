"""What both doors of the inference service, HTTP and WebSocket, refuse before a request waits. Pure."""

from typing import TYPE_CHECKING

from paddler.messages.inference import (
    ContinueFromConversationHistory,
    TokenRequest,
    undeclared_required_field,
)

if TYPE_CHECKING:
    from paddler.messages.state import ApplicableState


def is_embeddings_mode(state: "ApplicableState | None") -> bool:
    """Tell whether the cluster makes embeddings instead of tokens; without a state it does not."""
    return state is not None and state.inference_parameters.enable_embeddings


def invalid_parameters(message: TokenRequest) -> str | None:
    """Return why this well-formed request cannot be served, or None."""
    name = undeclared_required_field(message)
    if name is not None:
        return f"Invalid request parameters: Required field '{name}' not found in properties"
    if isinstance(message, ContinueFromConversationHistory) and message.parse_tool_calls:
        return "Invalid request parameters: parse_tool_calls is not supported yet"
    return None
