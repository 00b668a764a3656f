"""Child processes of a daemon, as their parent sees them: started, waited for, and what ended them.

Whoever starts one kills it and waits for it; what it is told and tells is the business of others.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

_POLL_INTERVAL = 0.01


def start_module(
    module: str, *arguments: object, environment: Mapping[str, str], **options: Any
) -> "subprocess.Popen[bytes]":
    """Start a module of ours as `python -m`; `options` are those of Popen. Raises OSError.

    Call this on the main thread: PR_SET_PDEATHSIG, which a child may set, follows the thread that forks.
    """
    # -P and PYTHONPATH: the same import path as here, whatever directory this was started in.
    return subprocess.Popen(  # noqa: S603  our own interpreter and module
        [sys.executable, "-P", "-m", module, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment, "PYTHONPATH": _import_path()},
        **options,
    )


async def wait_for(process: "subprocess.Popen[bytes]") -> str:
    """Wait for a child's end, reap it, and return the cause: the signal or the exit code.

    Cancelled, it leaves the child to the next who waits.
    """
    pidfd = _open_pidfd(process.pid) if process.poll() is None else None
    if pidfd is not None:
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
    while (returncode := process.poll()) is None:  # noqa: ASYNC110  without a pidfd nothing tells of it
        await trio.sleep(_POLL_INTERVAL)
    return cause_of(returncode)


def is_running(process: "subprocess.Popen[bytes]") -> bool:
    """Tell whether a child has neither ended nor been stopped (SIGSTOP), which only Linux tells."""
    if process.poll() is not None:
        return False
    if sys.platform != "linux":
        return True
    return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None


def cause_of(returncode: int) -> str:
    """Say in words what a return code of Popen means."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # real-time signals have no name
        return f"signal {-returncode}"


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # only Linux has it, since 5.3, and no more files may be open
        return None


def _import_path() -> str:
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
