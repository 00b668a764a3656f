"""Grammars bind what real llama.cpp writes, and broken ones end with their typed error."""

import json
from typing import Any

import pytest

from tests.cluster import (
    Message,
    chat_markup,
    cluster,
    conversation,
    raw_prompt,
    result,
    state,
    text_of,
    usage_of,
)

pytestmark = pytest.mark.slow

YES_OR_NO = {"type": "gbnf", "grammar": 'root ::= "yes" | "no"', "root": "root"}
ANY_CASE = {"type": "gbnf", "grammar": "root ::= [Yy] [Ee] [Ss] | [Nn] [Oo]", "root": "root"}
ANSWER = {
    "type": "json_schema",
    "schema": json.dumps(
        {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    ),
}


@pytest.mark.scenario("GR-1", "GR-2", "GR-3", "GR-4")
async def test_answers_keep_to_their_grammar() -> None:
    async with cluster(slots=2, desired=state()) as running:
        answer = await running.generate(conversation("Is the sky blue?", 10, grammar=ANY_CASE))
        assert text_of(answer).lower() in ("yes", "no")
        assert list(result(answer[-1])) == ["Done"]
        answer = await running.generate({**raw_prompt("Is the sky blue?", 10), "grammar": YES_OR_NO})
        assert text_of(answer) in ("yes", "no")
        question = "Answer in JSON with answer: What is the capital of France?"
        for body in (conversation(question, 50), raw_prompt(question, 50)):
            answer = await running.generate({**body, "grammar": ANSWER})
            assert list(json.loads(text_of(answer))) == ["answer"]
            assert list(result(answer[-1])) == ["Done"]


@pytest.mark.scenario("GR-5", "GR-6")
async def test_unusable_grammars_end_with_their_typed_error_and_hurt_nobody() -> None:
    broken: list[tuple[Message, dict[str, Any], str]] = [
        ({"enable_thinking": True}, ANSWER, "GrammarIncompatibleWithThinking"),
        ({}, {"type": "gbnf", "grammar": 'root ::= "yes', "root": "root"}, "GrammarInitializationFailed"),
        ({}, {**YES_OR_NO, "root": "nowhere"}, "GrammarInitializationFailed"),
        ({}, {"type": "gbnf", "grammar": "", "root": "root"}, "GrammarInitializationFailed"),
        (
            {},
            {"type": "gbnf", "grammar": "root ::= " + "(" * 20_000, "root": "root"},
            "GrammarInitializationFailed",
        ),
        ({}, {"type": "json_schema", "schema": "{"}, "GrammarSyntaxError"),
        ({}, {"type": "json_schema", "schema": "[" * 10_000 + "]" * 10_000}, "GrammarSyntaxError"),
        ({}, {"type": "json_schema", "schema": '{"$ref": "https://example.com/a"}'}, "GrammarSyntaxError"),
        ({}, {"type": "json_schema", "schema": '{"$ref": "#"}'}, "GrammarSyntaxError"),
    ]
    async with cluster(slots=1, desired=state()) as running:
        for changes, grammar, terminal in broken:
            [message] = await running.generate(conversation("Hello", grammar=grammar, **changes))
            assert list(result(message)) == [terminal]
            if terminal == "GrammarInitializationFailed":
                assert "grammar" in result(message)[terminal]
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"


async def test_sampling_of_a_request_changes_its_answer_only() -> None:
    story = conversation("Tell me a story about a llama.", 40)
    wild = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 5}
    async with cluster(slots=1, desired=state()) as running:
        plain = text_of(await running.generate(story))
        first = text_of(await running.generate({**story, "sampling": wild}))
        again = text_of(await running.generate({**story, "sampling": wild}))
        other = text_of(await running.generate({**story, "sampling": {**wild, "seed": 6}}))
        assert first == again
        assert len({plain, first, other}) == 3
        assert text_of(await running.generate(story)) == plain
        hello = {"raw_prompt": chat_markup("Hello"), "max_tokens": 30}
        stopped = await running.generate({**hello, "sampling": {"stop": ["help you"]}})
        assert text_of(stopped) == "Hello! How can I "
        assert list(result(stopped[-1])) == ["Done"]
        endless = await running.generate({**hello, "sampling": {"ignore_eos": True}})
        usage = usage_of(endless)
        assert usage["content_tokens"] + usage["reasoning_tokens"] == 30


async def test_logprobs_come_with_the_tokens_that_asked_for_them() -> None:
    hello = {
        "raw_prompt": chat_markup("Hello"),
        "max_tokens": 3,
        "sampling": {"logprobs": True, "top_logprobs": 2},
    }
    async with cluster(slots=1, desired=state()) as running:
        messages = await running.generate(hello)
        events = [
            result(message)["TokenLogprobs"] for message in messages if "TokenLogprobs" in result(message)
        ]
        chosen = [token for event in events for token in event]
        assert "".join(token["token"] for token in chosen) == text_of(messages)
        for token in chosen:
            assert token["logprob"] <= 0
            assert token["top"][0] == {"token": token["token"], "logprob": token["logprob"]}
            assert len(token["top"]) == 2
