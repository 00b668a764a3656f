"""Long prompts are read in a few threads, in order, and only while somebody wants them."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import pytest

from paddler.engine.pipe import Generate
from paddler.engine.prompts import Prompts

PATIENCE = 10.0


class Desk:
    """Tokenises a text of letter X to the token X, when the test allows it."""

    def __init__(self) -> None:
        self.begun: SimpleQueue[str] = SimpleQueue()
        self.allowed = {letter: threading.Event() for letter in "abcdef"}
        self.woken: SimpleQueue[None] = SimpleQueue()
        self.prompts = Prompts(self.tokenize, wake=lambda: self.woken.put(None))

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        letter = text[0]
        self.begun.put(letter)
        assert self.allowed[letter].wait(PATIENCE)
        return np.array([ord(letter)], np.int32)

    def submit(self, letters: str) -> None:
        for letter in letters:
            assert self.prompts.read(Generate(ord(letter), letter * 5000, 1)) is None

    def begins(self, count: int) -> set[str]:
        """Wait for the next that are begun; more than these must not have been."""
        letters = {self.begun.get(timeout=PATIENCE) for _ in range(count)}
        assert self.begun.empty()
        return letters

    def finish(self, letter: str) -> None:
        """Let one be finished, and look at the finished as the loop does when it is woken."""
        self.allowed[letter].set()
        self.woken.get(timeout=PATIENCE)
        [(generation, prompt)] = self.prompts.finished()
        assert generation == prompt.tokens[0] == ord(letter)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    for allowed in desk.allowed.values():
        allowed.set()


def test_a_short_prompt_is_read_at_once(desk: Desk) -> None:
    desk.allowed["a"].set()
    prompt = desk.prompts.read(Generate(1, "a" * 4096, 1))
    assert prompt is not None
    assert prompt.tokens == np.array([97])
    assert list(desk.prompts.finished()) == []


def test_two_are_read_at_a_time_and_the_others_in_order(desk: Desk) -> None:
    desk.submit("abcd")
    assert desk.begins(2) == {"a", "b"}
    desk.finish("b")
    assert desk.begins(1) == {"c"}
    desk.finish("c")
    assert desk.begins(1) == {"d"}
    desk.finish("a")
    desk.finish("d")
    desk.submit("ef")
    assert desk.begins(2) == {"e", "f"}


def test_what_is_forgotten_before_its_turn_is_never_read(desk: Desk) -> None:
    desk.submit("abcdef")
    desk.begins(2)
    for letter in "acde":  # the first is in its thread already
        desk.prompts.forget(ord(letter))
    desk.finish("a")
    assert desk.begins(1) == {"f"}
    desk.finish("b")
    desk.finish("f")
    assert desk.begun.empty()
