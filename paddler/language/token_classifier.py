"""Is this piece of the answer content, reasoning or a tool call? Marks decide, and are never shown.

Marks are matched as text, across tokens: a token in which a mark may have begun is held back until the
text that follows decides it. What is shown does not depend on how text was cut into tokens.
"""

import re
from collections import deque
from collections.abc import Mapping, Sequence

import attrs

from paddler.language.bare_calls import BEGINNINGS, BareCallProbe, Verdict
from paddler.language.reasoning_formats import Markers
from paddler.language.section_marks import Move, Place, PlaceKind, places_of
from paddler.language.tool_calls import MAX_SECTION_CHARACTERS
from paddler.language.tool_formats import ToolFormat
from paddler.messages.tokens import Section, Usage

# Theory of operation
#
# The answer is one string of characters, each belonging to a token; those of control tokens are
# invisible but take part in matching. Characters are decided from left to right. At each character:
#
# 1. a mark of the place is complete there: its characters vanish, another place begins behind it;
# 2. what is left is the beginning of a mark: nothing more is decided until text follows;
# 3. the answer may be a bare tool call: the characters are put aside until the probe has decided, and
#    are then decided again, all for one section;
# 4. it is part of a header: it is collected and never shown;
# 5. otherwise it belongs to the section in force.
#
# A token is reported once all its characters are decided, so plain text gives exactly one entry
# per visible token. The rule looks at characters, never at tokens: that makes it independent of the cut.
# Tokens of a header count for the message that it heads.

MAX_HEADER_CHARACTERS = 512

_BETWEEN_CALLS = ";,"


@attrs.frozen
class SectionEnd:
    """A section of tool calls ends here; its text, without the marks around it."""

    text: str
    is_open: bool = False
    """The answer ended within it."""


Item = tuple[Section, str] | SectionEnd


@attrs.define(eq=False)
class _Token:
    weight: int
    """What it counts: 1, but 0 for text that no token of its own brought."""
    section: Section | None = None
    """What it counts for, if that is not the section in force: a mark's token."""
    entries: list[Item] = attrs.Factory(list)
    undecided: int = 0
    """Spans of it that are still held."""

    def show(self, section: Section, text: str) -> None:
        last = self.entries[-1] if self.entries else None
        if isinstance(last, tuple) and last[0] is section:
            self.entries[-1] = (section, last[1] + text)
        else:
            self.entries.append((section, text))


@attrs.define(eq=False)
class _Span:
    token: _Token
    text: str
    visible: bool


class TokenClassifier:
    """Classify the tokens of one answer and count them."""

    def __init__(
        self,
        *,
        markers: Markers | None,
        start: Section,
        control_tokens: Mapping[int, str],
        tool_format: ToolFormat | None = None,
    ) -> None:
        """Begin an answer in a section; without a tool format there are no tool calls.

        Give one to every request with tools, `FALLBACK` for models of no known format.
        """
        self._places = places_of(markers, tool_format)
        self._control_tokens = control_tokens
        self._control_ids = control_tokens.keys()
        self._inner = tool_format.inner if tool_format is not None else frozenset[str]()
        self._probes = tool_format is not None
        self._outside_section = Section.CONTENT if start is Section.REASONING else start
        self._is_trivial = markers is None and tool_format is None
        self._section = start
        self._spans: deque[_Span] = deque()
        self._counts = dict.fromkeys(Section, 0)
        self._raw: list[str] = []
        self._raw_length = 0
        self._header = ""
        self._header_weight = 0
        self._probe: BareCallProbe | None = None
        self._put_aside: list[_Span] = []
        self._watches = False
        """Characters that begin no mark mean something, too."""
        self._enter(self._places.reasoning if start is Section.REASONING else self._places.beginning)

    def feed(self, tokens: Sequence[int], text: str) -> list[Item]:
        """Take the next tokens and the text that became visible with them; return what is decided.

        The engine sends one token per turn. Of several, the first visible one is taken to carry the text.
        """
        if self._is_trivial or not (self._watches or self._spans or self._is_special(tokens, text)):
            self._counts[self._section] += len(tokens)
            if self._section is Section.TOOL_CALL:
                self._collect(text)
            return [(self._section, text)] if text else []
        carrier = next((at for at, number in enumerate(tokens) if number not in self._control_tokens), 0)
        for at, number in enumerate(tokens):
            token = _Token(weight=1)
            # What becomes visible with a control token was completed by it, so it stands before it.
            if at == carrier and text:
                self._push(token, text, visible=True)
            if number in self._control_tokens or not token.undecided:
                self._push(token, self._control_tokens.get(number, ""), visible=False)
        if text and not tokens:  # bytes flushed at the end
            self._push(_Token(weight=0), text, visible=True)
        return self._decide(more_follows=True)

    def finish(self) -> list[Item]:
        """Return what was held back: no mark can be completed any more."""
        shown = self._decide(more_follows=False)
        if self._probe is not None:
            self._settle(shown, is_call=self._probe.is_call)
            shown += self._decide(more_follows=False)
        self._counts[self._section] += self._header_weight
        self._header_weight = 0
        if self._place.kind is PlaceKind.TOOL_CALL:
            shown.append(attrs.evolve(self._section_end(), is_open=True))
        return shown

    def usage(self, *, prompt_tokens: int, cached_prompt_tokens: int, input_image_tokens: int = 0) -> Usage:
        """Return the counts so far; held tokens are counted once `finish` was called."""
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_prompt_tokens=cached_prompt_tokens,
            input_image_tokens=input_image_tokens,
            content_tokens=self._counts[Section.CONTENT],
            reasoning_tokens=self._counts[Section.REASONING],
            tool_call_tokens=self._counts[Section.TOOL_CALL],
            undeterminable_tokens=self._counts[Section.UNDETERMINABLE],
        )

    def _is_special(self, tokens: Sequence[int], text: str) -> bool:
        return not (self._initials.isdisjoint(text) and self._control_ids.isdisjoint(tokens))

    def _push(self, token: _Token, text: str, *, visible: bool) -> None:
        self._spans.append(_Span(token, text, visible))
        token.undecided += 1

    def _enter(self, place: Place) -> None:
        self._place = place
        self._initials = place.initials
        self._watches = place.kind in (PlaceKind.HEADER, PlaceKind.BEGINNING)
        match place.kind:
            case PlaceKind.OUTSIDE:
                self._section = self._outside_section
                self._watches = self._probes
            case PlaceKind.REASONING:
                self._section = Section.REASONING
            case PlaceKind.TOOL_CALL:
                self._section = Section.TOOL_CALL
            case PlaceKind.HEADER:
                self._header = ""
            case PlaceKind.BEGINNING:
                pass

    # Deciding characters.

    def _decide(self, *, more_follows: bool) -> list[Item]:
        shown: list[Item] = []
        text = "".join([span.text for span in self._spans])
        decided = at = 0
        while at < len(text):
            marker = self._place.marker_at(text, at)
            if marker is not None:
                self._take(at - decided, shown)
                self._pass_marker(marker, shown)
                at = decided = at + len(marker)
            elif more_follows and self._place.may_begin_at(text, at):
                break
            elif self._watches:
                decided, at = self._watch(text[at], decided, at, shown)
            else:
                at += 1
        self._take(at - decided, shown)
        while at == len(text) and self._spans:  # tokens without text that stand last
            if self._probe is not None:
                self._put_aside.append(self._spans.popleft())
            else:
                self._close_first(shown)
        return shown

    def _pass_marker(self, marker: str, shown: list[Item]) -> None:
        if self._probe is not None:
            self._settle(shown, is_call=self._probe.is_call)
        move = self._place.moves[marker]
        if self._place.kind is PlaceKind.HEADER:
            self._take(len(marker), shown)
            self._leave_header(move.to, marker)
            return
        if move.to is not None and move.to.kind is PlaceKind.HEADER:
            if move.ends_section:
                self._append_end(shown)
            self._enter(move.to)
            self._take(len(marker), shown)
            self._header = marker
            return
        if move.shown and not move.ends_section and move.to is not None:
            self._enter(move.to)
            self._take(len(marker), shown)
            return
        self._take(len(marker), shown, move=move)
        if move.to is not None:
            self._enter(move.to)

    def _watch(self, character: str, decided: int, at: int, shown: list[Item]) -> tuple[int, int]:
        """Follow a character that may mean something; return up to where is decided, and what is next."""
        if self._place.kind is PlaceKind.BEGINNING:
            self._enter(self._places.outside)
            return decided, at
        if self._place.kind is PlaceKind.OUTSIDE and not self._is_visible(at - decided):
            return decided, at + 1  # of a control token
        if self._probe is not None:
            return self._probe_next(self._probe, character, decided, at, shown)
        if self._place.kind is PlaceKind.HEADER:
            self._header += character
            if len(self._header) > MAX_HEADER_CHARACTERS:
                self._take(at + 1 - decided, shown)
                self._leave_header(self._places.outside, "")
                return at + 1, at + 1
        elif character in BEGINNINGS:
            self._take(at - decided, shown)
            self._probe = BareCallProbe()
            return at, at
        elif not character.isspace() and character not in _BETWEEN_CALLS:
            self._watches = False  # it begins as text
        return decided, at + 1

    def _is_visible(self, offset: int) -> bool:
        for span in self._spans:
            offset -= len(span.text)
            if offset < 0:
                return span.visible
        return False

    def _probe_next(
        self, probe: BareCallProbe, character: str, decided: int, at: int, shown: list[Item]
    ) -> tuple[int, int]:
        verdict = probe.feed(character)
        if verdict is Verdict.OPEN:
            return decided, at + 1
        behind = at if verdict is Verdict.CALL_BEFORE else at + 1
        self._take(behind - decided, shown)
        self._settle(shown, is_call=verdict is not Verdict.TEXT)
        return behind, behind

    def _settle(self, shown: list[Item], *, is_call: bool) -> None:
        """Decide what was put aside: a section of its own, or text."""
        length = sum(len(span.text) for span in self._put_aside)
        self._spans.extendleft(reversed(self._put_aside))
        self._put_aside = []
        self._probe = None
        self._watches = is_call
        if is_call:
            self._section = Section.TOOL_CALL
        self._take(length, shown, ends_section=is_call)
        self._section = self._outside_section

    def _leave_header(self, place: Place | None, marker: str) -> None:
        """Go where the header says, if its mark ended it; else to the given place."""
        header = self._header
        if place is None:
            if _RECIPIENT.search(header) is not None and self._places.header_call is not None:
                place = self._places.header_call
            else:
                place = self._places.reasoning if _ANALYSIS.search(header) else self._places.outside
        self._enter(place)
        self._counts[self._section] += self._header_weight
        self._header_weight = 0
        if place.kind is PlaceKind.TOOL_CALL:
            self._collect(header + marker)

    # Taking what is decided.

    def _take(
        self, length: int, shown: list[Item], *, move: Move | None = None, ends_section: bool = False
    ) -> None:
        """Decide the next characters: as the mark of a move, else as text of the section in force."""
        hidden = self._place.kind is PlaceKind.HEADER
        if move is not None:
            hidden = not move.shown
            ends_section = move.ends_section
        while length:
            span = self._spans[0]
            if self._probe is not None:
                length -= self._put_first_aside(length)
                continue
            taken = span.text[:length]
            length -= len(taken)
            if not hidden:
                self._show(span, taken)
            elif move is not None:
                span.token.section = move.counts_for
            if ends_section and not length:
                span.token.entries.append(self._section_end())
            if len(taken) == len(span.text):
                self._close_first(shown)
            else:
                span.text = span.text[len(taken) :]

    def _show(self, span: _Span, text: str) -> None:
        if self._section is Section.TOOL_CALL and (span.visible or text in self._inner):
            self._collect(text)
        if span.visible:
            span.token.show(self._section, text)

    def _put_first_aside(self, length: int) -> int:
        span = self._spans[0]
        taken = span.text[:length]
        if len(taken) == len(span.text):
            self._put_aside.append(self._spans.popleft())
        else:
            self._put_aside.append(_Span(span.token, taken, span.visible))
            span.token.undecided += 1
            span.text = span.text[len(taken) :]
        return len(taken)

    def _close_first(self, shown: list[Item]) -> None:
        token = self._spans.popleft().token
        token.undecided -= 1
        if token.undecided:
            return
        if self._place.kind is PlaceKind.HEADER and token.section is None:
            self._header_weight += token.weight
        else:
            self._counts[token.section or self._section] += token.weight
        shown += token.entries

    def _collect(self, text: str) -> None:
        if self._raw_length <= MAX_SECTION_CHARACTERS:  # so that one too many tells that it is too long
            self._raw.append(text)
            self._raw_length += len(text)

    def _section_end(self) -> SectionEnd:
        text = "".join(self._raw)
        self._raw = []
        self._raw_length = 0
        return SectionEnd(text)

    def _append_end(self, shown: list[Item]) -> None:
        """End a section before the token of the mark that follows, which may have shown some of it."""
        token = self._spans[0].token
        (token.entries or shown).append(self._section_end())


_RECIPIENT = re.compile(r"(?:^|\s)to=\S")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis")
