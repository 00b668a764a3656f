"""The bundled model in a real engine process: answers, ends, limits."""

from collections import Counter
from typing import Any

import llama_cpp
import pytest

from paddler.config import KvLayout
from paddler.engine.pipe import Finish
from paddler.engine.sequences import EVICTED, NO_TOKENS
from tests.llama.engines import chat, running

pytestmark = pytest.mark.slow

ANSWERS = {
    "Hello": "Hello! How can I help you today?",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 7 + 8?": "7 + 8 = 15.",
    "What is a slot?": "A slot is a place in an agent that handles one request at a time.",
    "Repeat after me: velvet harbour 42": "velvet harbour 42",
}
ENDLESS = "a b a b a b a b a b"
LAYOUTS = [KvLayout.PER_SLOT, KvLayout.SHARED]


def prompt_of(n_tokens: int) -> str:
    """Return a text of exactly so many tokens: digits are a token each."""
    return ("0123456789" * n_tokens)[:n_tokens]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_four_at_once_answer_as_one_by_one(layout: KvLayout) -> None:
    async with running(kv_layout=layout) as generations:
        alone = {question: await generations.ask(chat(question)) for question in ANSWERS}
        started = {question: generations.start(chat(question)) for question in ANSWERS}
        together = {question: await generations.answer(started[question]) for question in ANSWERS}
    assert {question: answer.text for question, answer in alone.items()} == ANSWERS
    assert {question: answer.text for question, answer in together.items()} == ANSWERS
    assert {answer.finish for answer in together.values()} == {Finish.END}
    assert together["Hello"].prompt_tokens == 13


async def test_two_threads_and_exact_answer_the_same() -> None:
    async with running(threads=2, exact=True) as generations:
        started = [generations.start(chat(question)) for question in ANSWERS]
        assert [(await generations.answer(one)).text for one in started] == list(ANSWERS.values())


async def test_default_sampling_answers_and_varies() -> None:
    async with running(temperature=1.5, top_k=0, top_p=0.99, min_p=0.0, penalty_repeat=1.1) as generations:
        started = [generations.start(chat("Tell me a story about a llama."), max_tokens=20) for _ in range(6)]
        texts = Counter([(await generations.answer(one)).text for one in started])
    assert len(texts) > 1


@pytest.mark.parametrize(("max_tokens", "expected"), [(-(2**31), 1), (-1, 1), (0, 1), (1, 1), (5, 5)])
async def test_max_tokens_ends_with_length(max_tokens: int, expected: int) -> None:
    async with running() as generations:
        answer = await generations.ask(chat("Count to 40."), max_tokens=max_tokens)
    assert (len(answer.tokens), answer.finish) == (expected, Finish.LENGTH)


async def test_huge_max_tokens_are_no_limit_and_the_end_token_counts_without_text() -> None:
    async with running() as generations:
        answer = await generations.ask(chat("What is 7 + 8?"), max_tokens=2**63)
    assert (answer.text, answer.finish) == ("7 + 8 = 15.", Finish.END)
    assert answer.tokens[-1] == 3639


async def test_no_tokens_is_a_failure_of_that_request_only() -> None:
    async with running() as generations:
        empty, other = generations.start(""), generations.start(chat("Hello"))
        answer = await generations.answer(empty)
        assert (answer.finish, answer.failure, answer.prompt_tokens) == (Finish.FAILED, NO_TOKENS, 0)
        assert (await generations.answer(other)).text == ANSWERS["Hello"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_batch", [1, 100, 2048])
async def test_prompts_at_the_edges_of_chunks_and_cells(layout: KvLayout, n_batch: int) -> None:
    """One slot of 256 cells; 255 tokens leave room for one more and then one that has no cell."""
    async with running(slots=1, context_size=256, n_batch=n_batch, kv_layout=layout) as generations:
        for size in (1, 63, 64, 65, 128):
            answer = await generations.ask(prompt_of(size), max_tokens=2)
            assert (answer.prompt_tokens, len(answer.tokens)) == (size, 2)
        for size, tokens in ((255, 2), (256, 1)):
            answer = await generations.ask(prompt_of(size))
            assert (len(answer.tokens), answer.finish) == (tokens, Finish.FAILED)
            assert answer.failure.startswith(EVICTED)
        assert (await generations.ask(prompt_of(256), max_tokens=1)).finish == Finish.LENGTH
        answer = await generations.ask(prompt_of(257))
        assert answer.failure == f"{EVICTED}: prompt has 257 tokens, room for 256"
        assert (answer.tokens, answer.prompt_tokens) == ((), 257)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_endless_generation_is_evicted_when_its_cells_are_full(layout: KvLayout) -> None:
    async with running(slots=1, context_size=256, kv_layout=layout) as generations:
        answer = await generations.ask(ENDLESS, max_tokens=4096)
        assert answer.failure.startswith(EVICTED)
        assert answer.prompt_tokens + len(answer.tokens) == 257
        assert (await generations.ask(chat("Hello"))).text == ANSWERS["Hello"]


async def test_shared_pool_evicts_the_longest_and_the_short_one_ends_well() -> None:
    async with running(slots=2, context_size=256, kv_layout=KvLayout.SHARED) as generations:
        long = generations.start(prompt_of(230), max_tokens=4096)
        await generations.tokens_of(long, 1)
        short = generations.start(chat("What is a slot?"))
        assert (await generations.answer(long)).failure.startswith(EVICTED)
        assert (await generations.answer(short)).text == ANSWERS["What is a slot?"]


async def test_own_cells_confine_pressure_to_a_slot() -> None:
    async with running(slots=2, context_size=256, kv_layout=KvLayout.PER_SLOT) as generations:
        long, other = (generations.start(prompt_of(200), max_tokens=50) for _ in range(2))
        assert (await generations.answer(long)).finish == Finish.LENGTH
        assert (await generations.answer(other)).finish == Finish.LENGTH


async def test_cancelled_in_the_prompt_while_generating_and_while_waiting() -> None:
    async with running(slots=2, context_size=4096) as generations:
        generating = generations.start(ENDLESS, max_tokens=4000)
        await generations.tokens_of(generating, 3)
        ingesting = generations.start(prompt_of(4000), max_tokens=1)
        waiting = generations.start(chat("Hello"))
        for generation in (waiting, ingesting, generating, generating):  # twice: late ones are ignored
            generations.engine.cancel(generation)
        for generation in (generating, ingesting, waiting):
            assert (await generations.answer(generation)).finish == Finish.STOPPED
        assert generations[waiting].tokens == ()
        assert (await generations.ask(chat("Hello"))).text == ANSWERS["Hello"]
        assert not generations.engine.open_generations


async def test_more_requests_than_slots_are_served_in_order() -> None:
    async with running(slots=1) as generations:
        started = [generations.start(chat("Hello")) for _ in range(5)]
        for generation in started:
            assert (await generations.answer(generation)).text == ANSWERS["Hello"]


async def test_long_prompt_beyond_the_cells_does_not_stall_the_others() -> None:
    async with running(context_size=4096) as generations:
        other = generations.start(ENDLESS, max_tokens=4000)
        await generations.tokens_of(other, 1)
        before = len(generations[other].tokens)
        answer = await generations.ask("hello " * 50_000)
        assert answer.failure.startswith(EVICTED)
        assert len(generations[other].tokens) - before > 20
        generations.engine.cancel(other)
        assert (await generations.ask("hello " * 3000, max_tokens=1)).prompt_tokens > 2000


@pytest.mark.parametrize(
    "prompt",
    [
        "\0",
        "a\0b",
        "\ud800",
        "\U0010ffff" * 50,
        "<|im_start|>" * 50,
        "<|endoftext|>",
        " " * 900,
        "\n\n\t",
        "é́",
    ],
)
async def test_odd_texts_are_continued(prompt: str) -> None:
    async with running() as generations:
        answer = await generations.ask(prompt, max_tokens=3)
    assert answer.prompt_tokens > 0
    assert answer.finish in (Finish.LENGTH, Finish.END)


async def test_text_after_a_nul_counts() -> None:
    async with running() as generations:
        cut = await generations.ask("ab", max_tokens=1)
        whole = await generations.ask("ab\0cdefgh 123456", max_tokens=1)
    assert whole.prompt_tokens > cut.prompt_tokens + 6


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": -1.0},
        {"temperature": 3.4e38, "top_k": -5},
        {"temperature": 1e-38, "top_k": 0},
        {"top_k": 2**31 - 1, "temperature": 1.0},
        {"top_k": -(2**31), "temperature": 1.0, "top_p": -1.0},
        {"temperature": 1.0, "top_p": 3.4e38, "min_p": 3.4e38, "top_k": 0},
        {"temperature": 1.0, "min_p": -3.4e38, "top_k": 40},
        {"penalty_repeat": 0.0},
        {"penalty_repeat": -3.4e38, "penalty_last_n": 2**31 - 1},
        {"penalty_repeat": 3.4e38, "penalty_frequency": 3.4e38, "penalty_presence": -3.4e38, "top_k": 0},
        {"penalty_last_n": 1, "penalty_presence": 2.0, "temperature": 0.5, "top_k": 40},
        {"penalty_last_n": -(2**31), "penalty_frequency": -1.0},
        {"n_gpu_layers": -(2**31)},
        {"n_batch": 0, "context_size": 0},
        {"n_batch": 2**64 - 1, "context_size": 2**32 - 1},
    ],
)
async def test_odd_parameters_generate_something(odd: dict[str, Any]) -> None:
    async with running(**odd) as generations:
        answer = await generations.ask(chat("Hello"), max_tokens=12)
    assert answer.finish in (Finish.LENGTH, Finish.END)


async def test_layers_for_a_gpu_that_is_not_there_are_told(caplog: pytest.LogCaptureFixture) -> None:
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp was compiled with a GPU's backend")
    async with running(n_gpu_layers=99) as generations:
        await generations.ask(chat("Hello"))
    assert "n_gpu_layers is 99, but llama.cpp was compiled without a GPU" in caplog.text
