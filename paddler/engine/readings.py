"""Where an answer may be in its grammar, character by character. Pure.

Every way to read the answer so far is followed at once, and ways that meet go on as one, however they came
there (a graph-structured stack), so that time is bounded.

A *reading* is the set of places where the answer may be: a state of a rule, and the frame of its call. A
frame says where its rule goes on when it ends, and within which frames: all calls that go on at the same
state after the same character share one. Readings are kept: an answer that comes back to where it was, as
in the middle of a string, finds the step to the next character taken already.
"""

from collections.abc import Iterable

import attrs

from paddler.engine.gbnf import Ranges, State, TokenTest, holds_any
from paddler.engine.pipe import Finish
from paddler.engine.sampling import GenerationRefused

_LARGEST = 20_000
"""Places and steps of one reading: 20 ms for a character."""

_WORK = 1_000_000
WORK_PER_TOKEN = 10_000
"""Places and steps that may be looked at for an answer: some two seconds' worth, and 20 ms more per token."""

_MOST_KEPT = 300_000
"""Places, steps and characters tried of the readings that are kept, about 60 MB; then they are forgotten."""


@attrs.define(eq=False)
class _Frame:
    """A call: where the caller goes on, and the frames it is in itself; None is the root's."""

    back: State
    callers: "set[_Frame | None]" = attrs.Factory(set)
    has_ended: bool = False
    """The rule has ended already while its reading is made: a caller that comes later goes on at once."""


_Place = tuple[State, "_Frame | None"]


class Reading:
    """All places where an answer may be, and the steps on from them."""

    def __init__(self, seeds: frozenset[_Place]) -> None:
        self.seeds = seeds
        self.complete = False
        self.single: dict[int, list[_Place]] = {}
        """Code point to where it leads: most steps are those of literals."""
        self.ranges: list[tuple[Ranges, State, _Frame | None]] = []
        self.tests: list[tuple[TokenTest, State, _Frame | None]] = []
        self.next: dict[str, Reading | None] = {}

    def may_begin(self, partial: bytes) -> bool:
        """Say whether a character with these first bytes, and more to come, can be next."""
        length = 2 if partial[0] < 0xE0 else 3 if partial[0] < 0xF0 else 4
        value = partial[0] & (0x7F >> length)
        for byte in partial[1:]:
            value = value << 6 | byte & 0x3F
        rest = 6 * (length - len(partial))
        shortest = (0x80, 0x800, 0x10000)[length - 2]  # less would take fewer bytes
        low, high = max(value << rest, shortest), ((value + 1) << rest) - 1
        return any(low <= code <= high for code in self.single) or any(
            holds_any(ranges, low, high) for ranges, _, _ in self.ranges
        )

    def add_step(self, ranges: Ranges, place: _Place) -> None:
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            self.single.setdefault(ranges[0][0], []).append(place)
        else:
            self.ranges.append((ranges, *place))


class Readings:
    """The readings of one answer, each made once."""

    def __init__(self) -> None:
        self._kept: dict[frozenset[_Place], Reading] = {}
        self._kept_size = 0
        self.work_left = _WORK

    def begin(self, start: State) -> Reading:
        """Return the reading before the first character. As all that follows: raises GenerationRefused."""
        return self.of({(start, None)})

    def of(self, seeds: Iterable[_Place]) -> Reading:
        """Return the reading with these places and all that follow from them without a character."""
        key = frozenset(seeds)
        reading = self._kept.get(key)
        if reading is None:
            reading, size = self._made(key)
            self._kept_size += size
            if self._kept_size > _MOST_KEPT:
                self._kept.clear()
                self._kept_size = size
            self._kept[key] = reading
        return reading

    def after(self, reading: Reading, character: str) -> Reading | None:
        """Return where a character leads, or None."""
        if character not in reading.next:
            code = ord(character)
            self._spend(len(reading.ranges))
            self._kept_size += 1
            seeds = set(reading.single.get(code, ()))
            for ranges, target, frame in reading.ranges:
                if holds_any(ranges, code, code):
                    seeds.add((target, frame))
            reading.next[character] = self.of(seeds) if seeds else None
        return reading.next[character]

    def _made(self, seeds: frozenset[_Place]) -> tuple[Reading, int]:
        """Follow empty steps, calls and the ends of rules; each place once, whatever leads there.

        Return the reading, and how many places and steps it has.
        """
        reading = Reading(seeds)
        size = 0
        frames: dict[State, _Frame] = {}
        seen: set[_Place] = set()
        todo = list(seeds)
        while todo:
            place = todo.pop()
            if place in seen:
                continue
            seen.add(place)
            state, frame = place
            size += 1 + state.steps
            if size > _LARGEST:
                raise _too_complex()
            for ranges, target in state.characters:
                reading.add_step(ranges, (target, frame))
            reading.tests += [(test, target, frame) for test, target in state.tokens]
            todo += [(target, frame) for target in state.empties]
            todo += self._calls(state, frame, frames)
            if state.is_end and frame is None:
                reading.complete = True
            elif state.is_end and frame is not None:
                frame.has_ended = True
                todo += [(frame.back, caller) for caller in frame.callers]
        self._spend(size)
        return reading, size

    def _calls(self, state: State, frame: _Frame | None, frames: dict[State, _Frame]) -> Iterable[_Place]:
        for rule, back in state.calls:
            assert rule.start is not None
            if back.only_ends:  # what is called goes on where this rule does: nothing to come back to
                yield rule.start, frame
                continue
            called = frames.get(back)
            if called is None:
                called = frames[back] = _Frame(back)
            if frame not in called.callers:
                called.callers.add(frame)
                if called.has_ended:
                    yield back, frame
            yield rule.start, called

    def _spend(self, places: int) -> None:
        self.work_left -= places
        if self.work_left < 0:
            raise _too_complex()


def _too_complex() -> GenerationRefused:
    return GenerationRefused(
        Finish.GRAMMAR_INVALID, "grammar is too complex: the answer can be read in too many ways"
    )
