"""Hostile and odd requests against real daemons: they end typed and soon, and the others never notice."""

import base64
import json
import os
import random
import signal
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import trio
from PIL import Image

from paddler.config import KvLayout
from tests.cluster import (
    ENDLESS,
    LOAD_WAIT,
    Cluster,
    Message,
    chat_markup,
    cluster,
    conversation,
    count_tasks,
    deterministic,
    raw_prompt,
    result,
    state,
    text_of,
    usage_of,
)
from tests.daemons.test_embeddings import embed, embedding_state
from tests.daemons.test_engine_failures import HANG_WAIT, engine_pids
from tests.daemons.test_images import data_uri, red_circle, seeing
from tests.daemons.test_tools import WEATHER, weather
from tests.streams import StreamedResponse

pytestmark = pytest.mark.slow

SOON = 5.0
"""Far more than any refusal takes, far less than a deadline."""
GREETING = "Hello! How can I help you today?"
COUNTING = ", ".join(str(number) for number in range(1, 41)) + "."


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def gbnf(grammar: str, root: str = "root") -> Message:
    rule = {"type": "gbnf", "grammar": grammar, "root": root}
    return {**raw_prompt("Is the sky blue?", 20), "grammar": rule}


def schema(value: Any) -> Message:
    text = value if isinstance(value, str) else json.dumps(value)
    return {**raw_prompt("Is the sky blue?", 20), "grammar": {"type": "json_schema", "schema": text}}


def sampled(**sampling: Any) -> Message:
    return {**raw_prompt("Hello", 20), "sampling": sampling}


def tool(location: Any, **changes: Any) -> Message:
    """Ask for a call of a tool whose argument has this schema."""
    parameters = {"type": "object", "properties": {"location": location}}
    function = {**WEATHER["function"], "parameters": parameters}
    return weather(tools=[{"type": "function", "function": function}], **changes)


def looking_at(url: str) -> Message:
    image = {"type": "image_url", "image_url": {"url": url}}
    content = [image, {"type": "text", "text": "Which shape is it?"}]
    return conversation("", 20, conversation_history=[{"role": "user", "content": content}])


DOUBLING = "\n".join(f"r{index} ::= r{index + 1} r{index + 1}" for index in range(40))
FORTY_FOLD = {f"d{index}": {"allOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in range(40)}

REFUSED: dict[str, tuple[Message, str]] = {
    "an open string": (gbnf('root ::= "yes'), "GrammarInitializationFailed"),
    "20,000 parentheses": (gbnf("root ::= " + "(" * 20_000), "GrammarInitializationFailed"),
    "a grammar of a megabyte": (gbnf('root ::= "' + "a" * 10**6 + '"'), "GrammarInitializationFailed"),
    "repetitions of repetitions": (gbnf('root ::= (("a"{1000}){1000}){1000}'), "GrammarInitializationFailed"),
    "an undefined rule": (gbnf("root ::= x"), "GrammarInitializationFailed"),
    "a NUL": (gbnf('root ::= "a\0b"'), "GrammarInitializationFailed"),
    "no character at all": (gbnf(r"root ::= [^\x00-\U0010FFFF]"), "GrammarRejectedModelOutput"),
    "a token that does not exist": (gbnf("root ::= <[99999999]>"), "GrammarRejectedModelOutput"),
    "a remote reference": (schema({"$ref": "http://127.0.0.1:9/x.json"}), "GrammarSyntaxError"),
    "a reference to a file": (schema({"$ref": "file:///etc/passwd"}), "GrammarSyntaxError"),
    "a schema that needs itself": (schema({"$ref": "#"}), "GrammarSyntaxError"),
    "references that double": (
        schema({"$ref": "#/$defs/d0", "$defs": FORTY_FOLD | {"d40": {"type": "object"}}}),
        "GrammarSyntaxError",
    ),
    "10,000 brackets": (schema("[" * 10_000 + "]" * 10_000), "GrammarSyntaxError"),
    "10,000 schemas deep": (schema('{"items":' * 10_000 + "{}" + "}" * 10_000), "GrammarSyntaxError"),
    "a NaN in a schema": (schema('{"type":"integer","minimum":NaN}'), "GrammarSyntaxError"),
    "a number of 5,000 digits": (
        schema('{"type":"integer","maximum":' + "9" * 5000 + "}"),
        "GrammarSyntaxError",
    ),
    "a huge pattern": (
        schema({"type": "string", "pattern": "^(((a{1000}){1000}){1000})$"}),
        "GrammarSyntaxError",
    ),
    "100,000 choices": (schema({"enum": list(range(100_000))}), "GrammarSyntaxError"),
    "half a surrogate pair": (schema(r'{"const":"\ud800"}'), "GrammarSyntaxError"),
    "a bias beyond the vocabulary": (sampled(logit_bias={"3648": 1.0}), "SamplerError"),
    "a prompt without tokens": ({"raw_prompt": "", "max_tokens": 5}, "SamplerError"),
    "a prompt beyond its cells": ({"raw_prompt": "a b " * 3000, "max_tokens": 5}, "SamplerError"),
    "a prompt of arguments": (
        conversation(
            "",
            conversation_history=[
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "[" * 9_999}}],
                },
                {"role": "user", "content": "Hello"},
            ],
        ),
        "SamplerError",
    ),
    "a tool that is somewhere else": (tool({"$ref": "http://127.0.0.1:9/a"}), "ToolSchemaInvalid"),
    "a tool of no type": (tool({"type": "strin"}), "ToolSchemaInvalid"),
}

REFUSED_AT_THE_DOOR: dict[str, Message] = {
    "an unknown key": sampled(magic=1),
    "a negative temperature": sampled(temperature=-1),
    "a huge temperature": sampled(temperature=1e30),
    "an integer beyond 32 bits": sampled(top_k=2**40),
    "no token id": sampled(logit_bias={"-1": 5.0}),
    "too many biases": sampled(logit_bias={str(token): 1.0 for token in range(5000)}),
    "too many stop strings": sampled(stop=["a"] * 17),
    "an empty stop string": sampled(stop=[""]),
    "too many alternatives": sampled(logprobs=True, top_logprobs=21),
    "too many tokens": {**raw_prompt(), "max_tokens": 2**31},
    "a tool that is not there": weather(tool_choice={"NamedTool": {"name": "x"}}),
    "a tool 400 deep": tool(json.loads('{"items":' * 400 + "{}" + "}" * 400)),
}

SERVED: dict[str, Message] = {
    "left recursion": gbnf('root ::= root "a" | "b"'),
    "ambiguity": gbnf('root ::= (a a a a a)*\na ::= ("a" | "aa" | "")*'),
    "rules that double": gbnf(f'root ::= r0\n{DOUBLING}\nr40 ::= "x"'),
    "rules that double nothing": gbnf(f'root ::= r0\n{DOUBLING}\nr40 ::= "x"?'),
    "a pattern that backtracks": schema({"type": "string", "pattern": "^(a+)+$"}),
    "stop strings that never come": sampled(stop=["zzzz" * 256] * 16),
    "stop strings that nearly come": {
        **ENDLESS,
        "max_tokens": 200,
        "sampling": {"stop": ["a b " * 255 + "c"] * 16},
    },
    "all alternatives": sampled(logprobs=True, top_logprobs=20),
    "nearly no temperature": sampled(temperature=1e-38),
    "nothing but the best": sampled(temperature=100.0, top_k=0, top_p=0.0, min_p=1.0),
    "a media marker in a text": conversation("What is <__media__>?", 10),
    "a NUL in a text": conversation("a\0b", 10),
    "a tool whose schema needs itself": tool({"$ref": "#/properties/location"}),
}
"""What looks dangerous and is not: it must come to a normal end."""


@asynccontextmanager
async def beside_an_undisturbed_stream(running: Cluster) -> AsyncIterator[None]:
    """Let another client count to 40 again and again; see that it always can, and that nothing is left."""
    await running.generate(raw_prompt("Hello", 1))
    await running.wait_for_slots(0)
    tasks, files = count_tasks(), descriptors()

    def at_rest() -> bool:
        return count_tasks() <= tasks and descriptors() <= files + 4  # pipes of preparation processes

    answers = []
    counted = trio.Event()

    async def count() -> None:
        while True:
            answers.append(text_of(await running.generate(raw_prompt("Count to 40.", 200))))
            counted.set()

    async with trio.open_nursery() as others:
        others.start_soon(count)
        yield
        await counted.wait()
        others.cancel_scope.cancel()
    assert set(answers) == {COUNTING}
    await running.wait_for_slots(0)
    assert await running.buffered() == 0
    with trio.fail_after(SOON):
        while not at_rest():  # noqa: ASYNC110 no event for these
            await trio.sleep(0.05)


async def end_of(running: Cluster, body: Message, *, within: float = SOON) -> str:
    """Return the kind of the last message of a request, or the status of one that got no stream."""
    with trio.fail_after(within):
        async with running.post(body) as response:
            if response.status_code != 200:
                return str(response.status_code)
            last = result((await response.messages())[-1])
            return str(next(iter(last)))


async def test_hostile_texts_end_typed_and_disturb_nobody() -> None:
    async with cluster(slots=3, desired=state()) as running, beside_an_undisturbed_stream(running):
        ends = {name: await end_of(running, body) for name, (body, _) in REFUSED.items()}
        assert ends == {name: kind for name, (_, kind) in REFUSED.items()}
        ends = {name: await end_of(running, body) for name, body in REFUSED_AT_THE_DOOR.items()}
        assert ends == dict.fromkeys(REFUSED_AT_THE_DOOR, "400")
        ends = {name: await end_of(running, body) for name, body in SERVED.items()}
        assert ends == dict.fromkeys(SERVED, "Done")


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims to be so large, and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def black(side: int) -> bytes:
    """Return a small file with many pixels."""
    file = BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def svg(inner: str, before: str = "") -> bytes:
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64">'
    return f"{before}{head}{inner}</svg>".encode()


LAUGHS = "".join(f'<!ENTITY a{index} "{f"&a{index - 1};" * 10 if index else "lol"}">' for index in range(12))
USES = "".join(f'<g id="a{index}">' + f'<use href="#a{index - 1}"/>' * 10 + "</g>" for index in range(1, 10))
BAD_PICTURES = {
    "a claim of 3.6 gigapixels": data_uri(png(60_000, 60_000)),
    "16 megapixels without data": data_uri(png(4000, 4000)),
    "400 megapixels": data_uri(black(20_000)),
    "another place": "http://127.0.0.1:9/x.png",
    "a file": "file:///etc/passwd",
    "an entity that is a file": data_uri(
        svg("<text>&x;</text>", '<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]>')
    ),
    "a billion laughs": data_uri(svg("<text>&a11;</text>", f'<?xml version="1.0"?><!DOCTYPE s [{LAUGHS}]>')),
    "a billion uses": data_uri(svg(f'<defs><g id="a0"><rect/></g>{USES}</defs><use href="#a9"/>')),
}


async def test_hostile_images_end_typed_and_disturb_nobody() -> None:
    circle = base64.b64decode(red_circle().partition(",")[2])
    async with cluster(slots=3, desired=seeing()) as running, beside_an_undisturbed_stream(running):
        ends = {name: await end_of(running, looking_at(url)) for name, url in BAD_PICTURES.items()}
        assert ends == dict.fromkeys(BAD_PICTURES, "ImageDecodingFailed")
        lie = "data:text/html;base64," + base64.b64encode(circle).decode()
        assert text_of(await running.generate(looking_at(lie))) == "It is a circle."
        elsewhere = svg('<image href="file:///etc/passwd" width="9" height="9"/>')
        assert await end_of(running, looking_at(data_uri(elsewhere))) == "Done"


async def test_a_filter_without_end_costs_its_own_client_a_deadline_only() -> None:
    endless = svg(
        '<filter id="f"><feMorphology radius="100000"/><feTurbulence numOctaves="1000000000"/></filter>'
        '<rect filter="url(#f)" width="64" height="64"/>'
    )
    changes = {"preparation_timeout": 1.0}
    async with (
        cluster(slots=3, desired=seeing(), agent_changes=changes) as running,
        beside_an_undisturbed_stream(running),
    ):
        assert await end_of(running, looking_at(data_uri(endless))) == "ImageDecodingFailed"


async def test_odd_documents_are_all_accounted_for() -> None:
    odd = {"blank": " ", "lines": "\n\n", "nul": "\0", "marks": "<|im_end|>" * 20, "media": "<__media__>"}
    async with cluster(agents=2, slots=2, desired=embedding_state(), max_buffered_requests=1000) as running:
        outcome = await embed(running, {**odd, "i" * 100_000: "a long name"})
        assert set(outcome.vectors) == {*odd, "i" * 100_000}
        outcome = await embed(running, {str(index): "a" for index in range(3000)})
        assert len(outcome.vectors) == 3000
        outcome = await embed(running, {"long": "ab " * 600_000, "short": "ab"})
        assert list(outcome.vectors) == ["short"]
        assert len(outcome.oversized) == 1
        assert not outcome.errors
        await running.wait_for_slots(0)


@pytest.mark.parametrize("failure", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_engine_that_fails_in_every_kind_of_work_comes_back(failure: signal.Signals) -> None:
    endless = {"ignore_eos": True}
    letters = gbnf("root ::= [ab]{2000}")  # a grammar that may end, ends an answer in spite of `ignore_eos`
    called = weather(tool_choice="required")
    seen = looking_at(red_circle(size=480))
    mix = [
        {**letters, "max_tokens": 4000, "sampling": endless},
        {**ENDLESS, "sampling": endless},
        called,
        seen,
        seen,
        called,
    ]
    ends: list[Message] = []

    async def follow(running: Cluster, body: Message, started: trio.Event) -> None:
        async with running.post(body) as response:
            async for line in response:
                started.set()
                ends.append(json.loads(line))

    async with cluster(slots=4, desired=seeing(), buffered_request_timeout=LOAD_WAIT) as running:
        with trio.fail_after(LOAD_WAIT):
            async with trio.open_nursery() as clients:
                started = [trio.Event() for _ in mix]
                for body, event in zip(mix, started, strict=True):
                    clients.start_soon(follow, running, body, event)
                for event in started[:2]:
                    await event.wait()
                [pid] = engine_pids()
                os.kill(pid, failure)
        last = [message for message in ends if _is_last(message)]
        assert len(last) == len(mix)
        assert sum("Error" in result(message) for message in last) >= 2
        with trio.fail_after(HANG_WAIT + LOAD_WAIT):
            assert text_of(await running.generate(looking_at(red_circle()))) == "It is a circle."
        await running.wait_for_slots(0)


def _is_last(message: Message) -> bool:
    return bool({"Done", "Error"} & set(result(message)))


WORDS = ("the slot", "a llama", "Paris", "blue", "seven", "harbour", "velvet", "counts", "token", "cache")


async def ask_a_family(running: Cluster, count: int) -> list[tuple[Message, list[Message]]]:
    """Ask prompts of which most go on where the answer to the one before, or a part of it, ended."""
    dice = random.Random(4)
    asked: list[tuple[Message, list[Message]]] = []
    for _ in range(count):
        begin = ""
        if len(asked) % 5:
            body, answer = asked[-1]
            begin = f"{body['raw_prompt']}{text_of(answer)}<|im_end|>\n"
        if dice.random() < 0.5:
            begin = begin[: dice.randint(0, len(begin))]
        prompt = begin + chat_markup(" ".join(dice.choices(WORDS, k=dice.randint(10, 60))))
        body = {
            "raw_prompt": prompt,
            "max_tokens": dice.choice([1, 4, 60, 90]),
            "sampling": {"logprobs": True, "ignore_eos": True},
        }
        asked.append((body, await running.generate(body)))
    return asked


def chosen(messages: list[Message]) -> list[tuple[str, float]]:
    """Return the tokens of an answer with their logprobs, which tell much more than the tokens."""
    rows = [result(message) for message in messages]
    return [
        (token["token"], token["logprob"])
        for row in rows
        if isinstance(row, dict)
        for token in row.get("TokenLogprobs", ())
    ]


async def some_messages(response: StreamedResponse, count: int) -> list[Message]:
    messages: list[Message] = []
    async for line in response:
        messages.append(json.loads(line))
        if len(messages) >= count:
            break
    return messages


@pytest.mark.parametrize(
    ("context_size", "changes"),
    [
        (4096, {"kv_layout": KvLayout.PER_SLOT}),
        (1024, {"kv_layout": KvLayout.PER_SLOT, "prefix_cache_bytes": 3_000_000}),
        (2048, {"kv_layout": KvLayout.SHARED, "prefix_cache_bytes": 64 * 1024 * 1024}),
    ],
    ids=["per slot", "per slot, host memory", "shared, host memory"],
)
async def test_answers_in_the_crowd_are_those_of_cold_prompts(
    context_size: int, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In the shared layout numbers depend on the place of cells, a little: wrong cells would show plainly."""
    tolerance = 0.0 if changes["kv_layout"] is KvLayout.PER_SLOT else 0.2
    plain = {"kv_layout": changes["kv_layout"], "prefix_cache": False}
    async with cluster(slots=1, desired=state(), agent_changes=plain) as running:
        asked = await ask_a_family(running, 30)
    caplog.clear()
    cached = 0

    async def be_a_client(running: Cluster, number: int) -> None:
        nonlocal cached
        dice = random.Random(number)
        first = dice.randrange(len(asked))
        for body, cold in (asked + asked)[first : first + 10]:
            async with running.post(body) as response:
                messages = await some_messages(response, dice.choice([1, 5, 1000, 1000]))
            _compare(chosen(messages), chosen(cold), tolerance=tolerance)
            if _is_last(messages[-1]) and "Done" in result(messages[-1]):
                assert len(chosen(messages)) == len(chosen(cold)) or tolerance
                cached += usage_of(messages)["cached_prompt_tokens"]

    desired = state(parameters=deterministic(context_size=context_size))
    async with cluster(slots=3, desired=desired, agent_changes=changes) as running:
        async with trio.open_nursery() as clients:
            for number in range(6):
                clients.start_soon(be_a_client, running, number)
        await running.wait_for_slots(0)
    assert cached > 0
    assert [record.getMessage() for record in caplog.records if "kv cache" in record.getMessage()] == []


def _compare(warm: list[tuple[str, float]], cold: list[tuple[str, float]], *, tolerance: float) -> None:
    """See that one is the beginning of the other, up to where rounding may let them part."""
    for (warm_token, warm_logprob), (cold_token, cold_logprob) in zip(warm, cold, strict=False):
        if tolerance and warm_token != cold_token:
            return
        assert warm_token == cold_token
        assert abs(warm_logprob - cold_logprob) <= tolerance
