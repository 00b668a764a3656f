"""JSON Schemas to grammars: what cannot be said is refused, and nothing takes long."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.engine.gbnf import read_gbnf
from paddler.engine.integer_grammar import gbnf_of_range
from paddler.engine.json_schema_grammar import SchemaNotConvertible, gbnf_of_schema
from paddler.engine.pattern_grammar import PatternNotConvertible, gbnf_of_pattern

INTEGERS = st.integers(-(10**6), 10**6)


def rules_of(schema: Any) -> dict[str, str]:
    lines = gbnf_of_schema(json.dumps(schema)).splitlines()
    return dict(line.split(" ::= ", 1) for line in lines)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"minimum": NaN}', "not JSON"),
        ("true", "not an object"),
        ("[]", "not an object"),
        ('{"items":' * 10_000 + "true" + "}" * 10_000, "nests too deeply"),
        ("[" * 10_000, "nests too deeply"),
        (" " * 300_000 + "{}", "more than 262144 characters"),
        (json.dumps(nested(101)), "deeper than 100"),
    ],
)
def test_no_schemas(text: str, reason: str) -> None:
    with pytest.raises(SchemaNotConvertible, match=reason):
        gbnf_of_schema(text)


CLOSED = {"properties": {"a": {}}, "additionalProperties": False}
TWICE = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(50)}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "https://example.org/schema"}, "a place in the schema itself"),
        ({"$ref": "other.json#/a"}, "a place in the schema itself"),
        ({"$ref": ["#"]}, "a place in the schema itself"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"$ref": "#"}, "needs itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no end"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no end"),
        ({"allOf": [{"$ref": "#"}]}, "leads to itself"),
        ({"$ref": "#/$defs/a0", "$defs": TWICE | {"a50": {"type": "string"}}}, "many parts|leads to itself"),
        ({"not": {"type": "string"}}, "`not`"),
        ({"if": {}, "then": {}}, "`if`"),
        ({"patternProperties": {"a": {}}}, "`patternProperties`"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "number", "multipleOf": 0.5}, "`multipleOf`"),
        ({"type": "integer", "multipleOf": 5}, "`multipleOf`"),
        ({"type": "number", "minimum": 1.5}, "`minimum`"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "`maximum`"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "empty"),
        ({"type": "integer", "minimum": True}, "no number"),
        ({"type": "integer", "maximum": "9"}, "no number"),
        ({"type": "string", "maxLength": 10**6}, "`maxLength` beyond 2000"),
        ({"type": "string", "minLength": -1}, "no count"),
        ({"type": "string", "minLength": 1.5}, "no count"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "less than"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "less than"),
        ({"type": "array", "items": False, "minItems": 1}, "not allowed"),
        ({"type": "string", "pattern": "^a$", "minLength": 1}, "together"),
        ({"type": "strin"}, "does not exist"),
        ({"type": []}, "no type"),
        ({"type": [7]}, "does not exist"),
        ({"enum": []}, "no value"),
        ({"enum": ["a"], "type": "integer"}, "no value"),
        ({"enum": ["a"], "const": "b"}, "no value"),
        ({"enum": ["a"], "minLength": 2}, "beside `minLength`"),
        ({"enum": ["x" * 70_000]}, "65536 bytes"),
        ({"properties": {"a": False}}, "no schema that a value can fulfil"),
        ({"properties": []}, "no object"),
        ({"required": "a"}, "no array"),
        ({"required": ["a"], "additionalProperties": False}, "required and not allowed"),
        ({"anyOf": []}, "no schemas"),
        ({"anyOf": {}}, "no array"),
        ({"anyOf": [{}], "oneOf": [{}]}, "beside"),
        ({"allOf": [{"maxLength": 2}, {"maxLength": 3}]}, "two different `maxLength`"),
        ({"allOf": [CLOSED, {"required": ["b"], "properties": {"b": {}}}]}, "forbids the other parts"),
        ({"properties": {"\ud800": {}}}, "no text"),
        ({"type": "integer", "minimum": 10**309}, "empty"),
        ({"type": "integer", "maximum": -(10**309)}, "empty"),
        ({"type": "string", "minLength": 10**309}, "`minLength` beyond 2000"),
        ({"type": "string", "format": ["date"]}, "`format` is no text"),
        ({"type": "string", "format": {}}, "`format` is no text"),
        ({"type": "string", "pattern": 5}, "`pattern` is no text"),
        ({"type": "string", "pattern": ["a"]}, "`pattern` is no text"),
        ({"type": "string", "pattern": None}, "`pattern` is no text"),
        ({"type": "string", "minLength": None}, "`minLength` is no count"),
        ({"type": "array", "maxItems": None}, "`maxItems` is no count"),
        ({"type": "array", "prefixItems": None}, "`prefixItems` is no array"),
        ({"type": "integer", "minimum": None}, "`minimum` is no number"),
        ({"type": "number", "minimum": None}, "`minimum` is no number"),
        ({"type": "number", "minimum": False}, "`minimum` is no number"),
        ({"type": "integer", "multipleOf": True}, "`multipleOf` is no number"),
        ({"type": "integer", "multipleOf": None}, "`multipleOf` is no number"),
        ({"type": None}, "does not exist"),
        ({"properties": 5, "additionalProperties": 0, "allOf": []}, "`properties` is no object"),
    ],
)  # fmt: skip
def test_schemas_that_no_grammar_says(schema: Any, reason: str) -> None:
    with pytest.raises(SchemaNotConvertible, match=reason):
        gbnf_of_schema(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"description": "anything", "examples": [1], "x-own": True, "minLength": 3, "uniqueItems": False},
        {"type": "object", "properties": {f"p{i}": {"type": "number"} for i in range(300)}},
        {"enum": list(range(3000))},
        {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "null"}}},
        {"properties": {"next": {"$ref": "#"}}},
        nested(99),
        {"type": "integer", "minimum": -(10**309), "maximum": 10**309},
        {"enum": [10**309], "type": "integer"},
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "one", "$defs": {"a": {"type": "string"}}},
    ],
)
def test_schemas_that_a_grammar_says(schema: Any) -> None:
    read_gbnf(gbnf_of_schema(json.dumps(schema)), "root")


KEYWORDS = ["type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "required",
            "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "pattern", "format",
            "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
            "multipleOf"]  # fmt: skip
ODD_VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, -1, 3, 1.5, 2.0, 1e300, 10**309, -(10**309), "", "a", "#", "#/properties/a", "(",
     "date", "string", "object", "integer", "number", "array", ["string", "null"], ["date"], {}, []]
)  # fmt: skip


@given(
    st.recursive(
        ODD_VALUES,
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)
            | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
        ),
        max_leaves=12,
    ),
    st.sampled_from(KEYWORDS),
    st.sampled_from([{}, *({"type": name} for name in ("object", "array", "string", "integer", "number"))]),
)
def test_whatever_stands_at_a_keyword_no_other_error_comes(
    value: Any, keyword: str, beside: dict[str, Any]
) -> None:
    try:
        gbnf_of_schema(json.dumps({**beside, keyword: value}))
    except SchemaNotConvertible as refusal:
        assert str(refusal)  # noqa: PT017 - most are refused, and some are sound


def test_a_required_property_that_is_not_declared_is_there_all_the_same() -> None:
    assert '"\\x22a\\x22" ":" ws value' in rules_of({"type": "object", "required": ["a"]}).values()


def test_a_keyword_of_another_type_says_nothing() -> None:
    assert rules_of({"type": "null", "minLength": 3}) == {"root": "null", "null": '"null"'}


@given(INTEGERS, INTEGERS, st.lists(INTEGERS, max_size=5))
def test_ranges_of_integers_are_exact(one: int, other: int, more: list[int]) -> None:
    least, most = sorted((one, other))
    pattern = re.compile(gbnf_of_range(least, most).replace('"', "").replace(" ", ""))
    for number in (least - 1, least, most, most + 1, 0, 9, 10, -1, *more):
        assert bool(pattern.fullmatch(str(number))) == (least <= number <= most)


@pytest.mark.parametrize(("least", "most"), [(None, -5), (None, 0), (7, None), (0, None), (None, None)])
def test_open_ranges_of_integers(least: int | None, most: int | None) -> None:
    pattern = re.compile(gbnf_of_range(least, most).replace('"', "").replace(" ", ""))
    for number in (-(10**15), -12, -5, -4, -1, 0, 1, 6, 7, 10, 99, 100, 10**15):
        inside = (least is None or number >= least) and (most is None or number <= most)
        assert bool(pattern.fullmatch(str(number))) == inside
    assert not pattern.fullmatch("07")
    assert not pattern.fullmatch("-0")


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "[", "[a", "a)", "(a", "*", "a**", "(?=a)b", "(?<n>a)", "\\1", "\\b", "\\", "[z-a]", "^a|b$",
     "a^b", "a{", "\\p{L}"],
)  # fmt: skip
def test_patterns_that_no_grammar_says(pattern: str) -> None:
    with pytest.raises(PatternNotConvertible):
        gbnf_of_pattern(pattern, any_character="char")


@pytest.mark.parametrize(
    ("pattern", "expression"),
    [
        ("^ab?$", "([a-a] [b-b]?)"),
        ("^(?:a|b){2,}$", "(([a-a] | [b-b]){2,})"),
        ("a", "char* ([a-a]) char*"),
        ("^\\d+?$", "([0-9]+)"),
        ('^"$', '("\\x5c\\x22")'),
        ("^\\$$", "([\\U00000024-\\U00000024])"),
        ("^[^\\x00-a]$", "([b-\\U0010FFFF])"),
        ("^.$", "([\\U00000020-\\U00000021\\U00000023-\\U0000005B\\U0000005D-\\U0010FFFF])"),
    ],
)
def test_patterns_as_grammars(pattern: str, expression: str) -> None:
    assert gbnf_of_pattern(pattern, any_character="char") == expression
