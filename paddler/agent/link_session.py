"""One connection to the balancer: its frames, from the greeting to the farewell.

It knows nothing of WebSockets: it is given a connection that takes and gives text.
"""

import logging
from collections import deque
from typing import Any, Protocol, assert_never, cast

import attrs
import trio

import paddler
from paddler.agent.reconciliation import Reconciliation
from paddler.agent.slots import Slots
from paddler.agent.status import StatusBoard
from paddler.config import MAX_LINK_MESSAGE_BYTES
from paddler.errors import RemoteProtocolError
from paddler.messages.agent_socket import (
    PROTOCOL,
    AgentFrame,
    Answer,
    Ask,
    BalancerFrame,
    Embed,
    Generate,
    Goodbye,
    Heartbeat,
    Held,
    Part,
    Piece,
    Register,
    SetState,
    Status,
    Stop,
    Welcome,
    encode_step,
)
from paddler.messages.tokens import Done, Terminal, Usage
from paddler.messages.wire import decode, encode

MAX_OUTBOX_CHARACTERS = MAX_LINK_MESSAGE_BYTES
"""A balancer that has not read that much loses its link."""

_BALANCER_FRAME = cast("type[Any]", BalancerFrame)  # a union, which type checkers do not take for a type[T]
_STOPPED_BEFORE_IT_CAME = encode(Done(Usage()), Terminal)

logger = logging.getLogger(__name__)


class Connection(Protocol):
    """Text messages in both directions; each call raises EOFError when the connection is closed."""

    async def receive(self) -> str: ...

    def write(self, text: str) -> bool:
        """Take a message, behind those before it; say whether nothing is left to flush."""

    async def flush(self) -> None:
        """Wait until all that was written has been sent. Cancelled, it may leave half a message."""


class LinkSession:
    """The agent's side of one connection.

    Frames are written through: while the writer is *parked* nothing waits to be sent, and a frame goes
    to the socket by a plain call. What is not taken there wakes the writer, and until it has parked
    again frames line up in the outbox.
    """

    def __init__(
        self,
        *,
        name: str | None,
        board: StatusBoard,
        slots: Slots,
        reconciliation: Reconciliation,
        liveness_timeout: float,
        farewell_timeout: float,
        connection: Connection,
    ) -> None:
        self._name = name
        self._board = board
        self._slots = slots
        self._reconciliation = reconciliation
        self._liveness_timeout = liveness_timeout
        self._farewell_timeout = farewell_timeout
        self._connection = connection
        self._scope = trio.CancelScope()
        self._reason = ""
        self._registered = self._board.status
        self.was_accepted = False
        self._outbox: deque[str | None] = deque()  # None stands for the status of the moment it is sent
        self._outbox_characters = 0
        self._is_status_due = False
        self._is_parked = False
        self._is_flushed = True
        self._wakeup = trio.Event()
        self._parts: dict[int, _Parts] = {}

    async def run(self) -> str:
        """Serve the connection until it ends, and return why it did.

        Cancelled, it says goodbye, unless a frame was left half sent. Requests end with it.
        """
        try:
            with self._slots.connected(self._send_step, self._send_held), self._scope:
                await self._greet()
                if not self._reason:
                    self.was_accepted = True
                    await self._serve()
        finally:
            if not self._reason:  # nothing ended it but our own stop
                with trio.CancelScope(shield=True, deadline=trio.current_time() + self._farewell_timeout):
                    await self._say_goodbye()
        return self._reason

    async def _greet(self) -> None:
        """Exchange the first frames; they carry protocol numbers, so that both sides can refuse."""
        register = Register(PROTOCOL, paddler.__version__, self._name, self._registered)
        try:
            with trio.fail_after(self._liveness_timeout):
                self._is_flushed = self._connection.write(encode(register, AgentFrame))
                await self._flush()
                welcome = decode(await self._connection.receive(), _BALANCER_FRAME)
        except trio.TooSlowError:
            self._end(f"it did not answer within {self._liveness_timeout:g} s")
        except RemoteProtocolError:
            self._end("it does not speak the link protocol of this Paddler")
        except EOFError:
            self._end("it closed the connection before it answered")
        else:
            if not isinstance(welcome, Welcome):
                self._end("it does not speak the link protocol of this Paddler")
            elif welcome.protocol != PROTOCOL:
                self._end(
                    f"it speaks link protocol {welcome.protocol} (Paddler {welcome.version}), this agent "
                    f"{PROTOCOL} (Paddler {paddler.__version__}): use equal versions"
                )
            else:
                logger.info("linked to the balancer, Paddler %s", welcome.version)

    async def _serve(self) -> None:
        async with trio.open_nursery() as link:
            link.start_soon(self._write_frames)
            link.start_soon(self._publish_status)
            await self._read_frames(link)

    def _end(self, reason: str) -> None:
        """End the link; the first reason counts."""
        self._reason = self._reason or reason
        self._scope.cancel()

    # Reading.

    async def _read_frames(self, requests: trio.Nursery) -> None:
        """Take frames until the link ends; one must come in time, and none is waited upon."""
        try:
            while True:
                with trio.fail_after(self._liveness_timeout):
                    text = await self._connection.receive()
                self._take(decode(text, _BALANCER_FRAME), requests)
        except trio.TooSlowError:
            self._end(f"no sign of life for {self._liveness_timeout:g} s")
        except RemoteProtocolError as error:
            self._end(f"it broke the protocol: {error}")
        except EOFError:
            self._end("the connection was closed")

    def _take(self, frame: BalancerFrame, requests: trio.Nursery) -> None:
        match frame:
            case SetState(state):
                self._reconciliation.receive(state)
            case Generate(number, body) | Embed(number, body):
                requests.start_soon(self._slots.run, self._slots.accept(number, body))
            case Part():
                self._take_part(frame, requests)
            case Stop(number):
                if self._parts.pop(number, None) is not None:
                    self._send_step([(number, "D", _STOPPED_BEFORE_IT_CAME)])
                self._slots.stop(number)
            case Ask():
                self._put(encode(self._answer(frame), AgentFrame))
            case Heartbeat():
                pass  # it came: that is all it says
            case Welcome():
                raise RemoteProtocolError("a second Welcome")
            case _:
                assert_never(frame)

    def _take_part(self, part: Part, requests: trio.Nursery) -> None:
        parts = self._parts.setdefault(part.request, _Parts())
        parts.texts.append(part.text)
        parts.characters += len(part.text)
        if parts.characters > MAX_LINK_MESSAGE_BYTES:
            raise RemoteProtocolError(f"request {part.request} is longer than {MAX_LINK_MESSAGE_BYTES} bytes")
        if part.last:
            frame = decode("".join(self._parts.pop(part.request).texts), _BALANCER_FRAME)
            if not isinstance(frame, Generate | Embed) or frame.request != part.request:
                raise RemoteProtocolError(f"the parts of request {part.request} are not a request")
            self._take(frame, requests)

    def _answer(self, question: Ask) -> Answer:
        match question.about:
            case "chat_template_override":
                state = self._reconciliation.newest_state
                template = state.chat_template_override if state is not None else None
                return Answer(question.question, chat_template_override=template)
            case "model_metadata":
                return Answer(question.question, model_metadata=self._reconciliation.model_metadata)
            case _:
                return Answer(question.question)

    # Writing.

    def _send_step(self, pieces: list[Piece]) -> None:
        self._put(encode_step(pieces))

    def _send_held(self, held: Held) -> None:
        self._put(encode(held, AgentFrame))

    def _put(self, frame: str) -> None:
        if self._is_parked:
            self._write(frame)
            return
        self._outbox_characters += len(frame)
        if self._outbox_characters > MAX_OUTBOX_CHARACTERS:
            self._end("it does not read")
            return
        self._outbox.append(frame)

    async def _publish_status(self) -> None:
        """Queue a status after every change and in silence; changes before it is sent are merged.

        Sent often enough, statuses are all the signs of life that the balancer needs.
        """
        published = self._registered
        while True:
            with trio.move_on_after(self._liveness_timeout / 3):
                await self._board.newer_than(published)
            published = self._board.status
            if self._is_parked:
                self._write(encode(Status(published), AgentFrame))
            elif not self._is_status_due:
                self._is_status_due = True
                self._outbox.append(None)
            await trio.lowlevel.checkpoint()  # the writer's turn, if changes come without end

    async def _write_frames(self) -> None:
        """Flush what a plain call could not send, then the outbox; nobody else sends meanwhile."""
        try:
            while True:
                with trio.fail_after(self._liveness_timeout):
                    await self._flush()
                if self._outbox:
                    self._write(self._next_frame())
                else:
                    self._wakeup = trio.Event()
                    self._is_parked = True
                    await self._wakeup.wait()
        except trio.TooSlowError:
            self._end(f"it read nothing for {self._liveness_timeout:g} s")
        except EOFError:
            self._end("the connection was closed")
        finally:
            self._is_parked = False

    def _next_frame(self) -> str:
        frame = self._outbox.popleft()
        if frame is None:
            self._is_status_due = False
            return encode(Status(self._board.status), AgentFrame)
        self._outbox_characters -= len(frame)
        return frame

    def _write(self, frame: str) -> None:
        try:
            self._is_flushed = self._connection.write(frame)
        except EOFError:
            self._end("the connection was closed")
            return
        if not self._is_flushed:
            self._is_parked = False
            self._wakeup.set()

    async def _flush(self) -> None:
        await self._connection.flush()
        self._is_flushed = True

    async def _say_goodbye(self) -> None:
        """Say goodbye, unless a frame is still half sent: the balancer does not read, why wait for it?"""
        if not self._is_flushed:
            return
        try:
            self._connection.write(encode(Goodbye(), AgentFrame))
            await self._connection.flush()
        except EOFError:
            pass  # the balancer left first


@attrs.define
class _Parts:
    """What has come of a long request."""

    texts: list[str] = attrs.Factory(list)
    characters: int = 0
