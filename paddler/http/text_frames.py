"""Short text messages out of the bytes of a WebSocket's client; everything else is left to the library.

A message that is one masked frame, as nearly all are, is taken apart by three operations on integers
where the library's general reader costs tens of calls. Pure.
"""

from collections.abc import Iterator
from typing import Final

_TEXT: Final = 0x81
"""The first byte of a frame that is a whole text message."""

_MASKED: Final = 0x80
_LONGEST_HEAD: Final = 14


class TextFrames:
    """Splits a stream of bytes, cut anywhere, into short text messages and the bytes between them."""

    def __init__(self) -> None:
        self._head = b""  # an incomplete head of a frame
        self._foreign = 0  # bytes of the present frame that are still to come, and not ours
        self._in_fragments = False

    def feed(self, data: bytes) -> Iterator[str | bytes]:
        """Yield what comes, in order: a `str` is a message, `bytes` are for the library.

        Whatever is not in order ends up with the library, which says so.
        """
        data = self._head + data
        self._head = b""
        start = 0
        while start < len(data):
            if self._foreign:
                end = min(start + self._foreign, len(data))
                self._foreign -= end - start
                yield data[start:end]
                start = end
                continue
            head = _head_of(data[start : start + _LONGEST_HEAD])
            if head is None:
                self._head = data[start:]
                return
            head_size, size = head
            end = start + head_size + size
            text = None
            if data[start] == _TEXT and end <= len(data) and not self._in_fragments:
                text = _text_of(data[start:end], head_size)
            if text is not None:
                yield text
                start = end
            else:
                self._foreign = head_size + size
                if data[start] & 0x0F < 0x8:  # no control frame
                    self._in_fragments = not data[start] & 0x80


def _head_of(data: bytes) -> tuple[int, int] | None:
    """Return the sizes of a frame's head and of its payload, or None while they cannot be told."""
    if len(data) < 2:
        return None
    short = data[1] & 0x7F
    length_size = {126: 2, 127: 8}.get(short, 0)
    head_size = 2 + length_size + (4 if data[1] & _MASKED else 0)
    if len(data) < head_size:
        return None
    return head_size, int.from_bytes(data[2 : 2 + length_size]) if length_size else short


def _text_of(frame: bytes, head_size: int) -> str | None:
    """Return the text of a frame, or None if there is anything wrong with it."""
    size = len(frame) - head_size
    if head_size not in (6, 8) or (head_size == 8 and size < 126):
        return None
    key = (frame[head_size - 4 : head_size] * (size // 4 + 1))[:size]
    text = (int.from_bytes(frame[head_size:]) ^ int.from_bytes(key)).to_bytes(size)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None
