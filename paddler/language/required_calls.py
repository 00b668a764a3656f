"""A grammar that forces a tool call, as the model writes them: for `tool_choice` "required" or a name.

Control tokens are spelt out: the engine's grammars match tokens by their text, special ones included.
"""

import json
from collections.abc import Sequence
from typing import Any

from paddler.language.gbnf_text import GbnfOfSchema, literal, prefixed
from paddler.language.tag_values import CallNotForced, rules_of_value
from paddler.language.tool_calls import ToolCallParser
from paddler.language.tool_formats import FALLBACK, Syntax, ToolFormat, WrittenJson, WrittenTags
from paddler.messages.inference import NamedTool, Tool, ToolChoice
from paddler.messages.tokens import ToolCallParsed, ValidJson

ROOT = "tool-calls"
MAX_CALLS = 16
"""Calls that one answer may have where it must have one."""

_ANY_OBJECT = {"type": "object"}


def required_call_grammar(
    tool_format: ToolFormat | None,
    tools: Sequence[Tool],
    choice: ToolChoice,
    gbnf_of_schema: GbnfOfSchema,
) -> tuple[str, str] | None:
    """Return a grammar and its start rule, or None where the choice forces nothing or there is no such tool.

    A named tool is called exactly once; "required" allows up to MAX_CALLS calls. Formats whose syntax has
    no grammar here are forced into the one that every parser tries first. Raises CallNotForced for what the
    model's form of calls cannot carry, and what `gbnf_of_schema` raises.
    """
    if choice in ("auto", "none"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.name][:1]
    if not tools:
        return None
    tool_format = tool_format or FALLBACK
    lines: list[str] = []
    for at, tool in enumerate(tools):
        lines += _rules_of_tool(f"call-{at}", tool, tool_format, gbnf_of_schema)
    lines.append("any-call ::= " + " | ".join(f"call-{at}" for at in range(len(tools))))
    more = (
        ""
        if isinstance(choice, NamedTool)
        else f" ({literal(tool_format.separator)} any-call){{0,{MAX_CALLS - 1}}}"
    )
    lines.append(f"{ROOT} ::= any-call{more}")
    return "\n".join(lines) + "\n", ROOT


def schemas_needed(tool_format: ToolFormat | None, tools: Sequence[Tool], choice: ToolChoice) -> list[str]:
    """Return the schemas that `required_call_grammar` asks for, if they are converted elsewhere.

    Raises CallNotForced.
    """
    needed: dict[str, None] = {}

    def note(schema: str) -> str:
        needed[schema] = None
        return ""

    required_call_grammar(tool_format, tools, choice, note)
    return [*needed]


def _rules_of_tool(rule: str, tool: Tool, tool_format: ToolFormat, gbnf_of_schema: GbnfOfSchema) -> list[str]:
    written = _written(tool_format)
    marks = _marks_of(tool_format)
    _check_names(tool, tool_format, marks)
    head = literal(_head(tool, written))
    schema = schema_of(tool)
    if isinstance(written, WrittenJson):
        arguments = prefixed(gbnf_of_schema(json.dumps(schema, ensure_ascii=False)), f"{rule}-")
        return [*arguments, f"{rule} ::= {head} {rule}-root {literal(written.after)}"]
    lines: list[str] = []
    parts: list[str] = []
    required = schema.get("required") or ()
    trims_lines = tool_format.syntax is Syntax.FUNCTION_TAGS and not written.after_key.endswith("\n")
    for at, (key, value_schema) in enumerate((schema.get("properties") or {}).items()):
        value = f"{rule}-value-{at}"
        lines += rules_of_value(
            value, value_schema, schema, gbnf_of_schema, marks=marks, trims_lines=trims_lines
        )
        before, behind = literal(written.before_key + key + written.after_key), literal(written.after_value)
        part = f"{before} {value} {behind}"
        parts.append(part if key in required else f"({part})?")
    return [*lines, " ".join([f"{rule} ::=", head, *parts, literal(written.after)])]


def _written(tool_format: ToolFormat) -> WrittenJson | WrittenTags:
    written = tool_format.written or FALLBACK.written
    assert written is not None
    return written


def _head(tool: Tool, written: WrittenJson | WrittenTags) -> str:
    """Return what stands before the arguments; a name between the quotes of JSON is escaped."""
    name = tool.function.name
    if isinstance(written, WrittenJson) and written.between.startswith('"'):
        name = json.dumps(name, ensure_ascii=False)[1:-1]
    return written.before + name + written.between


def _marks_of(tool_format: ToolFormat) -> frozenset[str]:
    """Return the texts that mean something of their own wherever they stand in a section."""
    brackets = (*tool_format.brackets, *(FALLBACK.brackets if tool_format.written is None else ()))
    marks = [mark for bracket in brackets for mark in (bracket.opening, bracket.closing) if mark]
    return frozenset({*marks, *tool_format.inner})


def _check_names(tool: Tool, tool_format: ToolFormat, marks: frozenset[str]) -> None:
    """Raise CallNotForced for a tool whose calls, written by the grammar, would be read otherwise."""
    name = tool.function.name
    keys = [*(schema_of(tool).get("properties") or {})]
    if (
        "\0" in name
        or any(mark in name for mark in marks)
        or not _is_read_back(tool, ("a",) if keys else (), tool_format)
    ):
        raise CallNotForced("its name cannot stand in a call as this model writes them")
    if isinstance(_written(tool_format), WrittenJson):
        return
    has_mark = any(mark in key for mark in (*marks, "\0") for key in keys)
    if not has_mark and _is_read_back(tool, keys, tool_format):
        return
    for key in keys:  # which one is it?
        if "\0" in key or any(mark in key for mark in marks) or not _is_read_back(tool, (key,), tool_format):
            raise CallNotForced(f"the name of its parameter {key[:100]!r} cannot stand in a tag")


def _is_read_back(tool: Tool, keys: Sequence[str], tool_format: ToolFormat) -> bool:
    """Say whether a call with these parameters, all empty, is read as what it is."""
    written = _written(tool_format)
    arguments = "{}"
    if isinstance(written, WrittenTags):
        arguments = "".join(
            written.before_key + key + written.after_key + written.after_value for key in keys
        )
    text = _head(tool, written) + arguments + written.after
    for bracket in (*tool_format.brackets, *FALLBACK.brackets):
        if not bracket.shown:
            text = text.removeprefix(bracket.opening).removesuffix(bracket.closing or "")
    parser = ToolCallParser(tool_format, (tool,))
    parser.feed(text)
    outcome = parser.finish()
    if not isinstance(outcome, ToolCallParsed) or len(outcome.payload) != 1:
        return False
    [call] = outcome.payload
    expected = dict.fromkeys(keys, "") if isinstance(written, WrittenTags) else {}
    return call.name == tool.function.name and call.arguments == ValidJson(expected)


def schema_of(tool: Tool) -> dict[str, Any]:
    """Return the JSON Schema of a tool's arguments; any object where it declares none."""
    parameters = tool.function.parameters
    if parameters is None:
        return dict(_ANY_OBJECT)
    schema = {
        "type": parameters.type,
        "properties": parameters.properties,
        "required": list(parameters.required) if parameters.required is not None else None,
        "additionalProperties": parameters.additionalProperties,
    }
    return {key: value for key, value in schema.items() if value is not None}
