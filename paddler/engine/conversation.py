"""The talk with one engine process in both directions, and the watch over it.

Its death is the end of its stream, its hang a deadline; both are raised as EngineFailed by whichever
task meets them first.
"""

import logging
import os
from collections import deque
from collections.abc import Callable

import trio

from paddler.config import EngineTimeouts
from paddler.engine.child import EngineChild
from paddler.engine.pipe import (
    REPORTS,
    Advance,
    Command,
    Embedded,
    Encoding,
    FrameReader,
    Held,
    Log,
    Report,
    Turn,
    pack,
)
from paddler.engine.vitals import Pulse
from paddler.errors import EngineDied, EngineHung, RemoteProtocolError

_LOG_LEVELS = {3: logging.WARNING, 4: logging.WARNING}
"""llama.cpp's levels to ours while it serves; the rest is for debugging. So is all that it says while it
loads: a refusal carries its reason, and is tried again every second."""

_LOOKS_PER_STANDSTILL = 8
_TURNS_TO_A_HANG = 20
_TURNS_REMEMBERED = 64
"""Long enough for the slow turns of a prompt to be among them, and one stall is soon forgotten."""

_LAST_OUTPUT_GRACE = 1.0
_READ_BYTES = 64 * 1024
_MAX_LINE_BYTES = 64 * 1024
_MAX_LAST_WORDS = 500


logger = logging.getLogger(__name__)


class Conversation:
    """What one engine process is told and tells, and the signs of its life."""

    def __init__(self, child: EngineChild, timeouts: EngineTimeouts) -> None:
        self.child = child
        self.timeouts = timeouts
        self.loading = True
        self.open_generations: set[int] = set()
        self._offloaded = False
        self._reader = FrameReader[Report](REPORTS)
        self._received: deque[Report] = deque()
        self._last_words = ""
        self._output_ended = trio.Event()
        self._silence = 0.0
        self._is_encoding = False
        self._turn_times = deque([0.0], maxlen=_TURNS_REMEMBERED)

    def begin_serving(self, open_generations: set[int], *, offloaded: bool) -> None:
        """From here on the process must work only while this set, which others fill, is not empty.

        Where the model is `offloaded` it may do so without CPU time: then only being stopped is standing
        still, and every other hang is left to the step's deadline.
        """
        self.loading = False
        self._offloaded = offloaded
        self.open_generations = open_generations

    async def send(self, command: Command) -> None:
        try:
            await self.child.stream.send_all(pack(command))
        except trio.BrokenResourceError:
            pass  # it died: whoever reads tells why

    async def receive(self) -> Report:
        """Return the next report. Raises EngineDied when there will be none."""
        while not self._received:
            try:
                data = await self._read()
                reports = self._reader.feed(data)
            except RemoteProtocolError as error:
                self.child.kill()
                raise EngineDied(f"{error} on its pipe", self._last_words) from None
            if not data:
                raise await self._death()
            self._received.extend(reports)
        return self._received.popleft()

    async def _read(self) -> bytes:
        """Return what the process sent; nothing when it has ended.

        A stream would try before it waits: one futile call of the kernel for every token.
        """
        socket = self.child.stream.socket
        while True:
            await trio.lowlevel.wait_readable(socket)
            try:
                return os.read(socket.fileno(), _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    async def receive_within(self, patience: float) -> Report:
        """Return the next report while loading. Raises EngineDied, EngineHung."""
        try:
            with trio.fail_after(patience):
                return await self.receive()
        except trio.TooSlowError:
            self.child.kill()
            raise EngineHung(patience, self._last_words) from None

    async def read_turns(
        self,
        on_turn: Callable[[list[Advance]], None],
        on_held: Callable[[Held], None] = lambda _: None,
        on_embedded: Callable[[Embedded], None] = lambda _: None,
    ) -> None:
        while True:
            report = await self.receive()
            if isinstance(report, Held):
                on_held(report)
                continue
            if isinstance(report, Embedded):
                if report.finish is not None:
                    self.open_generations.discard(report.generation)
                on_embedded(report)
                continue
            if isinstance(report, Encoding):
                self._is_encoding = True
                continue
            if not isinstance(report, Turn):
                self.out_of_turn(report)
                continue
            if self.open_generations and not self._is_encoding:
                self._turn_times.append(self._silence)
            self._silence = 0.0
            self._is_encoding = False
            ended = {advance.generation for advance in report.advances if advance.finish is not None}
            self.open_generations -= ended
            if report.advances:
                on_turn(list(report.advances))

    async def write_commands(self, commands: trio.MemoryReceiveChannel[Command]) -> None:
        async for command in commands:
            await self.send(command)

    async def read_output(self) -> None:
        """Log what the process prints: asserts and tracebacks. The last line explains its death."""
        line = b""
        async for data in self.child.output:
            *lines, line = (line + data).split(b"\n")
            self._log_output(lines)
            line = line[-_MAX_LINE_BYTES:]
        self._log_output([line])
        self._output_ended.set()

    async def watch(self) -> None:
        """Notice a process that does not get on with its work. Raises EngineHung."""
        interval = self.timeouts.standstill / _LOOKS_PER_STANDSTILL
        pulse = Pulse(longest_gap=2 * interval)
        last = trio.current_time()
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            elapsed, last = now - last, now
            if not self.open_generations:
                self._silence = 0.0
                if not self.loading:  # nothing to do: it cannot hang
                    pulse.rest()
                    continue
            uses_cpu = bool(self.open_generations) and not self._offloaded
            pulse.look(self.child.vitals(), elapsed, must_work=uses_cpu)
            self._silence += min(elapsed, 2 * interval)  # as in Pulse: our own standstill is not its
            patience = max(self.timeouts.step, _TURNS_TO_A_HANG * max(self._turn_times))
            if self._is_encoding:
                patience = self.timeouts.encode
            silent = not self.loading and self._silence >= patience
            if pulse.standing_still >= self.timeouts.standstill or silent:
                self.child.kill()
                raise EngineHung(max(pulse.standing_still, self._silence), self._last_words)

    def out_of_turn(self, report: Report) -> None:
        """Log a line of llama.cpp's. Raises EngineDied for anything else: nothing is said out of turn."""
        if not isinstance(report, Log):
            self.child.kill()
            raise EngineDied(f"{type(report).__name__} out of turn", self._last_words)
        level = logging.DEBUG if self.loading else _LOG_LEVELS.get(report.level, logging.DEBUG)
        logger.log(level, "%s", report.text)

    def _log_output(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._last_words = text.strip()[:_MAX_LAST_WORDS]
                logger.warning("engine process %d: %s", self.child.pid, text)

    async def _death(self) -> EngineDied:
        """Learn how the process ended; its last words may still be on their way."""
        with trio.move_on_after(_LAST_OUTPUT_GRACE) as dying:
            cause = await self.child.wait()
        if dying.cancelled_caught:
            self.child.kill()
            cause = "closed its socket"
        with trio.move_on_after(_LAST_OUTPUT_GRACE):
            await self._output_ended.wait()
        return EngineDied(cause, self._last_words)
