"""What the engine process does: load a model, make its context, then serve (serving.py).

A plain loop. Other threads only tokenise long prompts (prompts.py).
"""

import re
import socket
import stat
from functools import partial
from pathlib import Path
from typing import NoReturn

from paddler.engine import adapters, llama, memory
from paddler.engine.context import Context
from paddler.engine.images import Projection
from paddler.engine.layout import Refused, check_weights, plan_context
from paddler.engine.parent_link import ParentGone, ParentLink
from paddler.engine.pipe import (
    ContextRefused,
    EngineSettings,
    Log,
    ModelRefused,
    OpenContext,
    Progress,
    ProjectionRefused,
)
from paddler.engine.samplers import Samplers
from paddler.engine.serving import serve_embeddings, serve_generations
from paddler.messages.state import InferenceParameters

_SPLIT_FILE = re.compile(r"-00001-of-(\d{5})\.gguf$")


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
        serve_embeddings(link, model, context, plan, settings)
    samplers = Samplers(model, description, settings.parameters)
    serve_generations(link, model, context, plan, settings, projection, samplers)


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


def _parts(path: Path) -> list[Path]:
    """Return the files of a model, which may be split; llama.cpp finds them by the name of the first."""
    split = _SPLIT_FILE.search(path.name)
    if split is None:
        return [path]
    count = split.group(1)
    stem = path.name[: split.start()]
    return [path.with_name(f"{stem}-{part:05}-of-{count}.gguf") for part in range(1, int(count) + 1)]


def _wait_for_the_end(link: ParentLink) -> NoReturn:
    """Let the parent decide what comes after a refusal: an engine never ends by itself."""
    while True:
        link.receive(None)


def _forward(link: ParentLink, line: Log) -> None:
    try:
        link.send(line)
    except ParentGone:
        pass  # called from llama.cpp, which cannot pass it on; the next frame of our own will tell
