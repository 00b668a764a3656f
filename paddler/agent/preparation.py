"""Chat templates are rendered in processes of their own, with a deadline and a memory limit.

A template is a program from a model file: it may loop for ever or fill the memory. That costs its
request a ChatTemplateError and the process its life, and nobody else anything.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from signal import Signals
from typing import Any, Protocol

import attrs
import trio

from paddler.agent.preparation_process import LENGTH_BYTES, pack
from paddler.errors import PaddlerError
from paddler.language.chat_template import MAX_PROMPT_CHARACTERS, Prompt
from paddler.messages.tokens import ChatTemplateError

MAX_WORKERS = 4
"""So many jobs can be stuck at once before others wait for a deadline; each worker costs some 30 MB."""

PATIENCE = 0.2
"""How long a job waits for a busy worker before another is started: hundreds of usual renderings, so that
a burst of requests starts none, and about as long as a start takes."""

MEMORY_LIMIT_BYTES = 512 * 1024 * 1024
"""Address space of a worker: ten times what it needs."""

REAP_TIMEOUT = 2.0
"""How long a killed worker is waited for."""

_MAX_ANSWER_BYTES = 6 * MAX_PROMPT_CHARACTERS + 1024 * 1024
_RECEIVE_BYTES = 65536


class TemplateRenderer(Protocol):
    """What slots and reconciliation need of preparation."""

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError: ...

    async def compile_error(self, template: str) -> str | None: ...


@asynccontextmanager
async def open_preparation(*, timeout: float) -> AsyncIterator["Preparation"]:
    """Provide preparation for the duration of the block; its processes are gone afterwards."""
    preparation = Preparation(timeout=timeout)
    try:
        yield preparation
    finally:
        await preparation.aclose()


class Preparation:
    """A small pool of preparation processes.

    Jobs go to an idle worker; one is started when there is none, or when all have been busy for PATIENCE.
    So a stuck template delays others by that much, and a worker is never shared by two jobs.
    """

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._idle: list[_Worker] = []
        self._leased: set[_Worker] = set()
        self._killed: list[_Worker] = []
        self._waiting = trio.lowlevel.ParkingLot()

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError:
        """Render a conversation. Cancelling kills the worker that is at it."""
        answer = await self._run({"template": template, "variables": variables})
        if "error" in answer:
            return ChatTemplateError(answer["error"])
        return Prompt(answer["text"], answer["suffix"])

    async def compile_error(self, template: str) -> str | None:
        """Return why a template does not compile, or None."""
        return (await self._run({"template": template, "variables": None})).get("error")

    async def aclose(self) -> None:
        """Kill and reap all processes."""
        for worker in (*self._idle, *self._leased):
            self._kill(worker)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + REAP_TIMEOUT):
            for worker in self._killed:
                await worker.ended()

    async def _run(self, job: dict[str, Any]) -> dict[str, str]:
        worker = await self._lease()
        answer: dict[str, str] | None = None
        try:
            with trio.fail_after(self._timeout):
                answer = await worker.answer(pack(job))
        except trio.TooSlowError:
            return {"error": f"the chat template was not rendered within {self._timeout:g} s"}
        except _WorkerDied as error:
            return {"error": str(error)}
        finally:
            self._leased.remove(worker)
            if answer is None:
                self._kill(worker)
            else:
                self._idle.append(worker)
            self._waiting.unpark()
        return answer

    async def _lease(self) -> "_Worker":
        """Take an idle worker, a new one if need be, or wait for one to become idle."""
        patient = True
        while True:
            self._forget_dead()
            if self._idle:
                worker = self._idle.pop()
                break
            if not self._leased or (len(self._leased) < MAX_WORKERS and not patient):
                worker = _Worker.start()
                break
            with trio.move_on_after(PATIENCE) as patience:
                await self._waiting.park()
            patient = not patience.cancelled_caught
        self._leased.add(worker)
        return worker

    def _kill(self, worker: "_Worker") -> None:
        worker.kill()
        self._killed.append(worker)  # reaped later: a caller that is cancelled cannot wait for it

    def _forget_dead(self) -> None:
        for worker in [worker for worker in self._idle if not worker.is_alive()]:
            self._idle.remove(worker)
            worker.kill()
        self._killed = [worker for worker in self._killed if worker.is_alive()]


@attrs.define(eq=False)
class _WorkerDied(PaddlerError):
    cause: str

    def __str__(self) -> str:
        return f"the process that renders chat templates died: {self.cause}"


class _Worker:
    """One preparation process, at the other end of a socket pair."""

    def __init__(self, process: "subprocess.Popen[bytes]", stream: trio.SocketStream) -> None:
        self._process = process
        self._stream = stream

    @classmethod
    def start(cls) -> "_Worker":
        """Start a process; forked here, on the main thread, as its death signal follows the forking thread.

        A process group of its own keeps it out of reach of Ctrl-C, also while Python still starts.
        """
        ours, theirs = socket.socketpair()
        arguments = [theirs.fileno(), MEMORY_LIMIT_BYTES, os.getpid()]
        try:
            process = subprocess.Popen(  # noqa: S603 our own module
                [sys.executable, "-m", "paddler.agent.preparation_process", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

    async def answer(self, job: bytes) -> dict[str, str]:
        """Hand over a job and wait for its answer. Raises _WorkerDied; cancelled, the worker is useless."""
        try:
            await self._stream.send_all(job)
            length = int.from_bytes(await self._receive(LENGTH_BYTES), "little")
            if length > _MAX_ANSWER_BYTES:
                raise _WorkerDied(f"an answer of {length} bytes")
            answer: dict[str, str] = json.loads(await self._receive(length))
        except (trio.BrokenResourceError, EOFError):
            raise _WorkerDied(await self._cause()) from None
        except ValueError:
            raise _WorkerDied("an unreadable answer") from None
        return answer

    async def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            data = await self._stream.receive_some(min(length - len(received), _RECEIVE_BYTES))
            if not data:
                raise EOFError
            received += data
        return bytes(received)

    async def _cause(self) -> str:
        with trio.move_on_after(REAP_TIMEOUT):
            await self.ended()
        code = self._process.poll()
        if code is None:
            return "it closed its socket"
        return Signals(-code).name if code < 0 else f"exit status {code}"

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._stream.socket.close()

    async def ended(self) -> None:
        """Wait until the process has ended, and reap it."""
        if sys.platform == "linux" and self.is_alive():
            descriptor = os.pidfd_open(self._process.pid)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        while self.is_alive():  # noqa: ASYNC110 where there are no pidfds, the status is all there is
            await trio.sleep(0.01)
