"""GBNF, llama.cpp's language of grammars, to machines that take a text character by character. Pure.

Every rule becomes a machine: states with steps for characters, for whole tokens, for nothing, and calls of
other rules. Repetitions are written out, up to a limit; the rest of the limits keep the reading cheap.
The text is read as llama.cpp reads it, so that what it takes is taken here; left recursion is, too.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable

import attrs

MAX_GBNF_BYTES = 64 * 1024
MAX_DEPTH = 64
_MAX_STATES = 50_000
_MAX_STEPS = 200_000
_MAX_REPETITIONS = 2000
_MOST_REPETITIONS_OF_ONE = 8
"""As in `a?*+`."""
_LAST_CHARACTER = 0x10FFFF

_QUOTE_CHARACTERS = 24

_ESCAPE = r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])'
_LITERAL = re.compile(rf'"((?:[^"\\]|{_ESCAPE})*)"')
_CLASS = re.compile(rf"\[(\^?)((?:[^\]\\]|{_ESCAPE})*)\]")
_RANGE = re.compile(rf"({_ESCAPE}|.)(?:-({_ESCAPE}|.))?", re.DOTALL)
_CHARACTER = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
_TOKEN = re.compile(r"(!?)<(?:\[([0-9]{1,9})\]|([^>\[][^>]*))>")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_BRACES = re.compile(r"\{[ \t]*([0-9]{1,9})[ \t]*(,?)[ \t]*([0-9]{0,9})[ \t]*\}")
_DEFINITION = re.compile(r"::=")
_CONTROLS = {"t": "\t", "r": "\r", "n": "\n"}

Ranges = tuple[tuple[int, int], ...]
"""Code points, from and to; in order, and apart from each other."""


class GrammarUnfit(Exception):
    """A grammar that cannot be used; the text says why and begins with "grammar"."""


@attrs.frozen
class TokenTest:
    """A certain token or, negated, any other; by its id or by its text, control tokens spelt out."""

    token: int | None
    text: bytes
    negated: bool

    def matches(self, token: int, text: bytes) -> bool:
        same = text == self.text if self.token is None else token == self.token
        return same is not self.negated


@attrs.define
class State:
    """A place in a rule and where it goes on from there."""

    characters: list[tuple[Ranges, "State"]] = attrs.Factory(list)
    tokens: list[tuple[TokenTest, "State"]] = attrs.Factory(list)
    calls: list[tuple["Rule", "State"]] = attrs.Factory(list)
    empties: list["State"] = attrs.Factory(list)
    is_end: bool = False
    """The rule is fulfilled."""
    _only_ends: bool | None = None

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @property
    def steps(self) -> int:
        return len(self.characters) + len(self.tokens) + len(self.calls) + len(self.empties)

    @property
    def only_ends(self) -> bool:
        """Say whether nothing but the end of the rule can follow. To be asked when the machine is whole."""
        if self._only_ends is None:
            way = [self]
            while (last := way[-1])._only_ends is None and last.steps == len(last.empties) == 1:
                way.append(last.empties[0])
            answer = last._only_ends if last._only_ends is not None else last.is_end and not last.steps
            for state in way:
                state._only_ends = answer
        return bool(self._only_ends)


@attrs.define(eq=False)
class Rule:
    name: str
    start: State | None = None
    """None until it is defined."""


def read_gbnf(text: str, root: str) -> State:
    """Return where the rule `root` begins. Raises GrammarUnfit; time is bounded by MAX_GBNF_BYTES."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarUnfit("grammar is no text: it has half of a surrogate pair") from None
    if not text.strip():
        raise GrammarUnfit("grammar is empty")
    if "\0" in text:
        raise GrammarUnfit("grammar has a NUL character")
    if size > MAX_GBNF_BYTES:
        raise GrammarUnfit(f"grammar has {size} bytes, more than {MAX_GBNF_BYTES}")
    return _Reader(text).read(root)


Build = Callable[[State, State], None]
"""Adds the states of an expression between two."""


def holds_any(ranges: Ranges, low: int, high: int) -> bool:
    """Say whether any code point between two is in the ranges."""
    behind = bisect_right(ranges, (high, _LAST_CHARACTER))
    return behind > 0 and ranges[behind - 1][1] >= low


class _Reader:
    """A descent through the text, at most MAX_DEPTH deep, that makes the machines."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._states = 0
        self._steps = 0
        self._rules: dict[str, Rule] = {}

    def read(self, root: str) -> State:
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            self._rule()
        if root not in self._rules:
            raise GrammarUnfit(f"grammar has no rule {_quoted(root)}")
        for rule in self._rules.values():
            if rule.start is None:
                raise GrammarUnfit(f"grammar does not define rule {_quoted(rule.name)}")
        start = self._rules[root].start
        assert start is not None
        if self._rules[root] not in _endable(list(self._rules.values())):
            raise GrammarUnfit("grammar has no end: a rule needs itself")
        return start

    def _rule(self) -> None:
        rule = self._named(self._take(_NAME, "the name of a rule")[0])
        self._skip(_SPACE)
        self._take(_DEFINITION, '"::="')
        self._skip(_SPACE_AND_LINES)
        build = self._alternatives(nested=False)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._error("a new line or the end")
        rule.start = self._state()
        end = self._state()
        end.is_end = True
        build(rule.start, end)
        self._skip(_SPACE_AND_LINES)

    def _alternatives(self, *, nested: bool) -> Build:
        builds = [self._sequence(nested=nested)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            builds.append(self._sequence(nested=nested))

        def build(begin: State, end: State) -> None:
            for alternative in builds:
                alternative(begin, end)

        return builds[0] if len(builds) == 1 else build

    def _sequence(self, *, nested: bool) -> Build:
        """Read symbols, each with the repetitions behind it, until something else comes."""
        builds: list[Build] = []
        repeatable = 0
        while self._at < len(self._text):
            bounds = self._repetition()
            if bounds is not None:
                if not repeatable:
                    raise self._error("something to repeat")
                builds[-1] = self._repeated(builds[-1], *bounds)
                repeatable -= 1
            else:
                symbol = self._symbol()
                if symbol is None:
                    break
                builds.append(symbol)
                repeatable = 0 if symbol == self._nothing else _MOST_REPETITIONS_OF_ONE
            self._skip(_SPACE_AND_LINES if nested else _SPACE)
        return self._in_turn(builds)

    def _in_turn(self, builds: list[Build]) -> Build:
        def build(begin: State, end: State) -> None:
            if not builds:
                self._nothing(begin, end)
            for one in builds[:-1]:
                between = self._state()
                one(begin, between)
                begin = between
            if builds:
                builds[-1](begin, end)

        return build

    def _symbol(self) -> Build | None:
        first = self._text[self._at]
        if first == '"':
            literal = self._take(_LITERAL, "the end of a string")[1]
            codes = [self._code(character) for character in _CHARACTER.findall(literal)]
            if any(0xD800 <= code <= 0xDFFF for code in codes):
                raise GrammarUnfit("grammar has half of a surrogate pair in a string: it is no character")
            return (
                self._in_turn([self._one_of(((code, code),)) for code in codes]) if codes else self._nothing
            )
        if first == "[":
            negated, members = self._take(_CLASS, "the end of a character class").groups()
            return self._one_of(self._ranges(members, negated=bool(negated))) if members else self._nothing
        if first in "<!":
            negated, token, text = self._take(_TOKEN, "a token").groups()
            return self._this_token(
                TokenTest(None if token is None else int(token), f"<{text}>".encode(), bool(negated))
            )
        if first == ".":
            self._at += 1
            return self._one_of(((0, _LAST_CHARACTER),))
        if first == "(":
            return self._group()
        if name := _NAME.match(self._text, self._at):
            self._at = name.end()
            return self._call(self._named(name[0]))
        return None

    def _ranges(self, members: str, *, negated: bool) -> Ranges:
        ranges = []
        for low, high in _RANGE.findall(members):
            first = self._code(low)
            last = self._code(high) if high else first
            if last < first:
                raise GrammarUnfit(f"grammar has an empty range {_quoted(f'{low}-{high}')}")
            ranges.append((first, last))
        rest = _others(ranges)
        return rest if negated else _others(rest)

    def _code(self, written: str) -> int:
        if len(written) == 1:
            return ord(written)
        kind, digits = written[1], written[2:]
        code = int(digits, 16) if digits else ord(_CONTROLS.get(kind, kind))
        if code > _LAST_CHARACTER:
            raise GrammarUnfit(f"grammar has {written}, which is no character")
        return code

    def _group(self) -> Build:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise GrammarUnfit(f"grammar nests groups deeper than {MAX_DEPTH}")
        self._at += 1
        self._skip(_SPACE_AND_LINES)
        inner = self._alternatives(nested=True)
        if not self._text.startswith(")", self._at):
            raise self._error('")"')
        self._at += 1
        self._depth -= 1
        return inner

    def _repetition(self) -> tuple[int, int | None] | None:
        first = self._text[self._at]
        if first in "*+?":
            self._at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[first]
        if first != "{":
            return None
        lowest, comma, highest = self._take(_BRACES, "a repetition").groups()
        least = int(lowest)
        most = least if not comma else int(highest) if highest else None
        if least > _MAX_REPETITIONS or (most or 0) > _MAX_REPETITIONS:
            raise GrammarUnfit(f"grammar repeats something more than {_MAX_REPETITIONS} times")
        if most is not None and most < least:
            raise GrammarUnfit(f"grammar repeats something at least {least} and at most {most} times")
        return least, most

    def _repeated(self, once: Build, least: int, most: int | None) -> Build:
        """Repeat an expression; none leads into the state it begins at, nor on from the one it ends at."""

        def build(begin: State, end: State) -> None:
            for _ in range(least):
                after = self._state()
                once(begin, after)
                begin = after
            if most is None:
                loop, back = self._state(), self._state()
                self._nothing(begin, loop)
                once(loop, back)
                self._nothing(back, loop)
                self._nothing(loop, end)
                return
            for _ in range(most - least):
                after = self._state()
                once(begin, after)
                self._nothing(begin, end)
                begin = after
            self._nothing(begin, end)

        return build

    def _named(self, name: str) -> Rule:
        return self._rules.setdefault(name, Rule(name))

    def _state(self) -> State:
        self._states += 1
        if self._states > _MAX_STATES:
            raise GrammarUnfit(f"grammar has more than {_MAX_STATES} places, repetitions written out")
        return State()

    def _nothing(self, begin: State, end: State) -> None:
        self._count_step()
        begin.empties.append(end)

    def _one_of(self, ranges: Ranges) -> Build:
        def build(begin: State, end: State) -> None:
            self._count_step()
            begin.characters.append((ranges, end))

        return build

    def _this_token(self, test: TokenTest) -> Build:
        def build(begin: State, end: State) -> None:
            self._count_step()
            begin.tokens.append((test, end))

        return build

    def _call(self, rule: Rule) -> Build:
        def build(begin: State, end: State) -> None:
            self._count_step()
            begin.calls.append((rule, end))

        return build

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise GrammarUnfit(f"grammar has more than {_MAX_STEPS} steps, repetitions written out")

    def _take(self, pattern: re.Pattern[str], wanted: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._error(wanted)
        self._at = match.end()
        return match

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _error(self, wanted: str) -> GrammarUnfit:
        line = self._text.count("\n", 0, self._at) + 1
        return GrammarUnfit(
            f"grammar line {line}: expected {wanted} at {_quoted(self._text[self._at :]) or 'its end'}"
        )


def _others(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return all characters but these."""
    rest = []
    begin = 0
    for low, high in sorted(ranges):
        if low > begin:
            rest.append((begin, low - 1))
        begin = max(begin, high + 1)
    return (*rest, (begin, _LAST_CHARACTER)) if begin <= _LAST_CHARACTER else tuple(rest)


def _endable(rules: list[Rule]) -> set[Rule]:
    """Return the rules that some text fulfils."""
    endable: set[Rule] = set()
    waiting: dict[Rule, list[tuple[Rule, State]]] = {}
    seen: set[tuple[Rule, State]] = set()
    todo = [(rule, rule.start) for rule in rules if rule.start is not None]
    while todo:
        rule, state = todo.pop()
        if (rule, state) in seen:
            continue
        seen.add((rule, state))
        if state.is_end and rule not in endable:
            endable.add(rule)
            todo += waiting.pop(rule, [])
        todo += [(rule, after) for after in state.empties]
        todo += [(rule, after) for _, after in state.characters]
        todo += [(rule, after) for _, after in state.tokens]
        for called, after in state.calls:
            if called in endable:
                todo.append((rule, after))
            else:
                waiting.setdefault(called, []).append((rule, after))
    return endable


def _quoted(text: str) -> str:
    return repr(text[:_QUOTE_CHARACTERS]) if text else ""
