"""What does not have the documented shape is refused, with a sentence that names the place."""

import json
import re
from random import Random
from typing import Any, cast

import pytest

from paddler.errors import RemoteProtocolError
from paddler.messages.agent_socket import AgentFrame, BalancerFrame, Generate
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    GenerateEmbeddingBatch,
)
from paddler.messages.inference_socket import ClientFrame
from paddler.messages.state import DesiredState
from paddler.messages.strict_json import MAX_NESTING
from paddler.messages.wire import MAX_BRANCHES, decode, encode, parse_json
from tests.messages.test_documented_shapes import (
    CONVERSATION_JSON,
    DEFAULT_PARAMETERS_JSON,
    DEFAULT_STATE_JSON,
)

RAW_PROMPT_JSON = {"max_tokens": 1, "raw_prompt": "x"}


def raw_prompt(**changes: Any) -> tuple[Any, Any]:
    return ContinueFromRawPrompt, RAW_PROMPT_JSON | changes


def conversation(**changes: Any) -> tuple[Any, Any]:
    return ContinueFromConversationHistory, CONVERSATION_JSON | changes


def turn(**message: Any) -> tuple[Any, Any]:
    return conversation(conversation_history=[message])


def tool(function: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    return conversation(tools=[{"type": "function", "function": function} | changes])


def state(**changes: Any) -> tuple[Any, Any]:
    return DesiredState, DEFAULT_STATE_JSON | changes


def parameters(**changes: Any) -> tuple[Any, Any]:
    return state(inference_parameters=DEFAULT_PARAMETERS_JSON | changes)


def without(name: str, form: Any, value: dict[str, Any]) -> tuple[Any, Any]:
    return form, {key: item for key, item in value.items() if key != name}


REFUSED: list[tuple[tuple[Any, Any], str]] = [
    # kinds of JSON values: none is converted into another
    ((ContinueFromRawPrompt, []), "expected an object, got an array"),
    ((ContinueFromRawPrompt, None), "expected an object, got null"),
    (raw_prompt(max_tokens="1"), "expected an integer, got a string @ $.max_tokens"),
    (raw_prompt(max_tokens=1.0), "expected an integer, got a number @ $.max_tokens"),
    (raw_prompt(max_tokens=True), "expected an integer, got a boolean @ $.max_tokens"),
    (
        raw_prompt(max_tokens=2**31),
        "must be between -2147483648 and 2147483647: 2147483648 is out of range @ $.max_tokens",
    ),
    (raw_prompt(raw_prompt=None), "expected a string, got null @ $.raw_prompt"),
    (conversation(enable_thinking=0), "expected a boolean, got an integer @ $.enable_thinking"),
    (conversation(tools=None), "expected an array, got null @ $.tools"),
    (parameters(temperature="hot"), "expected a number, got a string @ $.inference_parameters.temperature"),
    (
        parameters(temperature=1e39),
        (
            "must be between -3.4028235e+38 and 3.4028235e+38: 1e+39 is out of range "
            "@ $.inference_parameters.temperature"
        ),
    ),
    (
        parameters(context_size=-1),
        "must be between 0 and 4294967295: -1 is out of range @ $.inference_parameters.context_size",
    ),
    (
        parameters(n_batch=10**40),
        (
            "must be between 0 and 18446744073709551615: a number of that size is out of range "
            "@ $.inference_parameters.n_batch"
        ),
    ),
    # keys
    (
        without("max_tokens", ContinueFromRawPrompt, RAW_PROMPT_JSON),
        "missing field `max_tokens` @ $.max_tokens",
    ),
    (without("model", DesiredState, DEFAULT_STATE_JSON), "missing field `model` @ $.model"),
    (raw_prompt(top_k=1, seed=2), "unknown field `seed`, `top_k`"),
    (raw_prompt(sampling={"topk": 1}), "unknown field `topk` @ $.sampling"),
    (
        raw_prompt(sampling={"seed": -1}),
        "must be between 0 and 18446744073709551615: -1 is out of range @ $.sampling.seed",
    ),
    *(
        (
            raw_prompt(sampling={"logit_bias": wrong}),
            f"expected an object, got {kind} @ $.sampling.logit_bias",
        )
        for wrong, kind in [(" {", "a string"), ([], "an array"), (5, "an integer"), (False, "a boolean")]
    ),
    (
        raw_prompt(sampling={"logit_bias": {"5": 1.5, "x" * 1000: "1"}}),
        f"expected a number, got a string @ $.sampling.logit_bias['{'x' * 100}']",
    ),
    (state(extra=1), "unknown field `extra`"),
    (parameters(seed=1), "unknown field `seed` @ $.inference_parameters"),
    (
        turn(role="user", content="x", nickname="a"),
        "unknown field `nickname` @ $.conversation_history[0]",
    ),
    (turn(role="user"), "missing field `content` @ $.conversation_history[0].content"),
    # content
    (
        turn(role="user", content=5),
        "expected a string or an array of parts, got an integer @ $.conversation_history[0].content",
    ),
    (
        turn(role="user", content=[{"type": "audio"}]),
        "unknown `type`, expected one of `image_url`, `text` @ $.conversation_history[0].content[0]",
    ),
    (
        turn(role="user", content=[{"text": "x"}]),
        "missing field `type` @ $.conversation_history[0].content[0]",
    ),
    (
        turn(role="user", content=[{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}]),
        "unknown field `detail` @ $.conversation_history[0].content[0].image_url",
    ),
    # grammars and tools
    (raw_prompt(grammar={}), "missing field `type` @ $.grammar"),
    (
        raw_prompt(grammar={"type": "regex"}),
        "unknown `type`, expected one of `gbnf`, `json_schema` @ $.grammar",
    ),
    (raw_prompt(grammar={"type": "gbnf", "grammar": "x"}), "missing field `root` @ $.grammar.root"),
    (
        raw_prompt(grammar={"type": "json_schema", "schema": {}}),
        "expected a string, got an object @ $.grammar.schema",
    ),
    (tool({"name": "a"}), "missing field `description` @ $.tools[0].function.description"),
    (
        tool({"name": "a", "description": "", "parameters": {"type": "object", "$schema": "x"}}),
        "unknown field `$schema` @ $.tools[0].function.parameters",
    ),
    (
        tool({"name": "a", "description": "", "parameters": {"type": "object", "properties": []}}),
        "expected an object, got an array @ $.tools[0].function.parameters.properties",
    ),
    # choices
    (
        parameters(k_cache_dtype="Q9"),
        (
            "unknown variant `Q9`, expected one of `F32`, `F16`, `BF16`, `Q8_0`, `Q4_0`, `Q4_1`, `IQ4_NL`, "
            "`Q5_0`, `Q5_1` @ $.inference_parameters.k_cache_dtype"
        ),
    ),
    (
        state(model="Nothing"),
        "unknown variant `Nothing`, expected one of `HuggingFace`, `LocalToAgent`, `None`, `Url` @ $.model",
    ),
    (
        state(lora_adapters=[{"source": "None", "scale": 1}]),
        (
            "unknown variant `None`, expected one of `HuggingFace`, `LocalToAgent`, `Url`"
            " @ $.lora_adapters[0].source"
        ),
    ),
    *(
        (
            state(lora_adapters=[{"source": {"LocalToAgent": "/a"}, "scale": scale}]),
            f"{reason} @ $.lora_adapters[0].scale",
        )
        for scale, reason in [
            (100.5, "must be between -100 and 100: 100.5 is out of range"),
            (-101, "must be between -100 and 100: -101 is out of range"),
            (10**400, "must be between -100 and 100: a number of that size is out of range"),
            ("1", "expected a number, got a string"),
            (None, "expected a number, got null"),
        ]
    ),
    (state(lora_adapters=[{"scale": 1}]), "missing field `source` @ $.lora_adapters[0].source"),
    (state(lora_adapters={}), "expected an array, got an object @ $.lora_adapters"),
    (state(model={"LocalToAgent": 5}), "expected a string, got an integer @ $.model"),
    (
        state(model={"Url": {"url": "a"}, "LocalToAgent": "b"}),
        (
            "expected an object with exactly one key, one of `HuggingFace`, `LocalToAgent`, `None`, `Url` "
            "@ $.model"
        ),
    ),
    (
        (GenerateEmbeddingBatch, {"input_batch": [], "normalization_method": "L1"}),
        "unknown variant `L1`, expected one of `L2`, `None`, `RmsNorm` @ $.normalization_method",
    ),
    (
        (GenerateEmbeddingBatch, {"input_batch": [{"id": 1, "content": ""}], "normalization_method": "L2"}),
        "expected a string, got an integer @ $.input_batch[0].id",
    ),
    # frames
    (
        (ClientFrame, {"Hello": 1}),
        "unknown variant `Hello`, expected one of `Error`, `Notification`, `Request`",
    ),
    (
        (ClientFrame, {"Notification": {"Start": "x"}}),
        "unknown notification, expected `StopRespondingTo`",
    ),
    (
        (ClientFrame, {"Request": {"id": "1", "request": {"Other": {}}}}),
        (
            "unknown variant `Other`, expected one of `ContinueFromConversationHistory`, "
            "`ContinueFromRawPrompt` @ $.request"
        ),
    ),
    (
        (AgentFrame, "Bye"),
        (
            "unknown variant `Bye`, expected one of `Answer`, `Goodbye`, `Heartbeat`, "
            "`Held`, `Register`, `Status`"
        ),
    ),
]


@pytest.mark.scenario("SD-10")
@pytest.mark.parametrize(("wrong", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_wrong_input_is_refused_with_the_place_named(wrong: tuple[Any, Any], sentence: str) -> None:
    form, value = wrong
    with pytest.raises(RemoteProtocolError, match=f"^{re.escape(sentence)}$"):
        decode(json.dumps(value), form)


FULL_CONVERSATION = CONVERSATION_JSON | {
    "conversation_history": [
        *cast("list[Any]", CONVERSATION_JSON["conversation_history"]),
        {
            "role": "assistant",
            "content": "",
            "name": "a",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ],
    "documents": [{"title": "a"}],
    "tool_choice": {"NamedTool": {"name": "get_weather"}},
    "sampling": {
        **dict.fromkeys(("temperature", "top_p", "min_p", "penalty_repeat", "penalty_frequency"), 0.5),
        **dict.fromkeys(("penalty_presence", "penalty_last_n", "top_k", "seed", "top_logprobs"), 1),
        **dict.fromkeys(("logprobs", "ignore_eos"), True),
        "stop": ["a"],
        "logit_bias": {"5": 1},
    },
}
FULL_STATE = DEFAULT_STATE_JSON | {
    "model": {"HuggingFace": {"repo_id": "a", "filename": "b", "revision": "c"}},
    "multimodal_projection": {"Url": {"url": "a"}},
    "chat_template_override": {"content": ""},
    "lora_adapters": [{"source": {"LocalToAgent": "/a"}, "scale": 1}],
}
FULL: list[tuple[Any, Any]] = [
    (ContinueFromConversationHistory, FULL_CONVERSATION),
    (ContinueFromRawPrompt, RAW_PROMPT_JSON | {"grammar": {"type": "gbnf", "grammar": "", "root": ""}}),
    (
        GenerateEmbeddingBatch,
        {
            "input_batch": [{"id": "1", "content": "a"}],
            "normalization_method": {"RmsNorm": {"epsilon": 1}},
        },
    ),
    (DesiredState, FULL_STATE),
    (ClientFrame, {"Request": {"id": "1", "request": {"ContinueFromRawPrompt": RAW_PROMPT_JSON}}}),
    (ClientFrame, {"Notification": {"StopRespondingTo": "1"}}),
    (ClientFrame, {"Error": {"request_id": "1", "error": {"code": 1, "description": ""}}}),
]
HOUSE_FORMS = re.compile(
    r"(expected (an? |`)\w.*"
    r"|must be between -?[\d.e+]+ and [\d.e+]+: .+ is out of range"
    r"|unknown (field|variant) `.*|unknown `type`, expected one of .*|unknown notification, expected .*"
    r"|missing field `\w+`|nested deeper than \d+ levels)"
    r"( @ \$[^ ]*)?",
    re.DOTALL,
)
PYTHON_WORDS = re.compile(
    r"object has no|not iterable|subscriptable|Error|Exception|NoneType|<class|unhashable"
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything in a JSON value, itself included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = value.copy()
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def random_json(random: Random, depth: int = 0) -> Any:
    match random.randrange(12 if depth < 3 else 9):
        case 0:
            return None
        case 1:
            return random.random() < 0.5
        case 2:
            return random.choice([-1, 0, 1, 2**31, 2**64, -(10**50), 10**400])
        case 3:
            return random.choice([0.5, -1e39, 1e308])
        case 4 | 5 | 6 | 7 | 8:
            return random.choice(["", " {", "[]", "None", "items", "\0", "ß🦙", "x" * 200, "text", "Request"])
        case 9:
            return [random_json(random, depth + 1) for _ in range(random.randrange(3))]
        case _:
            keys = ["", "type", "id", "content", "url", "5", "None", "Url", "$", "x" * 200]
            return {random.choice(keys): random_json(random, depth + 1) for _ in range(random.randrange(3))}


@pytest.mark.parametrize(("form", "whole"), FULL)
def test_every_wrong_value_is_refused_in_our_own_words(form: Any, whole: Any) -> None:
    decode(json.dumps(whole), form)
    random = Random(11)  # a seed, so that a failure stays
    for path in places(whole):
        for _ in range(40):
            wrong = replaced(whole, path, random_json(random))
            try:
                decode(json.dumps(wrong), form)
            except RemoteProtocolError as refusal:
                sentence = str(refusal)
                assert HOUSE_FORMS.fullmatch(sentence), (path, sentence)
                assert not PYTHON_WORDS.search(re.sub(r"`[^`]*`", "", sentence)), (path, sentence)
                assert len(sentence) < 700, (path, sentence)


def test_one_wrong_item_ends_the_work_on_a_list() -> None:
    body = conversation(conversation_history=[{"role": 1, "content": 2}] * 100)[1]
    with pytest.raises(RemoteProtocolError) as refused:
        decode(json.dumps(body), ContinueFromConversationHistory)
    found = refused.value.__context__
    assert isinstance(found, BaseExceptionGroup)
    [history] = found.exceptions
    assert isinstance(history, BaseExceptionGroup)
    assert len(history.exceptions) == 1


def test_a_refusal_is_short_however_much_is_wrong() -> None:
    many = {f"{number:05}": 0 for number in range(10_000)}
    with pytest.raises(RemoteProtocolError, match=r"^unknown field `00000`, `00001`, `00002` and 9997 more$"):
        decode(json.dumps({"max_tokens": 1, "raw_prompt": "", **many}), ContinueFromRawPrompt)
    with pytest.raises(RemoteProtocolError, match=r"^unknown field `x{100}`$"):
        decode(json.dumps({"max_tokens": 1, "raw_prompt": "", "x" * 10_000: 0}), ContinueFromRawPrompt)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"max_tokens": ' + "9" * 5000 + "}", "an integer has too many digits"),
        ("[" * 100_000, "nested too deeply"),
        (r'"\ud800"', "a lone surrogate cannot be written in UTF-8"),
        (b'"a\xff"', "byte 2 is not UTF-8"),
        ("[NaN]", "NaN is not JSON"),
        ("[1e400]", "number 1e400 is out of range: beyond 1.8e+308"),
    ],
    ids=["many digits", "deep", "lone surrogate", "not UTF-8", "not a number", "beyond floats"],
)
def test_what_json_cannot_say_is_refused_in_our_own_words(text: str | bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"^{re.escape(words)}$"):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"max_tokens": NaN, "raw_prompt": "x"}',
        '{"max_tokens": 1, "raw_prompt": "x"} {}',
        '{"max_tokens": ' + "9" * 5000 + ', "raw_prompt": "x"}',
        "[" * 100_000,
        r'{"max_tokens": 1, "raw_prompt": "\ud800"}',
        b'{"max_tokens": 1, "raw_prompt": "\xff"}',
        b'{"max_tokens": 1, "raw_prompt": "\xed\xa0\x80"}',
        '{"max_tokens": 1, "raw_prompt": "x"}'.encode("utf-16"),
    ],
    ids=[
        "nothing",
        "unfinished",
        "not a number",
        "two values",
        "many digits",
        "deep",
        "escaped lone surrogate",
        "not UTF-8",
        "encoded lone surrogate",
        "UTF-16",
    ],
)
def test_text_that_is_not_json_in_utf_8_is_refused(text: str | bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(text, ContinueFromRawPrompt)


@pytest.mark.parametrize("key", ["properties", "additionalProperties"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_deeply_nested_schema_is_refused_where_writing_it_again_would_run_out_of_stack(
    key: str, opening: str, closing: str
) -> None:
    def schema(levels: int) -> str:
        nested = opening * (levels - 1) + "null" + closing * (levels - 1)
        text = json.dumps(
            tool({"name": "t", "description": "", "parameters": {"type": "object", key: {}}})[1]
        )
        return text.replace(f'"{key}": {{}}', f'"{key}": {{"a": {nested}}}')

    deepest = decode(schema(MAX_NESTING - 1), ContinueFromConversationHistory)
    frame, form = Generate(1, deepest), cast("type[Generate]", BalancerFrame)
    assert decode(encode(frame, form), form) == frame
    with pytest.raises(RemoteProtocolError, match=f"^nested deeper than {MAX_NESTING} levels @ .*{key}$"):
        decode(schema(MAX_NESTING), ContinueFromConversationHistory)


def test_escaped_surrogate_pairs_and_backslashes_are_ordinary_text() -> None:
    text = r'{"max_tokens": 1, "raw_prompt": "\ud83e\udd99 \\ud83e"}'
    assert decode(text, ContinueFromRawPrompt).raw_prompt == "🦙 \\ud83e"


@pytest.mark.parametrize("number", ["1e400", "-1e400", "[1e999]"])
def test_a_number_beyond_all_floats_is_refused_where_it_could_not_be_written_again(number: str) -> None:
    schema = {"type": "object", "properties": {"n": "NUMBER"}}
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}]
    body = json.dumps(CONVERSATION_JSON | {"tools": tools}).replace('"NUMBER"', number)
    with pytest.raises(RemoteProtocolError, match="is out of range"):
        decode(body, ContinueFromConversationHistory)


@pytest.mark.parametrize("filling", ["[[]],", "{},", "1,", '"a":1,'])
def test_a_long_text_of_tiny_values_is_refused_before_it_is_parsed(filling: str) -> None:
    opening, closing = ("{", '"z":1}') if ":" in filling else ("[", "1]")
    text = opening + filling * (3 * 1024 * 1024 // len(filling)) + closing
    assert text.count(",") > MAX_BRANCHES
    with pytest.raises(RemoteProtocolError, match="too many values"):
        decode(text, ContinueFromRawPrompt)


def test_a_long_text_of_one_image_is_taken() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (4 * 1024 * 1024)}}
    message = {"role": "user", "content": [part]}
    text = json.dumps(CONVERSATION_JSON | {"conversation_history": [message]})
    assert len(decode(text, ContinueFromConversationHistory).conversation_history) == 1
