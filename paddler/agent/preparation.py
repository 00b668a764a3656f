"""Chat templates are rendered in processes of their own, with a deadline and a memory limit.

A template is a program from a model file: it may loop for ever or fill the memory. That costs its
request a ChatTemplateError and the process its life, and nobody else anything.
"""

import math
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Protocol, cast

import attrs
import trio

from paddler.errors import PaddlerError, RemoteProtocolError
from paddler.language.chat_template import MAX_PROMPT_CHARACTERS, Prompt
from paddler.messages.tokens import ChatTemplateError
from paddler.processes.children import is_running, start_module, wait_for
from paddler.processes.frames import FrameCutter, pack_frame

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


class TemplateRenderer(Protocol):
    """What slots and reconciliation need of preparation."""

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError: ...

    async def compile_error(self, template: str) -> str | None: ...


@attrs.define(eq=False)
class PreparationFailed(PaddlerError):
    """No process could do the job; that says nothing of the template."""

    what: str

    def __str__(self) -> str:
        return f"the process that renders chat templates {self.what}"


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
    So a stuck template delays others by that much, and a worker is never shared by two jobs. The timeout
    of a job covers its wait for a worker.
    """

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._idle: list[_Worker] = []
        self._leased: set[_Worker] = set()
        self._killed: list[_Worker] = []
        self._waiting = trio.lowlevel.ParkingLot()

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError:
        """Render a conversation. Cancelling kills the worker that is at it."""
        try:
            answer = await self._run({"template": template, "variables": variables})
        except PreparationFailed as error:
            return ChatTemplateError(str(error))
        if "error" in answer:
            return ChatTemplateError(answer["error"])
        return Prompt(answer["text"], answer["suffix"])

    async def compile_error(self, template: str) -> str | None:
        """Return why a template does not compile, or None. Raises PreparationFailed."""
        return (await self._run({"template": template, "variables": None})).get("error")

    async def aclose(self) -> None:
        """Kill and reap all processes."""
        for worker in (*self._idle, *self._leased):
            self._kill(worker)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + REAP_TIMEOUT):
            for worker in self._killed:
                await worker.ended()

    async def _run(self, job: dict[str, Any]) -> dict[str, str]:
        deadline = trio.current_time() + self._timeout
        try:
            with trio.fail_at(deadline):
                worker = await self._lease()
        except trio.TooSlowError:
            raise PreparationFailed(f"was not free within {self._timeout:g} s") from None
        except PreparationFailed:
            self._waiting.unpark()  # whoever is next finds out for itself
            raise
        answer: dict[str, str] | None = None
        try:
            with trio.fail_at(deadline):
                answer = await worker.answer(pack_frame(job))
        except trio.TooSlowError:
            return {"error": f"the chat template was not rendered within {self._timeout:g} s"}
        finally:
            self._leased.remove(worker)
            if answer is None:
                self._kill(worker)
            else:
                self._idle.append(worker)
            self._waiting.unpark()
        return answer

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
        if self._leased and (is_patient or len(self._leased) == MAX_WORKERS):
            return None
        try:
            return _Worker.start()
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
    def start(cls) -> "_Worker":
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
                        *(theirs.fileno(), MEMORY_LIMIT_BYTES),
                        environment={},
                        stdout=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                        process_group=0,
                    )
            except OSError as error:
                raise PreparationFailed(f"cannot be started: {error.strerror}") from error
            on_failure.pop_all()
        return cls(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

    async def answer(self, job: bytes) -> dict[str, str]:
        """Hand over a job and wait for its answer; cancelled, the worker is useless.

        Raises PreparationFailed.
        """
        frames = FrameCutter(max_frame_bytes=_MAX_ANSWER_BYTES)
        try:
            await self._stream.send_all(job)
            async for data in self._stream:
                for answer in frames.feed(data):
                    return cast("dict[str, str]", answer)
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
