"""Calls whose arguments stand in tags of their own; the tool's schema says of what type they are."""

import re
from collections.abc import Mapping
from typing import Any

import attrs

from paddler.language.json_calls import MAX_DEPTH, BrokenCall, Call, Tools, arguments_of, check_count
from paddler.language.tool_formats import TAG_MARK
from paddler.messages.inference import Tool
from paddler.messages.tokens import ToolCallArguments, ValidJson


@attrs.frozen
class _Tags:
    """Patterns of a syntax in which every argument stands in tags of its own."""

    begins: re.Pattern[str]
    """Is found anywhere in a text of this syntax."""
    call: re.Pattern[str]
    key: re.Pattern[str]
    """Group 1 is the key, group 2, if there is one, says whether the value is a string."""
    value_end: re.Pattern[str]
    call_end: re.Pattern[str]
    trims_line: bool = False
    """A line break at either end belongs to the tags."""


_FUNCTION_TAGS = _Tags(
    begins=re.compile(r"<function="),
    call=re.compile(r"<function=([^<>\s]+)\s*>"),
    key=re.compile(r"<parameter=([^<>]+)>"),
    value_end=re.compile(r"</parameter>"),
    call_end=re.compile(r"</function>"),
    trims_line=True,
)
_INVOKE_TAGS = _Tags(
    begins=re.compile(r"<(?:｜DSML｜)?invoke\s"),
    call=re.compile(r'<(?:｜DSML｜)?invoke name="([^"<>]+)">'),
    key=re.compile(r'<(?:｜DSML｜)?parameter name="([^"<>]+)"(?: string="(true|false)")?>'),
    value_end=re.compile(r"</(?:｜DSML｜)?parameter>"),
    call_end=re.compile(r"</(?:｜DSML｜)?invoke>"),
)
_ARGUMENT_TAGS = _Tags(
    begins=re.compile(r"<arg_key>"),
    call=re.compile(r"([\w.\-]+)(?=\s*(?:<arg_key>|\Z))"),
    key=re.compile(r"<arg_key>([^<>]+)</arg_key>\s*<arg_value>"),
    value_end=re.compile(r"</arg_value>"),
    call_end=re.compile(r"\Z"),
)
_NOT_SPACE = re.compile(r"\S|\Z")


def read_function_tags(text: str, tools: Tools) -> list[Call] | None:
    """Read `<function=name>` with parameters in tags, or with JSON."""
    return _read_tags(text, tools, _FUNCTION_TAGS)


def read_invoke_tags(text: str, tools: Tools) -> list[Call] | None:
    """Read `<invoke name="…">`, with DeepSeek's marks in the tags or without."""
    return _read_tags(text, tools, _INVOKE_TAGS)


def read_argument_tags(text: str, tools: Tools) -> list[Call] | None:
    """Read a name and `<arg_key>`, `<arg_value>` behind it; a name alone only if there is such a tool."""
    if text.strip() in tools:
        return [Call(text.strip(), ValidJson({}))]
    return _read_tags(text, tools, _ARGUMENT_TAGS)


_TAG = re.compile(r"<(/?)([^<>]+)>")
_INVOKE = re.compile(r'invoke name="([^"<>]+)"')


@attrs.define
class _Element:
    """A tag that is open, and what stood in it so far."""

    name: str
    schema: Any
    text: str = ""
    children: list[tuple[str, Any]] = attrs.Factory(list)

    def child_schema(self, name: str) -> Any:
        schema = self.schema if isinstance(self.schema, dict) else {}
        if name == "item" and "items" in schema:
            return schema["items"]
        properties = schema.get("properties")
        return properties.get(name) if isinstance(properties, dict) else None

    def value(self) -> Any:
        types = types_named(self.schema, 0)
        if not self.children:
            is_text = self.text.strip() or not types & {"array", "object"} or "string" in types
            return typed_value(self.text, self.schema) if is_text else [] if "array" in types else {}
        if "object" not in types and all(name == "item" for name, _ in self.children):
            return [value for _, value in self.children]
        return dict(self.children)


def read_nested_tags(text: str, tools: Tools) -> list[Call] | None:
    """Read `<invoke name="…">` whose arguments are tags of their own name, a mark before each tag."""
    head, *parts = text.split(TAG_MARK)
    if not parts or head.strip():
        return None
    calls: list[Call] = []
    opened: list[_Element] = []
    for part in parts:
        tag = _TAG.match(part)
        if tag is None:
            raise BrokenCall("a mark stands before no tag")
        rest = part[tag.end() :]
        if not tag[1]:
            opened.append(_opened(tag[2], rest, opened[-1] if opened else None, tools))
            if len(opened) > MAX_DEPTH:
                raise BrokenCall("nested too deeply")
            continue
        expected = "invoke" if len(opened) == 1 else opened[-1].name if opened else None
        if tag[2] != expected or rest.strip():
            raise BrokenCall(f"the tag {tag[2][:50]!r} closes nothing, or text follows it")
        element = opened.pop()
        if opened:
            opened[-1].children.append((element.name, element.value()))
        else:
            calls.append(Call(element.name, ValidJson(dict(element.children))))
            check_count(calls)
    if opened:
        raise BrokenCall(f"the call of {opened[0].name} has no end")
    return calls


def _opened(tag: str, text: str, parent: _Element | None, tools: Tools) -> _Element:
    if parent is not None:
        return _Element(tag, parent.child_schema(tag), text)
    invoke = _INVOKE.fullmatch(tag)
    if invoke is None:
        raise BrokenCall(f"the tag {tag[:50]!r} begins no call")
    return _Element(invoke[1], {"properties": _parameter_schemas(tools.get(invoke[1]))})


def _read_tags(text: str, tools: Tools, tags: _Tags) -> list[Call] | None:
    if tags.begins.search(text) is None:
        return None
    calls: list[Call] = []
    at = _behind_space(text, 0)
    while at < len(text):
        call = tags.call.match(text, at)
        if call is None:
            raise BrokenCall(f"no call begins at character {at}")
        arguments, at = _tagged_arguments(text, call.end(), tools.get(call[1]), tags)
        calls.append(Call(call[1], arguments))
        check_count(calls)
        at = _behind_space(text, at)
    return calls


def _tagged_arguments(text: str, at: int, tool: Tool | None, tags: _Tags) -> tuple[ToolCallArguments, int]:
    found: dict[str, Any] = {}
    schemas = _parameter_schemas(tool)
    at = _behind_space(text, at)
    if text.startswith("{", at):
        end = tags.call_end.search(text, at)
        if end is None:
            raise BrokenCall("a call has no end")
        return arguments_of(text[at : end.start()]), end.end()
    while (end := tags.call_end.match(text, at)) is None:
        key = tags.key.match(text, at)
        if key is None:
            raise BrokenCall(f"neither a parameter nor the end of the call at character {at}")
        value_end = tags.value_end.search(text, key.end())
        if value_end is None:
            raise BrokenCall(f"the parameter {key[1][:50]!r} has no end")
        value = text[key.end() : value_end.start()]
        if tags.trims_line:
            value = value.removeprefix("\n").removesuffix("\n")
        said = key[2] if tags.key.groups > 1 else None
        found[key[1].strip()] = value if said == "true" else typed_value(value, schemas.get(key[1].strip()))
        at = _behind_space(text, value_end.end())
    return ValidJson(found), end.end()


def _behind_space(text: str, at: int) -> int:
    match = _NOT_SPACE.search(text, at)
    assert match is not None
    return match.start()


def _parameter_schemas(tool: Tool | None) -> Mapping[str, Any]:
    parameters = tool.function.parameters if tool is not None else None
    return (parameters.properties if parameters is not None else None) or {}


_WORDS = {"True": True, "False": False, "None": None}


def typed_value(text: str, schema: Any) -> Any:
    """Return a value of a tag: text where the schema wants a string, else its JSON, else its text."""
    stripped = text.strip()
    value: Any = _WORDS.get(stripped)
    if stripped not in _WORDS:
        match arguments_of(stripped):
            case ValidJson(value):
                pass
            case _:
                return text
    types = types_named(schema)
    if "string" in types and (isinstance(value, str) or not types & types_of(value)):
        return text
    return value


def types_named(schema: Any, depth: int = 0) -> frozenset[str]:
    """Return the types that a schema names, itself or in its alternatives; none: any type."""
    if not isinstance(schema, dict) or depth > 5:
        return frozenset()
    named = schema.get("type", ())
    types = frozenset(
        name for name in ([named] if isinstance(named, str) else named) if isinstance(name, str)
    )
    if not types:
        examples = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
        types = types.union(*[types_of(example) for example in examples])
    for word in ("anyOf", "oneOf", "allOf"):
        types = types.union(*[types_named(part, depth + 1) for part in schema.get(word, ())])
    return types


def types_of(value: Any) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number", "integer"} if value.is_integer() else {"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
        case _:
            return frozenset({"object"})
