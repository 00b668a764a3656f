"""Connections that wait for another request: so many at most that others find descriptors."""

import resource
from typing import Final, Protocol

MAX_IDLE: Final = 10_000
"""So many connections of a service may wait for another request, and not more than …"""

IDLE_SHARE: Final = 0.25
"""… this share of the descriptors that we may have; of more, the longest idle one ends."""


def most_idle() -> int:
    """Return how many may wait, by the descriptors that this process may have."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_IDLE
    return min(MAX_IDLE, max(1, int(descriptors * IDLE_SHARE)))


class _Connection(Protocol):
    def abort(self) -> None: ...


class IdleConnections:
    """The connections that wait for another request, the longest idle first. All calls are plain."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[_Connection, None] = {}

    def add(self, connection: _Connection) -> None:
        """Take one more, and end the one that waits longest when they are too many."""
        self._waiting[connection] = None
        if len(self._waiting) > self._most:
            longest = next(iter(self._waiting))
            self.discard(longest)
            longest.abort()

    def discard(self, connection: _Connection) -> None:
        self._waiting.pop(connection, None)
