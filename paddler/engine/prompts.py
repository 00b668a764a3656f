"""Prompts to tokens: short ones at once; long ones, and pictures, in threads: they would stall every slot.

Only the tokenising itself happens in another thread; who is next is decided on the engine's loop, so
nothing here needs a lock.
"""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from paddler.engine.pipe import Generate
from paddler.engine.sequences import Ids, Prompt

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

    def __init__(
        self,
        tokenize: Callable[[str], Ids],
        *,
        wake: Callable[[], object],
        read_pictures: Callable[[Generate], Prompt] | None = None,
    ) -> None:
        """Call `wake`, in another thread, whenever there is something new among the finished.

        Without `read_pictures` there must be no prompts with pictures.
        """
        self._tokenize = tokenize
        self._read_pictures = read_pictures
        self._wake = wake
        self._waiting: dict[int, Generate] = {}
        self._threads = 0
        self._finished: SimpleQueue[tuple[int, Prompt | None]] = SimpleQueue()

    def read(self, command: Generate) -> Prompt | None:
        """Return the prompt's tokens, or None and later the same among the finished."""
        if len(command.prompt) <= _INLINE_CHARACTERS and not command.pictures:
            return Prompt(self._tokenize(command.prompt))
        self._waiting[command.generation] = command
        self._start_next()
        return None

    def forget(self, generation: int) -> None:
        """Drop a prompt that nobody wants any more; one that is in a thread finishes."""
        self._waiting.pop(generation, None)

    def finished(self) -> Iterator[tuple[int, Prompt]]:
        """Yield what is finished, forgotten ones too."""
        while not self._finished.empty():
            generation, prompt = self._finished.get()
            assert prompt is not None, "a prompt could not be tokenised, see above"
            self._threads -= 1
            self._start_next()
            yield generation, prompt

    def _start_next(self) -> None:
        if self._waiting and self._threads < _MOST_THREADS:
            command = self._waiting.pop(next(iter(self._waiting)))
            self._threads += 1
            threading.Thread(target=self._read_aside, args=(command,), daemon=True).start()

    def _read_aside(self, command: Generate) -> None:
        prompt = None
        try:
            if command.pictures:
                assert self._read_pictures is not None
                prompt = self._read_pictures(command)
            else:
                prompt = Prompt(self._tokenize(command.prompt))
        finally:
            self._finished.put((command.generation, prompt))
            self._wake()
