"""Turns on a scripted context: who is decoded when, and what each turn tells."""

from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from paddler.engine.pipe import Advance, Finish, Generate
from paddler.engine.scheduler import TurnBudget
from paddler.engine.sequences import EVICTED, NO_TOKENS
from paddler.engine.turns import Turns
from paddler.messages.state import DETERMINISTIC_PARAMETERS

END = 9
LETTERS = {token: bytes([97 + token]) for token in range(10)}


@attrs.define
class ScriptedContext:
    """A pool of cells, and a model that answers each token with the next one."""

    pool: int = 1000
    room: int = 1000
    calls: list[Any] = attrs.Factory(list)
    used: dict[int, int] = attrs.Factory(dict)
    _last: list[int] = attrs.Factory(list)

    def clear(self, slot: int) -> None:
        self.used.pop(slot, None)

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool:
        if sum(self.used.values()) + len(tokens) > self.pool:
            return False
        for position, slot in zip(positions, slots, strict=True):
            assert self.used[slot] == position, "no gap, no step back"
            self.used[slot] += 1
        self.calls.append(("decode", slots))
        self._last = tokens
        return True

    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool:
        if sum(self.used.values()) + len(tokens) > self.pool:
            return False
        assert self.used.get(slot, 0) == position
        self.used[slot] = position + len(tokens)
        self.calls.append(("ingest", slot, len(tokens)))
        self._last = [int(tokens[-1])] if want_logits else []
        return True

    def logits(self, count: int) -> npt.NDArray[np.float32]:
        assert count == len(self._last)
        rows = np.zeros((count, 10), np.float32)
        for row, token in zip(rows, self._last, strict=True):
            row[(token + 1) % 10] = 1
        return rows


@attrs.define
class Prompts:
    """A text's characters are its tokens; texts in capitals take their time."""

    _slow: dict[int, str] = attrs.Factory(dict)
    ready: bool = False
    forgotten: list[int] = attrs.Factory(list)

    def forget(self, generation: int) -> None:
        """Take note, and finish it all the same: it may be in a thread already."""
        self.forgotten.append(generation)

    def read(self, generation: int, text: str) -> npt.NDArray[np.int32] | None:
        if text.isupper():
            self._slow[generation] = text
            return None
        return self._tokens(text)

    def finished(self) -> Iterable[tuple[int, npt.NDArray[np.int32]]]:
        if self.ready:
            while self._slow:
                generation, text = self._slow.popitem()
                yield generation, self._tokens(text.lower())

    def _tokens(self, text: str) -> npt.NDArray[np.int32]:
        return np.array([ord(letter) - 97 for letter in text], np.int32)


def turns_of(context: ScriptedContext, prompts: Prompts | None = None, *, slots: int = 2) -> Turns:
    return Turns(
        context,
        slots=slots,
        parameters=DETERMINISTIC_PARAMETERS,
        pieces=LETTERS,
        end_tokens=frozenset({END}),
        prompts=prompts or Prompts(),
        budget=TurnBudget(n_batch=64, seconds_per_token=0.001),
        clock=lambda: 0.0,
    )


def told(advances: tuple[Advance, ...]) -> dict[int, tuple[str, Finish | None]]:
    return {advance.generation: (advance.text, advance.finish) for advance in advances}


def test_a_generation_from_prompt_to_end() -> None:
    turns = turns_of(ScriptedContext())
    turns.submit(Generate(5, "abcdefg", 100))
    assert turns.run() == (Advance(5, (7,), "h", None, "", 7, 0),)
    assert turns.run() == (Advance(5, (8,), "i", None, "", 7, 0),)
    assert turns.run() == (Advance(5, (9,), "", Finish.END, "", 7, 0),)
    assert turns.idle
    assert turns.run() == ()


def test_decode_comes_before_one_chunk_of_one_prompt_and_they_never_mix() -> None:
    context = ScriptedContext()
    turns = turns_of(context, slots=3)
    turns.submit(Generate(1, "a", 100))
    turns.run()
    turns.submit(Generate(2, "a" * 130, 1))
    turns.submit(Generate(3, "a" * 65, 1))
    for _ in range(5):
        turns.run()
    assert context.calls[1:] == [
        ("decode", [0]), ("ingest", 1, 64),
        ("decode", [0]), ("ingest", 2, 64),
        ("decode", [0]), ("ingest", 1, 64),
        ("decode", [0]), ("ingest", 2, 1),
        ("decode", [0]), ("ingest", 1, 2),
    ]  # fmt: skip


def test_a_full_pool_takes_the_longest_and_its_last_turn_is_told_once() -> None:
    """The first decodes its token and is evicted for the second's prompt, both in one turn."""
    context = ScriptedContext(pool=30)
    turns = turns_of(context)
    turns.submit(Generate(1, "a" * 25, 100))
    turns.run()
    turns.submit(Generate(2, "abcdef", 100))
    first, second = turns.run()
    assert (first.tokens, first.text, first.finish) == ((2,), "c", Finish.FAILED)
    assert first.failure.startswith(EVICTED)
    assert (second.generation, second.text, second.finish) == (2, "g", None)
    assert context.used == {1: 6}


def test_a_decode_without_room_goes_on_without_the_longest() -> None:
    context = ScriptedContext(pool=10)
    turns = turns_of(context)
    turns.submit(Generate(1, "aaaaaa", 100))
    turns.submit(Generate(2, "aaa", 100))
    turns.run()
    turns.run()
    assert told(turns.run()) == {1: ("", Finish.FAILED), 2: ("c", None)}


def test_what_cannot_be_served_fails_at_once_and_frees_its_slot() -> None:
    context = ScriptedContext(room=4)
    turns = turns_of(context, slots=1)
    for generation, prompt in ((1, ""), (2, "aaaaa"), (3, "abc")):
        turns.submit(Generate(generation, prompt, 1))
    failures = [turns.run()[0].failure for _ in range(2)]
    assert failures == [NO_TOKENS, f"{EVICTED}: prompt has 5 tokens, room for 4"]
    assert told(turns.run()) == {3: ("d", Finish.LENGTH)}


def test_a_prompt_that_is_read_elsewhere_stalls_nobody() -> None:
    prompts = Prompts()
    turns = turns_of(ScriptedContext(), prompts)
    turns.submit(Generate(1, "ABC", 100))
    turns.run()
    reading = [turns.reading]
    turns.submit(Generate(2, "a", 100))
    assert told(turns.run()) == {2: ("b", None)}
    reading.append(turns.reading)
    assert reading == [True, False]
    prompts.ready = True
    assert told(turns.run()) == {1: ("d", None), 2: ("c", None)}


@pytest.mark.parametrize("prompt", ["abc", "ABC", "a" * 200])
def test_cancel_tells_once_whatever_the_generation_is_at(prompt: str) -> None:
    prompts = Prompts()
    context = ScriptedContext()
    turns = turns_of(context, prompts, slots=1)
    turns.submit(Generate(1, prompt, 100))
    turns.submit(Generate(2, "abc", 100))
    turns.run()
    for generation in (1, 1, 2, 7):
        turns.cancel(generation)
    assert {generation: finish for generation, (_, finish) in told(turns.run()).items()} == {
        1: Finish.STOPPED,
        2: Finish.STOPPED,
    }
    assert prompts.forgotten == [1, 2]
    prompts.ready = True
    assert turns.run() == ()
    assert turns.idle
    assert context.used == {}
