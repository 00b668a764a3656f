"""What an agent answers to a token request: token messages, events, terminals.

Externally tagged. A variant whose only field is called `payload` is written as that payload itself.
Token messages are on the hot path and never built as objects there: they travel as (Section, escaped
JSON string), see agent_socket.py.
"""

import enum
from typing import Any

import attrs

from paddler.messages.numbers import Int32, Unsigned


class Section(enum.Enum):
    """What a generated token is part of; the value is the letter of the step frame."""

    CONTENT = "C"
    REASONING = "R"
    TOOL_CALL = "T"
    UNDETERMINABLE = "U"


TOKEN_VARIANTS = {
    Section.CONTENT: "ContentToken",
    Section.REASONING: "ReasoningToken",
    Section.TOOL_CALL: "ToolCallToken",
    Section.UNDETERMINABLE: "UndeterminableToken",
}


@attrs.frozen
class Usage:
    """Token counts of one request."""

    prompt_tokens: Unsigned = 0
    cached_prompt_tokens: Unsigned = 0
    input_image_tokens: Unsigned = 0
    input_audio_tokens: Unsigned = 0
    content_tokens: Unsigned = 0
    reasoning_tokens: Unsigned = 0
    tool_call_tokens: Unsigned = 0
    undeterminable_tokens: Unsigned = 0


@attrs.frozen
class Done:
    """Normal end: end of generation, `max_tokens`, or a stop that was asked for."""

    usage: Usage


@attrs.frozen
class ChatTemplateError:
    payload: str


@attrs.frozen
class DetokenizationFailed:
    payload: str


@attrs.frozen
class GrammarIncompatibleWithThinking:
    payload: str


@attrs.frozen
class GrammarInitializationFailed:
    payload: str


@attrs.frozen
class GrammarRejectedModelOutput:
    payload: str


@attrs.frozen
class GrammarSyntaxError:
    payload: str


@attrs.frozen
class ImageDecodingFailed:
    payload: str


@attrs.frozen
class ImageExceedsBatchSize:
    image_tokens: Unsigned
    n_batch: Int32


@attrs.frozen
class MultimodalNotSupported:
    payload: str


@attrs.frozen
class SamplerError:
    payload: str


@attrs.frozen
class TokenGenerationDisabled:
    payload: str


@attrs.frozen
class ToolSchemaInvalid:
    payload: str


# What may come between tokens; written whole, letter E of the step frame.


@attrs.frozen
class ValidJson:
    payload: Any


@attrs.frozen
class InvalidJson:
    payload: str


ToolCallArguments = ValidJson | InvalidJson


@attrs.frozen
class ParsedToolCall:
    """One call; ids that the model did not give are `call_0`, `call_1`, … within the event."""

    id: str
    name: str
    arguments: ToolCallArguments


@attrs.frozen
class ToolCallParsed:
    """A finished tool call section; no call when the parser found none."""

    payload: tuple[ParsedToolCall, ...]


@attrs.frozen
class ToolCallParseFailed:
    payload: str


@attrs.frozen
class ToolCallValidationFailed:
    payload: tuple[str, ...]


@attrs.frozen
class UnrecognizedToolCallFormat:
    text: str
    ffi_error_message: str


@attrs.frozen
class TokenLogprob:
    """A token's text, with control tokens spelt out, and the natural logarithm of its probability."""

    token: str
    logprob: float


@attrs.frozen
class ChosenLogprob:
    """The token that was chosen, and the likeliest ones at its place, likeliest first."""

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@attrs.frozen
class TokenLogprobs:
    """Beyond Paddler 4.1, only for requests that ask: the tokens since the last of these."""

    payload: tuple[ChosenLogprob, ...]


Event = (
    ToolCallParsed
    | ToolCallParseFailed
    | ToolCallValidationFailed
    | UnrecognizedToolCallFormat
    | TokenLogprobs
)

Terminal = (
    Done
    | ChatTemplateError
    | DetokenizationFailed
    | GrammarIncompatibleWithThinking
    | GrammarInitializationFailed
    | GrammarRejectedModelOutput
    | GrammarSyntaxError
    | ImageDecodingFailed
    | ImageExceedsBatchSize
    | MultimodalNotSupported
    | SamplerError
    | TokenGenerationDisabled
    | ToolSchemaInvalid
)


@attrs.frozen
class StreamError:
    """The `error` of an `Error` envelope."""

    code: Int32
    description: str


TOKEN_GENERATION_DISABLED_TEXT = "Token generation is disabled while the cluster is configured for embeddings"  # noqa: S105 no secret


def response_envelope(*, generated_by: str | None, request_id: str, response: Any) -> dict[str, Any]:
    """Return the `Response` envelope around an already unstructured response."""
    return {"Response": {"generated_by": generated_by, "request_id": request_id, "response": response}}


def error_envelope(*, request_id: str, error: StreamError) -> dict[str, Any]:
    """Return the `Error` envelope."""
    return {
        "Error": {"error": {"code": error.code, "description": error.description}, "request_id": request_id}
    }
