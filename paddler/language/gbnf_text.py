"""Pieces of GBNF as text: literals, and grammars under other names so that several fit into one."""

import re
from collections.abc import Callable

GbnfOfSchema = Callable[[str], str]
"""JSON Schema text to GBNF whose start rule is `root`; what it raises is passed through."""

# Strings, character classes, comments and repetitions hold no rule names.
_GBNF = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\{[^}]*\}|(?P<rule>[A-Za-z][A-Za-z0-9-]*)', re.DOTALL
)
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def prefixed(gbnf: str, prefix: str) -> list[str]:
    """Return the rules of a grammar with a prefix before each name."""
    renamed = _GBNF.sub(lambda match: prefix + match[0] if match["rule"] else match[0], gbnf)
    return [line for line in renamed.splitlines() if line.strip()]


def literal(text: str) -> str:
    """Return a GBNF string."""
    escaped = "".join(_ESCAPES.get(character, character) for character in text)
    return f'"{escaped}"'
