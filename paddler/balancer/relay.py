"""Bring one request to an agent and its answer back: claim a slot, hand over, wait, clean up.

Pieces do not pass through here: the link's reader hands them to the reply by plain calls. This task
only sleeps until the request is over, and keeps the deadline between two items.
"""

import logging
import math

import trio

from paddler.balancer.agent_link import AgentLinks
from paddler.balancer.request_buffer import RequestBuffer, Slot
from paddler.balancer.running_requests import Reply, RunningRequest
from paddler.errors import BufferFull, BufferTimeout, LocalProtocolError, RequestRefused, ShuttingDown
from paddler.messages.inference import Request
from paddler.messages.tokens import StreamError
from paddler.routing.chains import chain_of

SHUTTING_DOWN = StreamError(503, str(ShuttingDown()))
NOT_HANDED_OVER = StreamError(500, "Failed to generate response")

FAILURE_REPORT_INTERVAL = 10.0
"""An overloaded balancer fails many requests; its log says so this often."""

log = logging.getLogger(__name__)


class Relay:
    """Serves requests with the agents that are connected."""

    def __init__(self, *, buffer: RequestBuffer, links: AgentLinks, item_timeout: float) -> None:
        self._buffer = buffer
        self._links = links
        self._item_timeout = item_timeout
        self._untold_failures = 0
        self._next_report = -math.inf

    async def serve(self, request: Request, reply: Reply) -> None:
        """Serve one request to its end.

        Exactly one terminal, a `D` or `F` piece or an error, reaches the reply, unless the task is
        cancelled. Cancellation leaves no ticket behind and no slot that nobody cares for: the agent
        is told to stop, and its link frees the slot.
        """
        try:
            async with self._buffer.slot(chain_of(request)) as slot:
                while await self._is_bounced(slot, request, reply):
                    await slot.claim_again()
        except RequestRefused as refusal:
            self._fail(reply, _stream_error(refusal))

    def shut_down(self) -> None:
        """End all requests, waiting and running, and refuse those that come later."""
        self._buffer.shut_down()
        self._links.end_requests(SHUTTING_DOWN)

    def _fail(self, reply: Reply, error: StreamError) -> None:
        """End a request with an error that the operator learns of, too: at most one line per interval."""
        reply.error(error)
        if error == SHUTTING_DOWN:
            return
        self._untold_failures += 1
        if trio.current_time() >= self._next_report:
            log.warning(
                "requests fail, %d since the last such line: %d %s",
                self._untold_failures,
                error.code,
                error.description,
            )
            self._untold_failures = 0
            self._next_report = trio.current_time() + FAILURE_REPORT_INTERVAL

    async def _is_bounced(self, slot: Slot, request: Request, reply: Reply) -> bool:
        """Run the request on the slot's agent; return True when the agent gave it back untouched."""
        try:
            running = self._links.hand_over(slot, request, reply)
        except LocalProtocolError:
            self._fail(reply, NOT_HANDED_OVER)
            return False
        try:
            in_time = await self._wait_for_end(running)
        finally:
            running.leave()
        if not in_time:
            self._fail(reply, _item_timeout(self._item_timeout))
        return running.bounced

    async def _wait_for_end(self, running: RunningRequest) -> bool:
        """Return True when the request is over, False when no item came for the item timeout.

        The timeout is looked at first, so one of zero wins over an item that is ready.
        """
        while not running.over.is_set():
            deadline = running.last_item + self._item_timeout
            if trio.current_time() >= deadline:
                return False
            with trio.move_on_at(deadline):
                await running.over.wait()
        return True


def _stream_error(refusal: RequestRefused) -> StreamError:
    match refusal:
        case BufferFull():
            return StreamError(503, "Buffered requests overflow")
        case BufferTimeout():
            return StreamError(504, "Waiting for available slot timed out")
        case ShuttingDown():
            return SHUTTING_DOWN
        case _:
            raise AssertionError(refusal)


def _item_timeout(timeout: float) -> StreamError:
    return StreamError(
        504,
        f"Inference timed out after {round(timeout * 1000)}ms waiting for next token. "
        "Increase --inference-item-timeout if the prompt requires longer processing.",
    )
