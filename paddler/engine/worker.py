"""What the engine process does: load, then turn after turn until the parent closes the socket.

A plain loop: commands are looked for between turns (poll(0), a microsecond), and waited for when there
is nothing to do. Other threads only tokenise long prompts (prompts.py).
"""

import os
import re
import select
import socket
import stat
import threading
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from paddler.engine import adapters, llama, memory
from paddler.engine.cells import Cells
from paddler.engine.context import Context
from paddler.engine.embedder import Embedder
from paddler.engine.images import ImageCells, Projection
from paddler.engine.layout import ContextPlan, Refused, check_weights, plan_context
from paddler.engine.pipe import (
    COMMANDS,
    Cancel,
    Capacity,
    Command,
    ContextRefused,
    Embed,
    Encoding,
    EngineSettings,
    FrameReader,
    Generate,
    Log,
    ModelRefused,
    OpenContext,
    Progress,
    ProjectionRefused,
    Report,
    Turn,
    pack,
)
from paddler.engine.prompts import Prompts
from paddler.engine.samplers import Samplers
from paddler.engine.scheduler import TurnBudget
from paddler.engine.turns import Turns
from paddler.messages.state import InferenceParameters

_READ_BYTES = 1 << 20

_SIGN_OF_LIFE_MS = 1000
"""How often an engine that only tokenises says that it works."""

_SPLIT_FILE = re.compile(r"-00001-of-(\d{5})\.gguf$")


class ParentGone(Exception):
    """The parent closed the socket: the normal end."""


class ParentLink:
    """Blocking frames to the parent, polled frames from it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader[Command](COMMANDS, max_frame_bytes=2**32 - 1)  # the parent is trusted
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._sending = threading.Lock()  # llama.cpp may log from any thread

    def wake_on(self, fd: int) -> None:
        """End the waiting of receive() when this pipe has a byte, too; receive() takes it out."""
        self._poll.register(fd, select.POLLIN)

    def send(self, report: Report) -> None:
        try:
            with self._sending:
                self._connection.sendall(pack(report))
        except OSError:
            raise ParentGone from None

    def receive(self, timeout_ms: int | None) -> list[Command]:
        """Return the commands that are there, after waiting for anything to happen if told to."""
        commands: list[Command] = []
        for fd, _ in self._poll.poll(timeout_ms):
            if fd != self._connection.fileno():
                os.read(fd, _READ_BYTES)
            elif data := self._read():
                commands += self._reader.feed(data)
            else:
                raise ParentGone
        return commands

    def receive_one(self) -> Command:
        """Wait for the next command, at a time when only one can come."""
        while True:
            commands = self.receive(None)
            if commands:
                [command] = commands
                return command

    def is_closed(self) -> bool:
        """Say whether the parent has gone, at a time when it has nothing to send."""
        return bool(self._poll.poll(0))

    def _read(self) -> bytes:
        try:
            return self._connection.recv(_READ_BYTES)
        except OSError:
            return b""


def run(connection: socket.socket) -> NoReturn:
    """Serve until the parent closes the socket, which raises ParentGone."""
    link = ParentLink(connection)
    log = llama.LlamaLog(partial(_forward, link))
    settings = link.receive_one()
    assert isinstance(settings, EngineSettings)
    host_memory = settings.host_memory_bytes or memory.host_memory_bytes()
    try:
        model, loaded_adapters = _load_model(link, log, settings, host_memory=host_memory)
    except Refused as refusal:
        at_fault = refusal.path if isinstance(refusal, adapters.AdapterRefused) else None
        link.send(ModelRefused(str(refusal), at_fault))
        _wait_for_the_end(link)
    try:
        projection = _load_projection(link, log, settings, model)
    except Refused as refusal:
        link.send(ProjectionRefused(str(refusal)))
        _wait_for_the_end(link)
    description = llama.describe(model)
    link.send(description)
    assert link.receive_one() == OpenContext()
    try:
        plan = plan_context(
            settings,
            llama.shape_of(model, description.metadata),
            host_memory_bytes=host_memory,
            whole_image=_whole_image(projection, settings.parameters),
        )
        context = Context(model, plan, settings, log=log)
        context.use_adapters(loaded_adapters)
    except Refused as refusal:
        link.send(ContextRefused(str(refusal)))
        _wait_for_the_end(link)
    if settings.parameters.enable_embeddings:
        _serve_embeddings(link, model, context, plan, settings.parameters)
    samplers = Samplers(model, description, settings.parameters)
    _serve(link, model, context, plan, settings, projection, samplers)


def _load_model(
    link: ParentLink, log: llama.LlamaLog, settings: EngineSettings, *, host_memory: int
) -> tuple[llama.Model, list[adapters.LoadedAdapter]]:
    files = _parts(Path(settings.model_path))
    try:
        states = [file.stat() for file in files]
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise Refused(str(error)) from None
    if not all(stat.S_ISREG(state.st_mode) for state in states):
        raise Refused("not a regular file")  # opening a pipe would block for ever
    total = sum(state.st_size for state in states)
    beside = sum(map(adapters.size_of, settings.adapters)) + _size_of(settings.projection_path)
    if not llama.offloads(settings.parameters.n_gpu_layers):
        check_weights(total + beside, host_memory_bytes=host_memory)

    def on_progress(share: float) -> bool:
        if link.is_closed():
            return False
        link.send(Progress(int(share * total), total))
        return True

    link.send(Progress(0, total))
    model = llama.load_model(
        settings.model_path,
        n_gpu_layers=settings.parameters.n_gpu_layers,
        on_progress=on_progress,
        log=log,
    )
    loaded_adapters = adapters.load_adapters(
        model, settings.adapters, on_next=lambda: link.send(Progress(total, total)), log=log
    )
    link.send(Progress(total, total))
    return model, loaded_adapters


def _size_of(projection_path: str | None) -> int:
    """Return the bytes of a projection's file, or 0; what it is worth is found out when it is loaded."""
    try:
        return 0 if projection_path is None else Path(projection_path).stat().st_size
    except (OSError, ValueError):
        return 0


def _load_projection(
    link: ParentLink, log: llama.LlamaLog, settings: EngineSettings, model: llama.Model
) -> Projection | None:
    if settings.projection_path is None:
        return None
    size = Path(settings.model_path).stat().st_size

    def on_progress() -> bool:
        if link.is_closed():
            return False
        link.send(Progress(size, size))  # the model's share is done: a sign of life
        return True

    return Projection(
        settings.projection_path, model, threads=settings.threads, log=log, on_progress=on_progress
    )


def _whole_image(projection: Projection | None, parameters: InferenceParameters) -> int:
    """Return the tokens of the largest image that has to be decoded at once, or 0 where none has to."""
    if projection is None or not projection.whole_images:
        return 0
    return projection.largest_image(parameters.image_resize_to_fit)


def _most_image_tokens(
    projection: Projection | None, plan: ContextPlan, parameters: InferenceParameters
) -> int:
    if projection is not None and projection.whole_images:
        return plan.n_batch
    return max(parameters.n_batch, 1)


def _parts(path: Path) -> list[Path]:
    """Return the files of a model, which may be split; llama.cpp finds them by the name of the first."""
    split = _SPLIT_FILE.search(path.name)
    if split is None:
        return [path]
    count = split.group(1)
    stem = path.name[: split.start()]
    return [path.with_name(f"{stem}-{part:05}-of-{count}.gguf") for part in range(1, int(count) + 1)]


def _serve(
    link: ParentLink,
    model: llama.Model,
    context: Context,
    plan: ContextPlan,
    settings: EngineSettings,
    projection: Projection | None,
    samplers: Samplers,
) -> NoReturn:
    began = time.perf_counter()
    if not context.warm_up():
        link.send(Log(llama.WARNING, "the warm-up decode failed"))
    warm_up_seconds = time.perf_counter() - began
    awake, wake = os.pipe()
    link.wake_on(awake)
    most_image_tokens = _most_image_tokens(projection, plan, settings.parameters)
    turns = Turns(
        context,
        slots=plan.slots,
        cells=Cells(
            context,
            slots=plan.slots,
            keep=settings.prefix_cache,
            stored_bytes=settings.prefix_cache_bytes,
        ),
        make_sampler=samplers.make,
        pieces=model.pieces,
        end_tokens=model.end_tokens,
        prompts=Prompts(
            partial(llama.tokenize, model),
            wake=partial(os.write, wake, b"."),
            read_pictures=(
                None if projection is None else partial(projection.read, most_tokens=most_image_tokens)
            ),
        ),
        budget=TurnBudget(n_batch=plan.n_batch, seconds_per_token=warm_up_seconds),
        images=None if projection is None else ImageCells(projection, context),
        on_encoding=lambda generation: link.send(Encoding(generation)),
    )
    if settings.prefix_cache_bytes and not context.storable:
        link.send(Log(llama.WARNING, "the model has sliding windows: no prefixes are kept in memory"))
    link.send(
        Capacity(
            layout=plan.layout,
            reason=plan.reason,
            slots=plan.slots,
            cells_per_slot=context.room,
            context_bytes=plan.context_bytes,
            warm_up_seconds=warm_up_seconds,
            offloaded=model.offloaded,
            n_batch=most_image_tokens,
        )
    )
    while True:
        timeout_ms = None if turns.idle else _SIGN_OF_LIFE_MS if turns.reading else 0
        for command in link.receive(timeout_ms):
            match command:
                case Generate():
                    turns.submit(command)
                case Cancel():
                    turns.cancel(command.generation)
                case _:
                    raise AssertionError(command)
        link.send(Turn(turns.run()))
        held = turns.held()
        if held is not None:
            link.send(held)


def _serve_embeddings(
    link: ParentLink,
    model: llama.Model,
    context: Context,
    plan: ContextPlan,
    parameters: InferenceParameters,
) -> NoReturn:
    began = time.perf_counter()
    if not context.warm_up():
        link.send(Log(llama.WARNING, "the warm-up decode failed"))
    warm_up_seconds = time.perf_counter() - began
    awake, wake = os.pipe()
    link.wake_on(awake)
    n_batch = max(min(parameters.n_batch, context.room), 1)  # without what the plan added for llama.cpp
    embedder = Embedder(
        context,
        slots=plan.slots,
        n_batch=n_batch,
        prompts=Prompts(partial(llama.tokenize_document, model), wake=partial(os.write, wake, b".")),
    )
    link.send(
        Capacity(
            layout=plan.layout,
            reason=plan.reason,
            slots=plan.slots,
            cells_per_slot=n_batch,
            context_bytes=plan.context_bytes,
            warm_up_seconds=warm_up_seconds,
            offloaded=model.offloaded,
        )
    )
    while True:
        timeout_ms = None if embedder.idle else _SIGN_OF_LIFE_MS if embedder.reading else 0
        for command in link.receive(timeout_ms):
            match command:
                case Embed():
                    embedder.submit(command)
                case Cancel():
                    embedder.cancel(command.generation)
                case _:
                    raise AssertionError(command)
        for embedded in embedder.run():
            link.send(embedded)
        link.send(Turn(()))


def _wait_for_the_end(link: ParentLink) -> NoReturn:
    """Let the parent decide what comes after a refusal: an engine never ends by itself."""
    while True:
        link.receive(None)


def _forward(link: ParentLink, line: Log) -> None:
    try:
        link.send(line)
    except ParentGone:
        pass  # called from llama.cpp, which cannot pass it on; the next frame of our own will tell
