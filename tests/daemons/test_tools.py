"""Tool calls and thinking of the bundled model, through real daemons."""

from typing import Any

import pytest

from tests.cluster import (
    Message,
    as_delivered,
    cluster,
    conversation,
    result,
    state,
    text_of,
    tokens,
    usage_of,
)

pytestmark = pytest.mark.slow


def function(name: str, description: str, **properties: Any) -> Message:
    parameters = {"type": "object", "properties": properties, "required": [next(iter(properties))]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = function(
    "get_weather",
    "Get the current weather for a location",
    location={"type": "string"},
    unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
)
ADD = function("add", "Add two numbers", a={"type": "number"}, b={"type": "number"})
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def events(messages: list[Message], kind: str) -> list[Any]:
    return [result(message)[kind] for message in messages if kind in result(message)]


def weather(prompt: str = "What is the weather in Paris?", **changes: Any) -> Message:
    return conversation(prompt, 400, **{"tools": [WEATHER], "parse_tool_calls": True, **changes})


@pytest.mark.scenario("TC-1", "TC-2", "GE-7")
async def test_calls_are_streamed_counted_and_parsed() -> None:
    async with cluster(desired=state()) as running:
        messages = await running.generate(weather("What is the weather in Paris and Rome?"))
        calls = [call for event in events(messages, "ToolCallParsed") for call in event]
        assert [(call["name"], call["arguments"]) for call in calls] == [
            ("get_weather", {"ValidJson": {"location": city}}) for city in ("Paris", "Rome")
        ]
        assert tokens(messages, "ToolCallToken")
        assert usage_of(messages)["tool_call_tokens"] > len(tokens(messages, "ToolCallToken"))
        assert not any(mark in text_of(messages) for mark in MARKS)
        greeting = await running.generate(weather("Hello"))
        assert text_of(greeting) == "Hello! How can I help you today?"


@pytest.mark.scenario("TC-3")
async def test_without_the_flag_there_are_no_events() -> None:
    async with cluster(slots=1, desired=state()) as running:
        messages = await running.generate(weather(parse_tool_calls=False))
        kinds = {kind for message in messages for kind in result(message)}
        assert kinds == {"ToolCallToken", "Done"}


@pytest.mark.scenario("TC-4", "TC-5")
async def test_arguments_and_schemas_that_are_wrong_are_reported_by_name() -> None:
    numbers = function("get_weather", "Get the current weather for a location", location={"type": "integer"})
    none = function("get_weather", "Get the current weather for a location", location={"type": 123})
    async with cluster(slots=1, desired=state()) as running:
        messages = await running.generate(weather(tools=[numbers]))
        [[violation]] = events(messages, "ToolCallValidationFailed")
        assert violation.startswith("get_weather: ")
        assert list(result(messages[-1])) == ["Done"]
        [refusal] = await running.generate(weather(tools=[none]))
        assert "get_weather" in result(refusal)["ToolSchemaInvalid"]


async def test_a_required_call_is_made_even_for_a_greeting() -> None:
    async with cluster(slots=1, desired=state()) as running:
        for choice in ("required", {"NamedTool": {"name": "add"}}):
            messages = await running.generate(weather("Hello", tools=[ADD, WEATHER], tool_choice=choice))
            [calls] = events(messages, "ToolCallParsed")
            assert calls[0]["name"] in ("add", "get_weather")
            if choice != "required":
                assert [call["name"] for call in calls] == ["add"]
        messages = await running.generate(weather(tool_choice="none"))
        assert not tokens(messages, "ToolCallToken")


async def test_results_of_calls_in_the_history_are_answered() -> None:
    history = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "function": {"name": "get_weather", "arguments": {"location": "Paris"}}}
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": '{"temperature": 21, "unit": "celsius", "condition": "sunny"}',
        },
    ]
    async with cluster(slots=1, desired=state()) as running:
        messages = await running.generate(weather(conversation_history=history))
        assert text_of(messages) == "In Paris it is sunny with 21 degrees celsius."


async def test_a_thought_comes_before_its_call() -> None:
    async with cluster(slots=1, desired=state()) as running:
        messages = await running.generate(weather(enable_thinking=True))
        kinds = [kind for message in messages for kind in result(message)]
        assert kinds.index("ReasoningToken") < kinds.index("ToolCallToken")
        [[call]] = events(messages, "ToolCallParsed")
        assert call["arguments"] == {"ValidJson": {"location": "Paris"}}
        assert not any(mark in text_of(messages) for mark in MARKS)


@pytest.mark.scenario("TH-5", "TH-6", "TH-7", "TH-8", "TH-9")
async def test_thinking_models_answer_what_people_ask_and_end() -> None:
    several_turns = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "assistant", "content": "Arr! What be yer question?"},
        {"role": "user", "content": "What is the capital of Spain?"},
    ]
    json_only = [
        {"role": "system", "content": "Answer in JSON only."},
        {"role": "user", "content": "Answer in JSON with name and age: Ada is 36 years old."},
    ]
    links = "\n".join(f"https://example.com/page/{number}" for number in range(60))
    long = [
        {"role": "system", "content": "You are a helpful assistant who reads every link. " * 20},
        {"role": "user", "content": f"Hello\n{links}"},
    ]
    async with cluster(desired=as_delivered(temperature=0.0)) as running:
        for body, most in (
            (conversation("What is 2 + 2?", 2000, thinking=True), 2000),
            (conversation("", 1000, thinking=True, conversation_history=several_turns), 1000),
            (conversation("", 2000, thinking=True, conversation_history=json_only), 2000),
            (conversation("", 512, conversation_history=json_only), 512),
            (conversation("", 512, conversation_history=long), 512),
        ):
            messages = await running.generate(body)
            assert 0 < len(tokens(messages)) <= most
            assert list(result(messages[-1])) == ["Done"]
            assert not any(mark in text_of(messages) for mark in MARKS)
        assert len(tokens(await running.generate(conversation("hi", 500)))) < 500
