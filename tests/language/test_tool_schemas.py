"""Tools' schemas are checked before generating, and the arguments of calls against them."""

from typing import Any

import pytest

from paddler.language.tool_schemas import check_schemas, violations


def tool(parameters: Any = None, name: str = "get_weather") -> dict[str, Any]:
    function = {"name": name, "description": ""}
    return {
        "type": "function",
        "function": function | ({} if parameters is None else {"parameters": parameters}),
    }


def call(arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"id": "call_0", "name": name, "arguments": {"ValidJson": arguments}}


def of(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"location": schema}, "required": ["location"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a+$"},
        {"$ref": "#/properties/location/$defs/x", "$defs": {"x": {"type": "string"}}},
        {"type": "object", "properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}}},
        {"enum": [{"$ref": "http://example.org/never-fetched"}]},
        True,
    ],
)
def test_usable_schemas_pass(schema: Any) -> None:
    assert check_schemas([tool(), tool(of(schema))]) is None


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": 123}, "123"),
        ({"type": "text"}, "text"),
        ({"$ref": "https://example.org/schema.json"}, "fetched"),
        ({"$ref": "other.json#/x"}, "fetched"),
        ({"pattern": "("}, "pattern"),
        ({"patternProperties": {"[": {}}}, "pattern"),
        (deep(10_000), "nested"),
        (5, "5"),
    ],
)
def test_a_schema_that_is_none_is_refused_with_the_tools_name(schema: Any, reason: str) -> None:
    error = check_schemas([tool(name="fine"), tool(of(schema))])
    assert error is not None
    assert '"get_weather"' in error
    assert reason in error
    assert len(error) < 1000


def test_arguments_that_keep_to_the_schema_pass() -> None:
    assert violations([call({"location": 5})], [tool(of({"type": "integer"}))]) == []


def test_a_violation_names_the_tool_and_the_place() -> None:
    (entry,) = violations([call({"location": "Oslo"})], [tool(of({"type": "integer"}))])
    assert entry.startswith("get_weather: ")
    assert "'Oslo' is not of type 'integer'" in entry
    assert "location" in entry


def test_each_call_has_its_entry() -> None:
    tools = [tool(of({"type": "integer"})), tool(name="ping")]
    calls = [call({}), call({"anything": 1}, "ping"), call({}, "pong"), call({"location": 1}), call([])]
    missing, unknown, no_object = violations(calls, tools)
    assert "'location' is a required property" in missing
    assert unknown == 'unknown tool name "pong"'
    assert "is not of type 'object'" in no_object


def test_arguments_that_are_no_json_pass() -> None:
    broken = {"id": "call_0", "name": "get_weather", "arguments": {"InvalidJson": "{location: Oslo"}}
    assert violations([broken], [tool(of({"type": "integer"}))]) == []


def test_a_long_argument_is_not_repeated_whole() -> None:
    (entry,) = violations([call({"location": "x" * 100_000})], [tool(of({"type": "integer"}))])
    assert len(entry) < 1000


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#/properties/location"}, "itself"),
        ({"$ref": "#/$defs/missing"}, "nowhere"),
        ({"$ref": "#missing"}, "nowhere"),
        ({"allOf": [{"$ref": "#/properties/location"}]}, "itself"),
    ],
)
def test_references_that_lead_nowhere_are_a_violation(schema: Any, reason: str) -> None:
    (entry,) = violations([call({"location": "Oslo"})], [tool(of(schema))])
    assert entry.startswith("get_weather: ")
    assert reason in entry


def test_a_schema_may_contain_itself_where_the_arguments_end() -> None:
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}
    assert check_schemas([tool(tree)]) is None
    assert violations([call({"child": {"child": {}}})], [tool(tree)]) == []
    assert len(violations([call({"child": {"other": {}}})], [tool(tree)])) == 1
