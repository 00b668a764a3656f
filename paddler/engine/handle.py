"""The Trio side of the engine: open_engine() starts the process, loads, watches and ends it.

Four tasks run beside the caller's block: they read turns, write commands, log what the process prints,
and watch for a hang. A process that fails ends the block; it is never restarted here.
"""

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from paddler.config import EngineTimeouts
from paddler.engine.child import EngineChild
from paddler.engine.conversation import Conversation
from paddler.engine.pipe import (
    Advance,
    Cancel,
    Capacity,
    Command,
    ContextRefused,
    Embed,
    Embedded,
    EngineSettings,
    Generate,
    GrammarRule,
    Held,
    ModelDescription,
    ModelRefused,
    OpenContext,
    Picture,
    Progress,
    ProjectionRefused,
    SamplerSettings,
)
from paddler.errors import EngineDied, EngineFailed, ModelUnavailable
from paddler.messages.inference import NormalizationMethod
from paddler.messages.state import ModelCannotBeLoaded, MultimodalProjectionCannotBeLoaded, SlotCannotStart

logger = logging.getLogger(__name__)


class Engine:
    """A serving engine; valid within the block of open_engine()."""

    def __init__(
        self, description: ModelDescription, capacity: Capacity, commands: trio.MemorySendChannel[Command]
    ) -> None:
        self.description = description
        self.capacity = capacity
        self._commands = commands
        self.open_generations: set[int] = set()

    def generate(
        self,
        generation: int,
        *,
        prompt: str,
        max_tokens: int,
        sampler: SamplerSettings | None = None,
        grammar: GrammarRule | None = None,
        pictures: tuple[Picture, ...] = (),
    ) -> None:
        """Start a generation; more than the engine has slots wait in it, in order."""
        self.open_generations.add(generation)
        self._commands.send_nowait(Generate(generation, prompt, max_tokens, sampler, grammar, pictures))

    def embed(
        self, generation: int, *, documents: tuple[str, ...], normalization_method: NormalizationMethod
    ) -> None:
        """Make vectors of documents; only where the parameters enable embeddings, and `generate` is not."""
        self.open_generations.add(generation)
        self._commands.send_nowait(Embed(generation, documents, normalization_method))

    def cancel(self, generation: int) -> None:
        """Stop a generation; its last Advance or Embedded follows, unless it has come already."""
        self._commands.send_nowait(Cancel(generation))


@asynccontextmanager
async def open_engine(
    settings: EngineSettings,
    *,
    timeouts: EngineTimeouts,
    on_model: Callable[[ModelDescription], Awaitable[None]],
    on_progress: Callable[[int, int], None],
    on_turn: Callable[[list[Advance]], None],
    on_held: Callable[[Held], None] = lambda _: None,
    on_embedded: Callable[[Embedded], None] = lambda _: None,
) -> AsyncIterator[Engine]:
    """Load a model in a process of its own and yield the engine that serves it.

    `on_model` is awaited between weights and context and may raise. Raises ModelUnavailable when the
    model or its context cannot be made; EngineDied or EngineHung when the process fails, before or
    during the block. However the block ends, the process has ended too, within `timeouts.stop`.
    """
    problem: BaseException | None = None
    try:
        child = EngineChild()
    except OSError as error:
        raise EngineDied(f"cannot be started: {error.strerror}") from error
    talk = Conversation(child, timeouts)
    try:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(talk.read_output)
            tasks.start_soon(talk.watch)
            description = await _load_model(talk, settings, on_progress)
            await on_model(description)
            capacity = await _open_context(talk, settings)
            # No limit: an agent has a handful of open generations, each with at most two commands.
            send_commands, commands = trio.open_memory_channel[Command](math.inf)
            engine = Engine(description, capacity, send_commands)
            talk.begin_serving(engine.open_generations, offloaded=capacity.offloaded)
            tasks.start_soon(talk.write_commands, commands)
            tasks.start_soon(talk.read_turns, on_turn, on_held, on_embedded)
            yield engine
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        problem = _what_happened(group)
    finally:
        await child.end(within=timeouts.stop)
    if problem is not None:
        raise problem  # not within `except`: what caused it stays what it was


async def _load_model(
    talk: Conversation, settings: EngineSettings, on_progress: Callable[[int, int], None]
) -> ModelDescription:
    await talk.send(settings)
    patience = talk.timeouts.start
    while True:
        match await talk.receive_within(patience):
            case Progress(done, total):
                on_progress(done, total)
            case ModelDescription() as description:
                return description
            case ModelRefused(reason, adapter_path):
                raise ModelUnavailable((ModelCannotBeLoaded(adapter_path or settings.model_path),), reason)
            case ProjectionRefused(reason):
                path = settings.projection_path or ""
                raise ModelUnavailable((MultimodalProjectionCannotBeLoaded(path),), reason)
            case report:
                talk.out_of_turn(report)
        patience = talk.timeouts.load_silence


async def _open_context(talk: Conversation, settings: EngineSettings) -> Capacity:
    await talk.send(OpenContext())
    while True:
        match await talk.receive_within(talk.timeouts.load_silence):
            case Capacity() as capacity:
                logger.info(
                    "%d slots of %d tokens, %s: %s",
                    capacity.slots,
                    capacity.cells_per_slot,
                    capacity.layout,
                    capacity.reason,
                )
                return capacity
            case ContextRefused(reason):
                slots = range(settings.slots)
                raise ModelUnavailable(tuple(SlotCannotStart(reason, slot) for slot in slots), reason)
            case report:
                talk.out_of_turn(report)


def _what_happened(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception behind a nursery's group, as if there had been no tasks beside the block.

    Their Cancelled is dropped, and so is a failure of the engine that came on top of a bug.
    """
    _, errors = group.split(trio.Cancelled)
    if errors is None:
        return group
    failures, others = errors.split(EngineFailed)
    if others is None:
        assert failures is not None
        return failures.exceptions[0]
    return others.exceptions[0] if len(others.exceptions) == 1 else others
