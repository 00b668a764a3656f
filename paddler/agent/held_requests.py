"""Tell the balancer which of its requests the engine holds: generations become request numbers again."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

from paddler.engine.pipe import Held
from paddler.messages import agent_socket

MAX_REMEMBERED = 4096
"""Generations whose requests are known; the oldest are forgotten, as if nobody held them."""

SendHeld = Callable[[agent_socket.Held], None]


class HeldRequests:
    """The generations of one link, by the engine's number; those of an older link mean nothing to a newer."""

    def __init__(self, running: Container[int]) -> None:
        self._running = running
        self._requests: dict[int, int] = {}
        self._send: SendHeld | None = None
        self._told = agent_socket.Held(())

    @contextmanager
    def connected(self, send: SendHeld | None) -> Iterator[None]:
        """Send by `send` for the duration of the block, one link's life."""
        self._requests.clear()
        self._told = agent_socket.Held(())
        self._send = send
        try:
            yield
        finally:
            self._send = None

    def remember(self, generation: int, number: int) -> None:
        """Take note which request a generation belongs to."""
        self._requests[generation] = number
        if len(self._requests) > MAX_REMEMBERED:
            del self._requests[next(iter(self._requests))]

    def report(self, held: Held) -> None:
        """Take the engine's word for what it holds, and pass on what is new to the balancer.

        A report that follows the end of a generation and lacks it is the last word on it.
        """
        tokens = dict(held.prefixes)
        self._requests = {
            generation: number
            for generation, number in self._requests.items()
            if generation in tokens or generation in self._running
        }
        told = agent_socket.Held(
            tuple(
                agent_socket.HeldPrefix(number, tokens[generation])
                for generation, number in self._requests.items()
                if tokens.get(generation, 0) > 0
            )
        )
        if told != self._told:
            self._told = told
            if self._send is not None:
                self._send(told)
