"""A model's format is found by its template, and what the table says fits together."""

import itertools

import pytest

from paddler.language.reasoning_formats import FAMILIES
from paddler.language.section_marks import Place, places_of
from paddler.language.tool_formats import FALLBACK, FORMATS, ToolFormat, find_format
from tests.language.tools import ANSWERS


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tools>{{ tools }}</tools> <tool_call>\n{{ call | tojson }}\n</tool_call>", "hermes"),
        ("<tool_call>\n<function={{ n }}>\n<parameter={{ k }}>", "qwen3-coder"),
        ("<tool_call>{{ n }}<arg_key>{{ k }}</arg_key><arg_value>", "glm 4.5"),
        ('<|start_header_id|>{{ role }}<|end_header_id|>{"name": 1, "parameters": 2}', "llama 3"),
        ("[TOOL_CALLS]{{ n }}[ARGS]{{ a }}", "mistral"),
        ("[TOOL_CALLS][{{ calls }}]", "mistral nemo"),
        ("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] }}", "deepseek r1"),
        ("{{ '<' + '｜DSML｜' + 'invoke' }}", "deepseek v3.2"),
        ("<|tool_call>call:{{ n }}<tool_call|>", "gemma 4"),
        ("<start_of_turn>model", "gemma 3"),
        ("<|channel|>commentary<|message|>{{ a }}<|call|>", "harmony"),
        ("{% set ns = ']<]minimax[>[' %}{{ ns ~ '<tool_call>' }}", "minimax m3"),
        ("<|tool|>{{ tools }}<|/tool|>", "phi 4"),
        ("respond with <|tool_call|> and a list", "granite 3"),
    ],
)
def test_a_template_tells_the_format(template: str, name: str) -> None:
    found = find_format(template, [])
    assert found is not None
    assert found.name == name


def test_control_tokens_tell_it_where_the_template_does_not() -> None:
    found = find_format("{{ messages }}", ["<s>", "[TOOL_CALLS]", "[ARGS]"])
    assert found is not None
    assert found.name == "mistral"
    assert find_format(None, ["<s>"]) is None


def test_names_are_unique_and_every_format_has_an_answer_in_the_tests() -> None:
    names = [tool_format.name for tool_format in FORMATS]
    assert len(set(names)) == len(names)
    assert {answer.tool_format for answer in ANSWERS} == set(names)


@pytest.mark.parametrize("tool_format", [*FORMATS, FALLBACK], ids=lambda tool_format: tool_format.name)
def test_no_mark_begins_with_another_wherever_both_hold(tool_format: ToolFormat) -> None:
    for family in [None, *FAMILIES]:
        places = places_of(family, tool_format)
        for place in reachable([places.beginning, places.reasoning, places.header, places.header_call]):
            for one, other in itertools.permutations(place.moves, 2):
                assert not one.startswith(other), (family, one, other)


def reachable(places: list[Place | None]) -> list[Place]:
    found: list[Place] = []
    waiting = [place for place in places if place is not None]
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.append(place)
            waiting += [move.to for move in place.moves.values() if move.to is not None]
    return found
