"""An agent that does what a test says: it speaks the real frames over a pair of memory channels.

It answers nothing by itself but, unless told otherwise, registers and gives signs of life.
"""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import trio
import trio.testing

from paddler.balancer.agent_link import AgentLinks
from paddler.messages.agent_socket import (
    PROTOCOL,
    AgentFrame,
    AgentStatus,
    BalancerFrame,
    Embed,
    Generate,
    Heartbeat,
    Part,
    Piece,
    Register,
    Status,
    Stop,
    encode_step,
    escape_text,
)
from paddler.messages.state import StateApplicationStatus
from paddler.messages.tokens import Done, StreamError, Terminal, Usage
from paddler.messages.wire import decode, encode

HEARTBEAT_INTERVAL = 1.0


def agent_status(*, slots: int = 1, version: int = 1, **changes: Any) -> AgentStatus:
    """Return the status of an agent that serves on `slots` slots."""
    status = AgentStatus(
        version=version,
        desired_slots_total=slots,
        slots_processing=0,
        slots_total=slots,
        download_current=0,
        download_filename=None,
        download_indeterminate=True,
        download_total=0,
        issues=(),
        model_path="/models/scripted.gguf",
        state_application_status=StateApplicationStatus.APPLIED,
        uses_chat_template_override=False,
    )
    return attrs.evolve(status, **changes)


def decode_balancer_frame(text: str) -> BalancerFrame:
    return cast("BalancerFrame", decode(text, cast("type[Any]", BalancerFrame)))


class ScriptedAgent:
    """The agent's end of a link."""

    def __init__(
        self,
        *,
        send_texts: trio.MemorySendChannel[str],
        receive_texts: trio.MemoryReceiveChannel[str],
        status: AgentStatus,
    ) -> None:
        self.status = status
        self.unlinked = trio.Event()
        """Set when the balancer's side of the link has returned."""
        self._send_texts = send_texts
        self._receive_texts = receive_texts
        self._parts: dict[int, list[str]] = {}

    def send_text(self, text: str) -> None:
        """Send any text at all."""
        self._send_texts.send_nowait(text)

    def send_frame(self, frame: AgentFrame) -> None:
        self.send_text(encode(frame, AgentFrame))

    def register(self, name: str | None = "agent-a", *, protocol: int = PROTOCOL) -> None:
        self.send_frame(Register(protocol=protocol, version="test", name=name, status=self.status))

    def report(self, **changes: Any) -> None:
        """Publish a status with these changes and the next version."""
        self.status = attrs.evolve(self.status, **{"version": self.status.version + 1, **changes})
        self.send_frame(Status(self.status))

    def step(self, *pieces: Piece) -> None:
        """Send what one decode step gave."""
        self.send_text(encode_step(list(pieces)))

    def token(self, request: int, text: str, letter: str = "C") -> None:
        self.step((request, letter, escape_text(text)))

    def done(self, request: int, usage: Usage = Usage()) -> None:  # noqa: B008 frozen
        self.step((request, "D", encode(Done(usage), Terminal)))

    def error(self, request: int, error: StreamError) -> None:
        self.step((request, "X", encode(error)))

    def bounce(self, request: int) -> None:
        self.step((request, "B", "null"))

    def hang_up(self) -> None:
        """Close the connection without a word."""
        self._send_texts.close()

    async def next_text(self) -> str:
        """Return the next message as it came. Raises trio.EndOfChannel after the last one."""
        return await self._receive_texts.receive()

    async def next_frame(self) -> BalancerFrame:
        """Return the next frame that is no heartbeat."""
        while True:
            frame = decode_balancer_frame(await self.next_text())
            if frame != Heartbeat():
                return frame

    async def next_frame_of(self, *kinds: type[Any]) -> Any:
        """Return the next frame of these kinds, and drop what comes before it."""
        while True:
            frame = await self.next_frame()
            if isinstance(frame, kinds):
                return frame

    async def next_request(self) -> Generate:
        """Return the next request, put together from its parts if it comes in parts."""
        frame = await self._next_whole_frame()
        assert isinstance(frame, Generate)
        return frame

    async def next_embedding(self) -> Embed:
        """Likewise, where it is one for embeddings."""
        frame = await self._next_whole_frame()
        assert isinstance(frame, Embed)
        return frame

    async def next_stop(self) -> Stop:
        frame = await self.next_frame_of(Stop)
        assert isinstance(frame, Stop)
        return frame

    async def _next_whole_frame(self) -> BalancerFrame:
        while True:
            frame = await self.next_frame_of(Generate, Embed, Part)
            if not isinstance(frame, Part):
                return cast("BalancerFrame", frame)
            self._parts.setdefault(frame.request, []).append(frame.text)
            if frame.last:
                return decode_balancer_frame("".join(self._parts.pop(frame.request)))

    async def live(self) -> None:
        """Give signs of life until cancelled, or until the connection is closed."""
        while True:
            await trio.sleep(HEARTBEAT_INTERVAL)
            try:
                self.send_frame(Heartbeat())
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                return


@asynccontextmanager
async def connected_agent(
    links: AgentLinks,
    agent_id: str = "agent-1",
    *,
    name: str | None = "agent-a",
    slots: int = 1,
    register: bool = True,
    alive: bool = True,
    unread_frames: float = math.inf,
) -> AsyncIterator[ScriptedAgent]:
    """Connect an agent for the duration of the block.

    With a finite `unread_frames` the connection takes only so many frames that the agent did not read.
    """
    # The agent's direction never blocks, so that a script needs no task of its own.
    send_to_balancer, receive_from_agent = trio.open_memory_channel[str](math.inf)
    send_to_agent, receive_from_balancer = trio.open_memory_channel[str](unread_frames)
    agent = ScriptedAgent(
        send_texts=send_to_balancer,
        receive_texts=receive_from_balancer,
        status=agent_status(slots=slots),
    )

    async def read(take: Callable[[str], None]) -> None:
        async for text in receive_from_agent:
            take(text)

    async def serve() -> None:
        with receive_from_agent, send_to_agent:
            await links.serve_agent(agent_id, read=read, send=send_to_agent.send)
        agent.unlinked.set()

    async with trio.open_nursery() as connection:
        connection.start_soon(serve)
        if alive:
            connection.start_soon(agent.live)
        if register:
            agent.register(name)
            await trio.testing.wait_all_tasks_blocked()
        with send_to_balancer, receive_from_balancer:
            yield agent
        connection.cancel_scope.cancel()
