"""Tickets in order of arrival, with a limit. Decides which ticket is next; never waits or wakes.

Theory of operation. A ticket is issued when its request arrives, and its number is that order for
ever. It joins the line when no slot is free, leaves it when `grant` found it an agent or its
request gave up, and may join again when the agent bounced the request or vanished: then it stands
where its number puts it, before everybody who came later.

`grant` is called after everything that can free a slot. So between two calls no ticket in
line could be given any free slot, and a newcomer who finds one overtakes nobody. (A slot may be free while
tickets wait: those that this agent has just bounced.)
"""

from bisect import bisect_left
from operator import attrgetter

import attrs

from paddler.routing.chains import NO_CHAIN, Chain
from paddler.routing.fleet import Agent, Fleet

_arrival = attrgetter("number")


@attrs.define(eq=False)
class Ticket:
    """A request's place in the order of arrival."""

    number: int
    chain: Chain = NO_CHAIN
    refusals: dict[Agent, int] = attrs.field(factory=dict)
    """Agents that bounced this request, each with the count of its reports at that time."""

    def refuse(self, agent: Agent) -> None:
        """Note that the agent bounced this request: not there again before its next status."""
        self.refusals[agent] = agent.reports


class WaitingLine:
    """The tickets that wait; a limit of zero or less admits no newcomers."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tickets: list[Ticket] = []  # by number
        self._issued = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, ticket: Ticket) -> bool:
        place = self._place(ticket)
        return place < len(self._tickets) and self._tickets[place] is ticket

    @property
    def is_full(self) -> bool:
        """Whether newcomers are refused; who comes back is not."""
        return len(self._tickets) >= self.limit

    def issue(self, chain: Chain = NO_CHAIN) -> Ticket:
        """Return the ticket of a request that arrives now; `chain` says which agents suit it best."""
        self._issued += 1
        return Ticket(self._issued, chain)

    def join(self, ticket: Ticket) -> None:
        """Put a ticket where its arrival puts it, whatever the limit."""
        assert ticket not in self, "a ticket stands in line once"
        self._tickets.insert(self._place(ticket), ticket)

    def leave(self, ticket: Ticket) -> None:
        """Take out a ticket whose request gave up."""
        assert ticket in self, "only who stands in line can leave it"
        del self._tickets[self._place(ticket)]

    def grant(self, fleet: Fleet) -> list[tuple[Ticket, Agent]]:
        """Claim every slot that a ticket in line may have, first come first served.

        The tickets served are out of the line afterwards.
        """
        granted: list[tuple[Ticket, Agent]] = []
        place = 0
        while place < len(self._tickets):
            ticket = self._tickets[place]
            agent = fleet.claim(ticket.refusals, ticket.chain)
            if agent is not None:
                del self._tickets[place]
                granted.append((ticket, agent))
            elif ticket.refusals:
                place += 1  # a free slot may be left that only this ticket refuses
            else:
                break
        return granted

    def _place(self, ticket: Ticket) -> int:
        return bisect_left(self._tickets, ticket.number, key=_arrival)
