"""Are tools' parameters JSON Schemas, and do the arguments of calls keep to them? The door to jsonschema.

Runs in a preparation process: takes and returns JSON values only, fetches nothing, and leaves it to the
process's deadline to end a regular expression that never stops.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

MAX_SCHEMA_DEPTH = 100
MAX_QUOTE = 400
"""Characters of a library's message that are passed on: it may quote whole arguments."""

_DATA_KEYWORDS = frozenset({"const", "default", "enum", "examples"})
"""What stands below these is data, however much it looks like a schema."""


class _Unusable(ValueError):
    """A schema that cannot be used, and why."""


def check_schemas(tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why the parameters of one of the tools are no usable schema, naming the tool, or None.

    `tools` are in the shape of OpenAI: `{"type": "function", "function": {"name", "parameters"?, …}}`.
    """
    for tool in tools:
        function = tool["function"]
        try:
            _check_schema(function.get("parameters"))
        except _Unusable as refusal:
            return f'The parameters of tool "{function["name"]}" are not a valid JSON Schema: {refusal}'
    return None


def violations(calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one entry for each call to an unknown tool or with arguments that break its schema.

    `calls` are those of `ToolCallParsed` as JSON: each has a `name` and `arguments`, which is
    `{"ValidJson": …}` or `{"InvalidJson": …}`. Arguments that are no JSON pass, and so does everything
    for a tool without parameters.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    found: list[str] = []
    for call in calls:
        name = call["name"]
        if name not in schemas:
            found.append(f'unknown tool name "{name}"')
        elif schemas[name] is not None and "ValidJson" in call["arguments"]:
            violation = _first_violation(call["arguments"]["ValidJson"], schemas[name])
            if violation is not None:
                found.append(f"{name}: {violation}")
    return found


def _check_schema(schema: Any) -> None:
    if schema is None:
        return
    for part in _subschemas(schema):
        reference = part.get("$ref", part.get("$dynamicRef"))
        if isinstance(reference, str) and not reference.startswith("#"):
            raise _Unusable(f"it refers to {reference[:MAX_QUOTE]!r}, and nothing is fetched")
        patterns = [part.get("pattern"), *_keys(part.get("patternProperties"))]
        for pattern in patterns:
            _check_pattern(pattern)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise _Unusable(f"{error.message[:MAX_QUOTE]} (at {_place(error)})") from None
    except RecursionError:
        raise _Unusable("it is nested too deeply") from None


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Walk all objects of a schema, data left out. Raises _Unusable where they are nested too deeply."""
    waiting = [(schema, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise _Unusable(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        if isinstance(value, Mapping):
            yield value
            waiting += [(value[key], depth + 1) for key in value if key not in _DATA_KEYWORDS]
        elif isinstance(value, list | tuple):
            waiting += [(item, depth + 1) for item in value]


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Mapping) else []


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str):
        return  # absent, or a property of that name
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _Unusable(f"the pattern {pattern[:MAX_QUOTE]!r} is not valid: {error}") from None


def _first_violation(arguments: Any, schema: Any) -> str | None:
    validator = Draft202012Validator(schema, registry=Registry())
    try:
        error = next(validator.iter_errors(arguments), None)
    except RecursionError:
        return "the schema refers to itself without end"
    except Unresolvable as failure:
        return f"the schema refers to {str(failure.ref)[:MAX_QUOTE]!r}, which is nowhere"
    if error is None:
        return None
    return f"{error.message[:MAX_QUOTE]} (at {_place(error)})"


def _place(error: SchemaError | ValidationError) -> str:
    return "/".join(str(step) for step in error.absolute_path)[:MAX_QUOTE] or "the top"
