"""Claim a slot on an agent, or wait in line for one until the deadline.

Which ticket is next is decided in routing/waiting_line.py; this module only waits, wakes, and
gives slots back.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from paddler.balancer.changes import Changes
from paddler.errors import BufferFull, BufferTimeout, ShuttingDown
from paddler.routing.chains import NO_CHAIN, Chain
from paddler.routing.fleet import Agent, Fleet
from paddler.routing.waiting_line import Ticket, WaitingLine


class Slot:
    """One request's right to a slot, while its block lasts.

    It is *waiting* (its ticket stands in line), *held* (an agent is claimed), or *handed over*: then
    the link of the agent has the slot and either frees it with `RequestBuffer.release` or puts
    the request back in line with `bounce`.
    """

    def __init__(self, buffer: "RequestBuffer", ticket: Ticket, *, deadline: float) -> None:
        self.ticket = ticket
        self.deadline = deadline
        self.claimed: Agent | None = None
        self.wake = trio.Event()
        self._buffer = buffer

    @property
    def agent(self) -> Agent:
        """The agent whose slot is held."""
        assert self.claimed is not None, "no slot is held"
        return self.claimed

    def hand_over(self) -> Agent:
        """Leave the claimed slot to the caller, who gives it back."""
        agent = self.agent
        self.claimed = None
        return agent

    def bounce(self, agent: Agent) -> None:
        """Give back the slot of an agent that bounced the request, and return to the place in line."""
        self.ticket.refuse(agent)
        self._buffer.rejoin(self, agent)

    async def claim_again(self) -> None:
        """Wait for another slot after `bounce`, until the deadline of the first.

        Raises BufferTimeout, ShuttingDown. Cancellation leaves the ticket to the end of the block.
        """
        await self._buffer.wait_for_grant(self)


class RequestBuffer:
    """The waiting line in front of a fleet; `changes` is notified when `buffered` changed."""

    def __init__(self, fleet: Fleet, *, max_buffered_requests: int, timeout: float) -> None:
        self.changes = Changes()
        self._fleet = fleet
        self._line = WaitingLine(max_buffered_requests)
        self._timeout = timeout
        self._waiting: dict[Ticket, Slot] = {}
        self._announced = 0
        self._shutting_down = False

    @property
    def buffered(self) -> int:
        """How many requests wait for a slot now."""
        return len(self._line)

    @asynccontextmanager
    async def slot(self, chain: Chain = NO_CHAIN) -> AsyncIterator[Slot]:
        """Hold one slot, on the agent that suits this chain best, for the duration of the block.

        Raises BufferFull at once when no slot is free and the line has no room, BufferTimeout when
        none came free in time, ShuttingDown. Leaving the block, by cancellation too, gives back the
        place in line or the slot, unless the slot was handed over.
        """
        slot = Slot(self, self._line.issue(chain), deadline=trio.current_time() + self._timeout)
        try:
            self._claim_or_join(slot)
            await self.wait_for_grant(slot)
            yield slot
        finally:
            self._give_back(slot)

    def release(self, agent: Agent) -> None:
        """Free a slot that was handed over, and serve the next ticket with it."""
        self._fleet.release(agent)
        self.grant_free_slots()

    def grant_free_slots(self) -> None:
        """Serve the line; to be called after everything that may have freed a slot."""
        if not self._shutting_down:
            for ticket, agent in self._line.grant(self._fleet):
                slot = self._waiting.pop(ticket)
                slot.claimed = agent
                slot.wake.set()
        self._announce()

    def rejoin(self, slot: Slot, agent: Agent) -> None:
        """Put a slot's ticket back to its place in line and free the agent's slot, in this order."""
        self._join(slot)
        self.release(agent)

    def shut_down(self) -> None:
        """Refuse everyone who waits and everyone who comes later, with ShuttingDown."""
        self._shutting_down = True
        for slot in self._waiting.values():
            slot.wake.set()

    async def wait_for_grant(self, slot: Slot) -> None:
        """Return when the slot is held, at once if it is: a claim must not go stale before its use.

        Raises BufferTimeout, but never when a slot was granted in the very tick of the deadline.
        """
        while slot.claimed is None or not slot.claimed.connected:
            if self._shutting_down:
                raise ShuttingDown
            if slot.claimed is not None:  # the agent left between the grant and now; it never had the request
                self.rejoin(slot, slot.hand_over())
                continue
            with trio.move_on_at(slot.deadline):
                await slot.wake.wait()
            if slot.claimed is None and not self._shutting_down:
                raise BufferTimeout(self._timeout)
        if self._shutting_down:
            raise ShuttingDown

    def _claim_or_join(self, slot: Slot) -> None:
        if self._shutting_down:
            raise ShuttingDown
        slot.claimed = self._fleet.claim(slot.ticket.refusals, slot.ticket.chain)
        if slot.claimed is None:
            if self._line.is_full:
                raise BufferFull(self._line.limit)
            self._join(slot)
            self._announce()

    def _join(self, slot: Slot) -> None:
        slot.wake = trio.Event()
        self._line.join(slot.ticket)
        self._waiting[slot.ticket] = slot

    def _give_back(self, slot: Slot) -> None:
        if slot.ticket in self._line:
            self._line.leave(slot.ticket)
            del self._waiting[slot.ticket]
            self._announce()
        elif slot.claimed is not None:
            self.release(slot.hand_over())

    def _announce(self) -> None:
        if self._announced != len(self._line):
            self._announced = len(self._line)
            self.changes.notify()
