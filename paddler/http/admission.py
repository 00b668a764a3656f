"""What both doors of the inference service, HTTP and WebSocket, refuse before a request waits. Pure."""

from typing import TYPE_CHECKING

from paddler.messages.inference import TokenRequest, tool_choice_objection, undeclared_required_field
from paddler.messages.sampling import sampling_objection

if TYPE_CHECKING:
    from paddler.messages.state import ApplicableState


def is_embeddings_mode(state: "ApplicableState | None") -> bool:
    """Tell whether the cluster makes embeddings instead of tokens; without a state it does not."""
    return state is not None and state.inference_parameters.enable_embeddings


def invalid_parameters(message: TokenRequest) -> str | None:
    """Return why this well-formed request cannot be served, or None."""
    objection = _objection(message)
    return None if objection is None else f"Invalid request parameters: {objection}"


def _objection(message: TokenRequest) -> str | None:
    name = undeclared_required_field(message)
    if name is not None:
        return f"Required field '{name}' not found in properties"
    if message.sampling is not None and (objection := sampling_objection(message.sampling)) is not None:
        return objection
    return tool_choice_objection(message)
