"""docs/conformance.md and the scenario marks of the tests say the same."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
LIST = TESTS.parent / "docs" / "conformance.md"

FAMILIES = {
    "BK": 12,
    "BU": 10,
    "ST": 5,
    "CA": 16,
    "GE": 15,
    "CB": 14,
    "GR": 6,
    "TH": 12,
    "TC": 7,
    "IM": 10,
    "EM": 21,
    "IS": 15,
    "DL": 17,
    "SD": 11,
    "SW": 8,
    "MA": 12,
    "OA": 15,
    "CL": 7,
    "SH": 13,
}
"""How many scenarios each family has; they are numbered from 1."""

ROW = re.compile(r"^\| ([A-Z]{2}-\d+) \| [^|]+ \| `([^`|]+)` \|$", re.MULTILINE)


def listed() -> list[tuple[str, str]]:
    """Return the rows of the list: id and word."""
    return [(found[1], found[2]) for found in ROW.finditer(LIST.read_text())]


def marks() -> Iterator[tuple[str, str]]:
    """Yield every id that a `scenario` mark names, with the file it stands in."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            match node:
                case ast.Call(func=ast.Attribute(attr="scenario"), args=arguments):
                    for argument in arguments:
                        yield ast.literal_eval(argument), str(path.relative_to(TESTS))


WORDS = dict(listed())
MARKS = list(marks())


def test_the_list_has_every_scenario_once() -> None:
    every = [f"{family}-{number}" for family, size in FAMILIES.items() for number in range(1, size + 1)]
    assert Counter(identifier for identifier, _ in listed()) == Counter(every)


def test_every_scenario_has_one_of_the_four_words() -> None:
    known = re.compile(r"test|planned|by construction|needs .+")
    assert [row for row in listed() if not known.fullmatch(row[1])] == []


def test_what_is_called_tested_has_a_test() -> None:
    shown = {identifier for identifier, _ in MARKS}
    claimed = {identifier for identifier, word in listed() if word in ("test", "by construction")}
    assert sorted(claimed - shown) == []


def test_no_mark_names_what_is_unknown_or_planned() -> None:
    assert [mark for mark in MARKS if WORDS.get(mark[0], "planned") == "planned"] == []
