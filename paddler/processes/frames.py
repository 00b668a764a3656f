"""JSON frames between a process and its children: values to bytes and back, without I/O.

A frame is a 4-byte little-endian length and that much UTF-8 JSON. JSON because a dying child may write
anything, and nothing it writes may harm the parent.
"""

import json
from typing import Any

from paddler.errors import RemoteProtocolError

_LENGTH_BYTES = 4

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def pack_frame(value: Any) -> bytes:
    """Return the frame of a JSON value; a lone surrogate, which is no UTF-8, becomes a question mark."""
    body = _to_json(value).encode(errors="replace")
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class FrameCutter:
    """Cut a byte stream into frames and return their values."""

    def __init__(self, *, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[Any]:
        """Take the next bytes and return the values they complete. Raises RemoteProtocolError."""
        self._buffer += data
        values = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "little")
            if length > self._max_frame_bytes:
                raise RemoteProtocolError(f"a frame of {length} bytes")
            end = start + _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            values.append(_read(self._buffer[start + _LENGTH_BYTES : end]))
            start = end
        del self._buffer[:start]
        return values


def _read(body: bytearray) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"an unreadable frame: {error!r}") from None
