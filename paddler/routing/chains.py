"""What the prompts of two requests have in common, without looking at the prompts again.

A request becomes a *chain* of links: tools and documents, then message by message; a raw prompt
block by block. A link is the hash of everything up to its end, so two prompts begin alike as far as their
links are equal. A hash is a hint where to go, never a proof: the engine compares tokens.
"""

import marshal
from collections.abc import Hashable, Iterable, Iterator
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

_Piece = tuple[Hashable, int]
"""What a link adds to the one before, and its characters."""


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
            return _link(_blocks(text), seed=0, characters=len(text))
        case ContinueFromConversationHistory():
            return _conversation_chain(request)
        case GenerateEmbeddingBatch():
            return NO_CHAIN


def _conversation_chain(request: ContinueFromConversationHistory) -> Chain:
    head = _head(request)
    pieces: list[_Piece] = [(head, len(head))] if head else []
    pieces += [_message_piece(message) for message in request.conversation_history[:MAX_LINKS]]
    characters = sum([length for _, length in pieces])
    return _link(pieces, seed=int(request.enable_thinking), characters=characters)


def _link(pieces: Iterable[_Piece], *, seed: int, characters: int) -> Chain:
    links: list[int] = []
    ends: list[int] = []
    link, end = hash(("chain", seed)), 0
    for piece, length in pieces:
        end += length
        if end > MAX_CHARACTERS or len(links) == MAX_LINKS:
            break
        link = hash((link, piece))
        links.append(link)
        ends.append(end)
    return Chain(tuple(links), tuple(ends), characters)


def _blocks(text: str) -> Iterator[_Piece]:
    """Give the whole blocks of a raw prompt: the next prompt goes on where this one ended, inside a block."""
    for start in range(0, len(text) - BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS):
        yield text[start : start + BLOCK_CHARACTERS], BLOCK_CHARACTERS


def _head(request: ContinueFromConversationHistory) -> bytes:
    """Return what templates put in front of the messages; empty when there is nothing."""
    if not request.tools and not request.documents:
        return b""
    tools = []
    for tool in request.tools:
        function = tool.function
        form = function.parameters
        fields = form and (form.type, form.properties, form.required, form.additionalProperties)
        tools.append((function.name, function.description, fields))
    return _bytes((tools, request.documents))


def _message_piece(message: ConversationMessage) -> _Piece:
    content: Any = message.content
    if isinstance(content, str):
        characters = len(content)
    else:
        content, characters = _parts(content)
    characters += len(message.role)
    if message.reasoning_content is None and message.tool_calls is None and message.tool_call_id is None:
        return (message.role, content, message.name), characters
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    history = (message.reasoning_content, message.tool_call_id, _bytes(calls))
    characters += len(message.reasoning_content or "") + len(history[2])
    return (message.role, content, message.name, history), characters


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
