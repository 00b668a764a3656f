"""One generation: where its tokens are, what bounds it, how it ends. Pure.

A sequence is first *waiting* for a slot, then its prompt is *read* (text to tokens), then it
*ingests* the prompt chunk by chunk, and with the first sampled token it *generates*. Whoever ends it
sets `finish`; a finished sequence never changes again. `position` counts the tokens that lie in KV
cells; while generating one more token, `pending`, is sampled and has no cell yet.
"""

import codecs
from collections.abc import Sized
from typing import Protocol

import attrs

from paddler.engine.pipe import Finish

GRID = 64
"""Prompts are cut at multiples of this many tokens, counted from position 0, and the tail is a chunk of
its own: then a prompt's KV does not depend on where it was cut (engine notes §3.3)."""

EVICTED = "Request evicted due to KV cache pressure"
NO_TOKENS = "the prompt has no tokens"


class Tokens(Sized, Protocol):
    """The ids of a prompt; llama.py's are a numpy array."""

    def __getitem__(self, span: slice, /) -> "Tokens": ...


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


@attrs.define(eq=False)
class Sequence:
    """The state of one generation."""

    generation: int
    max_tokens: int
    slot: int | None = None
    prompt: Tokens | None = None
    """None until the text is tokenised."""
    room: int = 0
    position: int = 0
    pending: int | None = None
    generated: int = 0
    finish: Finish | None = None
    failure: str = ""
    _decoder: codecs.IncrementalDecoder = attrs.field(factory=_utf8_decoder)

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def ingesting(self) -> bool:
        return self.finish is None and self.prompt is not None and self.pending is None

    @property
    def generating(self) -> bool:
        return self.finish is None and self.pending is not None

    def take_prompt(self, prompt: Tokens, *, room: int) -> None:
        """Begin with the tokens of the prompt, or fail when they cannot be served."""
        self.prompt = prompt
        self.room = room
        if len(prompt) == 0:
            self.fail(NO_TOKENS)
        elif len(prompt) > room:
            self.fail(f"{EVICTED}: prompt has {len(prompt)} tokens, room for {room}")

    def next_chunk(self, limit: int) -> int:
        """Return how many prompt tokens the next decode may take, at most `limit`."""
        remaining = self.prompt_tokens - self.position
        to_grid_line = GRID - self.position % GRID
        if limit < to_grid_line or remaining < to_grid_line:  # a tiny n_batch, or the tail
            return min(limit, remaining)
        whole = min(limit, remaining) - to_grid_line
        return to_grid_line + whole // GRID * GRID

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
        return self._decoder.decode(b"" if is_end else piece, final=self.finish is not None)

    def fail(self, failure: str) -> None:
        self.finish = Finish.FAILED
        self.failure = failure

    def stop(self) -> None:
        self.finish = Finish.STOPPED

    def flush_text(self) -> str:
        """Return what an end without a token leaves of an incomplete character."""
        return self._decoder.decode(b"", final=True)
