"""Where prompts begin, decided without a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.prefixes import Checkpoint, Placement, Prefixes, Stored
from paddler.engine.sequences import GRID, Prompt, Span

ROOM = 4096


def prompt_of(*blocks: int, tail: int = 0, spans: tuple[Span, ...] = ()) -> Prompt:
    """Return a prompt of blocks of equal tokens, and a tail of other ones."""
    tokens = [token for token in blocks for _ in range(GRID)] + [-7] * tail
    return Prompt(np.array(tokens, np.int32), spans)


def ledger(
    *contents: Prompt | None, cuttable: bool = True, settled_only: bool = True, stored_bytes: int = 0
) -> Prefixes:
    """Return a slot per prompt, filled with it in this order; None leaves one empty."""
    prefixes = Prefixes(
        slots=len(contents),
        room=ROOM,
        cuttable=cuttable,
        settled_only=settled_only,
        stored_bytes=stored_bytes,
    )
    for slot, content in enumerate(contents):
        if content is not None:
            fill(prefixes, slot, content)
    return prefixes


def fill(prefixes: Prefixes, slot: int, content: Prompt, *, generation: int = 0) -> None:
    prefixes.place(Placement(slot))
    prefix = prefixes.slots[slot]
    prefix.tokens[: len(content)] = content.tokens
    prefix.length = prefix.prompt_tokens = len(content)
    prefix.settled = len(content) // GRID * GRID
    prefix.hold(generation or slot + 1, len(content))


def begin(prefixes: Prefixes, prompt: Prompt, *idle: int) -> tuple[int, int, int | None]:
    """Return slot, tokens and source of where a prompt begins."""
    placement = prefixes.choose(prompt, idle=idle)
    assert placement is not None
    assert not isinstance(placement.source, Stored)
    return placement.slot, placement.tokens, placement.source


@pytest.mark.parametrize(
    ("prompt", "held", "expected"),
    [
        (prompt_of(1, 2, 3, tail=1), prompt_of(1, 2, 3), 192),
        (prompt_of(1, 2, 3), prompt_of(1, 2, 3), 128),
        (prompt_of(1, 2, 3, tail=9), prompt_of(1, 2, 4), 128),
        (prompt_of(1, 2, 3, tail=9), prompt_of(1, 2, tail=63), 128),
        (prompt_of(1, tail=9), prompt_of(2), 0),
        (prompt_of(tail=63), prompt_of(tail=64), 0),
        (prompt_of(tail=65), prompt_of(tail=64), 64),
        (prompt_of(1, 2, 2, 2, 3, spans=(Span(100, 150),)), prompt_of(1, 2, 2), 64),
        (prompt_of(1, 2, 2, 2, 3, spans=(Span(64, 128),)), prompt_of(1, 2, 2), 192),
        (prompt_of(1, 2, 2, 2, 3, spans=(Span(10, 182), Span(192, 64))), prompt_of(1, 2, 2, 5), 192),
        (prompt_of(1, 2, 2, 2, 3, spans=(Span(10, 180), Span(190, 66))), prompt_of(1, 2, 2, 5), 190),
        (prompt_of(1, 2, 2, 2, 3, spans=(Span(0, 250),)), prompt_of(1, 2, 2, 5), 0),
    ],
)
def test_whole_blocks_and_whole_images_are_common_and_a_token_is_left(
    prompt: Prompt, held: Prompt, expected: int
) -> None:
    assert ledger(None).common(prompt, held.tokens) == expected


@given(st.lists(st.integers(0, 1), max_size=300), st.lists(st.integers(0, 1), max_size=300))
def test_what_is_common_is_the_longest_run_of_equal_blocks(first: list[int], second: list[int]) -> None:
    first, second = [0] * 150 + first, [0] * 150 + second
    found = ledger(None).common(Prompt(np.array(first, np.int32)), np.array(second, np.int32))
    lines = range(0, min(len(first) - 1, len(second)) + 1, GRID)
    assert found == max(line for line in lines if first[:line] == second[:line])


def test_the_longest_prefix_is_cut_a_busy_one_is_copied_and_nothing_is_cold() -> None:
    prefixes = ledger(prompt_of(1, 2), prompt_of(1, 2, 3), None)
    assert begin(prefixes, prompt_of(1, 2, 3, 4), 0, 1, 2) == (1, 192, 1)
    assert begin(prefixes, prompt_of(1, 2, 3, 4), 0, 2) == (2, 192, 1)
    assert begin(prefixes, prompt_of(1, 2, 5), 0, 2) == (0, 128, 0)
    assert begin(prefixes, prompt_of(9), 0, 1, 2) == (2, 0, None)
    assert begin(prefixes, prompt_of(9), 0, 1) == (0, 0, None)


def test_a_conversation_is_not_cut_for_another_while_a_slot_is_worth_less() -> None:
    """Both begin with the same system prompt."""
    system, other = prompt_of(1, 2, 3), prompt_of(1, 2, 9)
    empty = ledger(system, None)
    assert begin(empty, other, 0, 1) == (1, 128, 0)
    worth_less = ledger(prompt_of(8), prompt_of(1, 2, 3, 4, 5, 6))
    assert begin(worth_less, other, 0, 1) == (0, 128, 1)
    worth_more = ledger(prompt_of(1, 2, 3), prompt_of(*range(20, 40)))
    assert begin(worth_more, other, 0, 1) == (0, 128, 0)
    assert begin(ledger(prompt_of(1, 2, tail=60), None), other, 0, 1) == (0, 128, 0)


def test_an_answer_that_is_not_repeated_costs_no_slot() -> None:
    """The next turn drops what the model thought: its slot is cut, though another is empty."""
    prefixes = ledger(prompt_of(1, 2, tail=5), None)
    for token in [3] * 300:
        prefixes.slots[0].append(token)
    assert begin(prefixes, prompt_of(1, 2, 4, tail=5), 0, 1) == (0, 128, 0)


def test_what_was_not_used_for_long_is_worth_less() -> None:
    prefixes = ledger(prompt_of(1, 2), prompt_of(3, 4, 5), prompt_of(6))
    assert begin(prefixes, prompt_of(9), 0, 1, 2) == (0, 0, None)
    fill(prefixes, 0, prompt_of(7, 8))
    assert begin(prefixes, prompt_of(9), 0, 1, 2) == (2, 0, None)
    fill(prefixes, 2, prompt_of(7, 8, 9))
    assert begin(prefixes, prompt_of(9), 0, 1, 2) == (1, 0, None)


def test_what_was_not_computed_in_whole_chunks_counts_only_in_a_shared_pool() -> None:
    for settled_only, expected in ((True, 64), (False, 128)):
        prefixes = ledger(prompt_of(1, tail=10), settled_only=settled_only)
        for token in [-7] * 60:
            prefixes.slots[0].append(token)
        assert begin(prefixes, prompt_of(1, tail=100), 0) == (0, expected, 0)


def test_a_prompt_waits_for_one_that_will_hold_more_of_it() -> None:
    prefixes = ledger(prompt_of(1), None)
    ingesting = [prompt_of(1, 2, 3, 4)]
    assert prefixes.choose(prompt_of(1, 2, 3, 5), idle={1}, ingesting=ingesting) is None
    placed = prefixes.choose(prompt_of(1, 5, 3), idle={1}, ingesting=ingesting)
    assert placed is not None
    assert (placed.slot, placed.tokens) == (1, 64)


def test_a_state_is_taken_over_only_at_a_checkpoint() -> None:
    prefixes = ledger(prompt_of(1, 2, 3, 4), cuttable=False)
    assert begin(prefixes, prompt_of(1, 2, 3, 4, 5), 0) == (0, 0, None)
    for line in (64, 128, 256):
        prefixes.slots[0].add_checkpoint(Checkpoint(line, np.zeros(1, np.uint8)))
    placement = prefixes.choose(prompt_of(1, 2, 3, 5), idle={0})
    assert placement is not None
    assert placement.checkpoint is not None
    assert (placement.tokens, placement.checkpoint.tokens) == (128, 128)
    prefixes.place(placement)
    assert [checkpoint.tokens for checkpoint in prefixes.slots[0].checkpoints] == [64, 128]


def test_copies_are_kept_within_their_bytes_and_the_last_used_longest() -> None:
    size = 1000 + 4 * 128
    prefixes = ledger(None, stored_bytes=2 * size)
    state = np.zeros(1000, np.uint8)
    for block in (1, 2):
        fill(prefixes, 0, prompt_of(block, block), generation=block)
        assert prefixes.worth_storing(0)
        prefixes.store(0, state)
    assert not prefixes.worth_storing(0), "it is stored already"
    placement = prefixes.choose(prompt_of(1, 1, 1), idle={0})
    assert placement is not None
    assert isinstance(placement.source, Stored)
    prefixes.place(placement)
    fill(prefixes, 0, prompt_of(3, 3), generation=3)
    prefixes.store(0, state)
    fill(prefixes, 0, prompt_of(4), generation=4)
    assert prefixes.held() == ((1, 128), (3, 128), (4, 64))
    assert prefixes.can_store(0, 2 * size - 4 * 64)
    assert not prefixes.can_store(0, 2 * size)


def test_a_copy_that_is_about_to_be_restored_gives_way_to_none() -> None:
    size = 1000 + 4 * 128
    prefixes = ledger(None, stored_bytes=2 * size)
    for block in (1, 2, 3):
        fill(prefixes, 0, prompt_of(block, block), generation=block)
        if block < 3:
            prefixes.store(0, np.zeros(1000, np.uint8))
    placement = prefixes.choose(prompt_of(1, 1, 1), idle={0})
    assert placement is not None
    assert isinstance(placement.source, Stored)
    assert not prefixes.can_store(0, 1001, beside=placement.source)
    assert prefixes.can_store(0, 1000, beside=placement.source)
    prefixes.store(0, np.zeros(1000, np.uint8))
    fill(prefixes, 0, prompt_of(4), generation=4)
    assert prefixes.held() == ((1, 128), (3, 128), (4, 64))


def test_a_longer_copy_takes_the_place_of_its_beginning() -> None:
    prefixes = ledger(None, stored_bytes=10**6)
    for blocks in ((1,), (1, 2)):
        fill(prefixes, 0, prompt_of(*blocks))
        prefixes.store(0, np.zeros(10, np.uint8))
    fill(prefixes, 0, prompt_of(1))
    assert not prefixes.worth_storing(0)
    placement = prefixes.choose(prompt_of(1, 2, 3), idle={0})
    assert placement is not None
    assert (placement.tokens, isinstance(placement.source, Stored)) == (128, True)


def test_without_memory_nothing_is_worth_storing() -> None:
    assert not ledger(prompt_of(1, 2)).worth_storing(0)


def test_held_shrinks_with_a_cut_and_a_fork_holds_for_the_same_generations() -> None:
    prefixes = ledger(prompt_of(1, 2, 3, tail=10), None)
    assert prefixes.held() == ((1, 192),)
    fork = prefixes.choose(prompt_of(1, 2, 4), idle={1})
    assert fork is not None
    prefixes.place(fork)
    prefixes.slots[0].cut(64)
    assert prefixes.held() == ((1, 128),)
    prefixes.slots[1].cut(0)
    assert prefixes.held() == ((1, 64),)


def test_the_idle_slot_worth_least_is_reclaimed_first_and_empty_ones_never() -> None:
    prefixes = ledger(prompt_of(1, 2), prompt_of(3), None)
    assert prefixes.reclaimable({0, 1, 2}) in (0, 1)
    assert prefixes.reclaimable({0, 2}) == 0
    assert prefixes.reclaimable({2}) is None
