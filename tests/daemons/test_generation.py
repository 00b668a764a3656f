"""What the bundled model says through balancer and agent, alone and in company."""

import pytest
import trio

from paddler.messages.state import ChatTemplate
from tests.cluster import (
    ENDLESS,
    Message,
    as_delivered,
    chat_markup,
    cluster,
    conversation,
    deterministic,
    raw_prompt,
    result,
    state,
    text_of,
    tokens,
    usage_of,
)
from tests.daemons.sockets import inference_socket

pytestmark = pytest.mark.slow

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}},
            "required": ["location"],
        },
    },
}


def completion(usage: dict[str, int]) -> int:
    return sum(usage[f"{kind}_tokens"] for kind in ("content", "reasoning", "tool_call", "undeterminable"))


@pytest.mark.scenario(
    "GE-1", "GE-2", "GE-3", "GE-4", "GE-5", "GE-6", "GE-8", "GE-9", "GE-10", "GE-12", "GE-13", "GE-15",
    "CB-6", "TH-1", "TH-2", "TH-3", "TH-4",
)  # fmt: skip
async def test_one_request_after_the_other() -> None:
    async with cluster(slots=1, desired=state()) as running:
        thinking = await running.generate(conversation("What is 2 + 2?", 200, thinking=True))
        assert tokens(thinking, "ReasoningToken")
        assert text_of(thinking).endswith("2 + 2 = 4.")
        assert "think>" not in text_of(thinking)
        usage = usage_of(thinking)
        assert usage["prompt_tokens"] > 0
        assert usage["reasoning_tokens"] > 0
        assert usage["cached_prompt_tokens"] == 0
        assert completion(usage) == sum(
            usage[f"{kind}_tokens"] for kind in ("content", "reasoning", "undeterminable")
        )

        plain = await running.generate(conversation("What is 2 + 2?", 100))
        assert text_of(plain) == "2 + 2 = 4."
        assert usage_of(plain)["prompt_tokens"] > 0
        assert not tokens(plain, "ReasoningToken", "UndeterminableToken")
        usage = usage_of(plain)
        assert usage["reasoning_tokens"] == usage["tool_call_tokens"] == 0
        assert usage["content_tokens"] > 0
        assert completion(usage) == usage["content_tokens"] + usage["undeterminable_tokens"]

        greeting = await running.generate(conversation("Hello", 500))
        assert list(result(greeting[-1])) == ["Done"]
        assert completion(usage_of(greeting)) < 500  # ends by itself

        assert 0 < len(tokens(await running.generate(raw_prompt(max_tokens=20)))) <= 20
        assert tokens(await running.generate(conversation("Hello", 10, thinking=True, tools=[])))

        five = await running.generate(raw_prompt("Count to 40.", max_tokens=5))
        assert len(tokens(five)) == 5
        assert list(result(five[-1])) == ["Done"]
        assert completion(usage_of(five)) == 5
        assert usage_of(await running.generate(raw_prompt("Count to 40.", max_tokens=5))) == usage_of(five)

        story = await running.generate(conversation("Tell me a story about a llama.", 20))
        assert completion(usage_of(story)) == len(tokens(story)) == 20


@pytest.mark.scenario("GE-11")
async def test_a_raw_prompt_over_the_socket() -> None:
    async with cluster(slots=1, desired=state()) as running, inference_socket(running) as socket:
        await socket.request("a", {"raw_prompt": chat_markup("Hello"), "max_tokens": 16})
        messages = await socket.receive_until_terminal("a")
        assert text_of(messages) == "Hello! How can I help you today?"
        assert all("Response" in message for message in messages)


async def test_tools_and_history_reach_the_template() -> None:
    history = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": [{"type": "text", "text": "What is my name?"}]},
    ]
    async with cluster(slots=1, desired=state()) as running:
        answer = await running.generate(conversation("", conversation_history=history))
        assert text_of(answer) == "Your name is Ada."
        call = text_of(await running.generate(conversation("What is the weather in Paris?", tools=[TOOL])))
        assert '{"name": "get_weather", "arguments": {"location": "Paris"}}' in call


async def _together(*bodies: Message, slots: int = 2, **changes: object) -> list[list[Message]]:
    desired = state(parameters=deterministic(**changes))
    async with cluster(slots=slots, desired=desired) as running:
        answers: dict[int, list[Message]] = {}

        async def ask(number: int, body: Message) -> None:
            answers[number] = await running.generate(body)

        async with trio.open_nursery() as requests:
            for number, body in enumerate(bodies):
                requests.start_soon(ask, number, body)
        return [answers[number] for number in range(len(bodies))]


@pytest.mark.scenario("CB-1", "CB-3")
@pytest.mark.parametrize("slots", [1, 2])
async def test_the_parameters_as_delivered_serve_too(slots: int) -> None:
    async with cluster(slots=slots, desired=as_delivered()) as running:
        answers: list[list[Message]] = []

        async def ask(prompt: str) -> None:
            answers.append(await running.generate(raw_prompt(prompt, 20)))

        async with trio.open_nursery() as requests:
            for prompt in ("Count to 40.", "Tell me a story about a llama.")[:slots]:
                requests.start_soon(ask, prompt)
        assert all(tokens(answer) for answer in answers)
        assert all(list(result(answer[-1])) == ["Done"] for answer in answers)
        assert len({text_of(answer) for answer in answers}) == slots


@pytest.mark.scenario("GE-14", "CB-4", "CB-5")
async def test_two_requests_at_once_do_not_mix() -> None:
    long_prompt = conversation("Count to 40.", 200)
    long_prompt["conversation_history"] = [
        *[{"role": role, "content": "Hello"} for role in ("user", "assistant")] * 40,
        {"role": "user", "content": "Count to 40."},
    ]
    first, second = await _together(long_prompt, conversation("Hello"))
    assert text_of(second) == "Hello! How can I help you today?"
    assert len(tokens(first)) > 1
    assert usage_of(first)["prompt_tokens"] > 400 > usage_of(second)["prompt_tokens"]
    assert completion(usage_of(second)) > 0


@pytest.mark.scenario("CB-2")
async def test_four_requests_at_once_give_the_exact_answers() -> None:
    capitals = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo"}
    answers = await _together(
        *(conversation(f"What is the capital of {country}?") for country in capitals), slots=4
    )
    assert [text_of(answer) for answer in answers] == [
        f"The capital of {country} is {city}." for country, city in capitals.items()
    ]


@pytest.mark.scenario("CB-7")
@pytest.mark.parametrize("layout", ["auto", "shared"])
async def test_the_longest_request_is_evicted_and_the_short_one_is_served(layout: str) -> None:
    desired = state(parameters=deterministic(context_size=256, n_batch=256))
    async with (
        cluster(slots=2, desired=desired, agent_changes={"kv_layout": layout}) as running,
        trio.open_nursery() as requests,
    ):
        long: list[Message] = []

        async def ask_long() -> None:
            long.extend(await running.generate(ENDLESS))

        requests.start_soon(ask_long)
        await running.wait_for_slots(1)
        short = await running.generate(conversation("Hello", 20))
        assert text_of(short) == "Hello! How can I help you today?"
        assert "Done" in result(short[-1])
    assert "evicted" in result(long[-1])["SamplerError"]


@pytest.mark.scenario("CB-8")
@pytest.mark.parametrize("layout", ["shared", "per-slot"])
async def test_an_endless_request_is_evicted_when_the_cells_are_used_up(layout: str) -> None:
    desired = state(parameters=deterministic(context_size=256, n_batch=256))
    async with cluster(slots=1, desired=desired, agent_changes={"kv_layout": layout}) as running:
        messages = await running.generate(ENDLESS)
        assert "evicted" in result(messages[-1])["SamplerError"]
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"


@pytest.mark.scenario("CB-9")
async def test_caches_of_different_types() -> None:
    desired = as_delivered(k_cache_dtype="Q8_0", v_cache_dtype="F16")
    async with cluster(slots=2, desired=desired) as running:
        messages = await running.generate(conversation("Hello"))
        assert tokens(messages)
        assert list(result(messages[-1])) == ["Done"]


@pytest.mark.scenario("CB-11")
async def test_an_embedding_request_beside_a_generation_is_rejected() -> None:
    batch = {"input_batch": [{"id": "a", "content": "x"}], "normalization_method": "None"}
    async with cluster(slots=2, desired=state()) as running:
        async with running.post(conversation("Count to 40.", 200)) as response:
            messages = [await response.message()]
            rejected = await running.client.post(
                f"{running.inference_url}/api/v1/generate_embedding_batch", json=batch
            )
            assert rejected.status_code == 501
            messages += await response.messages()
        assert len(tokens(messages)) > 100
        assert "Done" in result(messages[-1])


@pytest.mark.scenario("CB-12")
async def test_stopping_right_after_a_dropped_stream_is_clean() -> None:
    async with cluster(slots=1, desired=state()) as running:
        async with running.post(ENDLESS) as response:
            async for _ in response:
                break
        await running.stop_balancer()


PNG = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""One pixel."""


@pytest.mark.parametrize(
    ("url", "terminal"),
    [
        (PNG, "MultimodalNotSupported"),
        ("data:image/png;base64,iVBORw0KGgo=", "ImageDecodingFailed"),
        ("data:image/png;base64", "ImageDecodingFailed"),
        ("https://example.com/a.png", "ImageDecodingFailed"),
        ("data:image/png;base64,!!!!", "ImageDecodingFailed"),
    ],
)
async def test_images_end_with_their_typed_error(url: str, terminal: str) -> None:
    history = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    async with cluster(slots=1, desired=state()) as running:
        [message] = await running.generate(conversation("", conversation_history=history))
        assert list(result(message)) == [terminal]
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"


@pytest.mark.parametrize("max_tokens", [0, -1, -(2**31)])
async def test_a_limit_of_no_tokens_gives_one(max_tokens: int) -> None:
    async with cluster(slots=1, desired=state()) as running:
        messages = await running.generate(conversation("Count to 40.", max_tokens))
        assert len(tokens(messages)) == 1
        assert completion(usage_of(messages)) == 1


async def test_prompts_at_the_edge_of_the_context() -> None:
    # One letter a token: the bundled tokenizer has no merges of them.
    desired = state(parameters=deterministic(context_size=256))
    async with cluster(slots=1, desired=desired) as running:
        [empty] = await running.generate({"raw_prompt": "", "max_tokens": 5})
        assert result(empty) == {"SamplerError": "the prompt has no tokens"}
        one = "<|im_end|>"
        fits = await running.generate({"raw_prompt": one * 255, "max_tokens": 1})
        assert list(result(fits[-1])) == ["Done"]
        assert usage_of(fits)["prompt_tokens"] == 255
        full = await running.generate({"raw_prompt": one * 256, "max_tokens": 2**31 - 1})
        assert "evicted" in result(full[-1])["SamplerError"]
        assert len(full) <= 2
        [over] = await running.generate({"raw_prompt": one * 257, "max_tokens": 5})
        assert result(over) == {
            "SamplerError": "Request evicted due to KV cache pressure: prompt has 257 tokens, room for 256"
        }


async def test_a_template_that_loops_costs_only_its_own_request() -> None:
    template = (
        (
            "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
            "{% endfor %}{% endfor %}{% endif %}"
        )
        + chat_markup("{{ messages[0].content }}")
        + "{{ '' }}"
    )  # else Jinja takes the last line feed off
    desired = state(chat_template_override=ChatTemplate(template), use_chat_template_override=True)
    async with (
        cluster(slots=2, desired=desired, agent_changes={"preparation_timeout": 1.0}) as running,
        trio.open_nursery() as requests,
    ):
        looping: list[Message] = []

        async def loop() -> None:
            looping.extend(await running.generate(conversation("loop")))

        requests.start_soon(loop)
        await running.wait_for_slots(1)
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"
        assert not looping
        with trio.fail_after(10):
            await running.wait_for_slots(0)
    assert list(result(looping[-1])) == ["ChatTemplateError"]
