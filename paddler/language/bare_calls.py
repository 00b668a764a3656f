"""Is an answer that begins like JSON a tool call without any mark around it? Decided as early as it can be.

Fed character by character; until it is decided, the caller shows nothing of what it has fed.
"""

import enum
import json
from typing import Any

MAX_HELD_CHARACTERS = 64 * 1024
"""A call may be that long; then the text is released."""

BEGINNINGS = frozenset("{[`")

_CALL_KEYS = frozenset(
    {"name", "arguments", "parameters", "type", "function", "id", "tool_name", "tool_call_id", "call_id"}
)
_FENCES = ("```json\n", "```tool_call\n", "```tool_calls\n", "```\n")


class Verdict(enum.Enum):
    """What the character that was fed last decided."""

    OPEN = "open"
    TEXT = "text"
    CALL = "call"
    """The character ends it."""
    CALL_BEFORE = "call before"
    """It ended before the character."""


class BareCallProbe:
    """Follow one object, or an array of objects; a fence around it belongs to it."""

    # Theory of operation
    #
    # 1. An opening fence must be one of _FENCES, an array must begin with an object.
    # 2. Every key of an outermost object must be one that calls have: answers in JSON are released at
    #    their first key, mostly.
    # 3. When all brackets are closed, the whole is parsed once and must have the shape of calls.
    # 4. Behind it, a fence is followed to its end.

    def __init__(self) -> None:
        self._fed: list[str] = []
        self._fence = ""
        self._is_fenced = False
        self._open: list[str] = []
        """Brackets that are open."""
        self._in_string = False
        self._is_escaped = False
        self._expects_key = False
        self._key: list[str] | None = None
        """Of an outermost object, while it is read."""
        self._begun_at = 0
        self._closing_fence: str | None = None

    @property
    def is_call(self) -> bool:
        """Tell whether what was fed is a call already; only its fence may be missing."""
        return self._closing_fence is not None

    def feed(self, character: str) -> Verdict:
        """Take the next character."""
        self._fed.append(character)
        if len(self._fed) > MAX_HELD_CHARACTERS:
            return Verdict.CALL if self.is_call else Verdict.TEXT
        if self._closing_fence is not None:
            return self._after_call(character)
        if self._in_string:
            return self._inside_string(character)
        if not self._open and not self._is_fenced and (self._fence or character == "`"):
            return self._inside_fence(character)
        if character.isspace():
            return Verdict.OPEN
        return self._structure(character)

    def _inside_fence(self, character: str) -> Verdict:
        self._fence += character
        self._is_fenced = self._fence in _FENCES
        return Verdict.OPEN if any(fence.startswith(self._fence) for fence in _FENCES) else Verdict.TEXT

    def _inside_string(self, character: str) -> Verdict:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False
            if self._key is not None and "".join(self._key) not in _CALL_KEYS:
                return Verdict.TEXT
            self._key = None
            return Verdict.OPEN
        if self._key is not None:
            self._key.append(character)
            if len(self._key) > 20:
                return Verdict.TEXT
        return Verdict.OPEN

    def _structure(self, character: str) -> Verdict:
        """Follow a character outside strings that is no space."""
        if not self._open:
            self._begun_at = len(self._fed) - 1
            self._open.append(character)
            self._expects_key = character == "{"
            return Verdict.OPEN if character in "{[" else Verdict.TEXT
        if self._open == ["["] and character not in "{,]":
            return Verdict.TEXT
        if character == '"':
            self._in_string = True
            self._key = [] if self._expects_key and self._is_outermost() else None
            self._expects_key = False
        elif self._expects_key and self._is_outermost() and character != "}":
            return Verdict.TEXT
        elif character in "{[":
            self._open.append(character)
            self._expects_key = character == "{"
        elif character in "}]":
            return self._close(character)
        elif character == ",":
            self._expects_key = self._open[-1] == "{"
        return Verdict.OPEN

    def _is_outermost(self) -> bool:
        return self._open in (["{"], ["[", "{"])

    def _close(self, character: str) -> Verdict:
        if self._open.pop() + character not in ("{}", "[]"):
            return Verdict.TEXT
        self._expects_key = False
        if self._open:
            return Verdict.OPEN
        if not _has_shape_of_calls("".join(self._fed[self._begun_at :])):
            return Verdict.TEXT
        if not self._is_fenced:
            return Verdict.CALL
        self._closing_fence = ""
        return Verdict.OPEN

    def _after_call(self, character: str) -> Verdict:
        assert self._closing_fence is not None
        if character == "`":
            self._closing_fence += character
            return Verdict.CALL if len(self._closing_fence) == 3 else Verdict.OPEN
        if character.isspace() and not self._closing_fence:
            return Verdict.OPEN
        return Verdict.CALL_BEFORE


def _has_shape_of_calls(text: str) -> bool:
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(_has_shape_of_call(entry) for entry in entries)


def _has_shape_of_call(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    if isinstance(entry.get("function"), dict):
        entry = entry["function"]
    names = any(isinstance(entry.get(key), str) for key in ("name", "tool_name", "function"))
    return names and ("arguments" in entry or "parameters" in entry)
