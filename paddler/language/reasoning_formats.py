"""How families of models write reasoning: one table, and how a model's family is found."""

from collections.abc import Iterable

import attrs

from paddler.messages.tokens import Section


@attrs.frozen
class Headers:
    """Marks of messages that each begin with a header: what it says decides what the message is."""

    opening: tuple[str, ...] = ("<|start|>", "<|channel|>")
    closing: str = "<|message|>"
    """Ends the header; the message follows."""
    ends: tuple[str, ...] = ("<|end|>", "<|return|>", "<|call|>")
    """End the message."""
    continued: tuple[str, ...] = (" to=", "to=")
    """With these an answer goes on in a header that the prompt began."""


@attrs.frozen
class Markers:
    """How one family of models writes reasoning; a family may know several spellings of either end."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    signs: tuple[str, ...] = ()
    """What a template or the control tokens must contain; the first closing marker when empty."""
    headers: Headers | None = None
    """The family says before each message what it is; opening and closing only judge prompts then."""

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
        closing=("<|channel|>final<|message|>", "<|end|>"),
        signs=("<|channel|>", "<|message|>"),
        headers=Headers(),
    ),  # gpt-oss
    Markers(opening=("<|START_THINKING|>",), closing=("<|END_THINKING|>",)),  # Command A
    Markers(opening=("<mm:think>",), closing=("</mm:think>",)),  # MiniMax M3
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
