"""One connected agent: reader, writer, signs of life; and all of them together.

A link knows nothing of WebSockets, it is given a way to read and a way to send text. Reading never
waits for anyone: frames come, and pieces, statuses and answers are handed on, by plain calls.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import attrs
import trio

import paddler
from paddler.balancer.outbox import Outbox
from paddler.balancer.questions import Questions
from paddler.balancer.request_buffer import RequestBuffer, Slot
from paddler.balancer.running_requests import Reply, RunningRequest, RunningRequests
from paddler.errors import NoSuchAgent, RemoteProtocolError
from paddler.messages.agent_socket import (
    PROTOCOL,
    AgentFrame,
    AgentStatus,
    Answer,
    BalancerFrame,
    Goodbye,
    Heartbeat,
    Held,
    Register,
    SetState,
    Status,
    Welcome,
)
from paddler.messages.inference import Request
from paddler.messages.snapshots import ModelMetadata
from paddler.messages.state import ApplicableState, ChatTemplate
from paddler.messages.tokens import StreamError
from paddler.messages.wire import decode, encode, parse_json, structure
from paddler.routing.fleet import Agent, Fleet

log = logging.getLogger(__name__)

Read = Callable[[Callable[[str], None]], Awaitable[None]]
"""Gives each text message to a call that never raises, until there are no more; it may raise EOFError."""

Send = Callable[[str], Awaitable[None]]

AGENT_GONE = StreamError(502, "Agent controller connection closed")

_AGENT_FRAME = cast("type[Any]", AgentFrame)  # a union, which type checkers do not take for a type
_HEARTBEAT = encode(Heartbeat(), BalancerFrame)


@attrs.frozen(kw_only=True)
class LinkTimeouts:
    """Deadlines of a link; see the fields of the same names in BalancerConfig."""

    registration: float
    liveness: float
    answer: float
    item: float


class AgentLink:
    """The link to one agent.

    It is *new* until the agent registered, then `agent` and `requests` are set, and *ended* once `end`
    was called by anyone, for good. Whatever ends it ends everything on it in the same step.
    """

    def __init__(self, agent_id: str, *, fleet: Fleet, buffer: RequestBuffer, timeouts: LinkTimeouts) -> None:
        self.agent_id = agent_id
        self.agent: Agent | None = None
        self.requests: RunningRequests | None = None
        self.ended = False
        self._fleet = fleet
        self._buffer = buffer
        self._timeouts = timeouts
        self._outbox = Outbox()
        self._scope = trio.CancelScope()
        self._registered = trio.Event()
        self._last_sign = -math.inf
        self.questions = Questions(agent_id, send=self.send, answer_timeout=timeouts.answer)

    async def run(self, read: Read, send: Send, *, admit: Callable[[Register], None]) -> None:
        """Greet the agent, have it admitted when it registers, and serve it until the link ends."""
        with self._scope:
            async with trio.open_nursery() as link:
                link.start_soon(self._read_frames, read, admit)
                with self._failures_end_it(f"it did not register within {self._timeouts.registration:g} s"):
                    with trio.fail_after(self._timeouts.registration):
                        await send(encode(Welcome(PROTOCOL, paddler.__version__), BalancerFrame))
                        await self._registered.wait()
                if self.requests is not None and not self.ended:
                    link.start_soon(self._watch)
                    link.start_soon(self._write_frames, send)
                    link.start_soon(self.requests.end_drains)

    def register(self, register: Register) -> None:
        """Enter the agent into the fleet."""
        self.agent = self._fleet.register(self.agent_id, register.name, register.status)
        self.requests = RunningRequests(
            self.agent,
            buffer=self._buffer,
            outbox=self._outbox,
            send=self.send,
            item_timeout=self._timeouts.item,
        )

    def end(self, reason: str, level: int = logging.INFO) -> None:
        """End the link now, with one log line. A plain call; only the first one counts."""
        if self.ended:
            return
        self.ended = True
        log.log(level, "%s: link ended: %s", self.shown_name, reason)
        self._scope.cancel()
        if self.agent is not None and self.requests is not None:
            self._fleet.remove(self.agent)
            self.requests.end_all(AGENT_GONE)
        self.questions.end_all()

    def send(self, frame: str) -> None:
        """Queue a frame; an agent that let its outbox fill up loses its link."""
        if not self.ended and not self._outbox.put(frame):
            self.end("its outbox is full", logging.WARNING)

    async def _read_frames(self, read: Read, admit: Callable[[Register], None]) -> None:
        def take(frame: str) -> None:
            """Take a frame in the task of whoever reads the connection, which must not suffer from it."""
            if self.ended:
                return
            self._last_sign = trio.current_time()
            try:
                if self.requests is not None:
                    self._take(frame)
                else:
                    admit(_read_register(frame))
                    self._registered.set()
            except RemoteProtocolError as error:
                self.end(str(error), logging.WARNING)
            except Exception:  # border: one link
                log.exception("%s: link failed", self.shown_name)
                self.end("it failed", logging.WARNING)

        try:
            await read(take)
        except (EOFError, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.end("it disconnected")

    async def _watch(self) -> None:
        """End the link when no frame comes for too long; one timer, whatever the number of frames."""
        liveness = self._timeouts.liveness
        while True:
            due = self._last_sign + liveness
            if due <= trio.current_time():
                break
            await trio.sleep_until(due)
        self.end(f"no sign of life for {liveness:g} s", logging.WARNING)

    async def _write_frames(self, send: Send) -> None:
        with self._failures_end_it(f"it read nothing for {self._timeouts.liveness:g} s"):
            while not self.ended:
                with trio.move_on_after(self._timeouts.liveness / 3):
                    await self._outbox.wait()
                with trio.fail_after(self._timeouts.liveness):
                    await send(self._outbox.take() or _HEARTBEAT)
                # Quart's send may return without a checkpoint when the peer is gone.
                await trio.lowlevel.checkpoint()

    @contextmanager
    def _failures_end_it(self, too_slow: str) -> Iterator[None]:
        """End the link when the block fails as connections do; a bug passes."""
        try:
            yield
        except trio.TooSlowError:
            self.end(too_slow, logging.WARNING)
        except RemoteProtocolError as error:
            self.end(str(error), logging.WARNING)
        except (EOFError, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self.end("it disconnected")

    def _take(self, frame: str) -> None:
        """Act on one frame of a registered agent."""
        assert self.agent is not None
        assert self.requests is not None
        if frame.startswith("S"):
            self.requests.feed(frame)
            return
        match decode(frame, _AGENT_FRAME):
            case Status(status):
                self._report_changes(self.agent.status, status)
                self._fleet.update(self.agent, status)
                # Also when it shows nothing new: a status readmits requests that the agent had bounced.
                self._buffer.grant_free_slots()
            case Held(prefixes):
                self.agent.prefixes.report({held.request: held.tokens for held in prefixes})
            case Answer() as answer:
                self.questions.settle(answer)
            case Heartbeat():
                pass
            case Goodbye():
                self.end("it said goodbye")
            case Register():
                raise RemoteProtocolError("it registered twice on one connection")

    def _report_changes(self, known: AgentStatus, status: AgentStatus) -> None:
        """Log what an operator wants to know of an agent without looking at it."""
        if status.issues != known.issues:
            if status.issues:
                news = [issue for issue in status.issues if issue not in known.issues] or status.issues
                more = f" (and {len(status.issues) - 1} more)" if len(status.issues) > 1 else ""
                log.warning("%s has an issue: %s%s", self.shown_name, news[0], more)
            else:
                log.info("%s has no issue any more", self.shown_name)
        if status.slots_total != known.slots_total:
            log.info(
                "%s serves %d of %d slots", self.shown_name, status.slots_total, status.desired_slots_total
            )

    @property
    def shown_name(self) -> str:
        """The agent as log lines name it."""
        name = self.agent.name if self.agent is not None else None
        return f"agent {self.agent_id!r}" if name is None else f"agent {name!r} ({self.agent_id})"


class AgentLinks:
    """All agents that are connected, and the state that each of them is to serve."""

    def __init__(self, *, fleet: Fleet, buffer: RequestBuffer, timeouts: LinkTimeouts) -> None:
        self._fleet = fleet
        self._buffer = buffer
        self._timeouts = timeouts
        self._links: set[AgentLink] = set()
        self._registered: dict[str, AgentLink] = {}
        self._set_state: str | None = None
        self._shutting_down = False

    async def serve_agent(self, agent_id: str, *, read: Read, send: Send) -> None:
        """Serve one agent's connection until it ends; the caller closes it then.

        Cancellation ends the link like a lost connection: the agent leaves the fleet, and its requests
        end with an error.
        """
        if self._shutting_down:
            return
        link = AgentLink(agent_id, fleet=self._fleet, buffer=self._buffer, timeouts=self._timeouts)
        self._links.add(link)
        try:
            await link.run(read, send, admit=lambda register: self._admit(link, register))
        except Exception:  # one link must not take the others down
            log.exception("agent %r: link failed", agent_id)
        finally:
            link.end("its connection ended")
            self._links.remove(link)
            if self._registered.get(agent_id) is link:  # and not the one that replaced it
                del self._registered[agent_id]

    def hand_over(self, slot: Slot, request: Request, reply: Reply) -> RunningRequest:
        """Give a request and the slot it holds to the link of the slot's agent.

        Raises LocalProtocolError, and leaves the slot alone, when the link cannot take the request.
        """
        requests = self._registered[slot.agent.id].requests
        assert requests is not None
        return requests.hand_over(slot, request, reply)

    def end_requests(self, error: StreamError) -> None:
        """End every request at every agent with this error; the agents are told to stop."""
        for link in tuple(self._registered.values()):
            if link.requests is not None:
                link.requests.end_all(error)

    async def ask(self, agent_id: str, about: str) -> ChatTemplate | ModelMetadata | None:
        """Ask an agent for its `chat_template_override` or `model_metadata`.

        Raises NoSuchAgent, AgentGone, AnswerTimeout, and LocalProtocolError when it cannot be asked.
        """
        link = self._registered.get(agent_id)
        if link is None or link.ended:
            raise NoSuchAgent(agent_id)
        answer = await link.questions.ask(about)
        match about:
            case "chat_template_override":
                return answer.chat_template_override
            case "model_metadata":
                return answer.model_metadata
            case _:
                raise AssertionError(about)

    def push_state(self, state: ApplicableState) -> None:
        """Send a state to all agents, and to every agent that registers from now on."""
        self._set_state = encode(SetState(state), BalancerFrame)
        for link in tuple(self._registered.values()):
            link.send(self._set_state)

    def shut_down(self) -> None:
        """End all links, and admit no more."""
        self._shutting_down = True
        for link in tuple(self._links):
            link.end("balancer is shutting down")

    def _admit(self, link: AgentLink, register: Register) -> None:
        """Take an agent into the fleet; of two connections with one id the newer one wins."""
        older = self._registered.get(link.agent_id)
        if older is not None:
            older.end("a newer connection has the same id")
        link.register(register)
        self._registered[link.agent_id] = link
        log.info("%s registered, Paddler %s", link.shown_name, register.version)
        if self._set_state is not None:
            link.send(self._set_state)
        self._buffer.grant_free_slots()


def _read_register(frame: str) -> Register:
    """Read an agent's first frame. Raises RemoteProtocolError with words for the operator."""
    try:
        message = parse_json(frame)
    except RemoteProtocolError:
        message = None
    match message:
        case {"Register": {"protocol": protocol, "version": version}} if protocol != PROTOCOL:
            raise RemoteProtocolError(
                f"it speaks link protocol {protocol!r} (version {version!r}), this balancer speaks "
                f"{PROTOCOL} (version {paddler.__version__!r}): run the same version on both sides"
            )
        case {"Register": payload}:
            return structure(payload, Register)
        case _:
            raise RemoteProtocolError(
                "it does not speak this balancer's link protocol: is it another Paddler?"
            )
