"""An engine serves: generations, or embeddings, turn after turn until its parent closes the socket.

Commands are looked for between turns (poll(0), a microsecond), and waited for when there is nothing to do.
"""

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import attrs

from paddler.engine import llama
from paddler.engine.cells import Cells
from paddler.engine.context import Context
from paddler.engine.cores import processors
from paddler.engine.embedder import Embedder
from paddler.engine.images import ImageCells, Projection
from paddler.engine.layout import ContextPlan
from paddler.engine.parent_link import ParentLink
from paddler.engine.pipe import Cancel, Capacity, Embed, Encoding, EngineSettings, Generate, Log, Turn
from paddler.engine.prompts import Prompts
from paddler.engine.samplers import Samplers
from paddler.engine.scheduler import TurnBudget
from paddler.engine.thread_count import ThreadCount
from paddler.engine.thread_times import ThreadTimesReader
from paddler.engine.turn_sender import HOLD, HOLD_WITHOUT_SPARE_CORE, TurnSender
from paddler.engine.turns import Turns
from paddler.messages.state import InferenceParameters

_SIGN_OF_LIFE_MS = 1000
"""How often an engine that only tokenises says that it works."""

_OBJECTS_PER_COLLECTION = 20_000
"""As Python comes (700), collecting takes three quarters of the time in which a large grammar is read."""


def serve_generations(
    link: ParentLink,
    model: llama.Model,
    context: Context,
    plan: ContextPlan,
    settings: EngineSettings,
    projection: Projection | None,
    samplers: Samplers,
) -> NoReturn:
    """Serve until the parent closes the socket, which raises ParentGone."""
    warm_up_seconds = _warm_up(link, context)
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
            wake=_waker(link),
            read_pictures=(
                None if projection is None else partial(projection.read, most_tokens=most_image_tokens)
            ),
        ),
        budget=TurnBudget(n_batch=plan.n_batch, seconds_per_token=warm_up_seconds),
        images=None if projection is None else ImageCells(projection, context),
        on_encoding=lambda generation: link.send(Encoding(generation)),
    )
    capacity = _capacity(model, plan, cells_per_slot=context.room, warm_up_seconds=warm_up_seconds)
    link.send(attrs.evolve(capacity, n_batch=most_image_tokens))
    if settings.prefix_cache_bytes and not context.storable:
        link.send(Log(llama.WARNING, "the model has sliding windows: no prefixes are kept in memory"))
    _tell_of_layers(link, model, settings)
    sender = TurnSender(
        link.send,
        longest_hold=HOLD if settings.threads < processors() else HOLD_WITHOUT_SPARE_CORE,
        clock=time.perf_counter,
    )
    threads = _thread_count(link, context, settings)
    while True:
        patience_ms = _patience_ms(turns)
        assert patience_ms == 0 or not sender.keeps_any
        commands = link.receive(patience_ms)
        if commands:
            sender.flush()  # a prompt may take its time
        for command in commands:
            match command:
                case Generate():
                    turns.submit(command)
                case Cancel():
                    turns.cancel(command.generation)
                case _:
                    raise AssertionError(command)
        sender.take(turns.run(), only_decodes=turns.only_decodes)
        held = turns.held()
        if held is not None:
            sender.flush()
            link.send(held)
        threads.turn_ended()


def serve_embeddings(
    link: ParentLink,
    model: llama.Model,
    context: Context,
    plan: ContextPlan,
    settings: EngineSettings,
) -> NoReturn:
    """Do the same for embeddings."""
    warm_up_seconds = _warm_up(link, context)
    parameters = settings.parameters
    n_batch = max(min(parameters.n_batch, context.room), 1)  # without what the plan added for llama.cpp
    embedder = Embedder(
        context,
        slots=plan.slots,
        n_batch=n_batch,
        prompts=Prompts(partial(llama.tokenize_document, model), wake=_waker(link)),
    )
    link.send(_capacity(model, plan, cells_per_slot=n_batch, warm_up_seconds=warm_up_seconds))
    _tell_of_layers(link, model, settings)
    threads = _thread_count(link, context, settings)
    while True:
        for command in link.receive(_patience_ms(embedder)):
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
        threads.turn_ended()


def _warm_up(link: ParentLink, context: Context) -> float:
    """Decode for the first time, and return how long it took."""
    gc.collect()
    gc.freeze()  # what exists by now stays
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    began = time.perf_counter()
    if not context.warm_up():
        link.send(Log(llama.WARNING, "the warm-up decode failed"))
    return time.perf_counter() - began


def _tell_of_layers(link: ParentLink, model: llama.Model, settings: EngineSettings) -> None:
    layers = settings.parameters.n_gpu_layers
    if layers != 0 and not model.offloaded:
        complaint = f"n_gpu_layers is {layers}, but llama.cpp was compiled without a GPU: all are on the CPU"
        link.send(Log(llama.WARNING, complaint))


def _thread_count(link: ParentLink, context: Context, settings: EngineSettings) -> ThreadCount:
    return ThreadCount(
        settings.threads,
        use=context.use_threads,
        look=ThreadTimesReader(),
        report=lambda line: link.send(Log(llama.WARNING, line)),
        clock=time.perf_counter,
    )


def _capacity(
    model: llama.Model, plan: ContextPlan, *, cells_per_slot: int, warm_up_seconds: float
) -> Capacity:
    return Capacity(
        layout=plan.layout,
        reason=plan.reason,
        slots=plan.slots,
        cells_per_slot=cells_per_slot,
        context_bytes=plan.context_bytes,
        warm_up_seconds=warm_up_seconds,
        offloaded=model.offloaded,
    )


def _waker(link: ParentLink) -> Callable[[], object]:
    """Return what ends the waiting for commands, from any thread."""
    awake, wake = os.pipe()
    link.wake_on(awake)
    return partial(os.write, wake, b".")


def _patience_ms(work: Turns | Embedder) -> int | None:
    """Return how long to wait for commands; None without an end, where there is nothing to do."""
    if work.idle:
        return None
    return _SIGN_OF_LIFE_MS if work.reading else 0


def _most_image_tokens(
    projection: Projection | None, plan: ContextPlan, parameters: InferenceParameters
) -> int:
    if projection is not None and projection.whole_images:
        return plan.n_batch
    return max(parameters.n_batch, 1)
