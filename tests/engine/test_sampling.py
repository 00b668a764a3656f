"""Choosing tokens from logits."""

from collections import Counter
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.sampling import Sampler
from paddler.messages.state import DETERMINISTIC_PARAMETERS

PLAIN = attrs.evolve(DETERMINISTIC_PARAMETERS, temperature=1.0, top_k=0)
NOTHING = np.array([], np.int32)


def sampler(prompt: list[int] | None = None, **parameters: Any) -> Sampler:
    return Sampler(attrs.evolve(PLAIN, **parameters), np.array(prompt or [], np.int32), seed=1)


def row(*logits: float) -> Any:
    return np.array(logits, np.float32)


def drawn(logits: Any, *, times: int = 200, **parameters: Any) -> Counter[int]:
    choose = sampler(**parameters)
    return Counter(choose.pick(logits.copy()) for _ in range(times))


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 1}])
def test_greedy_takes_the_largest(greedy: dict[str, Any]) -> None:
    assert drawn(row(1, 3, 2), **greedy) == {1: 200}


def test_draws_follow_the_probabilities() -> None:
    counts = drawn(row(np.log(1), np.log(3)), times=4000)
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": -3}, {0, 1, 2, 3}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 0.65}, {0, 1}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": -1.0}, {0}),
        ({"top_p": 0.3}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 5.0}, {0}),
        ({"min_p": -1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.75}, {0, 1}),
    ],
)
def test_filters_keep_the_likely(parameters: dict[str, Any], kept: set[int]) -> None:
    logits = np.log(np.array([0.4, 0.3, 0.18, 0.12], np.float32))
    assert set(drawn(logits, **parameters)) == kept


def test_temperature_applies_after_the_filters() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert set(drawn(logits, top_p=0.85, temperature=100.0)) == {0, 1}


@given(st.integers(0, 2**32), st.sampled_from([300, 4096, 5000, 40_001]), st.sampled_from([2, 40, 300]))
def test_top_k_is_the_k_largest_in_rows_of_any_length(seed: int, size: int, top_k: int) -> None:
    logits = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    logits[::7] = logits[0]  # ties
    allowed = np.sort(logits)[-min(top_k, size)]
    choose = sampler(top_k=top_k, temperature=50.0)
    for _ in range(5):
        assert logits[choose.pick(logits.copy())] >= allowed


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_the_nucleus_of_a_long_row_is_that_of_a_full_sort(top_p: float) -> None:
    logits = np.random.default_rng(3).normal(scale=2, size=10_000).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits[order].astype(np.float64))
    heights = probabilities.cumsum() / probabilities.sum()
    nucleus = set(order[: int(heights.searchsorted(top_p)) + 1].tolist())
    picked = set(drawn(logits, top_p=top_p, temperature=1000.0))
    assert picked <= nucleus
    assert len(picked) > min(len(nucleus), 50) / 2


def test_penalties_are_those_of_llama() -> None:
    """Repeat divides positive and multiplies negative logits; frequency counts, presence does not."""
    choose = sampler(
        [0, 0, 1], temperature=0.0, penalty_repeat=2.0, penalty_frequency=0.5, penalty_presence=0.25
    )
    logits = row(4.0, -1.0, 0.8, 0.7)
    assert choose.pick(logits) == 2
    assert logits.tolist() == pytest.approx([4 / 2 - 1 - 0.25, -2 - 0.5 - 0.25, 0.8, 0.7])
    again = row(4.0, -1.0, 0.8, 0.7)
    assert choose.pick(again) == 0
    assert again[2] == pytest.approx(0.8 / 2 - 0.5 - 0.25)


@given(st.lists(st.integers(0, 9), max_size=40), st.sampled_from([-1, 1, 2, 5, 100]))
def test_only_the_last_n_count(tokens: list[int], last_n: int) -> None:
    """The picks of a greedy sampler are forced, so that they become its history."""
    choose = sampler([3, 4], temperature=0.0, penalty_presence=1.0, penalty_last_n=last_n)
    history = [3, 4]
    for token in tokens:
        logits = np.zeros(10, np.float32)
        logits[token] = 1000
        assert choose.pick(logits) == token
        history.append(token)
    logits = np.zeros(10, np.float32)
    choose.pick(logits)
    window = history if last_n < 0 else history[-last_n:]
    assert {token for token in range(10) if logits[token] < 0} == set(window)


@pytest.mark.parametrize(
    "odd",
    [
        {"penalty_repeat": 0.0, "penalty_presence": 1.0},
        {"penalty_repeat": -3.0, "penalty_presence": 1.0},
        {"penalty_repeat": 3.4e38, "penalty_frequency": 3.4e38, "penalty_presence": 3.4e38},
        {"penalty_frequency": -3.4e38, "temperature": 1e-38},
        {"temperature": 3.4e38, "top_k": 2, "top_p": 0.5, "min_p": 0.5},
        {"temperature": 1e-45, "top_p": 1e-38},
        {"penalty_last_n": 0, "penalty_repeat": 5.0},
    ],
)
@pytest.mark.parametrize("logits", [[0.0] * 5, [-1e30, 1e30, 0, 1, 2], [float("-inf")] * 4 + [0.0]])
def test_odd_parameters_choose_something(odd: dict[str, Any], logits: list[float]) -> None:
    choose = sampler([0, 1, 1], **odd)
    for _ in range(5):
        assert 0 <= choose.pick(row(*logits)) < 5


def test_requests_draw_differently() -> None:
    parameters = attrs.evolve(PLAIN, temperature=1.0)
    logits = np.zeros(1000, np.float32)
    first, second = Sampler(parameters, NOTHING), Sampler(parameters, NOTHING)
    assert [first.pick(logits) for _ in range(9)] != [second.pick(logits) for _ in range(9)]
