"""The engine process as its parent holds it: spawned, waited for, killed, reaped."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import trio

_KILL_GRACE = 5.0
"""A killed process that does not end by then hangs in the kernel; the agent must not hang with it."""

_POLL_INTERVAL = 0.01

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
        """Spawn it. Raises OSError.

        Call this on the main thread: PR_SET_PDEATHSIG follows the thread that forks.
        """
        with ExitStack() as on_failure, ExitStack() as child_side:
            ours, theirs = socket.socketpair()
            on_failure.callback(ours.close)
            child_side.callback(theirs.close)
            output, their_output = os.pipe()
            on_failure.callback(os.close, output)
            child_side.callback(os.close, their_output)
            # -P and PYTHONPATH: the same import path as here, whatever directory this was started in.
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [sys.executable, "-P", "-m", "paddler.engine.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=their_output,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _import_path()},
            )
            on_failure.pop_all()
        self._pidfd = _open_pidfd(self._process.pid)
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.output = trio.lowlevel.FdStream(output)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        """Wait for its end and return the cause: the signal or the exit code."""
        if self._pidfd is not None:
            await trio.lowlevel.wait_readable(self._pidfd)
            returncode = self._process.wait()
        else:
            while (polled := self._process.poll()) is None:  # noqa: ASYNC110  nothing tells of it
                await trio.sleep(_POLL_INTERVAL)
            returncode = polled
        return _cause(returncode)

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
        if self._pidfd is not None:
            os.close(self._pidfd)


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # only Linux has it, and only since 5.3
        return None


def _import_path() -> str:
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)


def _cause(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # real-time signals have no name
        return f"signal {-returncode}"
