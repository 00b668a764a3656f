"""Stop strings: where an answer ends, however its text comes in pieces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.pipe import Finish
from paddler.engine.sequences import Prompt, Sequence
from paddler.engine.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4).map(tuple)


def shown(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """Return the whole text that is shown, and whether a stop string ended it."""
    matcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        visible, stopped = matcher.feed(piece)
        text += visible
        if stopped:
            assert matcher.flush() == ""
            return text, True
    return text + matcher.flush(), False


def cut_naively(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """Say the same by trying every length."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(STOPS, st.lists(LETTERS, max_size=8))
def test_any_split_is_cut_where_the_first_stop_string_ends(stops: tuple[str, ...], pieces: list[str]) -> None:
    assert shown(stops, pieces) == cut_naively(stops, "".join(pieces))


@given(STOPS, st.lists(LETTERS, max_size=8))
def test_only_what_may_begin_a_stop_string_is_held_back(stops: tuple[str, ...], pieces: list[str]) -> None:
    matcher = StopStrings(stops)
    text = seen = ""
    for piece in pieces:
        visible, stopped = matcher.feed(piece)
        text, seen = text + piece, seen + visible
        if stopped:
            break
        held = text[len(seen) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_long_stop_strings_cost_no_more_than_short_ones() -> None:
    stops = tuple("a" * 1023 + letter for letter in "bcdefghijklmnopq")
    matcher = StopStrings(stops)
    for _ in range(300):
        matcher.feed("aaaa")
    assert matcher.flush() == "a" * 1023


def sequence(*stops: str, max_tokens: int = 10) -> Sequence:
    one = Sequence(1, max_tokens, stops=StopStrings(stops))
    one.take_prompt(Prompt(np.array([1], np.int32)), room=100)
    return one


@pytest.mark.parametrize(
    ("pieces", "texts", "finish"),
    [
        ([b"on", b"e\n", b"\ntwo"], ["on", "e", ""], Finish.END),
        ([b"a\n", b"b"], ["a", "\nb"], None),
        ([b"\xe2\x82", b"\xac\n\n"], ["", "€"], Finish.END),
    ],
)
def test_a_sequence_ends_before_its_stop_string(
    pieces: list[bytes], texts: list[str], finish: Finish | None
) -> None:
    one = sequence("\n\n")
    assert [one.accept(7, piece, is_end=False) for piece in pieces] == texts
    assert one.finish is finish


def test_what_was_held_back_is_shown_at_any_other_end() -> None:
    ended = sequence("\n\n")
    assert [ended.accept(7, b"a\n", is_end=False), ended.accept(9, b"", is_end=True)] == ["a", "\n"]
    limited = sequence("\n\n", max_tokens=1)
    assert (limited.accept(7, b"a\n", is_end=False), limited.finish) == ("a\n", Finish.LENGTH)
    cancelled = sequence("\n\n")
    cancelled.accept(7, b"a\n\xe2", is_end=False)
    cancelled.stop()
    assert cancelled.flush_text() == "\n\ufffd"


def test_a_stop_string_in_the_last_token_is_an_end() -> None:
    one = sequence("b", max_tokens=1)
    assert (one.accept(7, b"ab", is_end=False), one.finish) == ("a", Finish.END)
