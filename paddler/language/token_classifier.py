"""Is this piece of the answer content or reasoning? Markers decide, and are never shown.

Markers are matched as text, across tokens: a token in which a marker may have begun is held back
until the text that follows decides it. What is shown does not depend on how text was cut into tokens.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import attrs

from paddler.messages.tokens import Section, Usage

# Theory of operation
#
# The answer is one string of characters, each belonging to a token; those of control tokens are
# invisible but take part in matching. Characters are decided from left to right. At each place:
#
# 1. a marker is complete there: its characters vanish, the section changes behind it;
# 2. what is left is the beginning of a marker: nothing more is decided until text follows;
# 3. otherwise the character belongs to the section in force.
#
# A token is reported once all its characters are decided, so plain text gives exactly one entry
# per visible token. The rule looks at places, never at tokens: that makes it independent of the cut.
# It needs one thing of a family's markers: none may begin with another.


@attrs.frozen
class Markers:
    """How one family of models writes reasoning; a family may know several spellings of either end."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    signs: tuple[str, ...] = ()
    """What a template or the control tokens must contain; the first closing marker when empty."""

    def recognised_in(self, texts: Iterable[str]) -> bool:
        """Tell whether every sign occurs in one of the texts."""
        known = tuple(texts)
        return all(any(sign in text for text in known) for sign in self.signs or self.closing[:1])


FAMILIES = (
    Markers(opening=("<think>",), closing=("</think>",)),
    Markers(opening=("[THINK]",), closing=("[/THINK]",)),
    Markers(
        opening=("<|channel>thought\n",), closing=("<channel|>",), signs=("<|channel>", "<channel|>")
    ),  # Gemma 4
    Markers(
        opening=("<|channel|>analysis<|message|>",),
        closing=("<|end|><|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
        signs=("<|channel|>", "<|message|>"),
    ),  # gpt-oss
    Markers(opening=("<|START_THINKING|>",), closing=("<|END_THINKING|>",)),  # Command A
    Markers(opening=("<seed:think>",), closing=("</seed:think>",)),
    Markers(opening=("<|inner_prefix|>",), closing=("<|inner_suffix|>",)),  # Apertus
    Markers(opening=("<unused94>thought\n",), closing=("<unused95>",)),  # MedGemma
    Markers(opening=("<|begin_of_thought|>",), closing=("<|end_of_thought|>",)),
    Markers(opening=("◁think▷",), closing=("◁/think▷",)),  # Kimi-VL
    Markers(opening=("<thought>",), closing=("</thought>",)),
    Markers(opening=("<thinking>",), closing=("</thinking>",)),
    Markers(opening=("<reasoning>",), closing=("</reasoning>",)),
)
"""Families in the order in which they are looked for."""


def find_markers(template: str | None, control_texts: Iterable[str]) -> Markers | None:
    """Return the markers of a model, judged by its own template, else by its control tokens."""
    for texts in ((template or "",), tuple(control_texts)):
        for family in FAMILIES:
            if family.recognised_in(texts):
                return family
    return None


def section_after(text: str, markers: Markers | None) -> Section:
    """Return the section in which an answer begins that continues this text."""
    if markers is None:
        return Section.UNDETERMINABLE
    opened = max(text.rfind(marker) for marker in markers.opening)
    closed = max(text.rfind(marker) for marker in markers.closing)
    return Section.REASONING if opened > closed else Section.CONTENT


@attrs.define(eq=False)
class _Token:
    weight: int
    """What it counts: 1, but 0 for text that no token of its own brought."""
    section: Section | None = None
    """What it counts for, if that is not the section in force: a marker's token for its reasoning."""
    entries: list[tuple[Section, str]] = attrs.Factory(list)
    undecided: int = 0
    """Spans of it that are still held."""

    def show(self, section: Section, text: str) -> None:
        if self.entries and self.entries[-1][0] is section:
            text = self.entries.pop()[1] + text
        self.entries.append((section, text))


@attrs.define(eq=False)
class _Span:
    token: _Token
    text: str
    visible: bool


class TokenClassifier:
    """Classify the tokens of one answer and count them."""

    def __init__(self, *, markers: Markers | None, start: Section, control_tokens: Mapping[int, str]) -> None:
        self._section = start
        self._control_tokens = control_tokens
        self._sections: dict[str, Section] = {}
        if markers is not None:
            self._sections |= dict.fromkeys(markers.opening, Section.REASONING)
            self._sections |= dict.fromkeys(markers.closing, Section.CONTENT)
        self._initials = frozenset(marker[0] for marker in self._sections)
        self._spans: deque[_Span] = deque()
        self._counts = dict.fromkeys(Section, 0)

    def feed(self, tokens: Sequence[int], text: str) -> list[tuple[Section, str]]:
        """Take the next tokens and the text that became visible with them; return what is decided.

        The engine sends one token per turn. Of several, the first visible one is taken to carry the text.
        """
        if not self._sections or (not self._spans and self._is_plain(tokens, text)):
            self._counts[self._section] += len(tokens)
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

    def finish(self) -> list[tuple[Section, str]]:
        """Return what was held back: no marker can be completed any more."""
        return self._decide(more_follows=False)

    def usage(self, *, prompt_tokens: int, cached_prompt_tokens: int) -> Usage:
        """Return the counts so far; held tokens are counted once `finish` was called."""
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_prompt_tokens=cached_prompt_tokens,
            content_tokens=self._counts[Section.CONTENT],
            reasoning_tokens=self._counts[Section.REASONING],
            tool_call_tokens=self._counts[Section.TOOL_CALL],
            undeterminable_tokens=self._counts[Section.UNDETERMINABLE],
        )

    def _is_plain(self, tokens: Sequence[int], text: str) -> bool:
        if any(token in self._control_tokens for token in tokens):
            return False
        return self._initials.isdisjoint(text)

    def _push(self, token: _Token, text: str, *, visible: bool) -> None:
        self._spans.append(_Span(token, text, visible))
        token.undecided += 1

    def _decide(self, *, more_follows: bool) -> list[tuple[Section, str]]:
        shown: list[tuple[Section, str]] = []
        text = "".join([span.text for span in self._spans])
        plain_from = at = 0
        while at < len(text):
            marker = self._marker_at(text, at)
            if marker is not None:
                self._take(at - plain_from, shown)
                self._take(len(marker), shown, is_marker=True)
                self._section = self._sections[marker]
                at = plain_from = at + len(marker)
            elif more_follows and self._may_begin_at(text, at):
                break
            else:
                at += 1
        self._take(at - plain_from, shown)
        while at == len(text) and self._spans:
            self._close_first(shown)  # tokens without text that stand last
        return shown

    def _marker_at(self, text: str, at: int) -> str | None:
        if text[at] not in self._initials:
            return None
        return next((marker for marker in self._sections if text.startswith(marker, at)), None)

    def _may_begin_at(self, text: str, at: int) -> bool:
        if text[at] not in self._initials:
            return False
        rest = text[at:]
        return any(marker.startswith(rest) for marker in self._sections)

    def _take(self, length: int, shown: list[tuple[Section, str]], *, is_marker: bool = False) -> None:
        """Decide the next characters: as part of a marker, else as text of the section in force."""
        while length:
            span = self._spans[0]
            taken = span.text[:length]
            length -= len(taken)
            if is_marker:
                span.token.section = Section.REASONING
            elif span.visible:
                span.token.show(self._section, taken)
            if len(taken) == len(span.text):
                self._close_first(shown)
            else:
                span.text = span.text[len(taken) :]

    def _close_first(self, shown: list[tuple[Section, str]]) -> None:
        token = self._spans.popleft().token
        token.undecided -= 1
        if token.undecided == 0:
            self._counts[token.section or self._section] += token.weight
            shown += token.entries
