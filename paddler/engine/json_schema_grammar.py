"""JSON Schemas to GBNF. Pure.

Whatever such a grammar lets through fulfils the schema, but that `oneOf` is taken as `anyOf`. It may let
through less: properties come in the order of the schema and no others with them, and numbers have at most
sixteen digits. What a grammar cannot say is refused by name, never left out in silence.
"""

import json
import math
import re
from typing import Any
from urllib.parse import unquote

from paddler.engine.gbnf import MAX_GBNF_BYTES, GrammarUnfit, read_gbnf
from paddler.engine.integer_grammar import gbnf_of_range
from paddler.engine.pattern_grammar import PatternNotConvertible, gbnf_of_pattern, literal

MAX_SCHEMA_CHARACTERS = 256 * 1024
_MAX_DEPTH = 100
_MAX_VISITS = 5000
"""Of schemas within the schema: references may lead to one place in any number of ways."""
_MAX_REPETITIONS = 2000

_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "propertyNames",
               "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies",
               "unevaluatedProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains",
              "maxContains", "additionalItems", "unevaluatedItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}  # fmt: skip
_OF_TYPE["integer"] = _OF_TYPE["number"]
_ANY_TYPE = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "not", "if", "then", "else",
             "$dynamicRef", "$recursiveRef"}  # fmt: skip
_CONSTRAINTS = _ANY_TYPE.union(*_OF_TYPE.values())
"""Every other keyword says nothing about which values are right."""
_UNSUPPORTED = {"not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "patternProperties",
                "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas",
                "dependencies", "unevaluatedProperties", "uniqueItems", "contains", "minContains",
                "maxContains", "additionalItems", "unevaluatedItems"}  # fmt: skip

_PRIMITIVES = {
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "string": r'"\"" char* "\""',
    "number": '"-"? natural ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
    "not-negative": 'natural ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
    "natural": '"0" | [1-9] [0-9]{0,15}',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "char": r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CeEfF] hex hex hex | [dD] [0-7] hex hex))',
    "hex": "[0-9a-fA-F]",
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "date": r'"\"" ymd "\""',
    "time": r'"\"" hms "\""',
    "date-time": r'"\"" ymd "T" hms "\""',
    "ymd": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [1] [0-9] | "2" [0-8])',
    "hms": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{3})? (zone | "Z")',
    "zone": '[-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "uuid": r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""',
}
_FORMATS = {"date", "time", "date-time", "uuid"}
_LITERAL_OR_CLASS = re.compile(r'"(?:\\.|[^"\\])*"|\[[^\]]*\]')
_RULE_NAME = re.compile(r"[a-z]+(?:-[a-z]+)?")


class SchemaNotConvertible(Exception):
    """No grammar can be made of this schema; the text says why."""


def gbnf_of_schema(text: str) -> str:
    """Return a grammar whose rule `root` is what a JSON Schema describes. Raises SchemaNotConvertible."""
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise SchemaNotConvertible(f"the schema has more than {MAX_SCHEMA_CHARACTERS} characters")
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise SchemaNotConvertible("the schema nests too deeply") from None
    except ValueError as error:
        reason = str(error).partition(";")[0]  # of a number too long Python goes on with its own settings
        raise SchemaNotConvertible(f"the schema is not JSON: {reason}") from None
    if not isinstance(schema, dict):
        raise SchemaNotConvertible("the schema is not an object")
    grammar = _Conversion(schema).grammar()
    try:
        read_gbnf(grammar, "root")
    except GrammarUnfit as unfit:
        raise SchemaNotConvertible(f"no grammar can be made of the schema: {unfit}") from None
    return grammar


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class _Conversion:
    """The rules made so far; visiting a schema returns the name of the rule of its values."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._size = 0
        self._depth = 0
        self._visits = 0

    def grammar(self) -> str:
        root = self._visit(self._schema)
        rules = {"root": root, **self._rules}
        return "\n".join(f"{name} ::= {text}" for name, text in rules.items())

    def _visit(self, schema: Any) -> str:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise SchemaNotConvertible(f"the schema nests deeper than {_MAX_DEPTH}")
        self._count_visit()
        name = self._rule_of(schema)
        self._depth -= 1
        return name

    def _rule_of(self, schema: Any) -> str:
        if schema is True:
            return self._primitive("value")
        if not isinstance(schema, dict):
            raise SchemaNotConvertible(f"{json.dumps(schema)[:40]} is no schema that a value can fulfil")
        schema = _constraints(schema)
        if unsupported := _UNSUPPORTED & schema.keys():
            raise SchemaNotConvertible(f"`{min(unsupported)}` is not supported in a grammar")
        if "$ref" in schema and len(schema) == 1:
            return self._reference(schema["$ref"])
        if "$ref" in schema or "allOf" in schema:
            return self._visit(self._merged([schema]))
        if "anyOf" in schema or "oneOf" in schema:
            return self._any_of(schema)
        if "enum" in schema or "const" in schema:
            return self._enumeration(schema)
        return self._by_type(schema)

    def _reference(self, reference: Any) -> str:
        """Return the rule of a reference, named before it is made: schemas may contain themselves."""
        name = self._references.get(reference) if isinstance(reference, str) else None
        if name is None:
            target = self._target(reference)
            name = self._references[reference] = f"ref-{len(self._references)}"
            self._add(name, self._visit(target))
        return name

    def _count_visit(self) -> None:
        self._visits += 1
        if self._visits > _MAX_VISITS:
            raise SchemaNotConvertible("the schema has too many parts, references followed")

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise SchemaNotConvertible("`$ref` must lead to a place in the schema itself, as #/$defs/name")
        target: Any = self._schema
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                raise SchemaNotConvertible(f"`$ref` {reference[:100]!r} leads nowhere")
        return target

    def _merged(self, parts: list[Any], depth: int = 0) -> dict[str, Any]:
        """Return one schema that asks for what all parts ask for, with their `allOf` and `$ref` taken in."""
        if depth > _MAX_DEPTH:
            raise SchemaNotConvertible("a `$ref` or `allOf` leads to itself")
        merged: dict[str, Any] = {}
        closed: list[set[str]] = []
        for part in parts:
            self._count_visit()
            if part is True:
                continue
            if not isinstance(part, dict):
                raise SchemaNotConvertible("a part of `allOf` is no schema that a value can fulfil")
            part = _constraints(part)
            if not isinstance(part.get("properties", {}), dict):
                raise SchemaNotConvertible("`properties` is no object")
            inner = list(_list_of(part.pop("allOf", []), "allOf"))
            if "$ref" in part:
                inner.append(self._target(part.pop("$ref")))
            if inner:
                part = self._merged([part, *inner], depth + 1)
            for keyword, value in part.items():
                merged[keyword] = _both(keyword, merged[keyword], value) if keyword in merged else value
            if part.get("additionalProperties", True) not in (True, {}):
                closed.append(set(part.get("properties", {})))
        if any(merged.get("properties", {}).keys() - names for names in closed):
            raise SchemaNotConvertible("`additionalProperties` in a part of `allOf` forbids the other parts")
        return merged

    def _any_of(self, schema: dict[str, Any]) -> str:
        if "anyOf" in schema and "oneOf" in schema:
            raise SchemaNotConvertible("`anyOf` beside `oneOf` is not supported in a grammar")
        keyword = "anyOf" if "anyOf" in schema else "oneOf"
        alternatives = _list_of(schema.pop(keyword), keyword)
        if not alternatives:
            raise SchemaNotConvertible(f"`{keyword}` has no schemas")
        if schema:
            alternatives = [self._merged([schema, alternative]) for alternative in alternatives]
        return self._rule(" | ".join(self._visit(alternative) for alternative in alternatives))

    def _enumeration(self, schema: dict[str, Any]) -> str:
        values = _list_of(schema.pop("enum"), "enum") if "enum" in schema else [schema["const"]]
        only = _json_of(schema.pop("const")) if "const" in schema else None
        types = schema.pop("type", list(_OF_TYPE))
        types = types if isinstance(types, list) else [types]
        if schema:
            raise SchemaNotConvertible(f"`enum` beside `{min(schema)}` is not supported in a grammar")
        texts = dict.fromkeys(
            _json_of(value) for value in values if any(_is_a(value, name) for name in types)
        )
        texts = dict.fromkeys(text for text in texts if only in (None, text))
        if not texts:
            raise SchemaNotConvertible("`enum` or `const` leaves no value")
        return self._rule(" | ".join(map(literal, texts)))

    def _by_type(self, schema: dict[str, Any]) -> str:
        """Take the keywords of each type; those of other types say nothing about its values."""
        types = schema.get("type")
        if "type" not in schema:
            types = [name for name, keywords in _OF_TYPE.items() if keywords & schema.keys()]
            types = [name for name in types if name != "integer"]
            if not types:
                return self._primitive("value")
        names = []
        for name in types if isinstance(types, list) else [types]:
            if not isinstance(name, str) or name not in _OF_TYPE:
                raise SchemaNotConvertible(f"`type` {json.dumps(name)[:40]} does not exist")
            own = {keyword: schema[keyword] for keyword in _OF_TYPE[name] if keyword in schema}
            names.append(self._of_type(name, own))
        if not names:
            raise SchemaNotConvertible("`type` names no type")
        return names[0] if len(names) == 1 else self._rule(" | ".join(names))

    def _of_type(self, name: str, schema: dict[str, Any]) -> str:
        match name:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._string(schema)
            case "integer":
                return self._integer(schema)
            case "number":
                return self._number(schema)
        return self._primitive(name)

    def _object(self, schema: dict[str, Any]) -> str:
        self._primitive("ws")
        properties = schema.get("properties", {})
        required = _list_of(schema.get("required", []), "required")
        if not isinstance(properties, dict) or not all(isinstance(name, str) for name in required):
            raise SchemaNotConvertible("`properties` is no object, or `required` no array of names")
        others = schema.get("additionalProperties", True)
        missing = [name for name in required if name not in properties]
        if missing and others is False:
            raise SchemaNotConvertible(f"{missing[0]!r} is required and not allowed")
        properties = properties | dict.fromkeys(missing, others)
        if properties:
            return self._properties(properties, frozenset(required))
        if others is False:
            return self._rule('"{" ws "}"')
        if others is True or others == {}:
            return self._primitive("object")
        pair = f'{self._primitive("string")} ":" ws {self._visit(others)}'
        return self._rule(f'"{{" ws ({pair} ("," ws {pair})*)? ws "}}"')

    def _properties(self, properties: dict[str, Any], required: frozenset[str]) -> str:
        """Return the rule of an object with some of these properties in this order, and all required ones.

        From the last to the first two things are known: what may follow behind a property (with a comma
        before it), and what may come if there was none yet.
        """
        behind = first = '""'  # not just nothing: behind a last "|" the next line would go on
        for name, schema in reversed(properties.items()):
            key = literal(_json_of(name))
            pair = self._rule(f'{key} ":" ws {self._visit(schema)}')
            first_here, behind_here = f"{pair} {behind}", f'"," ws {pair} {behind}'
            if name not in required:
                first_here, behind_here = f"{first_here} | {first}", f"{behind_here} | {behind}"
            first, behind = self._rule(first_here), self._rule(behind_here)
        return self._rule(f'"{{" ws {first} ws "}}"')

    def _array(self, schema: dict[str, Any]) -> str:
        least = _count(schema, "minItems") or 0
        most = _count(schema, "maxItems")
        items = schema.get("items", True)
        prefix = schema.get("prefixItems", items if isinstance(items, list) else None)
        self._primitive("ws")
        if prefix is not None or "prefixItems" in schema:
            return self._tuple(_list_of(prefix, "prefixItems"), least, most)
        if most is not None and most < least:
            raise SchemaNotConvertible("`maxItems` is less than `minItems`")
        if most == 0 or items is False:
            if least:
                raise SchemaNotConvertible("`minItems` asks for items that are not allowed")
            return self._rule('"[" ws "]"')
        item = self._visit(items)
        bounds = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        some = f'{item} ("," ws {item}){bounds}'
        return self._rule(f'"[" ws {some} ws "]"' if least else f'"[" ws ({some})? ws "]"')

    def _tuple(self, items: list[Any], least: int, most: int | None) -> str:
        """Return the rule of an array with exactly these items."""
        items = items[:most]
        if len(items) < least:
            raise SchemaNotConvertible("`minItems` beyond `prefixItems` is not supported in a grammar")
        body = ' "," ws '.join(self._visit(item) for item in items)
        return self._rule(f'"[" ws {body} ws "]"')

    def _string(self, schema: dict[str, Any]) -> str:
        pattern, form = _text(schema, "pattern"), _text(schema, "format")
        lengths = "minLength" in schema or "maxLength" in schema
        known_format = form if form in _FORMATS else None
        if (pattern is not None) + lengths + (known_format is not None) > 1:
            raise SchemaNotConvertible(
                "two of `pattern`, `format` and a length are not supported together in a grammar"
            )
        if known_format is not None:
            return self._primitive(known_format)
        if not lengths and pattern is None:
            return self._primitive("string")
        character = self._primitive("char")
        if pattern is not None:
            return self._rule(rf'"\"" {self._pattern(pattern, character)} "\""')
        least, most = _count(schema, "minLength") or 0, _count(schema, "maxLength")
        if most is not None and most < least:
            raise SchemaNotConvertible("`maxLength` is less than `minLength`")
        return self._rule(rf'"\"" {character}{{{least},{"" if most is None else most}}} "\""')

    def _pattern(self, pattern: str, character: str) -> str:
        try:
            return gbnf_of_pattern(pattern, any_character=character)
        except PatternNotConvertible as reason:
            raise SchemaNotConvertible(f"`pattern` is not supported in a grammar: {reason}") from None

    def _integer(self, schema: dict[str, Any]) -> str:
        if _number_of(schema, "multipleOf") not in (None, 1):
            raise SchemaNotConvertible("`multipleOf` is not supported in a grammar")
        lows = [_bound(schema, "minimum", math.ceil), _bound(schema, "exclusiveMinimum", math.floor, 1)]
        highs = [_bound(schema, "maximum", math.floor), _bound(schema, "exclusiveMaximum", math.ceil, -1)]
        least = max((low for low in lows if low is not None), default=None)
        most = min((high for high in highs if high is not None), default=None)
        try:
            return self._rule(gbnf_of_range(least, most))
        except ValueError as error:
            raise SchemaNotConvertible(f"a range of numbers is empty: {error}") from None

    def _number(self, schema: dict[str, Any]) -> str:
        for keyword in schema:
            _number_of(schema, keyword)
        if schema.get("minimum") == 0 and len(schema) == 1:
            return self._primitive("not-negative")
        if schema:
            raise SchemaNotConvertible(f"`{min(schema)}` of fractions is not supported in a grammar")
        return self._primitive("number")

    def _rule(self, text: str) -> str:
        """Return the name of a rule with this text."""
        if text not in self._names:
            name = self._names[text] = f"r{len(self._names)}"
            self._add(name, text)
        return self._names[text]

    def _primitive(self, name: str) -> str:
        if name not in self._rules:
            self._add(name, _PRIMITIVES[name])
            for used in _RULE_NAME.findall(_LITERAL_OR_CLASS.sub("", _PRIMITIVES[name])):
                self._primitive(used)
        return name

    def _add(self, name: str, text: str) -> None:
        self._rules[name] = text
        self._size += len(name) + len(text)
        if self._size > MAX_GBNF_BYTES:
            raise SchemaNotConvertible(f"the schema makes a grammar of more than {MAX_GBNF_BYTES} bytes")


def _constraints(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that say something."""
    said = {keyword: value for keyword, value in schema.items() if keyword in _CONSTRAINTS}
    if said.get("uniqueItems") is False:
        del said["uniqueItems"]
    return said


def _both(keyword: str, one: Any, other: Any) -> Any:
    """Return what a keyword asks for when two parts have it."""
    if one == other:
        return one
    if keyword == "required":
        return [*_list_of(one, keyword), *_list_of(other, keyword)]
    if keyword == "properties" and isinstance(one, dict) and isinstance(other, dict):
        twice = [name for name in one if name in other and one[name] != other[name]]
        return one | other | {name: {"allOf": [one[name], other[name]]} for name in twice}
    raise SchemaNotConvertible(f"two different `{keyword}` at one place are not supported in a grammar")


def _list_of(value: Any, keyword: str) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaNotConvertible(f"`{keyword}` is no array")
    return value


def _count(schema: dict[str, Any], keyword: str) -> int | None:
    if keyword not in schema:
        return None
    value = schema[keyword]
    if not _is_a(value, "integer") or value < 0:
        raise SchemaNotConvertible(f"`{keyword}` is no count")
    if value > _MAX_REPETITIONS:
        raise SchemaNotConvertible(f"`{keyword}` beyond {_MAX_REPETITIONS} is not supported in a grammar")
    return int(value)


def _json_of(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise SchemaNotConvertible("`enum` or `const` has a number beyond all limits") from None


def _bound(schema: dict[str, Any], keyword: str, to_integer: Any, step: int = 0) -> int | None:
    value = _number_of(schema, keyword)
    return None if value is None else int(to_integer(value)) + step


def _number_of(schema: dict[str, Any], keyword: str) -> int | float | None:
    value = schema.get(keyword, 0)
    # An integer beyond all floats is finite, but math.isfinite cannot say so.
    if not _is_a(value, "number") or (isinstance(value, float) and not math.isfinite(value)):
        raise SchemaNotConvertible(f"`{keyword}` is no number")
    return value if keyword in schema else None


def _text(schema: dict[str, Any], keyword: str) -> str | None:
    value = schema.get(keyword, "")
    if not isinstance(value, str):
        raise SchemaNotConvertible(f"`{keyword}` is no text")
    return value if keyword in schema else None


def _is_a(value: Any, name: Any) -> bool:
    """Say whether a JSON value is of a type of JSON Schema."""
    match name:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer" | "number" if isinstance(value, int | float) and not isinstance(value, bool):
            return name == "number" or isinstance(value, int) or value.is_integer()
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return False
