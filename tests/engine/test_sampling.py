"""Choosing tokens from logits."""

from collections import Counter
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.pipe import Finish
from paddler.engine.sampling import GenerationRefused, Ids, Logits, Sampler, settings_of
from paddler.messages.state import DETERMINISTIC_PARAMETERS

PLAIN = attrs.evolve(settings_of(DETERMINISTIC_PARAMETERS), temperature=1.0, top_k=0, seed=1)
NOTHING = np.array([], np.int32)
N_VOCAB = 40_001


def sampler(
    prompt: list[int] | None = None,
    *,
    grammar: "ScriptedGrammar | None" = None,
    end_tokens: frozenset[int] = frozenset(),
    **settings: Any,
) -> Sampler:
    return Sampler(
        attrs.evolve(PLAIN, **settings),
        np.array(prompt or [], np.int32),
        n_vocab=N_VOCAB,
        end_tokens=end_tokens,
        text_of=lambda token: f"<{token}>",
        grammar=grammar,
    )


@attrs.define
class ScriptedGrammar:
    """Allows some tokens, hides some, and may begin only at others; notes what is asked of it."""

    allowed_tokens: set[int]
    hidden: list[int] = attrs.Factory(list)
    misfits: set[int] = attrs.Factory(set)
    bound: bool = True
    scans: list[int] = attrs.Factory(list)
    accepted: list[int] = attrs.Factory(list)

    def hide(self, row: Logits) -> None:
        row[self.hidden] = -np.inf

    def allows(self, token: int) -> bool:
        return token in self.allowed_tokens

    def allowed(self, ids: Ids) -> Ids:
        self.scans.append(len(ids))
        return ids[np.isin(ids, list(self.allowed_tokens))]

    def accept(self, token: int) -> None:
        assert token in self.allowed_tokens
        self.accepted.append(token)

    def watch(self, token: int) -> bool:
        return token not in self.misfits


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


def test_requests_without_a_seed_draw_differently() -> None:
    settings = attrs.evolve(PLAIN, seed=None)
    logits = np.zeros(1000, np.float32)
    first, second = (Sampler(settings, NOTHING, n_vocab=1000) for _ in range(2))
    assert [first.pick(logits) for _ in range(9)] != [second.pick(logits) for _ in range(9)]


def test_the_same_seed_draws_the_same() -> None:
    logits = np.zeros(1000, np.float32)
    first, second, other = (sampler(seed=seed) for seed in (7, 7, 8))
    drawn = [[choose.pick(logits.copy()) for _ in range(9)] for choose in (first, second, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_biases_come_before_everything_else() -> None:
    assert drawn(row(1, 3, 2), temperature=0.0, logit_bias={0: 5.0, 1: -0.5}) == {0: 200}
    assert set(drawn(row(0, 0, 0), logit_bias={2: -100.0})) == {0, 1}


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**31])
def test_a_bias_on_no_token_refuses_the_request(token: int) -> None:
    with pytest.raises(
        GenerationRefused, match=f"logit_bias names token {token}, the model has 40001"
    ) as caught:
        sampler(logit_bias={0: 1.0, token: 1.0})
    assert caught.value.finish is Finish.FAILED


def test_ignored_end_tokens_are_never_chosen_whatever_speaks_for_them() -> None:
    choose = sampler(
        [1, 1],
        end_tokens=frozenset({1, 2}),
        ignore_eos=True,
        logit_bias={1: 100.0},
        penalty_presence=-100.0,
        temperature=0.0,
    )
    assert choose.pick(row(0, 9, 9, -5)) == 0


def test_logprobs_are_those_of_the_model_and_the_likeliest_are_listed() -> None:
    probabilities = np.array([0.5, 0.3, 0.2], np.float32)
    choose = sampler(temperature=0.0, top_logprobs=2, logit_bias={2: 50.0}, top_k=1)
    assert choose.pick(np.log(probabilities) + np.float32(3)) == 2
    [(text, logprob, top)] = choose.logprobs or ()
    assert text == "<2>"
    assert logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [other for other, _ in top] == ["<0>", "<1>"]
    assert [float(np.exp(its)) for _, its in top] == pytest.approx([0.5, 0.3], abs=1e-6)


def test_logprobs_are_finite_and_without_alternatives_if_none_are_asked_for() -> None:
    choose = sampler(top_logprobs=0, temperature=0.0, logit_bias={1: 0.5})
    choose.pick(row(0, -np.inf))
    assert choose.logprobs == (("<0>", 0.0, ()),)
    impossible = sampler(top_logprobs=2, temperature=0.0)
    impossible.pick(row(0, -np.inf))
    assert impossible.logprobs == (("<0>", 0.0, (("<0>", 0.0), ("<1>", -9999.0))),)


def test_a_choice_that_the_grammar_allows_is_not_made_anew() -> None:
    grammar = ScriptedGrammar({1})
    assert sampler(grammar=grammar, temperature=0.0).pick(row(1, 3, 2)) == 1
    assert (grammar.scans, grammar.accepted) == ([], [1])


def test_a_refused_choice_is_made_among_the_likely_then_among_all() -> None:
    logits = -np.arange(1000, dtype=np.float32)
    near, far = ScriptedGrammar({200, 100}), ScriptedGrammar({999, 700})
    assert sampler(grammar=near, temperature=0.0).pick(logits.copy()) == 100
    assert sampler(grammar=far, temperature=0.0).pick(logits.copy()) == 700
    assert (near.scans, far.scans) == ([256], [256, 1000])


def test_draws_within_a_grammar_follow_the_probabilities_of_what_it_allows() -> None:
    choose = sampler(grammar=ScriptedGrammar({1, 2}))
    logits = np.log(np.array([0.96, 0.01, 0.03], np.float32))
    counts = Counter(choose.pick(logits.copy()) for _ in range(4000))
    assert set(counts) == {1, 2}
    assert counts[2] / 4000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("grammar", [ScriptedGrammar(set()), ScriptedGrammar({1}, hidden=[1])])
def test_a_grammar_that_leaves_nothing_rejects_the_model(grammar: ScriptedGrammar) -> None:
    with pytest.raises(GenerationRefused) as caught:
        sampler(grammar=grammar).pick(row(1, 3, 2))
    assert caught.value.finish is Finish.GRAMMAR_REJECTED
    assert grammar.accepted == []


def test_an_end_token_is_not_told_to_the_grammar_which_ignoring_it_gives_way_to() -> None:
    grammar = ScriptedGrammar({1})
    choose = sampler(grammar=grammar, end_tokens=frozenset({1}), ignore_eos=True)
    assert choose.pick(row(1, 3, 2)) == 1
    assert grammar.accepted == []


def test_before_a_grammar_begins_only_misfits_are_passed_over() -> None:
    grammar = ScriptedGrammar({0}, hidden=[2], misfits={1}, bound=False)
    assert sampler(grammar=grammar, temperature=0.0).pick(row(1, 3, 2)) == 2
    grammar.misfits = {0, 1, 2}
    with pytest.raises(GenerationRefused, match="cannot begin"):
        sampler(grammar=grammar, temperature=0.0).pick(row(1, 3, 2))
