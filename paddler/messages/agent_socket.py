"""Frames between balancer and agent, and the fast form of the step frame.

Both directions are WebSocket text messages, each one externally tagged JSON frame of the unions
below, except those that begin with `S`. Such a message is a step frame: all pieces that
a decode step, or several short ones, gave for all slots, in a form that is taken apart without a JSON parser:

    S
    <request> <letter> <JSON>
    …

separated by line feeds, one line per piece; `request` is the number the balancer gave in
`Generate` or `Embed`. JSON escapes line feeds, so no text can break a line. Letters:

    C R T U   a token message of that Section; JSON is the escaped text, a JSON string
    E         another, non-terminal GeneratedTokenResult, whole
    D         a terminal GeneratedTokenResult, whole
    V         a non-terminal EmbeddingResult, whole
    F         a terminal EmbeddingResult, whole
    X         terminal: a StreamError object, becomes an `Error` envelope
    B         terminal: the agent bounces the request untouched (its drain began); JSON is `null`

The balancer puts the JSON between prebuilt bytes and never looks into it.
"""

import json

import attrs

from paddler.errors import RemoteProtocolError
from paddler.messages.inference import GenerateEmbeddingBatch, Request, TokenRequest
from paddler.messages.numbers import Int32, Uint32, Unsigned
from paddler.messages.snapshots import ModelMetadata
from paddler.messages.state import AgentIssue, ApplicableState, ChatTemplate, StateApplicationStatus

PROTOCOL = 2
"""Number of this protocol; unequal numbers refuse each other with one clear line."""

PART_CHARACTERS = 256 * 1024
"""A request's frame longer than this travels as `Part`s, so that nothing waits behind it."""

TOKEN_LETTERS = frozenset("CRTU")
TERMINAL_LETTERS = frozenset("DFXB")
LETTERS = TOKEN_LETTERS | TERMINAL_LETTERS | {"E", "V"}


@attrs.frozen
class Welcome:
    """Balancer's first frame."""

    protocol: Uint32
    version: str


@attrs.frozen
class SetState:
    state: ApplicableState


@attrs.frozen
class Generate:
    """Run this request; `request` is unique on this link."""

    request: Unsigned
    body: TokenRequest


@attrs.frozen
class Embed:
    """Make vectors of these documents; numbers are those of `Generate`."""

    request: Unsigned
    body: GenerateEmbeddingBatch


@attrs.frozen
class Part:
    """A piece of the text of a longer frame, in order; the frame is complete with `last`."""

    request: Unsigned
    text: str
    last: bool


@attrs.frozen
class Stop:
    """Stop this request, of which nothing follows; the agent answers with its terminal piece."""

    request: Unsigned


@attrs.frozen
class Ask:
    """A question about the agent: `chat_template_override` or `model_metadata`."""

    question: Unsigned
    about: str


@attrs.frozen
class Heartbeat:
    """Sent in silence, by both sides."""


RequestFrame = Generate | Embed

BalancerFrame = Welcome | SetState | Generate | Embed | Part | Stop | Ask | Heartbeat


def request_frame(number: int, body: Request) -> RequestFrame:
    """Return the frame that hands a request to an agent."""
    return Embed(number, body) if isinstance(body, GenerateEmbeddingBatch) else Generate(number, body)


@attrs.frozen
class AgentStatus:
    """The versioned picture an agent publishes of itself; `version` grows with every change."""

    version: Unsigned
    desired_slots_total: Int32
    slots_processing: Int32
    slots_total: Int32
    download_current: Unsigned
    download_filename: str | None
    download_indeterminate: bool
    download_total: Unsigned
    issues: tuple[AgentIssue, ...]
    model_path: str | None
    state_application_status: StateApplicationStatus
    uses_chat_template_override: bool


@attrs.frozen
class Register:
    """Agent's first frame."""

    protocol: Uint32
    version: str
    name: str | None
    status: AgentStatus


@attrs.frozen
class Status:
    status: AgentStatus


@attrs.frozen
class Answer:
    question: Unsigned
    chat_template_override: ChatTemplate | None = None
    model_metadata: ModelMetadata | None = None


@attrs.frozen
class HeldPrefix:
    """A request of this link whose tokens, prompt and answer, still lie in KV cells, from the first on."""

    request: Unsigned
    tokens: Unsigned


@attrs.frozen
class Held:
    """All prefixes that the agent's slots hold now; replaces what was said before."""

    prefixes: tuple[HeldPrefix, ...]


@attrs.frozen
class Goodbye:
    """The agent leaves in an orderly way."""


AgentFrame = Register | Status | Answer | Held | Heartbeat | Goodbye

Piece = tuple[int, str, str]
"""(request, letter, JSON text)."""


def escape_text(text: str) -> str:
    """Return text as a JSON string of ASCII characters, quotes included."""
    return json.encoder.encode_basestring_ascii(text)


def encode_step(pieces: list[Piece]) -> str:
    """Write a step frame."""
    return "S\n" + "\n".join([f"{request} {letter} {text}" for request, letter, text in pieces])


def decode_step(frame: str) -> list[Piece]:
    """Take a step frame apart.

    Raises RemoteProtocolError when a line is not of the form; what stands in the JSON is not checked.
    """
    pieces: list[Piece] = []
    try:
        for line in frame.split("\n")[1:]:
            request, letter, text = line.split(" ", 2)
            if letter not in LETTERS:
                raise RemoteProtocolError(f"unknown letter {letter!r} in a step frame")
            pieces.append((int(request), letter, text))
    except ValueError:
        raise RemoteProtocolError("malformed line in a step frame") from None
    return pieces
