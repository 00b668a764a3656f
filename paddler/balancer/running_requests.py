"""The requests at one agent, from their hand-over to the agent's word that they ended.

Theory of operation. A request is

  forwarding   its pieces go to its reply;
  draining     its relay left, the agent was told to stop; pieces are discarded, the slot is not free;
  over         its number means nothing any more; late pieces of it are dropped.

  forwarding → draining   `leave`: client gone, item timeout
  forwarding → over       a terminal piece, the link's end, shutdown, `leave` before all of it was sent
  draining → over         a terminal piece, the link's end, shutdown, no item for another item timeout

Whatever moves a request to *over* gives its slot back in the same step, and a reply that is
still forwarded to gets its terminal there. All moves are plain calls.
"""

import logging
from collections.abc import Callable
from itertools import zip_longest
from typing import TYPE_CHECKING, NoReturn, Protocol

import attrs
import trio

from paddler.balancer.outbox import Outbox, Sent
from paddler.errors import LocalProtocolError, RemoteProtocolError
from paddler.messages.agent_socket import TERMINAL_LETTERS, BalancerFrame, Stop, decode_step, request_frame
from paddler.messages.inference import Request
from paddler.messages.tokens import StreamError
from paddler.messages.wire import decode, encode

if TYPE_CHECKING:
    from paddler.balancer.request_buffer import RequestBuffer, Slot
    from paddler.routing.fleet import Agent

log = logging.getLogger(__name__)


class Reply(Protocol):
    """Where the messages of one request go. Plain calls that never block and never raise."""

    def piece(self, agent_name: str | None, letter: str, text: str, *, more: bool = False) -> None:
        """Take one piece: a letter of messages/agent_socket.py, C R T U E D, or V F, and its JSON.

        With `more` the next one follows within this step, and both may travel together.
        """

    def error(self, error: StreamError) -> None:
        """Take the error that ends the request."""


@attrs.define(eq=False)
class RunningRequest:
    """One request at an agent."""

    number: int
    slot: "Slot"
    reply: Reply
    requests: "RunningRequests"
    last_item: float
    """When the agent last gave an item; before that, of the hand-over; in a drain, at least its begin."""
    draining: bool = False
    bounced: bool = False
    over: trio.Event = attrs.field(factory=trio.Event)

    def leave(self) -> None:
        """Let nothing more reach the reply, and have the agent stop unless the request is over."""
        self.requests.leave(self)


class RunningRequests:
    """All requests at one agent, by the number that they have on its link.

    `send` takes a frame for the agent and may end the link, which comes back here as `end_all`.
    """

    def __init__(
        self,
        agent: "Agent",
        *,
        buffer: "RequestBuffer",
        outbox: Outbox,
        send: Callable[[str], None],
        item_timeout: float,
    ) -> None:
        self._agent = agent
        self._buffer = buffer
        self._outbox = outbox
        self._send = send
        self._item_timeout = item_timeout
        self._running: dict[int, RunningRequest] = {}
        self._given = 0
        self._drain_began = trio.Event()

    def hand_over(self, slot: "Slot", request: Request, reply: Reply) -> RunningRequest:
        """Queue a request for the agent and take its slot over.

        Raises LocalProtocolError, and leaves the slot where it is, when the outbox has no room.
        """
        number = self._given + 1
        if not self._outbox.put_request(number, encode(request_frame(number, request), BalancerFrame)):
            raise LocalProtocolError(f"no room for another request in the outbox of agent {self._agent.id}")
        self._given = number
        slot.hand_over()
        self._agent.prefixes.note(number, slot.ticket.chain, arrival=slot.ticket.number)
        running = RunningRequest(number, slot, reply, self, last_item=trio.current_time())
        self._running[number] = running
        return running

    def feed(self, frame: str) -> None:
        """Hand the pieces of a step frame to their replies. Raises RemoteProtocolError.

        This runs once for every token that passes the balancer.
        """
        now = trio.current_time()
        name = self._agent.name
        pieces = decode_step(frame)
        followers = [number for number, _, _ in pieces[1:]]
        for (number, letter, text), follower in zip_longest(pieces, followers):
            running = self._running.get(number)
            if running is None:
                if not 0 < number <= self._given:
                    raise RemoteProtocolError(f"a piece for request {number}, which was never given")
                continue
            running.last_item = now
            if letter in TERMINAL_LETTERS:
                self._end(running, letter, text)
            elif not running.draining:
                running.reply.piece(name, letter, text, more=follower == number)

    def leave(self, running: RunningRequest) -> None:
        """Take a request from *forwarding* to *draining*, or to *over* if the agent has not got all of it."""
        if running.draining or running.over.is_set():
            return
        running.draining = True
        running.last_item = trio.current_time()
        sent = self._outbox.withdraw(running.number)
        if sent is not Sent.ALL:  # the agent cannot compute what it has not got
            self._close(running)
        if sent is not Sent.NOTHING:
            self._send(encode(Stop(running.number), BalancerFrame))
            self._drain_began.set()

    def end_all(self, error: StreamError) -> None:
        """End all requests now, those that are forwarded with this error, and tell the agent to stop."""
        while self._running:
            running = next(iter(self._running.values()))
            if not running.draining:
                running.reply.error(error)
                self.leave(running)
            self._close(running)

    async def end_drains(self) -> NoReturn:
        """Free the slots of requests whose agent has not confirmed its stop in time."""
        while True:
            drains = [running for running in self._running.values() if running.draining]
            now = trio.current_time()
            for running in drains:
                if running.last_item + self._item_timeout <= now:
                    log.warning(
                        "agent %r: request %d was not confirmed to have stopped; its slot is freed anyway",
                        self._agent.id,
                        running.number,
                    )
                    self._close(running)
            # The timeout is one for all: a drain that begins later ends later, and needs no wake-up.
            ends = [running.last_item for running in drains if not running.over.is_set()]
            if not ends:
                self._drain_began = trio.Event()
                await self._drain_began.wait()
            else:
                await trio.sleep_until(min(ends) + self._item_timeout)

    def _end(self, running: RunningRequest, letter: str, text: str) -> None:
        """Take an agent's terminal piece."""
        if running.draining:
            self._close(running)
        elif letter == "B":
            running.bounced = True
            self._forget(running)
            running.slot.bounce(self._agent)
        else:
            if letter == "X":
                running.reply.error(decode(text, StreamError))
            else:
                running.reply.piece(self._agent.name, letter, text)
            self._close(running)

    def _close(self, running: RunningRequest) -> None:
        """Free the slot, once."""
        if not running.over.is_set():
            self._forget(running)
            self._buffer.release(self._agent)

    def _forget(self, running: RunningRequest) -> None:
        del self._running[running.number]
        self._agent.prefixes.end(running.number)
        running.over.set()
