"""Prompts to tokens: short ones at once, long ones in threads, because they would stall every slot.

Only the tokenising itself happens in another thread; who is next is decided on the engine's loop, so
nothing here needs a lock.
"""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from paddler.engine.turns import Ids

_INLINE_CHARACTERS = 4 * 1024
"""Texts up to this length are tokenised between turns: about 2 ms, also when every slot gets one at once."""

_MOST_THREADS = 2
"""Each takes a core from the decoding, half a millisecond per kilobyte, and up to sixty times its text in
memory.

Two, so that one enormous text does not hold up the others. Only generations that have a slot are read,
and what is cancelled leaves the line: a prompt waits for those of the other slots at most, and for two
cancelled ones, which llama.cpp cannot stop.
"""


class Prompts:
    """The prompts that are read: waiting in order of arrival, in a thread, or finished."""

    def __init__(self, tokenize: Callable[[str], Ids], *, wake: Callable[[], object]) -> None:
        """Call `wake`, in another thread, whenever there is something new among the finished."""
        self._tokenize = tokenize
        self._wake = wake
        self._waiting: dict[int, str] = {}
        self._threads = 0
        self._finished: SimpleQueue[tuple[int, Ids | None]] = SimpleQueue()

    def read(self, generation: int, text: str) -> Ids | None:
        """Return the tokens, or None and later the tokens among the finished."""
        if len(text) <= _INLINE_CHARACTERS:
            return self._tokenize(text)
        self._waiting[generation] = text
        self._start_next()
        return None

    def forget(self, generation: int) -> None:
        """Drop a prompt that nobody wants any more; one that is in a thread finishes."""
        self._waiting.pop(generation, None)

    def finished(self) -> Iterator[tuple[int, Ids]]:
        """Yield what is finished, forgotten ones too."""
        while not self._finished.empty():
            generation, tokens = self._finished.get()
            assert tokens is not None, "a prompt could not be tokenised, see above"
            self._threads -= 1
            self._start_next()
            yield generation, tokens

    def _start_next(self) -> None:
        if self._waiting and self._threads < _MOST_THREADS:
            generation = next(iter(self._waiting))
            text = self._waiting.pop(generation)
            self._threads += 1
            threading.Thread(target=self._read_aside, args=(generation, text), daemon=True).start()

    def _read_aside(self, generation: int, text: str) -> None:
        tokens = None
        try:
            tokens = self._tokenize(text)
        finally:
            self._finished.put((generation, tokens))
            self._wake()
