"""Who takes part in a turn, and how much of a prompt it takes."""

import numpy as np
import pytest

from paddler.engine.scheduler import DecodeWidth, Scheduler, TurnBudget
from paddler.engine.sequences import EVICTED, Prompt, Sequence


def submitted(scheduler: Scheduler, *generations: int) -> list[Sequence]:
    sequences = [Sequence(generation, 100) for generation in generations]
    for sequence in sequences:
        scheduler.submit(sequence)
    return sequences


def read(sequence: Sequence) -> None:
    sequence.take_prompt(Prompt(np.zeros(100, np.int32)), room=1000)


def begin(sequences: list[Sequence]) -> None:
    for slot, sequence in enumerate(sequences):
        read(sequence)
        sequence.place(slot, cached=0)


def generate(sequence: Sequence, *, position: int = 100) -> None:
    sequence.position = position
    sequence.accept(1, b"", is_end=False)


def test_as_many_run_as_there_are_slots_in_order_of_arrival() -> None:
    scheduler = Scheduler(slots=2)
    first, second, third = submitted(scheduler, 7, 8, 9)
    assert scheduler.admit() == [first, second]
    assert scheduler.admit() == []
    first.stop()
    scheduler.release(first)
    assert scheduler.admit() == [third]


def test_a_prompt_that_is_read_needs_a_slot() -> None:
    scheduler = Scheduler(slots=3)
    first, second, third = submitted(scheduler, 1, 2, 3)
    scheduler.admit()
    assert scheduler.placeable() == []
    read(third)
    read(first)
    assert scheduler.placeable() == [first, third]
    first.place(0, cached=0)
    assert scheduler.placeable() == [third]
    second.stop()


def test_waiting_and_running_are_found_and_released() -> None:
    scheduler = Scheduler(slots=1)
    first, second = submitted(scheduler, 1, 2)
    scheduler.admit()
    assert (scheduler.find(1), scheduler.find(2), scheduler.find(3)) == (first, second, None)
    scheduler.release(second)
    scheduler.release(first)
    assert scheduler.find(2) is None
    assert scheduler.idle


def test_prompts_take_turns_and_generating_ones_leave_the_round() -> None:
    scheduler = Scheduler(slots=3)
    first, second, third = sequences = submitted(scheduler, 1, 2, 3)
    scheduler.admit()
    assert scheduler.prompts() == []
    begin(sequences)
    assert scheduler.prompts() == [first, second, third]
    scheduler.had_turn(first)
    assert scheduler.prompts() == [second, third, first]
    generate(second)
    assert scheduler.prompts() == [third, first]
    assert scheduler.generating() == [second]


def test_reading_says_that_only_a_prompt_is_missing() -> None:
    scheduler = Scheduler(slots=1)
    states = [scheduler.reading]
    first, _ = submitted(scheduler, 1, 2)
    states.append(scheduler.reading)
    scheduler.admit()
    states.append(scheduler.reading)
    begin([first])
    states.append(scheduler.reading)
    first.stop()
    scheduler.release(first)
    states.append(scheduler.reading)
    assert states == [False, False, True, False, False]


def test_the_largest_position_yields_and_the_youngest_of_equals() -> None:
    scheduler = Scheduler(slots=3)
    sequences = submitted(scheduler, 1, 2, 3)
    scheduler.admit()
    begin(sequences)
    for sequence, position in zip(sequences, (50, 70, 70), strict=True):
        sequence.position = position
    victim = scheduler.evict()
    assert victim is sequences[2]
    assert victim.failure.startswith(EVICTED)


@pytest.mark.parametrize(
    ("n_batch", "seconds_per_token", "last_decode", "company", "expected"),
    [
        (2048, 0.0001, 0.01, False, 512),
        (2048, 1.0, 0.01, False, 64),
        (2048, 0.0005, 0.01, True, 192),
        (2048, 0.0005, 0.05, True, 384),
        (2048, 1.0, 0.01, True, 64),
        (2048, 0.0, 0.0, True, 512),
        (100, 0.0001, 0.01, False, 64),
        (20, 1.0, 0.01, True, 20),
        (1, 0.0001, 0.01, True, 1),
    ],
)
def test_a_chunk_fits_the_turn(
    n_batch: int, seconds_per_token: float, last_decode: float, company: bool, expected: int
) -> None:
    budget = TurnBudget(n_batch=n_batch, seconds_per_token=seconds_per_token)
    budget.decoded(last_decode)
    assert budget.chunk_limit(company=company) == expected


def test_the_budget_learns_from_chunks_but_not_from_tails() -> None:
    budget = TurnBudget(n_batch=512, seconds_per_token=0.01)
    budget.ingested(1, 10.0)
    assert budget.chunk_limit(company=True) == 64
    for _ in range(20):
        budget.ingested(64, 0.0064)
    assert budget.chunk_limit(company=True) == 512


@pytest.mark.parametrize(("spent", "expected"), [(None, 64), (0.0, 64), (0.05, 0), (1.0, 0)])
def test_later_chunks_of_a_turn_get_what_time_is_left(spent: float | None, expected: int) -> None:
    budget = TurnBudget(n_batch=512, seconds_per_token=0.001)
    assert budget.chunk_limit(company=True, spent=spent) == expected


def test_one_decode_that_stalled_gives_the_prompts_no_more_time() -> None:
    budget = TurnBudget(n_batch=512, seconds_per_token=0.001)
    budget.decoded(0.01)
    budget.decoded(30.0)
    assert budget.chunk_limit(company=True) == 64
    budget.decoded(0.05)
    budget.decoded(0.05)
    assert budget.chunk_limit(company=True) == 192


def together(width: DecodeWidth, count: int, *times: float) -> None:
    for seconds in times:
        assert not width.is_one_by_one(count)
        width.decoded(count, seconds, one_by_one=False)


def test_one_by_one_is_chosen_when_single_decodes_promise_it_and_looked_at_again() -> None:
    width = DecodeWidth()
    width.decoded(1, 0.002, one_by_one=False)
    together(width, 4, 0.001, 0.016, 0.016)
    for _ in range(512):
        assert width.is_one_by_one(4)
        width.decoded(4, 0.008, one_by_one=True)
    while width.is_one_by_one(4):
        width.decoded(4, 0.008, one_by_one=True)
    together(width, 4, 0.001, 0.016, 0.016)
    assert width.is_one_by_one(4), "the batch was measured again, but not by its first decode"
    assert not width.is_one_by_one(5), "never measured"


def test_a_stall_does_not_speak_against_the_batch() -> None:
    width = DecodeWidth()
    width.decoded(1, 0.004, one_by_one=False)
    together(width, 4, 0.006, 1.0, 0.006)
    assert not width.is_one_by_one(4)
    together(width, 4, 1.0, 0.006, 0.006)
    assert not width.is_one_by_one(4)


def test_a_batch_that_got_faster_is_used_again() -> None:
    width = DecodeWidth()
    width.decoded(1, 0.004, one_by_one=False)
    together(width, 4, 1.0, 1.0, 1.0)
    while width.is_one_by_one(4):
        width.decoded(4, 0.016, one_by_one=True)
    together(width, 4, 1.0, 0.006, 0.006, 0.006)


def test_single_decodes_that_turn_slow_end_one_by_one() -> None:
    width = DecodeWidth()
    width.decoded(1, 0.002, one_by_one=False)
    together(width, 4, 0.016, 0.016, 0.016)
    decodes = 0
    while width.is_one_by_one(4):
        width.decoded(4, 0.040, one_by_one=True)
        decodes += 1
    assert 0 < decodes < 5
