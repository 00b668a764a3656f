"""Which tokens an answer may go on with, so that it becomes what its grammar says.

llama.cpp's own grammars are not used: they abort the process over a token too many, and some grammars of a
hundred bytes take them minutes for one token. Here every way to read the answer so far is followed at once,
and ways that meet go on as one, however they came there (a graph-structured stack), so that time is bounded.

A *reading* is the set of places where the answer may be: a state of a rule, and the frame of its call. A
frame says where its rule goes on when it ends, and within which frames: all calls that go on at the same
state after the same character share one. Readings are kept: an answer that comes back to where it was, as
in the middle of a string, finds the step to the next character taken already.
"""

from collections.abc import Callable, Iterable, Mapping

import attrs
import numpy as np
import numpy.typing as npt

from paddler.engine.gbnf import GrammarUnfit, Ranges, State, TokenTest, read_gbnf
from paddler.engine.pipe import Finish, GrammarRule
from paddler.engine.sampling import GenerationRefused, Ids, Logits

_MOST_PLACES = 20_000
"""At once: 20 ms for a character."""

_WORK = 1_000_000
_WORK_PER_TOKEN = 20_000
"""Places that may be visited for an answer, a second's worth and as much more for each 50 tokens."""

_MANY = 1000
"""Tokens, of which it pays to look at the first bytes all at once."""

_MOST_READINGS = 20_000
"""Kept; then they are forgotten."""


class Grammars:
    """Makes the grammars of one model."""

    def __init__(
        self,
        *,
        n_vocab: int,
        pieces: Mapping[int, bytes],
        control_tokens: Mapping[int, str],
        end_tokens: frozenset[int],
    ) -> None:
        self._n_vocab = n_vocab
        self._firsts: npt.NDArray[np.uint8] | None = None
        self._pieces = pieces
        self._end_tokens = end_tokens
        self._control_tokens = {
            token: text.encode() for token, text in control_tokens.items() if token not in end_tokens
        }

    def open(self, rule: GrammarRule) -> "Grammar":
        """Make a grammar. Raises GenerationRefused."""
        try:
            start = read_gbnf(rule.gbnf, rule.root)
        except GrammarUnfit as unfit:
            raise GenerationRefused(Finish.GRAMMAR_INVALID, str(unfit)) from None
        gbnf = rule.gbnf.encode()
        silent = [token for token, text in self._control_tokens.items() if text not in gbnf]
        return Grammar(
            start,
            begins_after=rule.begins_after,
            silent=silent,
            text_of=self._text_of,
            first_bytes=self._first_bytes,
            end_tokens=self._end_tokens,
        )

    def _first_bytes(self) -> npt.NDArray[np.uint8]:
        """Return the first byte of every token, 0 where it has none."""
        if self._firsts is None:
            texts = map(self._text_of, range(self._n_vocab))
            self._firsts = np.fromiter((text[0] if text else 0 for text in texts), np.uint8, self._n_vocab)
            self._firsts[list(self._end_tokens)] = 0
        return self._firsts

    def _text_of(self, token: int) -> bytes:
        control = self._control_tokens.get(token)
        return self._pieces[token] if control is None else control


class Grammar:
    """What one answer must look like, and how far it is."""

    def __init__(
        self,
        start: State,
        *,
        begins_after: tuple[str, ...],
        silent: list[int],
        text_of: Callable[[int], bytes],
        first_bytes: Callable[[], npt.NDArray[np.uint8]],
        end_tokens: frozenset[int],
    ) -> None:
        """Begin; `silent` are control tokens: users do not see them, so that they fulfil nothing."""
        self._silent = np.array(silent, np.intp)
        self._text_of = text_of
        self._first_bytes = first_bytes
        self._end_tokens = end_tokens
        self._readings = _Readings()
        self._reading = self._readings.of({(start, None)})
        self._partial = b""
        self._tested: tuple[int, tuple[_Reading, bytes] | None] = (-1, None)
        self._marker = _MarkerSearch(begins_after) if begins_after else None

    @property
    def bound(self) -> bool:
        """Say whether the answer is bound by now; before that everything is allowed."""
        return self._marker is None

    def hide(self, row: Logits) -> None:
        """Forbid what the grammar would take, but nobody would see."""
        row[self._silent] = -np.inf

    def allows(self, token: int) -> bool:
        """Say whether the answer can go on with a token, or end with it. Raises GenerationRefused."""
        if token in self._end_tokens:
            return self._reading.complete and not self._partial
        after = self._after(token)
        self._tested = (token, after)
        return after is not None

    def allowed(self, ids: Ids) -> Ids:
        """Return those of the tokens that the answer can go on with. Raises GenerationRefused."""
        if len(ids) > _MANY and not self._reading.tests:
            ids = ids[self._may_begin_with()[self._first_bytes()[ids]]]
        return np.array([token for token in ids.tolist() if self.allows(token)], np.intp)

    def accept(self, token: int) -> None:
        """Go on with a token that is allowed and no end token. Raises GenerationRefused."""
        after = self._tested[1] if self._tested[0] == token else self._after(token)
        assert after is not None
        self._reading, self._partial = after
        self._tested = (-1, None)
        self._readings.work_left += _WORK_PER_TOKEN

    def watch(self, token: int) -> bool:
        """Take a token of the free part, which may end it; false if the grammar cannot go on after it.

        Then nothing has changed. Raises GenerationRefused.
        """
        assert self._marker is not None
        begun = self._marker.feed(self._text_of(token))
        if begun is None:
            return True
        after = self._after_text(begun)
        if after is None:
            self._marker.undo()
            return False
        self._reading, self._partial = after
        self._marker = None
        return True

    def _may_begin_with(self) -> npt.NDArray[np.bool_]:
        """Return for every byte whether a token that begins with it need be looked at."""
        bytes_wanted = np.ones(256, np.bool_)
        if not self._partial:
            bytes_wanted[:0x80] = [
                self._readings.after(self._reading, chr(code)) is not None for code in range(0x80)
            ]
        bytes_wanted[0] = True  # an end token's, which has no text
        return bytes_wanted

    def _after(self, token: int) -> "tuple[_Reading, bytes] | None":
        text = self._text_of(token)
        after = self._after_text(text) if text else None
        if self._reading.tests and not self._partial:
            seeds = {
                (target, frame) for test, target, frame in self._reading.tests if test.matches(token, text)
            }
            if seeds and (after is None or not after[1]):
                return self._readings.of(seeds | (after[0].seeds if after is not None else set())), b""
        return after

    def _after_text(self, text: bytes) -> "tuple[_Reading, bytes] | None":
        """Return where a text leads, and the beginning of a character it ends with; None if nowhere."""
        data = self._partial + text
        if b"\0" in data:
            return None  # no character of an answer, whatever a grammar says
        try:
            characters, partial = data.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return None
            characters, partial = data[: error.start].decode(), data[error.start :]
        reading = self._reading
        for character in characters:
            after = self._readings.after(reading, character)
            if after is None:
                return None
            reading = after
        return (reading, partial) if not partial or reading.may_begin(partial) else None


@attrs.define(eq=False)
class _Frame:
    """A call: where the caller goes on, and the frames it is in itself; None is the root's."""

    back: State
    callers: "set[_Frame | None]" = attrs.Factory(set)
    has_ended: bool = False
    """The rule has ended already while its reading is made: a caller that comes later goes on at once."""


_Place = tuple[State, "_Frame | None"]


class _Reading:
    """All places where an answer may be, and the steps on from them."""

    def __init__(self, seeds: frozenset[_Place]) -> None:
        self.seeds = seeds
        self.complete = False
        self.single: dict[int, list[_Place]] = {}
        """Code point to where it leads: most steps are those of literals."""
        self.ranges: list[tuple[Ranges, State, _Frame | None]] = []
        self.tests: list[tuple[TokenTest, State, _Frame | None]] = []
        self.next: dict[str, _Reading | None] = {}

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
            begin <= high and low <= end for ranges, _, _ in self.ranges for begin, end in ranges
        )

    def add_step(self, ranges: Ranges, place: _Place) -> None:
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            self.single.setdefault(ranges[0][0], []).append(place)
        else:
            self.ranges.append((ranges, *place))


class _Readings:
    """The readings of one answer, each made once."""

    def __init__(self) -> None:
        self._kept: dict[frozenset[_Place], _Reading] = {}
        self.work_left = _WORK

    def of(self, seeds: Iterable[_Place]) -> _Reading:
        """Return the reading with these places and all that follow from them without a character."""
        key = frozenset(seeds)
        reading = self._kept.get(key)
        if reading is None:
            if len(self._kept) >= _MOST_READINGS:
                self._kept.clear()
            reading = self._kept[key] = self._made(key)
        return reading

    def after(self, reading: _Reading, character: str) -> _Reading | None:
        """Return where a character leads, or None."""
        if character not in reading.next:
            code = ord(character)
            self._spend(len(reading.ranges))
            seeds = set(reading.single.get(code, ()))
            for ranges, target, frame in reading.ranges:
                if any(low <= code <= high for low, high in ranges):
                    seeds.add((target, frame))
            reading.next[character] = self.of(seeds) if seeds else None
        return reading.next[character]

    def _made(self, seeds: frozenset[_Place]) -> _Reading:
        """Follow empty steps, calls and the ends of rules; each place once, whatever leads there."""
        reading = _Reading(seeds)
        frames: dict[State, _Frame] = {}
        seen: set[_Place] = set()
        todo = list(seeds)
        while todo:
            place = todo.pop()
            if place in seen:
                continue
            seen.add(place)
            state, frame = place
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
            if len(seen) > _MOST_PLACES:
                raise _too_complex()
        self._spend(len(seen))
        return reading

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


@attrs.define
class _MarkerSearch:
    """Find the end of the first of some texts in a text that comes in pieces."""

    _markers: tuple[str, ...]
    _tail: bytes = b""
    _before: bytes = b""

    def feed(self, piece: bytes) -> bytes | None:
        """Return what follows the marker, or None while there is none."""
        self._before = self._tail
        text = self._tail + piece
        ends = [
            place + len(marker)
            for marker in (marker.encode() for marker in self._markers)
            if (place := text.find(marker)) >= 0
        ]
        if ends:
            return text[min(ends) :]
        longest = max(len(marker.encode()) for marker in self._markers)
        self._tail = text[-(longest - 1) :] if longest > 1 else b""
        return None

    def undo(self) -> None:
        """Forget the last piece."""
        self._tail = self._before
