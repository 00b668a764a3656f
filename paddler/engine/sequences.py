"""One generation: where its tokens are, what bounds it, how it ends. Pure.

A sequence is first *waiting* for its turn to be served, then its prompt is *read* (text to tokens), then
it is *placed* into a slot, behind what the slot's cells hold of its prompt already; it *ingests* the rest
chunk by chunk, and with the first sampled token it *generates*. Whoever ends it sets `finish`; a finished
sequence never changes again. `position` counts the tokens that lie in KV cells; while generating one more
token, `pending`, is sampled and has no cell yet.
"""

import codecs
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from paddler.engine.pipe import Finish
from paddler.engine.stop_strings import StopStrings

GRID = 64
"""Prompts are cut at multiples of this many tokens, counted from position 0, and the tail is a chunk of
its own: then a prompt's KV does not depend on where it was cut (engine notes §3.3)."""

Ids = npt.NDArray[np.int32]

EVICTED = "Request evicted due to KV cache pressure"
NO_TOKENS = "the prompt has no tokens"


@attrs.frozen
class Span:
    """Positions of a prompt that are ingested, and reused, only as a whole: those of an image."""

    start: int
    length: int
    positions: int | None = None
    """How far it moves the positions of what follows, where that is not its length (M-RoPE)."""
    image: Any = attrs.field(default=None, eq=False, repr=False)
    """What fills its cells; images.Image."""

    @property
    def end(self) -> int:
        return self.start + self.length


@attrs.frozen(eq=False)
class Prompt:
    """A prompt as the cells will hold it: the id of each position.

    The positions of an image have ids below zero that follow from its content, so that equal ids mean
    equal cells; its span says where it begins and ends. Spans are in order and do not overlap.
    """

    tokens: Ids
    spans: tuple[Span, ...] = ()
    refused: Finish | None = None
    """It cannot be served: its generation ends with this, and `failure`."""
    failure: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> Ids:
        """The tokens without those of images."""
        return self.tokens[self.tokens >= 0] if self.spans else self.tokens

    @property
    def image_tokens(self) -> int:
        return sum(span.length for span in self.spans)

    def text_tokens(self, length: int) -> int:
        """Return how many of the first `length` tokens are text; no span may go on there."""
        return length - sum(span.length for span in self.spans if span.end <= length)

    def position(self, length: int) -> int:
        """Return the position of the token behind the first `length`; likewise."""
        if not self.spans:
            return length
        moved = (span for span in self.spans if span.end <= length and span.positions is not None)
        return length - sum(span.length - (span.positions or 0) for span in moved)

    @property
    def last_line(self) -> int:
        """The last grid line before the end: the most that can be reused, for one token must be computed."""
        return max(len(self.tokens) - 1, 0) // GRID * GRID


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


@attrs.define(eq=False)
class Sequence:
    """The state of one generation."""

    generation: int
    max_tokens: int
    slot: int | None = None
    """None until it is placed."""
    prompt: Prompt | None = None
    """None until the text is tokenised."""
    room: int = 0
    shift: int = 0
    """What is generated has its place so many positions before that of its cell, because of images."""
    position: int = 0
    cached: int = 0
    """Tokens of the prompt that were in cells already when it was placed."""
    text_tokens: int = 0
    cached_text_tokens: int = 0
    image_tokens: int = 0
    """Those of the prompt, counted apart."""
    pause: int = 0
    """A chunk ends here, too, because the state of the cells at this grid line is to be kept."""
    pending: int | None = None
    generated: int = 0
    finish: Finish | None = None
    failure: str = ""
    _decoder: codecs.IncrementalDecoder = attrs.field(factory=_utf8_decoder)
    _stops: StopStrings | None = None

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def ingesting(self) -> bool:
        return self.finish is None and self.slot is not None and self.pending is None

    @property
    def placeable(self) -> bool:
        return self.finish is None and self.slot is None and self.prompt is not None

    @property
    def generating(self) -> bool:
        return self.finish is None and self.pending is not None

    def take_prompt(self, prompt: Prompt, *, room: int) -> None:
        """Begin with the tokens of the prompt, or fail when they cannot be served."""
        self.prompt = prompt
        self.room = room
        self.shift = len(prompt) - prompt.position(len(prompt))
        self.text_tokens = prompt.text_tokens(len(prompt)) if prompt.refused is None else 0
        self.image_tokens = prompt.image_tokens
        if prompt.refused is not None:
            self.refuse(prompt.refused, prompt.failure)
        elif len(prompt) == 0:
            self.fail(NO_TOKENS)
        elif len(prompt) > room:
            self.fail(f"{EVICTED}: prompt has {len(prompt)} tokens, room for {room}")

    def place(self, slot: int, *, cached: int, pause: int = 0) -> None:
        """Begin in a slot whose cells hold the first `cached` tokens of the prompt."""
        self.slot = slot
        assert self.prompt is not None
        self.position = self.cached = cached
        self.cached_text_tokens = self.prompt.text_tokens(cached)
        self.pause = pause

    def span(self) -> Span | None:
        """Return the span that is to be ingested next."""
        assert self.prompt is not None
        return next((span for span in self.prompt.spans if span.start == self.position), None)

    def next_chunk(self, limit: int) -> int:
        """Return how many prompt tokens the next decode may take, at most `limit`; a span is one chunk."""
        span = self.span()
        if span is not None:
            return span.length
        remaining = self._next_stop() - self.position
        to_grid_line = GRID - self.position % GRID
        if limit < to_grid_line or remaining < to_grid_line:  # a tiny n_batch, or a tail
            return min(limit, remaining)
        if to_grid_line < GRID:  # behind a span: nobody can begin here, so what begins is alone
            return to_grid_line
        return min(limit, remaining) // GRID * GRID

    def _next_stop(self) -> int:
        assert self.prompt is not None
        stops = [span.start for span in self.prompt.spans if span.start > self.position]
        if self.pause > self.position:
            stops.append(self.pause)
        return min(stops, default=len(self.prompt))

    def accept(self, token: int, piece: bytes, *, is_end: bool) -> str:
        """Take the next sampled token; return the text that became visible; end where a limit says so."""
        self.generated += 1
        self.pending = token
        if is_end:
            self.finish = Finish.END
        elif self.generated >= self.max_tokens:
            self.finish = Finish.LENGTH
        elif self.position >= self.room:
            self.fail(f"{EVICTED}: {self.position} tokens fill its cells")
        text = self._decoder.decode(b"" if is_end else piece, final=self.finish is not None)
        return text if self._stops is None else self._before_stop(text, self._stops)

    def _before_stop(self, text: str, stops: StopStrings) -> str:
        """Return what may be shown; end the answer if a stop string ends in this text."""
        text, stopped = stops.feed(text)
        if stopped:
            self.finish = Finish.END
            self.failure = ""
        return text if self.finish is None else text + stops.flush()

    def fail(self, failure: str) -> None:
        self.refuse(Finish.FAILED, failure)

    def refuse(self, finish: Finish, failure: str) -> None:
        self.finish = finish
        self.failure = failure

    def stop(self) -> None:
        self.finish = Finish.STOPPED

    def flush_text(self) -> str:
        """Return what was held back, when the end comes without a token."""
        text = self._decoder.decode(b"", final=True)
        if self._stops is None:
            return text
        text, _ = self._stops.feed(text)
        return text + self._stops.flush()
