"""The engine process as its parent holds it: spawned, waited for, killed, reaped."""

import os
import socket
from contextlib import ExitStack

import trio

from paddler.engine.thread_times import are_waits_counted
from paddler.engine.vitals import Vitals, read_vitals
from paddler.processes.children import start_module, wait_for

_KILL_GRACE = 5.0
"""A killed process that does not end by then hangs in the kernel; the agent must not hang with it."""

_SPINS = 50_000
"""Rounds that a thread of OpenMP spins before it sleeps: long enough for what the engine does between two
decodes. That gains 5 % (49 million parameters, two threads) to 20 % (152k vocabulary)."""

_CAUTIOUS_SPINS = 500
"""Where thread_count.py sees no neighbours: one that is busy would slow decode ten times and more (engine
notes §1.3)."""


class EngineChild:
    """A running engine process. Whoever spawned it calls end(), once."""

    def __init__(self) -> None:
        """Spawn it, on the main thread. Raises OSError."""
        with ExitStack() as on_failure, ExitStack() as child_side:
            ours, theirs = socket.socketpair()
            on_failure.callback(ours.close)
            child_side.callback(theirs.close)
            output, their_output = os.pipe()
            on_failure.callback(os.close, output)
            child_side.callback(os.close, their_output)
            self._process = start_module(
                "paddler.engine.process",
                theirs.fileno(),
                environment={
                    "GOMP_SPINCOUNT": str(_SPINS if are_waits_counted() else _CAUTIOUS_SPINS),
                    "GGML_NO_BACKTRACE": "1",  # an abort would start a debugger for the backtrace
                },
                stdout=their_output,
                stderr=their_output,
                pass_fds=[theirs.fileno()],
            )
            on_failure.pop_all()
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.output = trio.lowlevel.FdStream(output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def vitals(self) -> Vitals | None:
        """Look at it, or return None where that cannot be seen."""
        return read_vitals(self.pid)

    async def wait(self) -> str:
        """Wait for its end and return the cause: the signal or the exit code."""
        return await wait_for(self._process)

    def kill(self) -> None:
        self._process.kill()

    async def end(self, *, within: float) -> None:
        """Close the socket, which tells it to end, and kill it when it has not `within` seconds.

        Shielded: a cancelled caller leaves no process behind either, and waits no longer than that.
        """
        self.stream.socket.close()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(within):
                await self.wait()
            if self._process.poll() is None:
                self.kill()
                with trio.move_on_after(_KILL_GRACE):
                    await self.wait()
            await self.output.aclose()
