"""Ends an answer before the first of some texts, however it comes in pieces. Pure.

A text that may be the beginning of a stop string is held back until it is clear that it is none. Each
stop string is followed by itself, character by character (Knuth, Morris and Pratt), so that a long one
costs no more than a short one; the one that ends first counts, and of those that end together the longest.
"""


class StopStrings:
    """The stop strings of one answer and how much of each the text ends with."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        """Take texts of at least one character."""
        self._followers = [_Follower(text) for text in texts]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next text; return what may be shown by now, and whether the answer ends there."""
        known = self._held + text
        for place, character in enumerate(text, start=len(self._held) + 1):
            ended = 0
            for follower in self._followers:
                ended = max(ended, follower.feed(character))
            if ended:
                self._held = ""
                return known[: place - ended], True
        held = max((follower.matched for follower in self._followers), default=0)
        self._held = known[len(known) - held :]
        return known[: len(known) - held], False

    def flush(self) -> str:
        """Return what was held back, for the answer has ended otherwise."""
        held, self._held = self._held, ""
        return held


class _Follower:
    """One stop string: how many of its first characters the text ends with."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._shorter = _borders(text)
        self.matched = 0

    def feed(self, character: str) -> int:
        """Take a character; return the length of the stop string if it ends here, else 0."""
        while self.matched and self._text[self.matched] != character:
            self.matched = self._shorter[self.matched]
        self.matched += self._text[self.matched] == character
        return self.matched if self.matched == len(self._text) else 0


def _borders(text: str) -> list[int]:
    """Return for each length the next shorter beginning of the text that a beginning of it ends with."""
    borders = [0, 0]
    border = 0
    for character in text[1:]:
        while border and text[border] != character:
            border = borders[border]
        border += text[border] == character
        borders.append(border)
    return borders
