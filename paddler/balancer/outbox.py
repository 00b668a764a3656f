"""What waits to be sent to one agent, in the order in which it is sent.

Requests can be long, so they travel in parts and give way: every other frame goes first, and several
requests take turns. Both kinds are bounded in bytes. All calls but `wait` are plain.
"""

import enum
from collections import deque

import attrs
import trio

from paddler.config import MAX_LINK_MESSAGE_BYTES
from paddler.messages.agent_socket import PART_CHARACTERS, BalancerFrame, Part
from paddler.messages.wire import encode

MAX_REQUEST_BYTES = MAX_LINK_MESSAGE_BYTES
"""Requests not yet sent: any single one fits when no other waits."""

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""Other frames not yet sent: two of the longest states (2 MiB of JSON, escaped) and thousands of stops."""


class Sent(enum.Enum):
    """How much of a request has left the outbox."""

    NOTHING = enum.auto()
    PART = enum.auto()
    ALL = enum.auto()


@attrs.define
class _Outgoing:
    """A request's frame, of which the first `sent` characters have left."""

    text: str
    sent: int = 0


class Outbox:
    """Frames on their way to one agent. Frames are ASCII, so characters are bytes."""

    def __init__(self) -> None:
        self._frames: deque[str] = deque()
        self._frame_bytes = 0
        self._requests: dict[int, _Outgoing] = {}  # the first is the next to send a part
        self._request_bytes = 0
        self._filled = trio.Event()

    def put(self, frame: str) -> bool:
        """Queue a frame that goes before all requests; False when there is no room."""
        if self._frame_bytes + len(frame) > MAX_FRAME_BYTES:
            return False
        self._frames.append(frame)
        self._frame_bytes += len(frame)
        self._filled.set()
        return True

    def put_request(self, number: int, frame: str) -> bool:
        """Queue the frame of a request, `Generate` or `Embed`; False when there is no room."""
        if self._request_bytes + len(frame) > MAX_REQUEST_BYTES:
            return False
        self._requests[number] = _Outgoing(frame)
        self._request_bytes += len(frame)
        self._filled.set()
        return True

    def withdraw(self, number: int) -> Sent:
        """Forget what is unsent of a request, and return how much had been sent already."""
        outgoing = self._requests.pop(number, None)
        if outgoing is None:
            return Sent.ALL
        self._request_bytes -= len(outgoing.text) - outgoing.sent
        return Sent.PART if outgoing.sent else Sent.NOTHING

    async def wait(self) -> None:
        """Return when there is something to take."""
        if not self._frames and not self._requests:
            self._filled = trio.Event()
        await self._filled.wait()

    def take(self) -> str | None:
        """Return the next frame to send, or None."""
        if self._frames:
            frame = self._frames.popleft()
            self._frame_bytes -= len(frame)
            return frame
        if self._requests:
            return self._take_from_request(next(iter(self._requests)))
        return None

    def _take_from_request(self, number: int) -> str:
        outgoing = self._requests.pop(number)
        if len(outgoing.text) <= PART_CHARACTERS:
            self._request_bytes -= len(outgoing.text)
            return outgoing.text
        piece = outgoing.text[outgoing.sent : outgoing.sent + PART_CHARACTERS]
        outgoing.sent += len(piece)
        self._request_bytes -= len(piece)
        last = outgoing.sent == len(outgoing.text)
        if not last:
            self._requests[number] = outgoing  # behind the others: requests take turns
        return encode(Part(request=number, text=piece, last=last), BalancerFrame)
