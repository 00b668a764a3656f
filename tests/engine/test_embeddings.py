"""Batches of documents, and what becomes of vectors."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.embeddings import Batch, Vector, normalize, to_json
from paddler.messages.inference import RmsNorm

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def vector(*numbers: float) -> Vector:
    return np.array(numbers, np.float32)


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 5), st.integers(1, 20))
def test_a_batch_never_exceeds_its_slots_or_tokens_and_takes_what_fits(
    lengths: list[int], slots: int, n_batch: int
) -> None:
    batch = Batch(slots=slots, n_batch=n_batch)
    taken: list[int] = []
    for length in lengths:
        fits = len(taken) < slots and sum(taken) + length <= n_batch
        assert batch.add(np.zeros(length, np.int32)) is fits
        if fits:
            taken.append(length)
    assert [len(document) for document in batch.documents] == taken
    assert batch.is_full is (len(taken) == slots or sum(taken) == n_batch)


def test_an_empty_document_is_never_taken() -> None:
    with pytest.raises(AssertionError):
        Batch(slots=1, n_batch=8).add(np.zeros(0, np.int32))


def test_the_three_normalisations() -> None:
    raw = vector(3, -4)
    assert normalize(raw, "None").tolist() == [3, -4]
    assert normalize(raw, "L2").tolist() == pytest.approx([0.6, -0.8])
    root = math.sqrt(12.5 + 0.5)
    assert normalize(raw, RmsNorm(0.5)).tolist() == pytest.approx([3 / root, -4 / root])


@pytest.mark.parametrize("method", ["None", "L2", RmsNorm(0.0), RmsNorm(-1.0), RmsNorm(1e-6)])
def test_zeros_stay_zeros(method: object) -> None:
    assert normalize(vector(0, 0, 0), method).tolist() == [0, 0, 0]  # type: ignore[arg-type]


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_unit_length_is_reached_whatever_the_size_of_the_numbers(numbers: list[float]) -> None:
    unit = normalize(vector(*numbers), "L2").astype(np.float64)
    if any(numbers):
        assert math.hypot(*unit.tolist()) == pytest.approx(1, abs=1e-4)


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_every_number_comes_back_from_its_json(numbers: list[float]) -> None:
    raw = vector(*numbers)
    text = to_json(raw)
    assert text is not None
    assert np.array_equal(vector(*json.loads(text)), raw)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_json_cannot_say_is_no_vector(number: float) -> None:
    assert to_json(vector(1, number)) is None
