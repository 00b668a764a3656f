"""One generation, without a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.pipe import Finish
from paddler.engine.sequences import EVICTED, GRID, NO_TOKENS, Prompt, Sequence, Span


def begun(
    prompt_tokens: int, *, room: int = 1000, max_tokens: int = 100, spans: tuple[Span, ...] = ()
) -> Sequence:
    sequence = Sequence(1, max_tokens)
    sequence.take_prompt(Prompt(np.zeros(prompt_tokens, np.int32), spans), room=room)
    sequence.place(0, cached=0)
    return sequence


def chunks(sequence: Sequence, *, limit: int = 512) -> list[int]:
    """Return where the chunks of a prompt end."""
    ends = []
    while sequence.position < sequence.prompt_tokens:
        sequence.position += sequence.next_chunk(limit)
        ends.append(sequence.position)
    return ends


@given(st.integers(1, 5000), st.lists(st.sampled_from([64, 128, 256, 512]), min_size=80, max_size=80))
def test_chunks_end_on_the_grid_and_the_tail_is_its_own(size: int, limits: list[int]) -> None:
    sequence = begun(size, room=5000)
    for limit in limits:
        if sequence.position == size:
            break
        chunk = sequence.next_chunk(limit)
        assert 0 < chunk <= limit
        sequence.position += chunk
        assert sequence.position % GRID == 0 or (chunk == size % GRID and sequence.position == size)
    assert sequence.position == size


@given(st.integers(1, 400), st.integers(1, 63))
def test_a_tiny_batch_still_respects_grid_lines(size: int, limit: int) -> None:
    sequence = begun(size)
    while sequence.position < size:
        chunk = sequence.next_chunk(limit)
        assert 0 < chunk <= limit
        assert (sequence.position + chunk - 1) // GRID == sequence.position // GRID
        sequence.position += chunk


@pytest.mark.parametrize(
    ("spans", "ends"),
    [
        ((), [128, 192, 200]),
        ((Span(0, 36),), [36, 64, 192, 200]),
        ((Span(70, 36), Span(106, 40)), [64, 70, 106, 146, 192, 200]),
        ((Span(64, 136),), [64, 200]),
        ((Span(128, 64),), [128, 192, 200]),
        ((Span(10, 180),), [10, 190, 192, 200]),
    ],
)
def test_an_image_is_a_chunk_and_what_lies_around_it_begins_and_ends_on_the_grid(
    spans: tuple[Span, ...], ends: list[int]
) -> None:
    """Wherever a prompt begins on a grid line, the chunks from there on are these."""
    assert chunks(begun(200, spans=spans), limit=128) == ends
    for line in (line for line in (64, 128) if line in ends):
        resumed = begun(200, spans=spans)
        resumed.place(0, cached=line)
        assert chunks(resumed, limit=128) == [end for end in ends if end > line]


@pytest.mark.parametrize(("size", "ends"), [(200, [192, 200]), (192, [128, 192]), (65, [64, 65]), (64, [64])])
def test_a_chunk_pauses_at_the_last_line_where_the_state_is_kept(size: int, ends: list[int]) -> None:
    sequence = begun(size)
    assert sequence.prompt is not None
    sequence.place(0, cached=0, pause=sequence.prompt.last_line)
    assert chunks(sequence) == ends


def test_a_sequence_without_a_slot_neither_ingests_nor_generates() -> None:
    sequence = Sequence(1, 5)
    states = [(sequence.placeable, sequence.ingesting, sequence.generating)]
    sequence.take_prompt(Prompt(np.zeros(100, np.int32)), room=200)
    states.append((sequence.placeable, sequence.ingesting, sequence.generating))
    sequence.place(3, cached=64)
    states.append((sequence.placeable, sequence.ingesting, sequence.generating))
    assert states == [(False, False, False), (True, False, False), (False, True, False)]
    assert (sequence.position, sequence.cached, sequence.slot) == (64, 64, 3)


@pytest.mark.parametrize(
    ("tokens", "failure"),
    [(0, NO_TOKENS), (11, f"{EVICTED}: prompt has 11 tokens, room for 10"), (10, ""), (1, "")],
)
def test_a_prompt_must_have_tokens_and_fit(tokens: int, failure: str) -> None:
    assert begun(tokens, room=10).failure == failure


@pytest.mark.parametrize(
    ("max_tokens", "is_end", "position", "finish"),
    [
        (5, False, 9, None),
        (5, True, 9, Finish.END),
        (5, True, 10, Finish.END),
        (1, True, 9, Finish.END),
        (1, True, 10, Finish.END),
        (1, False, 9, Finish.LENGTH),
        (1, False, 10, Finish.LENGTH),
        (2, False, 10, Finish.FAILED),
        (0, False, 9, Finish.LENGTH),
        (0, False, 10, Finish.LENGTH),
        (0, True, 9, Finish.END),
        (-1, False, 9, Finish.LENGTH),
        (-1, True, 9, Finish.END),
    ],
)
def test_a_token_ends_by_the_end_then_the_limit_then_the_cells(
    max_tokens: int, is_end: bool, position: int, finish: Finish | None
) -> None:
    sequence = begun(position, room=10, max_tokens=max_tokens)
    sequence.position = position
    text = sequence.accept(3, b"x", is_end=is_end)
    assert (sequence.finish, text) == (finish, "" if is_end else "x")
    assert (sequence.generated, sequence.pending) == (1, 3)
    assert sequence.failure.startswith(EVICTED) == (finish is Finish.FAILED)


@given(st.text(), st.integers(1, 3))
def test_characters_are_never_split(text: str, size: int) -> None:
    text = text.encode(errors="replace").decode()
    data = text.encode()
    pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    sequence = begun(1, max_tokens=len(pieces))
    seen = [sequence.accept(0, piece, is_end=False) for piece in pieces]
    assert "".join(seen) == text
    assert sequence.finish == Finish.LENGTH


def test_what_is_left_of_a_character_is_told_at_the_end() -> None:
    sequence = begun(1)
    assert sequence.accept(1, "é".encode()[:1], is_end=False) == ""
    assert sequence.accept(2, b"", is_end=True) == "\N{REPLACEMENT CHARACTER}"
    stopped = begun(1)
    stopped.accept(1, "é".encode()[:1], is_end=False)
    assert stopped.flush_text() == "\N{REPLACEMENT CHARACTER}"
