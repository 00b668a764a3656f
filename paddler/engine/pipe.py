"""Frames between agent and engine process: bytes to messages and back, without I/O.

A message is a frame of processes/frames.py with `[name, content]` in it. There is no farewell: closing
the socket tells the engine to end, however it is closed.
"""

import enum
import re
from collections.abc import Callable
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_origin

import attrs

from paddler.config import MAX_LINK_MESSAGE_BYTES, KvLayout
from paddler.errors import RemoteProtocolError
from paddler.messages.inference import NormalizationMethod, RmsNorm
from paddler.messages.state import InferenceParameters, KvCacheDtype, PoolingType
from paddler.processes.frames import FrameCutter, pack_frame

M = TypeVar("M")

_MAX_QUOTE = 200


# Agent to engine.


@attrs.frozen(kw_only=True)
class EngineSettings:
    """The first frame: what to load and how."""

    model_path: str
    slots: int
    parameters: InferenceParameters
    kv_layout: KvLayout
    threads: int
    exact: bool = False
    """Flash attention off: the same tokens whatever runs beside a request, with more than one thread too."""
    prefix_cache: bool = True
    """Keep the cells of finished generations, and start new ones behind the prefix they share with one."""
    prefix_cache_bytes: int = 0
    """Host memory for prefixes whose cells were needed; 0: they are forgotten."""
    projection_path: str | None = None
    adapters: tuple["Adapter", ...] = ()
    host_memory_bytes: int | None = None
    """What the model may take; None asks the host."""


@attrs.frozen
class OpenContext:
    """Go on: the agent has seen the model and wants it served."""


@attrs.frozen
class Adapter:
    """A LoRA adapter of the model, in force for everything that is generated."""

    path: str
    scale: float


@attrs.frozen(kw_only=True)
class SamplerSettings:
    """How the tokens of one generation are chosen; in range, but for ids beyond the vocabulary."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    penalty_repeat: float
    penalty_frequency: float
    penalty_presence: float
    penalty_last_n: int
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = attrs.Factory(dict)
    top_logprobs: int | None = None
    """None: no logprobs at all."""
    ignore_eos: bool = False


@attrs.frozen
class GrammarRule:
    """What the answer must look like, in GBNF."""

    gbnf: str
    root: str
    begins_after: tuple[str, ...] = ()
    """The answer is free up to the end of one of these texts, control tokens spelt out; (): bound at once."""


@attrs.frozen
class Picture:
    """An image as the model sees it: 8 bits each of red, green, blue, row by row, in base64."""

    width: int
    height: int
    rgb: str


@attrs.frozen
class Generate:
    """`prompt` has one media marker (language/chat_template.py) per picture."""

    generation: int
    prompt: str
    max_tokens: int
    sampler: SamplerSettings | None = None
    """None: the parameters of the state."""
    grammar: GrammarRule | None = None
    pictures: tuple[Picture, ...] = ()


@attrs.frozen
class Embed:
    """Make a vector of each document; `generation` is a number as those of `Generate`."""

    generation: int
    documents: tuple[str, ...]
    normalization_method: NormalizationMethod


@attrs.frozen
class Cancel:
    generation: int


Command = EngineSettings | OpenContext | Generate | Embed | Cancel


# Engine to agent.


@attrs.frozen
class Progress:
    """Bytes of the model file that are loaded."""

    done: int
    total: int


@attrs.frozen
class ModelRefused:
    reason: str
    adapter_path: str | None = None
    """The LoRA adapter at fault; None: the model itself."""


@attrs.frozen
class ProjectionRefused:
    reason: str


@attrs.frozen(kw_only=True)
class ModelDescription:
    """What the model file says of itself; sent when the weights are loaded."""

    metadata: dict[str, str]
    chat_template: str | None
    bos_text: str
    eos_text: str
    nl_text: str
    control_tokens: dict[int, str]
    """Tokens whose text never reaches users."""
    size_bytes: int
    n_params: int
    n_vocab: int
    n_ctx_train: int


@attrs.frozen
class ContextRefused:
    reason: str


@attrs.frozen(kw_only=True)
class Capacity:
    """The context as it was made; the engine serves from here on."""

    layout: KvLayout
    """Shared or per slot, never auto."""
    reason: str
    slots: int
    cells_per_slot: int
    """The most tokens that one request can have, prompt and answer together."""
    context_bytes: int
    """Estimated memory of the KV cache."""
    warm_up_seconds: float
    """Time of the first decode, an upper estimate of a token's."""
    offloaded: bool = False
    """A GPU computes: while the process waits for it, it may use no CPU time."""
    n_batch: int = 0
    """The most positions that one image may take."""


class Finish(enum.StrEnum):
    END = "end"
    LENGTH = "length"
    STOPPED = "stopped"
    FAILED = "failed"
    GRAMMAR_INVALID = "grammar_invalid"
    GRAMMAR_REJECTED = "grammar_rejected"
    IMAGE_INVALID = "image_invalid"
    IMAGE_TOO_LARGE = "image_too_large"
    """`image_tokens` is the size of that image."""


Logprobs = tuple[tuple[str, float, tuple[tuple[str, float], ...]], ...]
"""Per token: its text, control tokens spelt out, its logprob, and the likeliest (text, logprob) there."""


@attrs.frozen
class Advance:
    """What one turn did for one generation; at most one per generation and turn, in order."""

    generation: int
    tokens: tuple[int, ...]
    """Every id generated in this turn: markers, control tokens and the end token too."""
    text: str
    """Their visible text; an incomplete character is held back until it is complete or the end."""
    finish: Finish | None
    failure: str
    prompt_tokens: int
    """Of text; those of images are counted apart."""
    cached_prompt_tokens: int
    image_tokens: int = 0
    logprobs: Logprobs | None = None


@attrs.frozen
class Embedded:
    """What one turn did for one Embed; documents are named by their place in it.

    Sent before the Turn of that turn; each document is in one of these once, unless it was stopped.
    """

    generation: int
    vectors: tuple[tuple[int, str], ...]
    """(document, its vector as a JSON array of numbers)."""
    oversized: tuple[tuple[int, int, int], ...]
    """(document, its tokens, the most it may have)."""
    failed: tuple[tuple[int, str], ...]
    """(document, why it has no vector)."""
    finish: Finish | None


@attrs.frozen
class Turn:
    """What one turn did for all slots, or several short ones; an empty one is a sign of life."""

    advances: tuple[Advance, ...]


@attrs.frozen
class Held:
    """All generations whose tokens still lie in cells or in the host's cache: (generation, tokens).

    Sent after the turn that changed it.
    """

    prefixes: tuple[tuple[int, int], ...]


@attrs.frozen
class Encoding:
    """An image is being encoded; no turn can come before that is done."""

    generation: int


@attrs.frozen
class Log:
    """A line of llama.cpp's log."""

    level: int
    text: str


Report = (
    Progress
    | ModelRefused
    | ProjectionRefused
    | ModelDescription
    | ContextRefused
    | Capacity
    | Embedded
    | Turn
    | Held
    | Encoding
    | Log
)


def pack(message: Command | Report) -> bytes:
    """Return the frame of a message."""
    content: Any
    if isinstance(message, Turn):  # the hot path: written as arrays
        content = [
            (
                advance.generation,
                advance.tokens,
                advance.text,
                advance.finish,
                advance.failure,
                advance.prompt_tokens,
                advance.cached_prompt_tokens,
                advance.image_tokens,
                advance.logprobs,
            )
            for advance in message.advances
        ]
    else:
        content = attrs.asdict(message)
    return pack_frame([type(message).__name__, content])


class FrameReader(Generic[M]):
    """Read the messages of a byte stream: COMMANDS in the engine, REPORTS in the agent."""

    def __init__(
        self, readers: "dict[str, Callable[[Any], M]]", *, max_frame_bytes: int = MAX_LINK_MESSAGE_BYTES
    ) -> None:
        self._readers = readers
        self._frames = FrameCutter(max_frame_bytes=max_frame_bytes)

    def feed(self, data: bytes) -> list[M]:
        """Take the next bytes and return the messages they complete. Raises RemoteProtocolError."""
        return [self._read(frame) for frame in self._frames.feed(data)]

    def _read(self, frame: Any) -> M:
        try:
            name, content = frame
            return self._readers[name](content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RemoteProtocolError(f"an unknown message: {repr(error)[:_MAX_QUOTE]}") from None


def _read_settings(content: dict[str, Any]) -> EngineSettings:
    parameters = content.pop("parameters")
    for name, form in (
        ("k_cache_dtype", KvCacheDtype),
        ("v_cache_dtype", KvCacheDtype),
        ("pooling_type", PoolingType),
    ):
        parameters[name] = form(parameters[name])
    kv_layout = KvLayout(content.pop("kv_layout"))
    adapters = tuple(Adapter(**adapter) for adapter in content.pop("adapters"))
    return EngineSettings(
        parameters=InferenceParameters(**parameters), kv_layout=kv_layout, adapters=adapters, **content
    )


def _read_generate(content: dict[str, Any]) -> Generate:
    sampler, grammar = content.pop("sampler"), content.pop("grammar")
    if sampler is not None:
        bias = {int(token): bias for token, bias in sampler.pop("logit_bias").items()}
        sampler = SamplerSettings(logit_bias=bias, stop=tuple(sampler.pop("stop")), **sampler)
    if grammar is not None:
        grammar = GrammarRule(grammar["gbnf"], grammar["root"], tuple(grammar["begins_after"]))
    pictures = tuple(Picture(**picture) for picture in content.pop("pictures"))
    return Generate(**content, sampler=sampler, grammar=grammar, pictures=pictures)


def _read_embed(content: dict[str, Any]) -> Embed:
    method = content["normalization_method"]
    return Embed(
        content["generation"],
        tuple(content["documents"]),
        RmsNorm(**method) if isinstance(method, dict) else method,
    )


def _read_description(content: dict[str, Any]) -> ModelDescription:
    control_tokens = {int(token): text for token, text in content.pop("control_tokens").items()}
    return ModelDescription(control_tokens=control_tokens, **content)


def _read_capacity(content: dict[str, Any]) -> Capacity:
    return Capacity(layout=KvLayout(content.pop("layout")), **content)


_ADVANCE_KINDS = {
    (int, list, str, finish, str, int, int, int, logprobs)
    for finish in (NoneType, str)
    for logprobs in (NoneType, list)
}
_TOKEN_KINDS = {int}


def _read_turn(content: Any) -> Turn:
    """Read the hot path; its checks are those of _checked(), a row at a time."""
    if type(content) is not list:
        raise TypeError("a turn is no array")
    advances = []
    for row in content:
        if tuple(map(type, row)) not in _ADVANCE_KINDS:
            raise TypeError("an advance has other fields")
        generation, tokens, text, finish, failure, prompt_tokens, cached, image_tokens, logprobs = row
        if not _TOKEN_KINDS.issuperset(map(type, tokens)):
            raise TypeError("a token is no integer")
        if not text.isascii():
            text.encode()  # an escaped lone surrogate is JSON, but could not be passed on
        advances.append(
            Advance(
                generation,
                tuple(tokens),
                text,
                Finish(finish) if finish is not None else None,
                failure,
                prompt_tokens,
                cached,
                image_tokens,
                None if logprobs is None else _read_logprobs(logprobs),
            )
        )
    return Turn(tuple(advances))


def _read_logprobs(rows: list[Any]) -> Logprobs:
    """Read what few requests ask for; JSON has no NaN, and our frames no infinity."""
    return tuple(
        (str(text), float(logprob), tuple((str(other), float(its)) for other, its in top))
        for text, logprob, top in rows
    )


def _read_held(content: dict[str, Any]) -> Held:
    pairs = tuple((generation, tokens) for generation, tokens in content["prefixes"])
    if not all(type(number) is int for pair in pairs for number in pair):
        raise TypeError("a held prefix is no pair of integers")
    return Held(pairs)


_VECTOR = re.compile(r"\[[-+.,0-9e]+\]")
"""Enough to keep it within its line of a step frame."""


def _read_embedded(content: dict[str, Any]) -> Embedded:
    finish = content.pop("finish")
    rows: dict[str, Any] = {
        name: tuple(map(tuple, content.pop(name))) for name in ("vectors", "oversized", "failed")
    }
    report = Embedded(**content, **rows, finish=None if finish is None else Finish(finish))
    if type(report.generation) is not int:
        raise TypeError("a generation is no integer")
    for row, kinds in (
        *((row, (int, str)) for row in (*report.vectors, *report.failed)),
        *((row, (int, int, int)) for row in report.oversized),
    ):
        if tuple(map(type, row)) != kinds:
            raise TypeError("a document is told of in another form")
    for _, reason in report.failed:
        reason.encode()  # as in a turn
    if not all(_VECTOR.fullmatch(vector) for _, vector in report.vectors):
        raise ValueError("a vector is no array of numbers")
    return report


def _checked(read: Callable[[Any], Report]) -> Callable[[Any], Report]:
    """Refuse fields of other types too: a dying engine may write anything, and its agent must live on."""

    def read_checked(content: Any) -> Report:
        report = read(content)
        for field in attrs.fields(type(report)):
            if not _is_of(field.type, getattr(report, field.name)):
                raise TypeError(f"{field.name} is of another type")
        return report

    return read_checked


def _is_of(form: Any, value: Any) -> bool:
    parts = get_args(form)
    if not parts:
        return type(value) is form
    if get_origin(form) is dict:
        key, item = parts
        return type(value) is dict and all(_is_of(key, k) and _is_of(item, v) for k, v in value.items())
    return any(_is_of(part, value) for part in parts)


def _read_plain(form: Callable[..., M]) -> Callable[[Any], M]:
    return lambda content: form(**content)


COMMANDS: dict[str, Callable[[Any], Command]] = {
    "EngineSettings": _read_settings,
    "OpenContext": _read_plain(OpenContext),
    "Generate": _read_generate,
    "Embed": _read_embed,
    "Cancel": _read_plain(Cancel),
}
REPORTS: dict[str, Callable[[Any], Report]] = {
    "Progress": _checked(_read_plain(Progress)),
    "ModelRefused": _checked(_read_plain(ModelRefused)),
    "ProjectionRefused": _checked(_read_plain(ProjectionRefused)),
    "ModelDescription": _checked(_read_description),
    "ContextRefused": _checked(_read_plain(ContextRefused)),
    "Capacity": _checked(_read_capacity),
    "Embedded": _read_embedded,
    "Turn": _read_turn,
    "Held": _read_held,
    "Encoding": _checked(_read_plain(Encoding)),
    "Log": _checked(_read_plain(Log)),
}
