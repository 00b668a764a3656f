"""Sections of tool calls become events: each family's own form, any form for unknown models, bad ones."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.language.tool_calls import MAX_SECTION_CHARACTERS, ToolCallOutcome, ToolCallParser
from paddler.language.tool_formats import FALLBACK, FORMATS, ToolFormat
from paddler.messages.tokens import (
    InvalidJson,
    ParsedToolCall,
    ToolCallParsed,
    ToolCallParseFailed,
    UnrecognizedToolCallFormat,
    ValidJson,
)
from tests.language.tools import TOOLS

BY_NAME = {tool_format.name: tool_format for tool_format in FORMATS}


def parse(text: str, tool_format: ToolFormat | None = FALLBACK) -> ToolCallOutcome:
    parser = ToolCallParser(tool_format, TOOLS)
    parser.feed(text)
    return parser.finish()


def call(name: str, arguments: object, given_id: str = "call_0") -> ParsedToolCall:
    return ParsedToolCall(given_id, name, ValidJson(arguments))


@pytest.mark.scenario("TC-7")
@pytest.mark.parametrize("tool_format", [None, FALLBACK])
@pytest.mark.parametrize(
    "text",
    [
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>",
        "<tool_call>\n<function=get_weather><parameter=city>Paris</parameter></function>\n</tool_call>",
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        "get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        'call:get_weather{city:<|"|>Paris<|"|>}',
        '<invoke name="get_weather"><parameter name="city">Paris</parameter></invoke>',
        'get_weather(city="Paris")',
    ],
)
def test_every_syntax_is_read_without_a_registered_format(text: str, tool_format: ToolFormat | None) -> None:
    assert parse(text, tool_format) == ToolCallParsed((call("get_weather", {"city": "Paris"}),))


def test_the_own_format_is_no_obstacle_to_another() -> None:
    text = "<function=ping></function>"
    assert parse(text, BY_NAME["hermes"]) == ToolCallParsed((call("ping", {}),))


def test_ids_that_the_model_gave_are_kept_and_others_are_numbered() -> None:
    text = '[{"name": "ping", "arguments": {}, "id": "x"}, {"name": "ping", "arguments": {}}]'
    assert parse(text) == ToolCallParsed((call("ping", {}, "x"), call("ping", {}, "call_1")))


@pytest.mark.parametrize("text", ["[]", " [] "])
def test_no_call_at_all_is_an_empty_event(text: str) -> None:
    assert parse(text) == ToolCallParsed(())


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("[TOOL_CALLS]ping[ARGS]{city: Oslo", "{city: Oslo"),
        ('{"name": "ping", "arguments": "Oslo"}', "Oslo"),
        ("<function=ping>{city}</function>", "{city}"),
        ('[TOOL_CALLS]ping[ARGS]{"a": NaN}', '{"a": NaN}'),
        ('[TOOL_CALLS]ping[ARGS]{"a": 1e999}', '{"a": 1e999}'),
        ("[TOOL_CALLS]ping[ARGS]" + "[" * 102 + "]" * 102, "[" * 102 + "]" * 102),
        ("[TOOL_CALLS]ping[ARGS]" + "[" * 100_000, "[" * 100_000),
        ('[TOOL_CALLS]ping[ARGS]{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
    ],
)
def test_arguments_that_are_no_json_are_passed_on_as_written(text: str, written: str) -> None:
    assert parse(text) == ToolCallParsed((ParsedToolCall("call_0", "ping", InvalidJson(written)),))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "arguments": {"city": ',
        '{"arguments": {}}',
        '{"name": 5, "arguments": {}}',
        "[1, 2]",
        "[" * 100_000,
        '{"name": "ping", "arguments": {"a": 1e999}}',
        "<function=get_weather><parameter=city>Par",
        "<function=get_weather><parameter=city>Paris</parameter>",
        '<invoke name="x"><parameter',
        ']<]minimax[>[<invoke name="ping">',
        ']<]minimax[>[<invoke name="ping">]<]minimax[>[<a>1]<]minimax[>[</b>',
        ']<]minimax[>[<invoke name="ping">]<]minimax[>[</invoke>and so on',
        ']<]minimax[>[<invoke name="ping">' + "]<]minimax[>[<a>" * 200,
        "]<]minimax[>[<city>Paris]<]minimax[>[</city>",
        'call:get_weather{city:<|"|>Par',
        "call:get_weather{city:" + "[" * 50_000,
        "call:get_weather{a:[" + "1," * 50_000 + "]}",
        "<|tool_call_begin|>functions.ping:0<|tool_call_argument_begin|>{}",
        "<｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}",
        json.dumps([{"name": "ping", "arguments": {}}] * 200),
    ],
)
def test_what_is_recognised_and_broken_fails(text: str) -> None:
    outcome = parse(text)
    assert isinstance(outcome, ToolCallParseFailed)
    assert outcome.payload
    assert len(outcome.payload) < 300


@pytest.mark.parametrize("text", ["", "I would call a tool.", "<tool>ping</tool>", "call it", "\\", "\x00"])
def test_what_nobody_knows_is_reported_with_its_text(text: str) -> None:
    outcome = parse(text)
    assert isinstance(outcome, UnrecognizedToolCallFormat)
    assert outcome.text == text
    assert outcome.ffi_error_message


@pytest.mark.parametrize("text", ["", "\n", "get_wea", "call"])
def test_a_call_that_was_cut_off_before_its_syntax_shows_failed(text: str) -> None:
    parser = ToolCallParser(BY_NAME["hermes"], TOOLS)
    parser.feed(text)
    outcome = parser.finish(is_cut=True)
    assert isinstance(outcome, ToolCallParseFailed)
    assert "cut off" in outcome.payload


def test_a_section_beyond_the_limit_is_refused_and_not_kept() -> None:
    parser = ToolCallParser(None, TOOLS)
    for _ in range(MAX_SECTION_CHARACTERS // 1024 + 1):
        parser.feed(" " * 1024)
    outcome = parser.finish()
    assert isinstance(outcome, ToolCallParseFailed)
    assert str(MAX_SECTION_CHARACTERS) in outcome.payload


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("5", 5),
        ("five", "five"),
        ("True", True),
        ("null", None),
        ('{"a": 1}', {"a": 1}),
        ('"5"', "5"),
        ("", ""),
    ],
)
def test_values_in_tags_that_no_schema_types_are_json_where_they_can_be(value: str, expected: object) -> None:
    text = f"<function=unknown><parameter=x>{value}</parameter></function>"
    assert parse(text) == ToolCallParsed((call("unknown", {"x": expected}),))


@pytest.mark.parametrize("value", ["5", "true", '{"a": 1}', '"quoted"', " padded ", "a < b", "<function=x>"])
def test_a_string_parameter_stays_text(value: str) -> None:
    text = f"<function=get_weather><parameter=city>{value}</parameter></function>"
    assert parse(text) == ToolCallParsed((call("get_weather", {"city": value}),))


@pytest.mark.parametrize(
    "text",
    [
        "<function=ping>" * 60_000,
        "<function=ping><parameter=a>" + "</parameter" * 80_000,
        "<arg_key>" * 100_000,
        "[TOOL_CALLS]" * 80_000,
        "[TOOL_CALLS]a" * 70_000,
        "<｜tool▁call▁begin｜>" * 50_000,
        "call:" * 200_000,
        "to=" * 300_000,
        '{"a":' * 150_000,
        '<|"|>' * 200_000,
        "get_weather(" * 80_000,
        "a" * 1_000_000,
        " " * 1_000_000,
        '"' * 1_000_000,
        "```json\n" * 120_000,
        '<invoke name="' * 70_000,
        "]<]minimax[>[" * 70_000,
        ']<]minimax[>[<invoke name="a">' * 30_000,
        "<|tool_call_begin|>" * 50_000,
        "<|tool_call_begin|>" + "a" * 1_000_000,
        "<｜tool▁call▁begin｜>" + "a" * 1_000_000,
        "get_weather" + " " * 1_000_000 + "x",
    ],
    ids=lambda text: text[:20],
)
def test_no_text_takes_long(text: str) -> None:
    """Quadratic readers take minutes for these."""
    begun = time.process_time()
    parse(text)
    assert time.process_time() - begun < 5


NESTED = ']<]minimax[>[<invoke name="ping">]<]minimax[>[<a>'


@pytest.mark.parametrize(
    ("inside", "value"),
    [
        ("<a></a>", {"a": ""}),
        ("<a>1</a>", {"a": 1}),
        ("<a><b>1</b><c>x</c></a>", {"a": {"b": 1, "c": "x"}}),
        ("<a><item>1</item><item><b>2</b></item></a>", {"a": [1, {"b": 2}]}),
    ],
)
def test_marked_tags_nest(inside: str, value: object) -> None:
    text = f'<invoke name="ping">{inside}</invoke>'.replace("<", "]<]minimax[>[<")
    assert parse(text) == ToolCallParsed((call("ping", value),))


@given(st.text(alphabet='{}[]":,<>/=|`ab1 \n\\()', max_size=60))
def test_any_text_has_an_outcome(text: str) -> None:
    parse(text)
    for marked in (
        "<function=",
        "call:a{",
        "[TOOL_CALLS]a[ARGS]",
        "get(",
        '<invoke name="a">',
        "a<arg_key>",
        NESTED,
    ):
        parse(marked + text)
