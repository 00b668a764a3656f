"""What clients ask for: raw prompts, conversations, embedding batches, with tools and grammars.

Every object is strict: an unknown key refuses the request.
"""

from typing import Any, Literal

import attrs

from paddler.messages.numbers import Float32, Int32
from paddler.messages.sampling import Sampling


@attrs.frozen
class TextPart:
    """A piece of text of a message; `{"type": "text", "text": …}`."""

    text: str


@attrs.frozen
class ImageUrl:
    url: str


@attrs.frozen
class ImagePart:
    """An image of a message, as a data URI; `{"type": "image_url", "image_url": {"url": …}}`."""

    image_url: ImageUrl


ContentPart = TextPart | ImagePart


@attrs.frozen
class CalledFunction:
    """What the assistant called; `arguments` are a JSON object or a string that holds one."""

    name: str
    arguments: Any


@attrs.frozen
class CalledTool:
    """A tool call of an earlier assistant message."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


@attrs.frozen
class ConversationMessage:
    """One turn; `role` is free text and reaches the chat template unchanged.

    All but `role` and `content` are beyond Paddler 4.1: the history of tool calls and of reasoning.
    """

    role: str
    content: str | tuple[ContentPart, ...]
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[CalledTool, ...] | None = None


@attrs.frozen
class GbnfGrammar:
    """llama.cpp's grammar text and the name of its start rule."""

    grammar: str
    root: str


@attrs.frozen
class JsonSchemaGrammar:
    """A JSON Schema, serialised as a string."""

    schema: str


Grammar = GbnfGrammar | JsonSchemaGrammar


@attrs.frozen
class ToolParameters:
    """The arguments of a tool; only these four keys are accepted at this level."""

    type: str
    properties: dict[str, Any] | None = None
    required: tuple[str, ...] | None = None
    additionalProperties: Any = None  # noqa: N815 the wire's own key


@attrs.frozen
class ToolFunction:
    name: str
    description: str
    parameters: ToolParameters | None = None


@attrs.frozen
class Tool:
    function: ToolFunction
    type: Literal["function"] = attrs.field(kw_only=True)


@attrs.frozen
class NamedTool:
    """A tool that the answer must call; `{"NamedTool": {"name": …}}`."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


@attrs.frozen
class ContinueFromRawPrompt:
    """Generate from an already rendered prompt. `sampling` is beyond Paddler 4.1."""

    max_tokens: Int32
    raw_prompt: str
    grammar: Grammar | None = None
    sampling: Sampling | None = None


@attrs.frozen
class ContinueFromConversationHistory:
    """Render a conversation with the chat template, then generate.

    Beyond Paddler 4.1: `documents` (for templates that know them), `sampling` and `tool_choice`.
    """

    add_generation_prompt: bool
    conversation_history: tuple[ConversationMessage, ...]
    enable_thinking: bool
    max_tokens: Int32
    grammar: Grammar | None = None
    parse_tool_calls: bool = False
    tools: tuple[Tool, ...] = ()
    documents: tuple[dict[str, Any], ...] | None = None
    sampling: Sampling | None = None
    tool_choice: ToolChoice = "auto"


TokenRequest = ContinueFromRawPrompt | ContinueFromConversationHistory


@attrs.frozen
class RmsNorm:
    epsilon: Float32


NormalizationMethod = Literal["None", "L2"] | RmsNorm


@attrs.frozen
class EmbeddingDocument:
    id: str
    content: str


@attrs.frozen
class GenerateEmbeddingBatch:
    input_batch: tuple[EmbeddingDocument, ...]
    normalization_method: NormalizationMethod


Request = TokenRequest | GenerateEmbeddingBatch
"""What takes a slot of an agent."""


def undeclared_required_field(request: TokenRequest) -> str | None:
    """Return the first name that a tool requires but does not declare, or None."""
    if isinstance(request, ContinueFromRawPrompt):
        return None
    for tool in request.tools:
        parameters = tool.function.parameters
        if parameters is None or parameters.properties is None or parameters.required is None:
            continue
        for name in parameters.required:
            if name not in parameters.properties:
                return name
    return None


def tool_choice_objection(request: TokenRequest) -> str | None:
    """Return why the `tool_choice` of a request cannot be honoured, or None."""
    if isinstance(request, ContinueFromRawPrompt) or request.tool_choice in ("auto", "none"):
        return None
    if not request.tools:
        return "`tool_choice` requires a call, but there are no tools"
    if request.grammar is not None:
        return "`tool_choice` requires a call, which a grammar would not allow"
    names = {tool.function.name for tool in request.tools}
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.name not in names:
        return f"`tool_choice` names '{request.tool_choice.name[:100]}', which is not among the tools"
    return None
