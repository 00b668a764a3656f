"""The engine process as its parent holds it: spawned, waited for, killed, reaped."""

import os
import socket
from contextlib import ExitStack

import trio

from paddler.engine.vitals import Vitals, read_vitals
from paddler.processes.children import start_module, wait_for

_KILL_GRACE = 5.0
"""A killed process that does not end by then hangs in the kernel; the agent must not hang with it."""

_ENVIRONMENT = {
    # Idle OpenMP threads give up the processor soon: with the default one busy neighbour slows decode
    # ten times and more (engine notes §1.3).
    "GOMP_SPINCOUNT": "500",
    # An abort would start a debugger for the backtrace.
    "GGML_NO_BACKTRACE": "1",
}


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
                environment=_ENVIRONMENT,
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
