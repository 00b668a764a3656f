"""Regular expressions to GBNF, for the `pattern` of strings in JSON Schemas. Pure.

The grammar is one of JSON text: characters that JSON escapes are written escaped, and what stands for
"any character" leaves them out. Where both would do, less is allowed: what comes out always matches.
"""

import json
import re

_SPECIALS = (*range(0x20), 0x22, 0x5C)
_ESCAPED = {character: json.dumps(chr(character))[1:-1] for character in (0x22, 0x5C, 0x09, 0x0A, 0x0D)}
_LAST = 0x10FFFF

_DIGITS = [(0x30, 0x39)]
_WORD = [*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACES = [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0)]
_SETS = {"d": _DIGITS, "w": _WORD, "s": _SPACES}
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
_QUANTIFIER = re.compile(r"[*+?]|\{[0-9]{1,4}(?:,[0-9]{0,4})?\}")

Ranges = list[tuple[int, int]]


class PatternNotConvertible(Exception):
    """A regular expression that a grammar cannot say; the text says what of it."""


def gbnf_of_pattern(pattern: str, *, any_character: str) -> str:
    """Return an expression for the inside of a JSON string; `any_character` is the rule of one character.

    Raises PatternNotConvertible.
    """
    return _Translation(pattern).whole(any_character)


def literal(text: str) -> str:
    """Return a GBNF string."""
    escaped = (f"\\x{ord(letter):02x}" if letter < " " or letter in '"\\' else letter for letter in text)
    return f'"{"".join(escaped)}"'


class _Translation:
    """A descent through the pattern; groups nest as deep as gbnf.py lets them."""

    def __init__(self, pattern: str) -> None:
        self._starts = pattern.startswith("^")
        self._ends = pattern.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$$", pattern)
        self._text = pattern[self._starts : len(pattern) - self._ends]
        self._at = 0
        self._depth = 0

    def whole(self, any_character: str) -> str:
        alternatives = self._alternatives()
        if self._at < len(self._text):
            raise PatternNotConvertible('a ")" too many')
        if len(alternatives) > 1 and (self._starts or self._ends):
            raise PatternNotConvertible("alternatives beside an anchor need parentheses")
        before = "" if self._starts else f"{any_character}* "
        after = "" if self._ends else f" {any_character}*"
        return f"{before}({' | '.join(alternatives)}){after}"

    def _alternatives(self) -> list[str]:
        alternatives = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            alternatives.append(self._sequence())
        return alternatives

    def _sequence(self) -> str:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._part() + self._quantifier())
        return " ".join(parts)

    def _part(self) -> str:
        letter = self._text[self._at]
        if letter == "(":
            return self._group()
        if letter == "[":
            return self._class()
        if _QUANTIFIER.match(self._text, self._at) or letter in "{^$":
            raise PatternNotConvertible(f"{letter!r} in its place {self._at}")
        self._at += 1
        if letter == ".":
            return _class_of([], negated=True)
        if letter != "\\":
            return _class_of([(ord(letter), ord(letter))])
        ranges, negated = self._escape()
        return _class_of(ranges, negated=negated)

    def _quantifier(self) -> str:
        quantifier = _QUANTIFIER.match(self._text, self._at)
        if quantifier is None:
            return ""
        self._at = quantifier.end()
        if self._text.startswith("?", self._at):  # lazy: the same texts match
            self._at += 1
        return quantifier[0]

    def _group(self) -> str:
        self._at += 1
        self._depth += 1
        if self._depth > 50:
            raise PatternNotConvertible("groups nested deeper than 50")
        if self._text.startswith("?:", self._at):
            self._at += 2
        elif self._text.startswith("?", self._at):
            raise PatternNotConvertible("a group that looks around or has a name")
        alternatives = self._alternatives()
        if not self._text.startswith(")", self._at):
            raise PatternNotConvertible('a "(" without its ")"')
        self._at += 1
        self._depth -= 1
        return f"({' | '.join(alternatives)})"

    def _class(self) -> str:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        ranges: Ranges = []
        while not self._text.startswith("]", self._at):
            first = self._member()
            is_range = self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at)
            if is_range and len(first) == 1 and first[0][0] == first[0][1]:
                self._at += 1
                last = self._member()
                if len(last) != 1 or last[0][0] != last[0][1] or last[0][0] < first[0][0]:
                    raise PatternNotConvertible("a range of a character class")
                first = [(first[0][0], last[0][0])]
            ranges += first
        self._at += 1
        return _class_of(ranges, negated=negated)

    def _member(self) -> Ranges:
        if self._at >= len(self._text):
            raise PatternNotConvertible('a "[" without its "]"')
        letter = self._text[self._at]
        self._at += 1
        if letter != "\\":
            return [(ord(letter), ord(letter))]
        ranges, negated = self._escape()
        return _without(ranges) if negated else ranges

    def _escape(self) -> tuple[Ranges, bool]:
        """Read what follows a backslash: a set of characters, and whether it is its opposite."""
        letter = self._text[self._at : self._at + 1]
        if letter.lower() in _SETS and letter:
            self._at += 1
            return _SETS[letter.lower()], letter.isupper()
        if code := _HEX.match(self._text, self._at):
            self._at = code.end()
            value = int(code[1] or code[2], 16)
        elif letter in _CONTROLS and letter:
            self._at += 1
            value = _CONTROLS[letter]
        elif letter and not letter.isalnum():
            self._at += 1
            value = ord(letter)
        else:
            raise PatternNotConvertible(f'"\\{letter}"')
        return [(value, value)], False


def _class_of(ranges: Ranges, *, negated: bool = False) -> str:
    """Return an expression for one of the characters, as JSON writes them."""
    chosen = _without(ranges) if negated else ranges
    plain = chosen
    for special in _SPECIALS:
        plain = _cut(plain, special)
    alternatives = []
    if plain:
        alternatives.append("[" + "".join(f"{_code(low)}-{_code(high)}" for low, high in plain) + "]")
    if not negated:
        alternatives += [
            literal(written)
            for character, written in _ESCAPED.items()
            if any(low <= character <= high for low, high in chosen)
        ]
    if not alternatives:
        raise PatternNotConvertible("a character that JSON does not have")
    return alternatives[0] if len(alternatives) == 1 else f"({' | '.join(alternatives)})"


def _code(character: int) -> str:
    letter = chr(character)
    return letter if letter.isascii() and letter.isalnum() else f"\\U{character:08X}"


def _cut(ranges: Ranges, character: int) -> Ranges:
    parts: Ranges = []
    for low, high in ranges:
        if low <= character <= high:
            parts += [(low, character - 1), (character + 1, high)]
        else:
            parts.append((low, high))
    return [(low, high) for low, high in parts if low <= high]


def _without(ranges: Ranges) -> Ranges:
    """Return all characters but these."""
    rest: Ranges = []
    begin = 0
    for low, high in sorted(ranges):
        if low > begin:
            rest.append((begin, low - 1))
        begin = max(begin, high + 1)
    return [*rest, (begin, _LAST)] if begin <= _LAST else rest
