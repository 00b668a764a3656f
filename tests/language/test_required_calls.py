"""The grammar that forces a call is written as the model writes calls."""

import json
from typing import Any

import pytest

from paddler.engine.gbnf import read_gbnf
from paddler.engine.json_schema_grammar import SchemaNotConvertible, gbnf_of_schema
from paddler.language.required_calls import required_call_grammar, schemas_needed
from paddler.language.tag_values import CallNotForced
from paddler.language.tool_formats import FALLBACK, FORMATS, ToolFormat
from paddler.messages.inference import NamedTool, Tool, ToolFunction, ToolParameters
from tests.language.tools import PING, TOOLS, WEATHER

BY_NAME = {tool_format.name: tool_format for tool_format in FORMATS}


def lines(tool_format: ToolFormat | None, choice: Any = "required") -> list[str]:
    made = required_call_grammar(tool_format, TOOLS, choice, gbnf_of_schema)
    assert made is not None
    return made[0].splitlines()


def test_a_call_is_spelt_out_around_the_grammar_of_its_arguments() -> None:
    made = lines(BY_NAME["hermes"])
    assert (
        r'call-0 ::= "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": " call-0-root "}\n</tool_call>"'
        in made
    )
    assert made[-2:] == [
        "any-call ::= call-0 | call-1",
        r'tool-calls ::= any-call ("\n" any-call){0,15}',
    ]


def test_a_named_tool_is_the_only_one_and_called_once() -> None:
    made = lines(None, NamedTool("ping"))
    assert not any("get_weather" in line for line in made)
    assert made[-2:] == ["any-call ::= call-0", "tool-calls ::= any-call"]


def test_arguments_in_tags_are_typed() -> None:
    made = lines(BY_NAME["qwen3-coder"], NamedTool("get_weather"))
    assert "call-0-value-0 ::= [^<]*" in made
    assert "call-0-value-1 ::= call-0-value-1-root" in made
    (rule,) = [line for line in made if line.startswith("call-0 ::=")]
    assert rule.startswith(
        r'call-0 ::= "<tool_call>\n<function=get_weather>\n" "<parameter=city>\n" call-0-value-0'
    )
    assert r'("<parameter=days>\n" call-0-value-1 "\n</parameter>\n")?' in rule


@pytest.mark.parametrize("tool_format", [*FORMATS, FALLBACK, None], ids=str)
def test_every_format_gives_a_sound_grammar(tool_format: ToolFormat | None) -> None:
    made = required_call_grammar(tool_format, TOOLS, "required", gbnf_of_schema)
    assert made is not None
    read_gbnf(*made)


@pytest.mark.parametrize("choice", ["auto", "none", NamedTool("unknown")])
def test_what_forces_nothing_has_no_grammar(choice: Any) -> None:
    assert required_call_grammar(None, TOOLS, choice, gbnf_of_schema) is None
    assert required_call_grammar(None, (), "required", gbnf_of_schema) is None


def test_the_schemas_can_be_converted_beforehand() -> None:
    needed = schemas_needed(BY_NAME["hermes"], (WEATHER, PING, WEATHER), "required")
    assert [json.loads(schema).get("required") for schema in needed] == [["city"], None]
    converted = {schema: gbnf_of_schema(schema) for schema in needed}
    assert required_call_grammar(
        BY_NAME["hermes"], (WEATHER, PING, WEATHER), "required", converted.__getitem__
    ) == required_call_grammar(BY_NAME["hermes"], (WEATHER, PING, WEATHER), "required", gbnf_of_schema)


STRING = {"type": "string"}
ITEMS = {"type": "array", "items": {"type": "string"}}


def tool(properties: dict[str, Any], name: str = "f") -> Tool:
    return Tool(ToolFunction(name, "", ToolParameters(type="object", properties=properties)), type="function")


def value_rule(schema: Any, name: str = "qwen3-coder") -> str:
    made = required_call_grammar(BY_NAME[name], [tool({"a": schema})], "required", gbnf_of_schema)
    assert made is not None
    read_gbnf(*made)
    return dict(line.split(" ::= ", 1) for line in made[0].splitlines())["call-0-value-0"]


@pytest.mark.parametrize(
    ("schema", "expression"),
    [
        (STRING | {"description": "a", "title": "b", "default": 1, "x-own": 2, "format": "email"}, "[^<]*"),
        (STRING | {"const": "x"}, '"x"'),
        (STRING | {"enum": ["<", "a\nb", 5]}, r'"<" | "a\nb"'),
        ({"enum": ["celsius", None]}, '"celsius" | "null"'),
        (STRING | {"maxLength": 3}, "[^<]{0,3}"),
        (STRING | {"minLength": 2}, "[^<]{2,}"),
        (STRING | {"minLength": 2.0, "maxLength": 3}, "[^<]{2,3}"),
        ({"type": ["string"]}, "[^<]*"),
        ({"type": ["string", "null"]}, "[^<]* | call-0-value-0-0-root"),
        ({"anyOf": [STRING | {"maxLength": 3}, {"type": "null"}]}, "[^<]{0,3} | call-0-value-0-1-root"),
        ({"allOf": [STRING, {"maxLength": 3, "title": "x"}]}, "[^<]{0,3}"),
        ({"anyOf": [STRING, ITEMS]}, r"([^<\[{0-9 \t\r\n-] [^<]*)? | call-0-value-0-1-root"),
        (STRING | {"format": "date"}, "call-0-value-0-0-root"),
        ({"maxLength": 3}, "call-0-value-0-root"),
    ],
)
def test_strings_stand_bare_in_tags_and_keep_to_their_schema(schema: Any, expression: str) -> None:
    assert value_rule(schema) == expression


def test_line_breaks_that_would_be_lost_are_not_written() -> None:
    assert value_rule(STRING | {"minLength": 1}, "seed") == r"[^<\n]{1,}"
    assert value_rule(STRING, "seed") == "[^<]*"
    with pytest.raises(CallNotForced, match="cannot stand in a tag"):
        value_rule(STRING | {"const": "a\n"}, "seed")


@pytest.mark.parametrize("name", ["qwen3-coder", "seed", "minimax m2", "glm 4.5"])
@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (STRING | {"not": {}}, "^`not` is not supported in a grammar$"),
        (STRING | {"if": {}}, "^`if` is not supported in a grammar$"),
        (STRING | {"maxLength": 3, "pattern": "^z$"}, "`pattern`"),
        (STRING | {"pattern": "^z$"}, "`pattern` of a string in a tag"),
        (STRING | {"enum": ["a"], "minLength": 2}, "beside `minLength`"),
        (STRING | {"minLength": 3, "maxLength": 2}, "less than"),
        (STRING | {"maxLength": 10**6}, "`maxLength` beyond 2000"),
        (STRING | {"const": "a</parameter>"}, "cannot stand in a tag"),
        (STRING | {"const": "</tool_call>"}, "cannot stand in a tag"),
        ({"type": ["string", "null"], "enum": ["null"]}, "cannot stand in a tag"),
        ({"anyOf": [STRING, {"$ref": "#/properties/a"}]}, "`\\$ref` beside a string"),
        ({"anyOf": [STRING, {"maxLength": 3}]}, "without `type`"),
        ({"allOf": [STRING | {"maxLength": 3}, {"maxLength": 2}]}, "two different `maxLength`"),
        ({"anyOf": [STRING] * 300}, "more than 200"),
    ],
)
def test_what_a_bare_string_cannot_keep_to_is_refused(schema: Any, reason: str, name: str) -> None:
    with pytest.raises((CallNotForced, SchemaNotConvertible), match=reason):
        value_rule(schema, name)


def test_references_in_tags_lead_to_places_of_the_whole_schema() -> None:
    properties = {"a": {"$ref": "#/properties/b/items"}, "b": {"type": "array", "items": {"type": "null"}}}
    made = required_call_grammar(BY_NAME["glm 4.5"], [tool(properties)], "required", gbnf_of_schema)
    assert made is not None
    assert 'call-0-value-0-null ::= "null"' in made[0]


def test_a_name_between_the_quotes_of_json_is_escaped() -> None:
    made = required_call_grammar(BY_NAME["hermes"], [tool({}, 'a"b')], "required", gbnf_of_schema)
    assert made is not None
    assert r"{\"name\": \"a\\\"b\", " in made[0]


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda tool_format: tool_format.name)
def test_usual_names_can_be_called_in_every_format(tool_format: ToolFormat) -> None:
    for name in ("get_weather", "get-weather", "a.b", "f2"):
        assert required_call_grammar(tool_format, [tool({}, name)], "required", gbnf_of_schema)


@pytest.mark.parametrize(
    ("name", "tool_name"),
    [
        ("hermes", "</tool_call>"),
        ("hermes", "a<tool_call>"),
        ("mistral", "a b"),
        ("mistral", 'a"b'),
        ("mistral nemo", "[TOOL_CALLS]"),
        ("harmony", "a b"),
        ("kimi k2", "a<|tool_call_end|>"),
        ("qwen3-coder", "a>b"),
        ("qwen3-coder", "a\0"),
        ("minimax m2", 'a"b'),
        ("glm 4.5", "a b"),
        ("functionary v3.1", "a b"),
    ],
)
def test_a_name_that_would_be_read_otherwise_is_refused(name: str, tool_name: str) -> None:
    with pytest.raises(CallNotForced, match="its name"):
        required_call_grammar(BY_NAME[name], [tool({"a": STRING}, tool_name)], "required", gbnf_of_schema)


@pytest.mark.parametrize("key", ["a>b", " a", "</parameter>", "</tool_call>"])
def test_a_parameter_whose_name_no_tag_can_have_is_refused(key: str) -> None:
    with pytest.raises(CallNotForced, match="its parameter"):
        required_call_grammar(BY_NAME["qwen3-coder"], [tool({key: {}})], "required", gbnf_of_schema)
