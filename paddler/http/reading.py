"""Read a connection also while what it sent before still waits to be handled.

Knows bytes only; what they mean and what an end of theirs leads to is the connection's.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import trio

INBOX_BYTES: Final = 64 * 1024
"""How much may wait to be handled; when it is reached, the peer has to wait, and is not seen to leave."""


class Reader:
    """Receives in one task and handles in another.

    A protocol may keep a piece for long: what follows a request waits until that is answered. Only
    who goes on receiving meanwhile learns that the peer has left, and that nobody wants the answer.
    """

    def __init__(
        self,
        stream: trio.SocketStream,
        handle: Callable[[bytes], Awaitable[None]],
        *,
        patience: Callable[[], float],
    ) -> None:
        self._stream = stream
        self._handle = handle
        self._patience = patience
        self._inbox = bytearray()
        self._is_handling = False
        self._at_once = False
        self._ended = False
        self._dropping = False
        self._reading = trio.CancelScope()
        self._filled = trio.Event()
        self._emptied = trio.Event()

    async def run(self) -> None:
        """Hand on what comes; at the peer's end an empty piece, if all before it was handled.

        If not, it may take as long as `patience` says then, and is cancelled after it.
        """
        with self._reading:
            async with trio.open_nursery() as reading:
                handling = trio.CancelScope()
                reading.start_soon(self._handle_until_end, handling)
                await self._receive()
                self._ended = True
                self._filled.set()
                if self._is_handling or self._inbox:
                    patience = self._patience()
                    if patience:
                        handling.deadline = trio.current_time() + patience
                    else:
                        handling.cancel()

    def handle_at_once(self) -> None:
        """From here on handle what comes where it is received: only for handlers that keep nothing long.

        That saves a round of the event loop for every piece.
        """
        self._at_once = True

    def drop_rest(self, *, within: float) -> None:
        """Handle nothing new, yet go on receiving until the peer's end, not longer than this. Plain call."""
        self._dropping = True
        self._inbox.clear()
        self._emptied.set()
        self._reading.deadline = min(self._reading.deadline, trio.current_time() + within)

    def cancel(self) -> None:
        """End `run` at once. Plain call."""
        self._reading.cancel()

    async def _receive(self) -> None:
        while True:
            try:
                data = await self._stream.receive_some(INBOX_BYTES - len(self._inbox))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            if self._dropping:
                continue
            if self._at_once and not self._inbox and not self._is_handling:
                await self._handle(bytes(data))
                continue
            self._inbox += data
            self._filled.set()
            while len(self._inbox) == INBOX_BYTES:
                self._emptied = trio.Event()
                await self._emptied.wait()

    async def _handle_until_end(self, handling: trio.CancelScope) -> None:
        with handling:
            while True:
                await self._filled.wait()
                if self._inbox:
                    data = bytes(self._inbox)
                    self._inbox.clear()
                    self._emptied.set()
                    self._is_handling = True
                    await self._handle(data)
                    self._is_handling = False
                elif self._ended:
                    await self._handle(b"")
                    return
                else:
                    self._filled = trio.Event()
