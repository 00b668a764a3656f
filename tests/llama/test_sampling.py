"""Sampling per request on the bundled model: seeds, stop strings, biases, logprobs."""

import math
from typing import Any

import attrs
import pytest

from paddler.engine.pipe import Finish, SamplerSettings
from paddler.engine.sampling import settings_of
from paddler.messages.state import DETERMINISTIC_PARAMETERS
from tests.llama.engines import chat, running

pytestmark = pytest.mark.slow

HELLO = "Hello! How can I help you today?"
STORY = chat("Tell me a story about a llama.")


def sampler(**settings: Any) -> SamplerSettings:
    return attrs.evolve(settings_of(DETERMINISTIC_PARAMETERS), **settings)


HOT = sampler(temperature=1.5, top_k=0, top_p=0.99)


async def test_a_request_samples_as_it_says_and_the_others_as_the_state_says() -> None:
    async with running(temperature=0.0) as generations:
        hot = {(await generations.ask(STORY, max_tokens=20, sampler=HOT)).text for _ in range(4)}
        plain = {(await generations.ask(STORY, max_tokens=20)).text for _ in range(2)}
    assert len(hot) > 1
    assert len(plain) == 1


async def test_the_same_seed_gives_the_same_text() -> None:
    async with running(slots=1) as generations:
        texts = [
            (await generations.ask(STORY, max_tokens=30, sampler=attrs.evolve(HOT, seed=seed))).text
            for seed in (7, 7, 2**64 - 1)
        ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ((" can",), "Hello! How", Finish.END),
        (("lp you t",), "Hello! How can I he", Finish.END),
        (("never", "How", "can"), "Hello! ", Finish.END),
        (("H",), "", Finish.END),
        (("today??",), HELLO, Finish.END),
    ],
)
async def test_an_answer_ends_before_a_stop_string(stop: tuple[str, ...], text: str, finish: Finish) -> None:
    async with running() as generations:
        answer = await generations.ask(chat("Hello"), sampler=sampler(stop=stop))
    assert (answer.text, answer.finish) == (text, finish)


async def test_text_that_is_held_back_comes_with_any_other_end() -> None:
    async with running() as generations:
        whole = await generations.ask(chat("Hello"), max_tokens=3)
        held = await generations.ask(chat("Hello"), max_tokens=3, sampler=sampler(stop=(whole.text + "#",)))
    assert (held.text, held.finish) == (whole.text, Finish.LENGTH)


async def test_a_bias_forbids_and_demands_tokens() -> None:
    async with running() as generations:
        free = await generations.ask(chat("Hello"), max_tokens=4)
        forbidden = await generations.ask(
            chat("Hello"), max_tokens=4, sampler=sampler(logit_bias={free.tokens[0]: -100.0})
        )
        demanded = await generations.ask(
            chat("Hello"), max_tokens=4, sampler=sampler(logit_bias={500: 100.0})
        )
    assert free.tokens[0] not in forbidden.tokens
    assert demanded.tokens == (500,) * 4


async def test_a_bias_beyond_the_vocabulary_fails_that_request_with_both_numbers() -> None:
    async with running() as generations:
        answer = await generations.ask(chat("Hello"), sampler=sampler(logit_bias={3648: 1.0}))
        assert (answer.finish, answer.tokens) == (Finish.FAILED, ())
        assert answer.failure == "logit_bias names token 3648, the model has 3648"
        assert (await generations.ask(chat("Hello"))).text == HELLO


async def test_logprobs_name_every_token_and_its_rivals() -> None:
    async with running() as generations:
        answer = await generations.ask(chat("Hello"), sampler=sampler(top_logprobs=20, temperature=0.0))
        none = await generations.ask(chat("Hello"), sampler=sampler(temperature=0.0))
    assert len(answer.logprobs) == len(answer.tokens)
    assert none.logprobs == ()
    assert "".join(text for text, _, _ in answer.logprobs) == HELLO + "<|im_end|>"
    for text, logprob, top in answer.logprobs:
        assert (text, logprob) == top[0]
        assert [its for _, its in top] == sorted((its for _, its in top), reverse=True)
        assert 0.5 < sum(math.exp(its) for _, its in top) <= 1 + 1e-6


async def test_without_an_end_of_sequence_the_answer_goes_on() -> None:
    async with running() as generations:
        answer = await generations.ask(chat("Hello"), max_tokens=60, sampler=sampler(ignore_eos=True))
    assert (len(answer.tokens), answer.finish) == (60, Finish.LENGTH)
    assert answer.text.startswith(HELLO)


async def test_penalties_of_a_request_count_its_prompt() -> None:
    strict = sampler(penalty_presence=100.0, penalty_last_n=-1, temperature=0.0)
    async with running() as generations:
        answer = await generations.ask(chat("Count to 40."), max_tokens=30, sampler=strict)
    assert len(set(answer.tokens)) == len(answer.tokens)
