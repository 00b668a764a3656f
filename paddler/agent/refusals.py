"""What an agent refuses before it generates, in the order of the checks. Pure."""

import binascii
from collections.abc import Iterator

from paddler.messages.inference import ContinueFromConversationHistory, ImagePart, TokenRequest
from paddler.messages.tokens import (
    GrammarIncompatibleWithThinking,
    GrammarInitializationFailed,
    ImageDecodingFailed,
    MultimodalNotSupported,
    Terminal,
)

CHECKED_CHARACTERS = 64 * 1024
"""So much of an image's base64 is looked at here, on the event loop; a multiple of four."""


def refuse_early(body: TokenRequest) -> Terminal | None:
    """Return why this request cannot be served whatever the model, or None."""
    if body.grammar is not None:
        if isinstance(body, ContinueFromConversationHistory) and body.enable_thinking:
            return GrammarIncompatibleWithThinking("a grammar cannot be combined with enable_thinking")
        return GrammarInitializationFailed("a grammar cannot be used: grammars are not supported yet")
    for url in _image_urls(body):
        problem = _image_problem(url)
        if problem is not None:
            return ImageDecodingFailed(problem)
    return None


def refuse_images(body: TokenRequest) -> Terminal | None:
    """Return the refusal of a request with images, or None."""
    if next(_image_urls(body), None) is None:
        return None
    return MultimodalNotSupported("the request has an image: images are not supported yet")


def _image_urls(body: TokenRequest) -> Iterator[str]:
    if isinstance(body, ContinueFromConversationHistory):
        for message in body.conversation_history:
            if not isinstance(message.content, str):
                for part in message.content:
                    if isinstance(part, ImagePart):
                        yield part.image_url.url


def _image_problem(url: str) -> str | None:
    """Judge the form of a data URI."""
    if not url.startswith("data:"):
        return "remote images are not supported: the URL of an image must be a data URI"
    header, comma, payload = url.partition(",")
    if not comma:
        return "the data URI of an image has no comma"
    if not header.endswith(";base64"):
        return "the data URI of an image is not base64"
    payload = payload.strip()
    if not payload:
        return "the data URI of an image is empty"
    try:
        binascii.a2b_base64(payload[:CHECKED_CHARACTERS], strict_mode=True)
    except ValueError as error:
        return f"the base64 of an image is broken: {error}"
    return "the base64 of an image is cut off" if len(payload) % 4 else None
