"""Calls written in JSON, and what all syntaxes share: what a call is, its arguments, its bounds."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import attrs

from paddler.messages.inference import Tool
from paddler.messages.tokens import InvalidJson, ToolCallArguments, ValidJson

MAX_CALLS = 128
"""Calls of one section."""

MAX_DEPTH = 100
"""Levels of objects and arrays in arguments."""


class BrokenCall(ValueError):
    """A section that is of a syntax but breaks its rules, and how."""


@attrs.frozen
class Call:
    """A call as it was read; the model may have given an id."""

    name: str
    arguments: ToolCallArguments
    id: str | None = None


Tools = Mapping[str, Tool]
"""By name: their schemas say of what type the values in tags are."""


def check_count(calls: list[Call]) -> None:
    if len(calls) > MAX_CALLS:
        raise BrokenCall(f"more than {MAX_CALLS} calls in one section")


_FENCE = re.compile(r"\s*```[a-z_]*\s*\n(.*?)(?:```\s*)?\Z", re.DOTALL)
_BETWEEN_OBJECTS = re.compile(r"[\s;,]*")


def read_json(text: str, tools: Tools) -> list[Call] | None:
    """Read one or several objects, or arrays of them; a fence around them is passed over."""
    del tools
    text = text.removeprefix("functools")
    fence = _FENCE.match(text)
    if fence is not None:
        text = fence[1]
    text = text.strip()
    if not text.startswith(("{", "[")):
        return None
    calls: list[Call] = []
    at = 0
    while at < len(text):
        value, at = _json_value(text, at)
        for entry in value if isinstance(value, list) else [value]:
            calls.append(_call_of(entry))
            check_count(calls)
        between = _BETWEEN_OBJECTS.match(text, at)
        assert between is not None
        at = between.end()
    return calls


def _json_value(text: str, at: int) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise BrokenCall("nested too deeply") from None
    except ValueError as error:
        raise BrokenCall(f"not valid JSON: {error}") from None
    _check_bounds(value)
    return value, end


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, strict=False)  # models write bare line breaks


def _check_bounds(value: Any) -> None:
    """Raise BrokenCall for what cannot be passed on: nesting, and numbers beyond a float."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise BrokenCall("nested too deeply")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, float) and not math.isfinite(item):
            raise BrokenCall("a number is too large")


def _call_of(entry: Any) -> Call:
    if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
        entry = entry | entry["function"]
    if not isinstance(entry, dict):
        raise BrokenCall("a call is no object")
    name = next((entry[key] for key in ("name", "tool_name", "function") if entry.get(key)), None)
    if not isinstance(name, str):
        raise BrokenCall("a call has no name")
    given = (entry[key] for key in ("arguments", "parameters") if entry.get(key) is not None)
    arguments: Any = next(given, {})
    given_id = next((entry[key] for key in ("id", "tool_call_id", "call_id") if entry.get(key)), None)
    return Call(
        name,
        arguments_of(arguments) if isinstance(arguments, str) else ValidJson(arguments),
        given_id if isinstance(given_id, str) else None,
    )


def arguments_of(text: str) -> ToolCallArguments:
    """Return arguments that are a text: as the value they hold, or unchanged if they hold none."""
    try:
        value, end = _json_value(text.strip(), 0)
    except BrokenCall:
        return InvalidJson(text)
    return ValidJson(value) if end == len(text.strip()) else InvalidJson(text)
