"""Which marks mean something where in an answer, and what they change: a graph of places.

Built once per pair of reasoning family and tool format; token_classifier.py walks it.
"""

import enum
from collections.abc import Iterable
from functools import lru_cache

import attrs

from paddler.language.reasoning_formats import Headers, Markers
from paddler.language.tool_formats import Bracket, ToolFormat
from paddler.messages.tokens import Section

# What holds at each place:
#
#   OUTSIDE     marks of reasoning and of tool calls; a stray closing one vanishes
#   REASONING   the end of reasoning; marks of tool calls vanish and change nothing, but for formats whose
#               mark is a token that no thought contains
#   TOOL_CALL   the end of this section, or the beginning of the next: arguments may contain anything else
#   HEADER      what ends the header; the rest of it is collected and not shown
#   BEGINNING   of an answer that may go on in a header which the prompt began; else OUTSIDE
#
# At one place no mark may begin with another.


class PlaceKind(enum.Enum):
    """Where in an answer one can be."""

    BEGINNING = "beginning"
    OUTSIDE = "outside"
    REASONING = "reasoning"
    TOOL_CALL = "tool call"
    HEADER = "header"


@attrs.define(eq=False)
class Place:
    """A place and the marks that mean something there."""

    kind: PlaceKind
    moves: "dict[str, Move]" = attrs.Factory(dict)
    initials: frozenset[str] = frozenset()

    def marker_at(self, text: str, at: int) -> str | None:
        """Return the mark that is complete there."""
        if text[at] not in self.initials:
            return None
        return next((marker for marker in self.moves if text.startswith(marker, at)), None)

    def may_begin_at(self, text: str, at: int) -> bool:
        """Tell whether all the rest of a text may be the beginning of a mark."""
        if text[at] not in self.initials:
            return False
        rest = text[at:]
        return any(marker.startswith(rest) for marker in self.moves)


@attrs.frozen(eq=False)
class Move:
    """What a mark does: its characters vanish, unless they are shown, and another place begins behind it."""

    to: Place | None
    """None: nothing changes."""
    counts_for: Section | None
    """None: the section in force; in a header, the one that follows."""
    shown: bool = False
    ends_section: bool = False
    """It ends a section of tool calls."""


@attrs.frozen(eq=False)
class Places:
    """The graph of one model's answers."""

    outside: Place
    reasoning: Place
    header: Place | None
    """What the header says decides the way out of it."""
    header_call: Place | None
    """A message that is a call, where tools are known."""
    beginning: Place


@lru_cache(maxsize=64)
def places_of(markers: Markers | None, tool_format: ToolFormat | None) -> Places:
    """Return the graph; `tool_format` is None for requests without tools."""
    outside, reasoning = Place(PlaceKind.OUTSIDE), Place(PlaceKind.REASONING)
    header = header_call = None
    beginning = outside
    if markers is not None and markers.headers is not None:
        header = Place(PlaceKind.HEADER)
        header_call = Place(PlaceKind.TOOL_CALL) if tool_format is not None else None
        beginning = _join_headers(markers.headers, outside, reasoning, header, header_call)
    elif markers is not None:
        for place in (outside, reasoning):
            for marker in markers.opening:
                place.moves[marker] = Move(reasoning, Section.REASONING)
            for marker in markers.closing:
                place.moves[marker] = Move(outside, Section.REASONING)
    calls = [_join_bracket(bracket, outside) for bracket in tool_format.brackets] if tool_format else []
    if tool_format is not None:
        _join_to_reasoning(tool_format, outside, reasoning)
    for place in filter(None, (outside, reasoning, header, header_call, beginning, *calls)):
        place.initials = frozenset(marker[0] for marker in place.moves)
    return Places(outside, reasoning, header, header_call, beginning)


def _join_headers(
    headers: Headers, outside: Place, reasoning: Place, header: Place, header_call: Place | None
) -> Place:
    """Let headers begin everywhere, and return the place where an answer begins."""
    for place in filter(None, (outside, reasoning, header_call)):
        ends_section = place is header_call  # another message ends it
        for marker in headers.opening:
            place.moves[marker] = Move(header, None, ends_section=ends_section)
        for marker in headers.ends:
            place.moves[marker] = Move(outside, None, ends_section=ends_section)
        if place is not header_call:
            place.moves[headers.closing] = Move(None, None)
    for marker in headers.ends:
        header.moves[marker] = Move(outside, None)
    header.moves[headers.closing] = Move(None, None)
    beginning = Place(PlaceKind.BEGINNING, dict(outside.moves))
    for marker in headers.continued:
        beginning.moves[marker] = Move(header, None)
    return beginning


def _join_bracket(bracket: Bracket, outside: Place) -> Place:
    call = Place(PlaceKind.TOOL_CALL)
    outside.moves[bracket.opening] = Move(call, Section.TOOL_CALL, shown=bracket.shown)
    if not bracket.shown and not (bracket.closing and bracket.opening.startswith(bracket.closing)):
        call.moves[bracket.opening] = Move(call, Section.TOOL_CALL, ends_section=True)
    if bracket.closing is not None:
        call.moves[bracket.closing] = Move(outside, Section.TOOL_CALL, shown=bracket.shown, ends_section=True)
    return call


def _join_to_reasoning(tool_format: ToolFormat, outside: Place, reasoning: Place) -> None:
    """Say what the marks of calls do in reasoning, and stray closing ones everywhere."""
    for bracket in _unmistakable(tool_format.brackets):
        if tool_format.ends_reasoning:
            reasoning.moves[bracket.opening] = outside.moves[bracket.opening]
        else:
            reasoning.moves[bracket.opening] = Move(None, Section.REASONING)
        if bracket.closing is not None:
            reasoning.moves[bracket.closing] = Move(None, Section.REASONING)
            outside.moves[bracket.closing] = Move(None, Section.TOOL_CALL)


def _unmistakable(brackets: Iterable[Bracket]) -> Iterable[Bracket]:
    """Return those whose marks are nothing that a text may contain: no fences."""
    return (bracket for bracket in brackets if not bracket.shown and "`" not in bracket.opening)
