"""A pool of preparation processes: an idle one takes the next job, a stuck one is killed.

A job is a program or data from outside: it may loop for ever or fill the memory. That costs the job
its answer and the process its life, and nobody else anything.
"""

import math
import socket
import subprocess
from contextlib import ExitStack
from typing import Any, cast

import attrs
import trio

from paddler.errors import PaddlerError, RemoteProtocolError
from paddler.processes.children import is_running, start_module, wait_for
from paddler.processes.frames import FrameCutter, pack_frame

PATIENCE = 0.2
"""How long a job waits for a busy worker before another is started: hundreds of usual renderings, so that
a burst of requests starts none, and about as long as a start takes."""

REAP_TIMEOUT = 2.0
"""How long a killed worker is waited for."""


@attrs.define(eq=False)
class PreparationFailed(PaddlerError):
    """No process could do the job; that says nothing of the job."""

    what: str

    def __str__(self) -> str:
        return f"the preparation process {self.what}"


@attrs.define(eq=False)
class PreparationTimeout(PaddlerError):
    """A process was at the job until its deadline."""

    timeout: float

    def __str__(self) -> str:
        return f"not done within {self.timeout:g} s"


class WorkerPool:
    """Preparation processes of one memory limit.

    Jobs go to an idle worker; one is started when there is none, or when all have been busy for PATIENCE.
    So a stuck job delays others by that much, and a worker is never shared by two jobs. `most` can be
    stuck at once before others wait for a deadline.
    """

    def __init__(self, *, most: int, memory_limit_bytes: int, max_answer_bytes: int) -> None:
        self._most = most
        self._memory_limit_bytes = memory_limit_bytes
        self._max_answer_bytes = max_answer_bytes
        self._idle: list[_Worker] = []
        self._leased: set[_Worker] = set()
        self._killed: list[_Worker] = []
        self._waiting = trio.lowlevel.ParkingLot()

    async def run(self, job: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """Return the answer to a job; the timeout covers its wait for a worker.

        A worker that says it is `worn` gets no other job.

        Raises PreparationFailed and PreparationTimeout. Cancelling kills the worker that is at it.
        """
        deadline = trio.current_time() + timeout
        try:
            with trio.fail_at(deadline):
                worker = await self._lease()
        except trio.TooSlowError:
            raise PreparationFailed(f"was not free within {timeout:g} s") from None
        except PreparationFailed:
            self._waiting.unpark()  # whoever is next finds out for itself
            raise
        answer: dict[str, Any] | None = None
        try:
            with trio.fail_at(deadline):
                answer = await worker.answer(pack_frame(job), max_answer_bytes=self._max_answer_bytes)
        except trio.TooSlowError:
            raise PreparationTimeout(timeout) from None
        finally:
            self._leased.remove(worker)
            if answer is None or answer.pop("worn", False):
                self._kill(worker)
            else:
                self._idle.append(worker)
            self._waiting.unpark()
        return answer

    async def aclose(self) -> None:
        """Kill and reap all processes."""
        for worker in (*self._idle, *self._leased):
            self._kill(worker)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + REAP_TIMEOUT):
            for worker in self._killed:
                await worker.ended()

    async def _lease(self) -> "_Worker":
        """Take an idle worker, a new one if need be, or wait for one to become idle.

        Raises PreparationFailed when none can be started and none works.
        """
        patience_ends = trio.current_time() + PATIENCE
        while True:
            is_patient = trio.current_time() < patience_ends
            worker = self._idle_or_new(is_patient=is_patient)
            if worker is not None:
                self._leased.add(worker)
                return worker
            with trio.move_on_at(patience_ends if is_patient else math.inf):
                await self._waiting.park()

    def _idle_or_new(self, *, is_patient: bool) -> "_Worker | None":
        """Return a worker, or None while those that work are to be waited for."""
        self._forget_dead()
        if self._idle:
            return self._idle.pop()
        if self._leased and (is_patient or len(self._leased) == self._most):
            return None
        try:
            return _Worker.start(memory_limit_bytes=self._memory_limit_bytes)
        except PreparationFailed:
            if not self._leased:
                raise
            return None

    def _kill(self, worker: "_Worker") -> None:
        worker.kill()
        self._killed.append(worker)  # reaped later: a caller that is cancelled cannot wait for it

    def _forget_dead(self) -> None:
        for worker in [worker for worker in self._idle if not worker.is_running()]:
            self._idle.remove(worker)
            self._kill(worker)
        self._killed = [worker for worker in self._killed if worker.is_alive()]


class _Worker:
    """One preparation process, at the other end of a socket pair."""

    def __init__(self, process: "subprocess.Popen[bytes]", stream: trio.SocketStream) -> None:
        self._process = process
        self._stream = stream

    @classmethod
    def start(cls, *, memory_limit_bytes: int) -> "_Worker":
        """Start a process, on the main thread. Raises PreparationFailed.

        A process group of its own keeps it out of reach of Ctrl-C, also while Python still starts.
        """
        with ExitStack() as on_failure:
            try:
                ours, theirs = socket.socketpair()
                on_failure.callback(ours.close)
                with theirs:
                    process = start_module(
                        "paddler.agent.preparation_process",
                        *(theirs.fileno(), memory_limit_bytes),
                        environment={},
                        stdout=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                        process_group=0,
                    )
            except OSError as error:
                raise PreparationFailed(f"cannot be started: {error.strerror}") from error
            on_failure.pop_all()
        return cls(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

    async def answer(self, job: bytes, *, max_answer_bytes: int) -> dict[str, Any]:
        """Hand over a job and wait for its answer; cancelled, the worker is useless.

        Raises PreparationFailed.
        """
        frames = FrameCutter(max_frame_bytes=max_answer_bytes)
        try:
            await self._stream.send_all(job)
            async for data in self._stream:
                for answer in frames.feed(data):
                    return cast("dict[str, Any]", answer)
        except RemoteProtocolError as error:
            raise PreparationFailed(f"gave {error}") from None
        except trio.BrokenResourceError:
            pass
        raise PreparationFailed(await self._what_happened())

    async def _what_happened(self) -> str:
        with trio.move_on_after(REAP_TIMEOUT):
            return f"died: {await wait_for(self._process)}"
        return "closed its socket"

    def is_running(self) -> bool:
        return is_running(self._process)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._stream.socket.close()

    async def ended(self) -> None:
        """Wait until the process has ended, and reap it."""
        await wait_for(self._process)
