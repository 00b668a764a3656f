"""What an agent refuses before it generates, in the order of the checks. Pure."""

import binascii
from collections.abc import Iterator

from paddler.language.template_environment import MAX_PROMPT_CHARACTERS
from paddler.messages.inference import ContinueFromConversationHistory, ImagePart, TextPart, TokenRequest
from paddler.messages.tokens import (
    GrammarIncompatibleWithThinking,
    ImageDecodingFailed,
    SamplerError,
    Terminal,
)

CHECKED_CHARACTERS = 64 * 1024
"""So much of an image's base64 is looked at here, on the event loop; a multiple of four."""

_STRIPPED_CHARACTERS = 4096
"""Blanks around it are looked for in pieces of that size."""


def refuse_early(body: TokenRequest) -> Terminal | None:
    """Return why this request cannot be served whatever the model, or None."""
    thinks = isinstance(body, ContinueFromConversationHistory) and body.enable_thinking
    if thinks and body.grammar is not None:
        return GrammarIncompatibleWithThinking("a grammar cannot be combined with enable_thinking")
    for url in image_urls(body):
        problem = _image_problem(url)
        if problem is not None:
            return ImageDecodingFailed(problem)
    return None


def refuse_long(characters: int) -> Terminal | None:
    """Return the refusal of a prompt of that length, or None."""
    if characters <= MAX_PROMPT_CHARACTERS:
        return None
    return SamplerError(
        "Request evicted due to KV cache pressure: "
        f"prompt has {characters} characters, room for {MAX_PROMPT_CHARACTERS}"
    )


def conversation_characters(body: ContinueFromConversationHistory) -> int:
    """Return how much text the messages have, as a template sees them but for images."""
    return sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(part.text) for part in message.content if isinstance(part, TextPart))
        for message in body.conversation_history
    )


def image_urls(body: TokenRequest) -> Iterator[str]:
    """Yield the URLs of a request's images, in order."""
    if isinstance(body, ContinueFromConversationHistory):
        for message in body.conversation_history:
            if not isinstance(message.content, str):
                for part in message.content:
                    if isinstance(part, ImagePart):
                        yield part.image_url.url


def _image_problem(url: str) -> str | None:
    """Judge the form of a data URI. It can have 50 MB: nothing here copies more than a piece of it."""
    if url[:5].lower() != "data:":  # scheme and media type have no case
        return "remote images are not supported: the URL of an image must be a data URI"
    comma = url.find(",")
    if comma < 0:
        return "the data URI of an image has no comma"
    if url[max(comma - 7, 0) : comma].lower() != ";base64":
        return "the data URI of an image is not base64"
    start, end = _stripped(url, comma + 1)
    if start == end:
        return "the data URI of an image is empty"
    try:
        binascii.a2b_base64(url[start : min(start + CHECKED_CHARACTERS, end)], strict_mode=True)
    except ValueError as error:
        return f"the base64 of an image is broken: {error}"
    return "the base64 of an image is cut off" if (end - start) % 4 else None


def _stripped(text: str, start: int) -> tuple[int, int]:
    """Return where the text from `start` on begins and ends without the blanks around it."""
    end = len(text)
    while start < end:
        piece = text[start : min(start + _STRIPPED_CHARACTERS, end)]
        start += len(piece) - len(piece.lstrip())
        if not piece.isspace():
            break
    while start < end:
        piece = text[max(end - _STRIPPED_CHARACTERS, start) : end]
        end -= len(piece) - len(piece.rstrip())
        if not piece.isspace():
            break
    return start, end
