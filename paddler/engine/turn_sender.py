"""When the parent is told what turns did: at once, or a few short turns later.

A frame wakes agent, balancer and client, and where they share the processor with the engine that costs some
tenths of a millisecond each time. So turns that only decode are told together for as long as nobody notices.
Something is kept only while the next turn follows at once: whoever waits for commands must keep nothing.
"""

from collections.abc import Callable, Sequence

from paddler.engine.pipe import Advance, Turn

HOLD = 0.016
"""Frames of short turns are no further apart: a screen shows no more than sixty a second."""

HOLD_WITHOUT_SPARE_CORE = 0.033
"""… where each frame takes a core from the engine, whose threads all wait for that one: thirty are fluent."""


class TurnSender:
    """Sends what turns did; `send` takes the frame."""

    def __init__(
        self, send: Callable[[Turn], object], *, longest_hold: float, clock: Callable[[], float]
    ) -> None:
        self._send = send
        self._longest_hold = longest_hold
        self._clock = clock
        self._advances: list[Advance] = []
        self._sent_at = self._taken_at = clock()
        self._is_steady = False

    @property
    def keeps_any(self) -> bool:
        return bool(self._advances)

    def take(self, advances: Sequence[Advance], *, only_decodes: bool) -> None:
        """Send a turn, or keep it if it only decoded, the next one `only_decodes`, and nothing ended.

        First tokens, ends, and whatever stands before a prompt that takes its time go at once; so does what
        would be late with the next turn, should that take as long as this one.
        """
        self._advances += advances
        is_steady = only_decodes and self._is_steady
        now = self._clock()
        next_end = now + (now - self._taken_at)
        self._taken_at = now
        has_ended = any(advance.finish is not None for advance in advances)
        if has_ended or not is_steady or next_end - self._sent_at > self._longest_hold:
            self._send_kept()
        self._is_steady = only_decodes

    def flush(self) -> None:
        """Send what is kept, and the next turn at once: something else than decoding goes on."""
        self._is_steady = False
        if self._advances:
            self._send_kept()

    def _send_kept(self) -> None:
        """Send a frame; an empty one says that the engine works."""
        # Tokens of one generation side by side: from there on, they are one write.
        self._send(Turn(tuple(sorted(self._advances, key=lambda advance: advance.generation))))
        self._advances.clear()
        self._sent_at = self._clock()
