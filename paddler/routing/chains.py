"""What the prompts of two requests have in common, without looking at the prompts again.

A request becomes a *chain* of links: tools and documents, then message by message; a raw prompt
block by block. A link is the hash of everything up to its end, so two prompts begin alike as far as their
links are equal. A hash is a hint where to go, never a proof: the engine compares tokens.
"""

import marshal
from collections.abc import Hashable
from typing import Any

import attrs

from paddler.messages.inference import (
    ContentPart,
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    ConversationMessage,
    GenerateEmbeddingBatch,
    ImagePart,
    Request,
)

BLOCK_CHARACTERS = 1024
"""Of a raw prompt: some 256 tokens; less makes no detour worthwhile (routing/policies.py)."""

MAX_LINKS = 1024
MAX_CHARACTERS = 4 * 1024 * 1024
"""What is longer in one of the two ways is known by its beginning: bounded memory, bounded time."""

_IMAGE_CHARACTERS = 1024
"""What an image counts, whatever its bytes: as much as the text of about as many tokens."""

_SAMPLE = 4096


@attrs.frozen(eq=False)
class Chain:
    """The links of a request's prompt."""

    links: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    """Characters up to the end of each link, templates and markup left out."""
    characters: int = 0
    """Of the whole prompt, which may go on after the last link."""


NO_CHAIN = Chain()
"""Of a request that no cached prefix helps."""


def chain_of(request: Request) -> Chain:
    """Return the chain of a request, in one pass over it."""
    match request:
        case ContinueFromRawPrompt(raw_prompt=text):
            return _raw_chain(text)
        case ContinueFromConversationHistory():
            return _conversation_chain(request)
        case GenerateEmbeddingBatch():
            return NO_CHAIN


def _raw_chain(text: str) -> Chain:
    """Link the whole blocks: the next prompt goes on where this one ended, inside a block."""
    links: list[int] = []
    link = hash(("chain", "raw"))
    end = min(len(text), MAX_CHARACTERS, MAX_LINKS * BLOCK_CHARACTERS)
    for start in range(0, end - BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS):
        link = hash((link, text[start : start + BLOCK_CHARACTERS]))
        links.append(link)
    ends = range(BLOCK_CHARACTERS, len(links) * BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS)
    return Chain(tuple(links), tuple(ends), len(text))


def _conversation_chain(request: ContinueFromConversationHistory) -> Chain:
    links: list[int] = []
    ends: list[int] = []
    head = _head(request)
    link, end = hash(("chain", request.enable_thinking, head)), len(head)
    if 0 < end <= MAX_CHARACTERS:
        links.append(link)
        ends.append(end)
    for message in request.conversation_history[: MAX_LINKS - len(links)]:
        piece: Hashable = message.content
        # Nearly all messages are texts and no more: this loop is what a thousand of them cost.
        if (
            type(piece) is str
            and message.tool_calls is None
            and message.reasoning_content is None
            and message.tool_call_id is None
        ):
            end += len(message.role) + len(piece)
        else:
            piece, length = _rich_piece(message)
            end += len(message.role) + length
        if end <= MAX_CHARACTERS:
            link = hash((link, message.role, piece, message.name))
            links.append(link)
            ends.append(end)
    return Chain(tuple(links), tuple(ends), end)


def _head(request: ContinueFromConversationHistory) -> bytes:
    """Return what templates put in front of the messages; empty when there is nothing."""
    offered = request.tools if request.tool_choice != "none" else ()
    if not offered and not request.documents:
        return b""
    tools = []
    for tool in offered:
        function = tool.function
        form = function.parameters
        fields = form and (form.type, form.properties, form.required, form.additionalProperties)
        tools.append((function.name, function.description, fields))
    return _bytes((tools, request.documents))


def _rich_piece(message: ConversationMessage) -> tuple[Hashable, int]:
    """Return what a message with parts or a history of calls adds to the chain, and its characters."""
    content: Any = message.content
    if isinstance(content, str):
        characters = len(content)
    else:
        content, characters = _parts(content)
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    history = (message.reasoning_content, message.tool_call_id, _bytes(calls))
    characters += len(message.reasoning_content or "") + len(history[2])
    return (content, history), characters


def _parts(content: tuple[ContentPart, ...]) -> tuple[tuple[str, ...], int]:
    texts: list[str] = []
    characters = 0
    for part in content:
        if isinstance(part, ImagePart):
            texts.append(_sample(part.image_url.url))
            characters += _IMAGE_CHARACTERS
        else:
            texts.append(part.text)
            characters += len(part.text)
    return tuple(texts), characters


def _bytes(values: Any) -> bytes:
    """Write JSON values down, five times faster than as JSON.

    Later versions of this format write repeated objects as references, so that equal values may differ.
    """
    return marshal.dumps(values, 0)


def _sample(url: str) -> str:
    """Return enough of an image to tell it from others: it may be megabytes."""
    if len(url) <= 3 * _SAMPLE:
        return url
    middle = len(url) // 2
    return f"{len(url)} {url[:_SAMPLE]} {url[middle : middle + _SAMPLE]} {url[-_SAMPLE:]}"
