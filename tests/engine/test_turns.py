"""Turns on a scripted context: who is decoded when, and what each turn tells."""

from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from paddler.engine.cells import Cells
from paddler.engine.pipe import Advance, Finish, Generate, Held
from paddler.engine.prefixes import State
from paddler.engine.sampling import GenerationRefused
from paddler.engine.scheduler import TurnBudget
from paddler.engine.sequences import EVICTED, NO_TOKENS, Ids, Prompt
from paddler.engine.turns import SamplerMaker, Turns

END = 9
LETTERS = {token: bytes([97 + token]) for token in range(10)}


@attrs.define
class ScriptedContext:
    """A pool of cells, and a model that answers each token with the next one.

    Which cells hold which tokens is remembered: a copy brings them along, and a cut frees them.
    """

    pool: int = 1000
    room: int = 1000
    shared: bool = False
    cuttable: bool = True
    storable: bool = True
    broken: bool = False
    decode_time: float = 0.0
    """Of each token."""
    batch_time: float = 0.0
    """More than that, for several tokens at once."""
    ingest_time: float = 0.0
    now: float = 0.0
    calls: list[Any] = attrs.Factory(list)
    held: dict[int, list[int]] = attrs.Factory(dict)
    _last: list[int] = attrs.Factory(list)

    @property
    def used(self) -> dict[int, int]:
        return {slot: len(tokens) for slot, tokens in self.held.items()}

    def clear(self, slot: int) -> None:
        self.held.pop(slot, None)

    def cut(self, slot: int, length: int) -> bool:
        assert length <= len(self.held[slot])
        if not self.cuttable and length < len(self.held[slot]):
            return False
        del self.held[slot][length:]
        return True

    def copy(self, source: int, slot: int, length: int) -> bool:
        self.calls.append(("copy", source, slot, length))
        return self.restore(slot, self.save(source))

    def save(self, slot: int) -> State:
        return np.array(self.held[slot], np.int32).view(np.uint8)

    def saved_bytes(self, slot: int) -> int:
        return 4 * len(self.held[slot])

    def restore(self, slot: int, state: State) -> bool:
        assert slot not in self.held, "only into an empty slot"
        self.calls.append(("restore", slot))
        if self.broken or sum(self.used.values()) + len(state) // 4 > self.pool:
            return False
        self.held[slot] = state.view(np.int32).tolist()
        return True

    def save_checkpoint(self, slot: int) -> State:
        self.calls.append(("checkpoint", slot, len(self.held[slot])))
        return self.save(slot)

    def restore_checkpoint(self, slot: int, state: State) -> bool:
        self.held[slot] = state.view(np.int32).tolist()
        return True

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool:
        if sum(self.used.values()) + len(tokens) > self.pool:
            return False
        for token, position, slot in zip(tokens, positions, slots, strict=True):
            assert self.used[slot] == position, "no gap, no step back"
            self.held[slot].append(token)
        self.calls.append(("decode", slots))
        self.now += len(tokens) * self.decode_time + (len(tokens) > 1) * self.batch_time
        self._last = tokens
        return True

    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool:
        if sum(self.used.values()) + len(tokens) > self.pool:
            return False
        assert self.used.get(slot, 0) == position
        self.held.setdefault(slot, []).extend(tokens.tolist())
        self.calls.append(("ingest", slot, len(tokens)))
        self.now += self.ingest_time
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

    def read(self, command: Generate) -> Prompt | None:
        if command.prompt.isupper():
            self._slow[command.generation] = command.prompt
            return None
        return self._tokens(command.prompt)

    def finished(self) -> Iterable[tuple[int, Prompt]]:
        if self.ready:
            while self._slow:
                generation, text = self._slow.popitem()
                yield generation, self._tokens(text.lower())

    def _tokens(self, text: str) -> Prompt:
        return Prompt(np.array([ord(letter) - 97 for letter in text], np.int32))


class Greedy:
    """Takes the largest logit, and refuses to say the letter that it was forbidden."""

    logprobs = None

    def __init__(self, forbidden: int = -1) -> None:
        self._forbidden = forbidden

    def pick(self, row: npt.NDArray[np.float32]) -> int:
        token = int(row.argmax())
        if token == self._forbidden:
            raise GenerationRefused(Finish.GRAMMAR_REJECTED, "not this one")
        return token

    def close(self) -> None:
        pass


def make_greedy(_command: Generate, _prompt: Ids) -> Greedy:
    return Greedy()


def turns_of(
    context: ScriptedContext,
    prompts: Prompts | None = None,
    *,
    slots: int = 2,
    make_sampler: SamplerMaker = make_greedy,
    keep: bool = True,
    stored_bytes: int = 0,
) -> Turns:
    return Turns(
        context,
        slots=slots,
        cells=Cells(context, slots=slots, keep=keep, stored_bytes=stored_bytes),
        make_sampler=make_sampler,
        pieces=LETTERS,
        end_tokens=frozenset({END}),
        prompts=prompts or Prompts(),
        budget=TurnBudget(n_batch=64, seconds_per_token=0.001),
        clock=lambda: context.now,
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
    context = ScriptedContext(ingest_time=0.2)
    turns = turns_of(context, slots=3)
    turns.submit(Generate(1, "a", 100))
    turns.run()
    turns.submit(Generate(2, "a" * 130, 1))
    turns.submit(Generate(3, "b" * 65, 1))
    for _ in range(5):
        turns.run()
    assert context.calls[1:] == [
        ("decode", [0]), ("ingest", 1, 64),
        ("decode", [0]), ("ingest", 2, 64),
        ("decode", [0]), ("ingest", 1, 64),
        ("decode", [0]), ("ingest", 2, 1),
        ("decode", [0]), ("ingest", 1, 2),
    ]  # fmt: skip


def test_short_prompts_share_a_turn_while_it_has_time() -> None:
    context = ScriptedContext(ingest_time=0.02)
    turns = turns_of(context, slots=5)
    for generation, prompt in enumerate(("a", "b", "c", "d", "e"), start=1):
        turns.submit(Generate(generation, prompt, 100))
    assert [[*told(turns.run())] for _ in range(3)] == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_tokens_are_decoded_one_by_one_where_that_is_faster() -> None:
    context = ScriptedContext(decode_time=0.01, batch_time=0.05)
    turns = turns_of(context, keep=False)
    turns.submit(Generate(1, "a", 100))
    turns.run()
    turns.run()
    turns.submit(Generate(2, "b", 100))
    for _ in range(6):
        turns.run()
    decodes = [slots for kind, slots, *_ in context.calls if kind == "decode"]
    assert decodes == [[0], [0], [0, 1], [0, 1], [0, 1], [0], [1], [0], [1]]


def test_tokens_are_decoded_together_where_that_is_faster() -> None:
    context = ScriptedContext(decode_time=0.01)
    turns = turns_of(context)
    turns.submit(Generate(1, "a", 100))
    turns.run()
    turns.run()
    turns.submit(Generate(2, "b", 100))
    for _ in range(4):
        turns.run()
    assert context.calls[-1] == ("decode", [0, 1])


def test_who_yields_to_one_decoded_before_is_not_decoded() -> None:
    context = ScriptedContext(pool=15, decode_time=0.01, batch_time=0.05, shared=True)
    turns = turns_of(context)
    turns.submit(Generate(1, "a", 100))
    turns.run()
    turns.run()
    turns.submit(Generate(2, "aaaaaa", 100))
    for _ in range(4):
        turns.run()
    assert told(turns.run()) == {1: ("h", None), 2: ("", Finish.FAILED)}
    assert context.calls[-1] == ("decode", [0])


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


def run_until_idle(turns: Turns) -> dict[int, Advance]:
    """Return the last word on each generation."""
    last: dict[int, Advance] = {}
    while not turns.idle:
        last |= {advance.generation: advance for advance in turns.run()}
    return last


def cached(turns: Turns, *prompts: str, first: int = 1, max_tokens: int = 1) -> list[int]:
    """Ask one after another; return how many tokens of each were in cells already."""
    found = []
    for generation, prompt in enumerate(prompts, first):
        turns.submit(Generate(generation, prompt, max_tokens))
        found.append(run_until_idle(turns)[generation].cached_prompt_tokens)
    return found


def test_a_prompt_begins_behind_what_the_last_one_left() -> None:
    turns = turns_of(ScriptedContext())
    long = "a" * 64 + "b" * 66
    assert cached(turns, long, long, long[:128], long[:129], "a" * 70, "b" * 70) == [0, 128, 64, 128, 64, 0]


def test_without_the_cache_every_prompt_is_cold_and_cells_are_freed() -> None:
    context = ScriptedContext()
    turns = turns_of(context, keep=False)
    assert cached(turns, "a" * 130, "a" * 130) == [0, 0]
    assert context.held == {}
    assert turns.held() is None


def test_what_a_busy_slot_holds_is_copied() -> None:
    context = ScriptedContext()
    turns = turns_of(context)
    turns.submit(Generate(1, "a" * 130, 100))
    for _ in range(4):
        turns.run()
    turns.submit(Generate(2, "a" * 128 + "bc", 1))
    assert run_until_idle(turns)[2].cached_prompt_tokens == 128
    assert ("copy", 0, 1, 128) in context.calls


def test_prompts_with_a_common_beginning_compute_it_once() -> None:
    """The second waits for what the first is ingesting, a third that shares nothing does not."""
    context = ScriptedContext()
    turns = turns_of(context, slots=3)
    for generation, prompt in ((1, "a" * 300), (2, "a" * 200 + "b" * 20), (3, "c" * 20)):
        turns.submit(Generate(generation, prompt, 5))
    last = run_until_idle(turns)
    assert [last[generation].cached_prompt_tokens for generation in (1, 2, 3)] == [0, 192, 0]
    assert sum(call[2] for call in context.calls if call[0] == "ingest") == 300 + 28 + 20


def test_who_waits_for_a_prompt_that_is_cancelled_goes_on_with_what_there_is() -> None:
    turns = turns_of(ScriptedContext())
    turns.submit(Generate(1, "a" * 300, 5))
    turns.submit(Generate(2, "a" * 300, 1))
    turns.run()
    turns.run()
    turns.cancel(1)
    last = run_until_idle(turns)
    assert (last[1].finish, last[2].finish) == (Finish.STOPPED, Finish.LENGTH)
    assert last[2].cached_prompt_tokens == 128


def test_evicted_prefixes_return_from_memory() -> None:
    context = ScriptedContext()
    turns = turns_of(context, slots=1, stored_bytes=10_000)
    assert cached(turns, "a" * 130, "b" * 130, "a" * 130, "b" * 66) == [0, 0, 128, 64]


def test_a_copy_that_cannot_be_restored_is_forgotten_and_computed() -> None:
    context = ScriptedContext()
    turns = turns_of(context, slots=1, stored_bytes=10_000)
    cached(turns, "a" * 130, "b" * 130)
    context.broken = True
    assert cached(turns, "a" * 130, first=3) == [0]
    assert context.used[0] == 130


def test_what_is_larger_than_the_memory_is_lost_but_stops_nobody() -> None:
    """The second is copied from a busy slot into the one that the first has left."""
    context = ScriptedContext()
    turns = turns_of(context, stored_bytes=100)
    turns.submit(Generate(1, "b" * 130, 100))
    turns.submit(Generate(2, "a" * 130, 1))
    while len(run := turns.run()) < 2:
        pass
    assert {advance.generation for advance in run} == {1, 2}
    assert cached(turns, "b" * 128 + "cd", first=3) == [128]


def test_one_copy_per_turn() -> None:
    context = ScriptedContext()
    turns = turns_of(context, slots=4, stored_bytes=10_000)
    turns.submit(Generate(1, "a" * 130, 100))
    for _ in range(4):
        turns.run()
    for generation in (2, 3, 4):
        turns.submit(Generate(generation, "a" * 130, 100))
    copies = []
    for _ in range(3):
        context.calls.clear()
        turns.run()
        copies.append(sum(call[0] == "copy" for call in context.calls))
    assert copies == [1, 1, 1]


def test_idle_caches_give_way_before_anyone_is_evicted() -> None:
    context = ScriptedContext(pool=150, shared=True)
    turns = turns_of(context)
    assert cached(turns, "a" * 100) == [0]
    turns.submit(Generate(2, "b" * 100, 1))
    assert run_until_idle(turns)[2].finish is Finish.LENGTH
    assert sum(context.used.values()) == 100


def test_idle_caches_give_way_to_one_that_returns_from_memory() -> None:
    context = ScriptedContext(pool=300, shared=True)
    turns = turns_of(context, slots=3, stored_bytes=10_000)
    assert cached(turns, "a" * 130, "b" * 130, "c" * 130, "a" * 130) == [0, 0, 0, 128]
    assert sum(context.used.values()) == 260


def test_a_memory_that_cannot_be_cut_goes_back_to_a_checkpoint() -> None:
    context = ScriptedContext(cuttable=False)
    turns = turns_of(context, slots=1)
    prompt = "a" * 130
    assert cached(turns, prompt, prompt + "b" * 10, "a" * 100) == [0, 128, 0]
    assert [call for call in context.calls if call[0] == "checkpoint"] == [
        ("checkpoint", 0, 128),
        ("checkpoint", 0, 64),
    ]


def test_held_names_who_is_at_home_from_the_prompt_on() -> None:
    turns = turns_of(ScriptedContext(), slots=1)
    reports = []
    for generation, prompt in ((1, "a" * 130), (2, "b" * 70), (3, "b" * 64 + "c" * 70)):
        turns.submit(Generate(generation, prompt, 2))
        turns.run()
        reports.append(turns.held())
        run_until_idle(turns)
        reports.append(turns.held())
    assert reports == [
        Held(((1, 128),)), None,
        Held(((2, 64),)), None,
        Held(((2, 64), (3, 128))), None,
    ]  # fmt: skip


def test_a_refusal_of_the_sampler_ends_its_generation_alone() -> None:
    def make(command: Generate, _prompt: Ids) -> Greedy:
        if command.generation == 1:
            raise GenerationRefused(Finish.GRAMMAR_INVALID, "no root")
        return Greedy(forbidden=4 if command.generation == 2 else -1)

    turns = turns_of(ScriptedContext(), slots=3, make_sampler=make)
    for generation in (1, 2, 3):
        turns.submit(Generate(generation, "ab", 4))
    last = run_until_idle(turns)
    assert [(last[one].finish, last[one].failure) for one in (1, 2, 3)] == [
        (Finish.GRAMMAR_INVALID, "no root"),
        (Finish.GRAMMAR_REJECTED, "not this one"),
        (Finish.LENGTH, ""),
    ]
