"""The services of a balancer, wired as its daemon does, and a reply that records."""

import attrs
import trio

from paddler.balancer.agent_link import AgentLinks, LinkTimeouts
from paddler.balancer.changes import Changes
from paddler.balancer.relay import Relay
from paddler.balancer.request_buffer import RequestBuffer
from paddler.messages.inference import ContinueFromRawPrompt
from paddler.messages.tokens import StreamError
from paddler.routing.fleet import Fleet

PROMPT = ContinueFromRawPrompt(max_tokens=16, raw_prompt="Once")


@attrs.frozen
class Services:
    fleet: Fleet
    fleet_changes: Changes
    buffer: RequestBuffer
    links: AgentLinks
    relay: Relay

    def slots(self) -> tuple[int, int]:
        return self.fleet.totals()


def make_services(
    *,
    max_buffered_requests: int = 10,
    buffered_request_timeout: float = 10.0,
    item_timeout: float = 30.0,
    liveness_timeout: float = 12.0,
    registration_timeout: float = 10.0,
    answer_timeout: float = 3.0,
) -> Services:
    fleet_changes = Changes()
    fleet = Fleet(fleet_changes.notify)
    buffer = RequestBuffer(
        fleet, max_buffered_requests=max_buffered_requests, timeout=buffered_request_timeout
    )
    timeouts = LinkTimeouts(
        registration=registration_timeout, liveness=liveness_timeout, answer=answer_timeout, item=item_timeout
    )
    links = AgentLinks(fleet=fleet, buffer=buffer, timeouts=timeouts)
    return Services(
        fleet, fleet_changes, buffer, links, Relay(buffer=buffer, links=links, item_timeout=item_timeout)
    )


@attrs.define
class RecordingReply:
    """Keeps what reached it, and insists that nothing follows the terminal."""

    pieces: list[tuple[str | None, str, str]] = attrs.field(factory=list)
    writes: int = 0
    errors: list[StreamError] = attrs.field(factory=list)
    ended: trio.Event = attrs.field(factory=trio.Event)

    def piece(self, agent_name: str | None, letter: str, text: str, *, more: bool = False) -> None:
        assert not self.ended.is_set(), "a piece after the terminal"
        self.pieces.append((agent_name, letter, text))
        self.writes += not more
        if letter in "DF":
            self.ended.set()

    def error(self, error: StreamError) -> None:
        assert not self.ended.is_set(), "an error after the terminal"
        self.errors.append(error)
        self.ended.set()

    @property
    def letters(self) -> str:
        return "".join(letter for _, letter, _ in self.pieces)
