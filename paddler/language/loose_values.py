"""Values as models write them outside JSON: Python's literals, bare keys, quotes of their own.

A reader over one text, bounded in depth and in number of values; it evaluates nothing.
"""

import json
import re
from typing import Any

MAX_DEPTH = 100
MAX_VALUES = 20_000
"""Values of one text; reading them takes some 20 ms."""

_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]{1,300})?(?:[eE][+-]?[0-9]{1,3})?(?![\w.])")
_WORD = re.compile(r"[\w$.\-]+")
_NAME = re.compile(r"[\w.\-]+")
_QUOTED = {
    '"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL),
    "'": re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL),
    "<": re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL),  # Gemma 4's; nothing is escaped
}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


class NotReadable(ValueError):
    """A text that is not of the form, and why."""


class LooseReader:
    """Read a text from left to right; every method raises NotReadable."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text = text
        self.at = at
        self._values = 0

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def take(self, literal: str) -> bool:
        """Go behind a literal, if it is what follows."""
        self.skip_space()
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def expect(self, literal: str) -> None:
        if not self.take(literal):
            raise NotReadable(f"{literal!r} is missing at character {self.at}")

    def name(self) -> str:
        return self._match(_NAME, "a name")

    def pairs(self, assign: str, end: str, depth: int = 0) -> dict[str, Any]:
        """Read `key assign value, …` up to and with `end`; what opens it was taken."""
        found: dict[str, Any] = {}
        while not self.take(end):
            key = self._key()
            self.expect(assign)
            found[key] = self.value(depth + 1)
            if not self.take(","):
                self.expect(end)
                break
        return found

    def value(self, depth: int = 0) -> Any:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise NotReadable("too many values, or nested too deeply")
        if self.take("{"):
            return self.pairs(":", "}", depth)
        if self.take("["):
            return self._items(depth)
        quote = self.text[self.at : self.at + 1]
        if quote in _QUOTED:
            return self._quoted(quote)
        number = _NUMBER.match(self.text, self.at)
        if number is not None:
            self.at = number.end()
            return _number(number[0])
        word = self._match(_WORD, "a value")
        if word not in _CONSTANTS:
            raise NotReadable(f"{word[:50]!r} is no value")
        return _CONSTANTS[word]

    def _items(self, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self.take("]"):
            items.append(self.value(depth + 1))
            if not self.take(","):
                self.expect("]")
                break
        return items

    def _key(self) -> str:
        self.skip_space()
        quote = self.text[self.at : self.at + 1]
        return self._quoted(quote) if quote in _QUOTED else self._match(_WORD, "a key")

    def _quoted(self, quote: str) -> str:
        inside = self._match(_QUOTED[quote], "the end of a string")
        content = inside[len('<|"|>') : -len('<|"|>')] if quote == "<" else inside[1:-1]
        return content if quote == "<" or "\\" not in content else _ESCAPE.sub(_unescaped, content)

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip_space()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise NotReadable(f"{what} is missing at character {self.at}")
        self.at = match.end()
        return match[0]


def _number(text: str) -> int | float:
    number: int | float = json.loads(text)
    if number in (float("inf"), float("-inf")):
        raise NotReadable("a number is too large")
    return number


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    if code is not None:
        return chr(int(code, 16))
    return _ESCAPED.get(match[3], match[3])
