"""The bundled model begins behind cells that exist: sooner, and with the same tokens."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from paddler.config import KvLayout
from paddler.engine.pipe import Finish, Logprobs, SamplerSettings
from paddler.messages.state import KvCacheDtype
from tests.llama.engines import Answer, Generations, chat, running
from tests.llama.random_models import write_recurrent_model, write_window_model

pytestmark = pytest.mark.slow

TOKENS = 24
EXACT = [{"threads": 1}, {"threads": 2, "exact": True}]
"""Where company changes nothing; the caches are of the default types, Q8_0."""

GREEDY = SamplerSettings(
    temperature=0.0,
    top_k=1,
    top_p=1.0,
    min_p=0.0,
    penalty_repeat=1.0,
    penalty_frequency=0.0,
    penalty_presence=0.0,
    penalty_last_n=0,
    ignore_eos=True,
    top_logprobs=1,
)
"""Equal tokens could be luck, equal logprobs are not."""


def make_prompts() -> list[str]:
    """Return 12 texts of 70 to 400 tokens that the model goes on with."""
    generator = random.Random(7)
    words = [
        "llama",
        "slot",
        "agent",
        "Paris",
        "Rome",
        "two",
        "seven",
        "the",
        "a",
        "sees",
        "counts",
        "in",
        "over",
    ]
    return [
        f"Story {number}: " + " ".join(generator.choices(words, k=70 + 15 * number)) for number in range(12)
    ]


PROMPTS = make_prompts()


@asynccontextmanager
async def engine(**changes: Any) -> AsyncIterator[Generations]:
    async with running(kv_layout=KvLayout.PER_SLOT, **changes) as generations:
        yield generations


async def ask_each(generations: Generations, prompts: list[str] = PROMPTS) -> list[Answer]:
    return [await generations.ask(prompt, max_tokens=TOKENS, sampler=GREEDY) for prompt in prompts]


def told(answers: list[Answer]) -> list[tuple[tuple[int, ...], Logprobs]]:
    return [(answer.tokens, answer.logprobs) for answer in answers]


def blocks_of(answers: list[Answer]) -> list[int]:
    return [(answer.prompt_tokens - 1) // 64 * 64 for answer in answers]


async def cold(prompts: list[str] = PROMPTS, **mode: Any) -> list[Answer]:
    async with engine(prefix_cache=False, **mode) as generations:
        answers = await ask_each(generations, prompts)
    assert {answer.cached_prompt_tokens for answer in answers} == {0}
    return answers


@pytest.mark.parametrize("mode", EXACT)
async def test_warm_and_restored_prompts_are_continued_as_cold_ones(mode: dict[str, Any]) -> None:
    """One slot: whoever comes again finds its cells taken, and a copy of them in memory."""
    expected = await cold(**mode)
    assert len(set(told(expected))) == len(PROMPTS)
    async with engine(slots=1, prefix_cache_bytes=10**8, **mode) as generations:
        warm = []
        for prompt in PROMPTS:
            await generations.ask(prompt, max_tokens=2)
            warm.append(await generations.ask(prompt, max_tokens=TOKENS, sampler=GREEDY))
        restored = await ask_each(generations)
    for answers in (warm, restored):
        assert told(answers) == told(expected)
        assert [answer.cached_prompt_tokens for answer in answers] == blocks_of(expected)


@pytest.mark.parametrize("mode", EXACT)
async def test_company_and_forks_change_nothing(mode: dict[str, Any]) -> None:
    expected = await cold(**mode)
    async with engine(**mode) as generations:
        started = [
            generations.start(prompt, max_tokens=TOKENS, sampler=GREEDY)
            for prompt in PROMPTS
            for _ in range(2)
        ]
        answers = [await generations.answer(generation) for generation in started]
    firsts, seconds = answers[::2], answers[1::2]
    assert told(firsts) == told(seconds) == told(expected)
    assert [answer.cached_prompt_tokens for answer in seconds] == blocks_of(expected), (
        "computed once for both"
    )


@pytest.mark.parametrize(("write", "stored"), [(write_recurrent_model, True), (write_window_model, False)])
async def test_a_memory_that_is_not_plain_cells(
    tmp_path: Path, write: Callable[[Path], None], stored: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Continued, restored and in company: a state goes on at a checkpoint, windows are kept whole."""
    model = tmp_path / "model.gguf"
    write(model)
    mode = {"model_path": str(model), "context_size": 2048, "prefix_cache_bytes": 10**8}
    beginnings = [prompt[: 200 + 31 * index] for index, prompt in enumerate(PROMPTS[:6])]
    prompts = [f"{beginning}\nHello once more, and again." for beginning in beginnings]
    expected = await cold(prompts, **mode)
    assert len(set(told(expected))) == len(prompts)
    async with engine(slots=1, **mode) as generations:
        warm = []
        for beginning, prompt in zip(beginnings, prompts, strict=True):
            await generations.ask(beginning, max_tokens=50, sampler=GREEDY)
            warm.append(await generations.ask(prompt, max_tokens=TOKENS, sampler=GREEDY))
        restored = await ask_each(generations, prompts)
    assert told(warm) == told(restored) == told(expected)
    assert min(answer.cached_prompt_tokens for answer in warm) >= 192
    assert [answer.cached_prompt_tokens > 0 for answer in restored] == [stored] * len(prompts)
    assert ("no prefixes are kept in memory" in caplog.text) != stored
    async with engine(**mode) as generations:
        started = [generations.start(prompt, max_tokens=TOKENS, sampler=GREEDY) for prompt in prompts * 2]
        together = [await generations.answer(generation) for generation in started]
    assert told(together) == told(expected) * 2


async def test_the_next_turn_of_a_conversation_is_continued_as_cold() -> None:
    """The cells of the answer itself would differ; those of F16 show it."""
    mode = {"k_cache_dtype": KvCacheDtype.F16, "v_cache_dtype": KvCacheDtype.F16}
    async with engine(slots=1, **mode) as generations:
        warm, prompts, blocks = [], [], []
        for prompt in PROMPTS[:6]:
            answer = await generations.ask(prompt, max_tokens=100, sampler=GREEDY)
            blocks.append(answer.prompt_tokens // 64 * 64)
            prompts.append(f"{prompt}{answer.text} And then")
            warm.append(await generations.ask(prompts[-1], max_tokens=TOKENS, sampler=GREEDY))
    assert [answer.cached_prompt_tokens for answer in warm] == blocks
    assert told(warm) == told(await cold(prompts, **mode))


@pytest.mark.parametrize("layout", [KvLayout.PER_SLOT, KvLayout.SHARED])
async def test_an_answer_is_right_behind_cells_of_another_question(layout: KvLayout) -> None:
    system = "<|im_start|>system\nYou are a pirate.<|im_end|>\n"
    history = "".join(
        f"<|im_start|>user\nWhat is {n} + {n}?<|im_end|>\n"
        f"<|im_start|>assistant\n{n} + {n} = {2 * n}.<|im_end|>\n"
        for n in range(1, 6)
    )
    async with running(slots=2, kv_layout=layout) as generations:
        before = system + history
        first = await generations.ask(before + chat("What is the capital of France?"))
        started = [
            generations.start(before + chat(f"What is the capital of {land}?")) for land in ("Spain", "Italy")
        ]
        answers = [await generations.answer(generation) for generation in started]
    assert "Paris" in first.text
    assert ["Madrid" in answers[0].text, "Rome" in answers[1].text] == [True, True]
    assert min(answer.cached_prompt_tokens for answer in answers) >= 64


async def test_the_engine_tells_what_it_holds() -> None:
    digits = "0123456789" * 50
    async with running(slots=1, kv_layout=KvLayout.PER_SLOT) as generations:
        first = generations.start(digits[:200], max_tokens=2)
        await generations.answer(first)
        await generations.holding({first: 192})
        second = generations.start(digits[:130] + "abc", max_tokens=2)
        await generations.answer(second)
        await generations.holding({first: 128, second: 128})
        third = generations.start("abcdefghij" * 20, max_tokens=2)
        assert (await generations.answer(third)).cached_prompt_tokens == 0
        await generations.holding({third: generations[third].prompt_tokens // 64 * 64})


async def test_idle_cells_of_a_shared_pool_give_way_to_a_prompt() -> None:
    """Three prompts of 200 tokens one after another in 512 cells, then one of 500: nobody is evicted."""
    async with running(slots=4, context_size=512, kv_layout=KvLayout.SHARED) as generations:
        for letter in "012":
            answer = await generations.ask(letter + "0123456789" * 20, max_tokens=2)
            assert (answer.finish, answer.cached_prompt_tokens) == (Finish.LENGTH, 0)
        answer = await generations.ask("3" + "0123456789" * 50, max_tokens=2)
        assert (answer.finish, answer.prompt_tokens) == (Finish.LENGTH, 501)


async def test_a_cancelled_prompt_leaves_what_it_has_computed() -> None:
    text = "0123456789" * 400
    async with running(slots=2, context_size=4096, kv_layout=KvLayout.PER_SLOT) as generations:
        company = generations.start("a b a b a b", max_tokens=4000)
        await generations.tokens_of(company, 1)
        long = generations.start(text, max_tokens=4)
        await generations.holding({long: 4000 // 64 * 64})
        await generations.tokens_of(company, len(generations[company].tokens) + 3)
        generations.engine.cancel(long)
        assert (await generations.answer(long)).finish is Finish.STOPPED
        generations.engine.cancel(company)
        again = await generations.ask(text[:100], max_tokens=1)
        assert again.cached_prompt_tokens == 64
