"""The grammar of a value that stands in a tag: strings bare, all else in JSON, as tagged_calls.py reads it.

A bare string is not JSON, so that the grammars of schemas do not fit it. What they refuse is refused here,
too, and so is what only JSON can carry.
"""

import json
from typing import Any

from paddler.language.gbnf_text import GbnfOfSchema, literal, prefixed
from paddler.language.tagged_calls import typed_value, types_named, types_of


class CallNotForced(ValueError):
    """No grammar forces calls of this tool; the text says why."""


MAX_ALTERNATIVES = 200
"""Of the schema of one value: they are taken apart where the agent serves others, too."""

_MAX_LENGTH = 2000
_MAX_LITERAL_CHARACTERS = 64 * 1024
"""Of all literals of a value; grammars have no more bytes."""

_MAX_DEPTH = 100
_QUOTED_FORMATS = frozenset({"date", "time", "date-time", "uuid"})
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
_DATA = frozenset({"const", "default", "enum", "examples"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_ALSO_READ_AS_JSON = frozenset({"integer", "number", "array", "object"})
_CHARACTER = "[^<]"
_NOT_BEFORE_JSON = r"[^<\[{0-9 \t\r\n-]"


def rules_of_value(
    rule: str,
    schema: Any,
    whole: dict[str, Any],
    gbnf_of_schema: GbnfOfSchema,
    *,
    marks: frozenset[str],
    trims_lines: bool,
) -> list[str]:
    """Return the rules of a value whose schema stands in another one, `whole`.

    `marks` would end the value or its section. With `trims_lines` a line break at either end is lost.
    Raises CallNotForced, and what `gbnf_of_schema` raises.
    """
    alone = _standing_alone(schema, whole)
    if "string" not in types_named(schema):
        return [
            *prefixed(gbnf_of_schema(json.dumps(alone, ensure_ascii=False)), f"{rule}-"),
            f"{rule} ::= {rule}-root",
        ]
    if schema.keys() - _ANNOTATIONS != {"type"}:
        gbnf_of_schema(json.dumps(alone, ensure_ascii=False))  # refuses by name what no grammar can say
    lines: list[str] = []
    bodies: list[str] = []
    for at, alternative in enumerate(_alternatives(schema)):
        if "enum" in alternative or "const" in alternative:
            bodies += _literals(alternative, schema, marks, trims_lines=trims_lines)
            continue
        named = alternative.get("type", [])
        types = [named] if isinstance(named, str) else list(named)
        if "string" in types:
            own, body = _bare_string(f"{rule}-{at}-", alternative, schema, gbnf_of_schema, trims_lines)
            lines += own
            bodies.append(body)
        if not types:
            raise CallNotForced("a schema without `type` beside one of strings is not supported in a grammar")
        others = [name for name in types if name != "string"]
        if others:
            other = alternative | {"type": others}
            json_rules = gbnf_of_schema(json.dumps(_standing_alone(other, whole), ensure_ascii=False))
            lines += prefixed(json_rules, f"{rule}-{at}-")
            bodies.append(f"{rule}-{at}-root")
    return [*lines, f"{rule} ::= {' | '.join(bodies)}"]


def _alternatives(schema: Any, depth: int = 0) -> list[dict[str, Any]]:
    """Return the schemas of which one must be fulfilled, none with alternatives of its own."""
    if not isinstance(schema, dict):
        if schema is True:
            return [{}]
        raise CallNotForced("false is no schema that a value can fulfil")
    if depth > _MAX_DEPTH:
        raise CallNotForced(f"the schema nests deeper than {_MAX_DEPTH}")
    said = {keyword: value for keyword, value in schema.items() if keyword not in _ANNOTATIONS}
    if "$ref" in said:
        raise CallNotForced("`$ref` beside a string is not supported in a grammar")
    if "anyOf" in said and "oneOf" in said:
        raise CallNotForced("`anyOf` beside `oneOf` is not supported in a grammar")
    if "allOf" in said:
        merged = said
        for part in said.pop("allOf"):
            merged = _merged(merged, part)
        return _alternatives(merged, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if keyword in said:
            parts = said.pop(keyword)
            if len(parts) > MAX_ALTERNATIVES:
                raise CallNotForced(f"`{keyword}` has more than {MAX_ALTERNATIVES} schemas")
            found = [found for part in parts for found in _alternatives(_merged(said, part), depth + 1)]
            if len(found) > MAX_ALTERNATIVES:
                raise CallNotForced(f"a value has more than {MAX_ALTERNATIVES} alternatives")
            return found
    return [said]


def _merged(one: dict[str, Any], other: Any) -> Any:
    if not isinstance(other, dict):
        return one if other is True else other
    other = {keyword: value for keyword, value in other.items() if keyword not in _ANNOTATIONS}
    for keyword in one.keys() & other.keys():
        if one[keyword] != other[keyword]:
            raise CallNotForced(
                f"two different `{keyword}` at one place are not supported in a grammar of tags"
            )
    return one | other


def _literals(
    alternative: dict[str, Any], schema: Any, marks: frozenset[str], *, trims_lines: bool
) -> list[str]:
    """Return those values of `enum` and `const` that the type allows, as they stand in the tag."""
    values = alternative.get("enum", [alternative.get("const")])
    if "const" in alternative:
        values = [value for value in values if _json(value) == _json(alternative["const"])]
    named = alternative.get("type")
    types = {named} if isinstance(named, str) else set(named or ())
    values = [value for value in values if not types or types & types_of(value)]
    by_text = {value if isinstance(value, str) else _json(value): value for value in values}
    if sum(map(len, by_text)) > _MAX_LITERAL_CHARACTERS:
        raise CallNotForced(f"`enum` has more than {_MAX_LITERAL_CHARACTERS} characters")
    for text, value in by_text.items():
        is_lost = "\0" in text or "</" in text or any(mark in text for mark in marks)
        is_trimmed = trims_lines and text != text.removeprefix("\n").removesuffix("\n")
        if is_lost or is_trimmed or _json(typed_value(text, schema)) != _json(value):
            raise CallNotForced(f"{text[:40]!r} of `enum` or `const` cannot stand in a tag")
    return [literal(text) for text in by_text]


def _bare_string(
    prefix: str, alternative: dict[str, Any], schema: Any, gbnf_of_schema: GbnfOfSchema, trims_lines: bool
) -> tuple[list[str], str]:
    """Return rules that a bare string needs, and its expression."""
    if "pattern" in alternative:
        raise CallNotForced("`pattern` of a string in a tag is not supported in a grammar")
    form = alternative.get("format")
    if isinstance(form, str) and form in _QUOTED_FORMATS:
        quoted = gbnf_of_schema(json.dumps({"type": "string", "format": form}))
        return prefixed(quoted.replace(r'"\""', '""'), prefix), f"{prefix}root"
    least = _length(alternative, "minLength") or 0
    most = _length(alternative, "maxLength")
    character = _CHARACTER if not (trims_lines and least) else r"[^<\n]"
    if not types_named(schema) & _ALSO_READ_AS_JSON:
        return [], character + _repeated(least, most)
    # What looks like the JSON of another type would be read as that, whatever its own alternative asks for.
    if most == 0:
        return [], '""'
    rest = f"{character}{_repeated(max(least - 1, 0), None if most is None else most - 1)}"
    some = f"{_NOT_BEFORE_JSON} {rest}"
    return [], some if least else f"({some})?"


def _repeated(least: int, most: int | None) -> str:
    if most is None:
        return "*" if not least else f"{{{least},}}"
    return f"{{{least},{most}}}"


def _length(schema: dict[str, Any], keyword: str) -> int | None:
    value = schema.get(keyword)
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value <= _MAX_LENGTH:
        raise CallNotForced(f"`{keyword}` beyond {_MAX_LENGTH} is not supported in a grammar")
    return int(value)


def _standing_alone(schema: Any, whole: dict[str, Any]) -> Any:
    """Return the schema of a value so that its references, which are to `whole`, lead there still."""
    moved = _moved(schema)
    return schema if moved == schema else {**moved, "$defs": {"tool": _moved(whole)}}


def _moved(schema: Any, *, are_names: bool = False) -> Any:
    if isinstance(schema, list):
        return [_moved(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for keyword, value in schema.items():
        if not are_names and keyword in _DATA:
            moved[keyword] = value
        elif not are_names and keyword == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[keyword] = f"#/$defs/tool{value[1:]}"
        else:
            moved[keyword] = _moved(value, are_names=not are_names and keyword in _NAMED)
    return moved


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
