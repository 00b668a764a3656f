"""Which tokens an answer may go on with, so that it becomes what its grammar says.

llama.cpp's own grammars are not used: they abort the process over a token too many, and some grammars of a
hundred bytes take them minutes for one token. Here tokens are tested against readings (readings.py), whose
time is bounded.
"""

from collections.abc import Callable, Mapping

import attrs
import numpy as np
import numpy.typing as npt

from paddler.engine.gbnf import GrammarUnfit, State, read_gbnf
from paddler.engine.pipe import Finish, GrammarRule
from paddler.engine.readings import WORK_PER_TOKEN, Reading, Readings
from paddler.engine.sampling import GenerationRefused, Ids, Logits

_MANY = 1000
"""Tokens, of which it pays to look at the first bytes all at once."""


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
        self._readings = Readings()
        self._reading = self._readings.begin(start)
        self._partial = b""
        self._tested: tuple[int, tuple[Reading, bytes] | None] = (-1, None)
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
        self._readings.work_left += WORK_PER_TOKEN

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

    def _after(self, token: int) -> "tuple[Reading, bytes] | None":
        text = self._text_of(token)
        after = self._after_text(text) if text else None
        if self._reading.tests and not self._partial:
            seeds = {
                (target, frame) for test, target, frame in self._reading.tests if test.matches(token, text)
            }
            if seeds and (after is None or not after[1]):
                return self._readings.of(seeds | (after[0].seeds if after is not None else set())), b""
        return after

    def _after_text(self, text: bytes) -> "tuple[Reading, bytes] | None":
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
