"""The grammar that forces a call is written as the model writes calls."""

import json
from typing import Any

import pytest

from paddler.engine.gbnf import read_gbnf
from paddler.engine.json_schema_grammar import gbnf_of_schema
from paddler.language.required_calls import required_call_grammar, schemas_needed
from paddler.language.tool_formats import FALLBACK, FORMATS, ToolFormat
from paddler.messages.inference import NamedTool
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
