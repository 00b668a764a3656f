"""A grammar that forces a tool call, as the model writes them: for `tool_choice` "required" or a name.

Control tokens are spelt out: the engine's grammars match tokens by their text, special ones included.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from paddler.language.tool_formats import FALLBACK, ToolFormat, WrittenJson, WrittenTags
from paddler.messages.inference import NamedTool, Tool, ToolChoice

ROOT = "tool-calls"
MAX_CALLS = 16
"""Calls that one answer may have where it must have one."""

GbnfOfSchema = Callable[[str], str]
"""JSON Schema text to GBNF whose start rule is `root`; what it raises is passed through."""

_ANY_OBJECT = {"type": "object"}


def required_call_grammar(
    tool_format: ToolFormat | None,
    tools: Sequence[Tool],
    choice: ToolChoice,
    gbnf_of_schema: GbnfOfSchema,
) -> tuple[str, str] | None:
    """Return a grammar and its start rule, or None where the choice forces nothing or there is no such tool.

    A named tool is called exactly once; "required" allows up to MAX_CALLS calls. Formats whose syntax has
    no grammar here are forced into the one that every parser tries first.
    """
    if choice in ("auto", "none"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.name][:1]
    if not tools:
        return None
    written = (tool_format.written if tool_format is not None else None) or FALLBACK.written
    separator = tool_format.separator if tool_format is not None else FALLBACK.separator
    assert written is not None
    lines: list[str] = []
    for at, tool in enumerate(tools):
        lines += _rules_of_tool(f"call-{at}", tool, written, gbnf_of_schema)
    lines.append("any-call ::= " + " | ".join(f"call-{at}" for at in range(len(tools))))
    more = "" if isinstance(choice, NamedTool) else f" ({_literal(separator)} any-call){{0,{MAX_CALLS - 1}}}"
    lines.append(f"{ROOT} ::= any-call{more}")
    return "\n".join(lines) + "\n", ROOT


def schemas_needed(tool_format: ToolFormat | None, tools: Sequence[Tool], choice: ToolChoice) -> list[str]:
    """Return the schemas that `required_call_grammar` asks for, if they are converted elsewhere."""
    needed: dict[str, None] = {}

    def note(schema: str) -> str:
        needed[schema] = None
        return ""

    required_call_grammar(tool_format, tools, choice, note)
    return [*needed]


def _rules_of_tool(
    rule: str, tool: Tool, written: WrittenJson | WrittenTags, gbnf_of_schema: GbnfOfSchema
) -> list[str]:
    head = _literal(written.before + tool.function.name + written.between)
    schema = schema_of(tool)
    if isinstance(written, WrittenJson):
        arguments = _prefixed(gbnf_of_schema(json.dumps(schema, ensure_ascii=False)), f"{rule}-")
        return [*arguments, f"{rule} ::= {head} {rule}-root {_literal(written.after)}"]
    lines: list[str] = []
    parts: list[str] = []
    required = schema.get("required") or ()
    for at, (key, value_schema) in enumerate((schema.get("properties") or {}).items()):
        value = f"{rule}-value-{at}"
        lines += _rules_of_value(value, value_schema, gbnf_of_schema)
        before, behind = _literal(written.before_key + key + written.after_key), _literal(written.after_value)
        part = f"{before} {value} {behind}"
        parts.append(part if key in required else f"({part})?")
    return [*lines, " ".join([f"{rule} ::=", head, *parts, _literal(written.after)])]


def _rules_of_value(rule: str, schema: Any, gbnf_of_schema: GbnfOfSchema) -> list[str]:
    """Write the value of a tag: strings stand bare in it, and cannot have a `<`."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        choices = [choice for choice in schema.get("enum", ()) if isinstance(choice, str)]
        bare = " | ".join(_literal(choice) for choice in choices) or "[^<]*"
        return [f"{rule} ::= {bare}"]
    return [
        *_prefixed(gbnf_of_schema(json.dumps(schema, ensure_ascii=False)), f"{rule}-"),
        f"{rule} ::= {rule}-root",
    ]


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


# Strings, character classes, comments and repetitions hold no rule names.
_GBNF = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\{[^}]*\}|(?P<rule>[A-Za-z][A-Za-z0-9-]*)', re.DOTALL
)


def _prefixed(gbnf: str, prefix: str) -> list[str]:
    """Return the rules of a grammar under other names, so that several fit into one."""
    renamed = _GBNF.sub(lambda match: prefix + match[0] if match["rule"] else match[0], gbnf)
    return [line for line in renamed.splitlines() if line.strip()]


def _literal(text: str) -> str:
    escaped = "".join(_ESCAPES.get(character, character) for character in text)
    return f'"{escaped}"'


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
