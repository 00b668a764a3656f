"""Serve one model: load it, keep it loaded, restart its engine, say why it cannot be served."""

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NoReturn, Protocol, cast

import attrs
import trio

from paddler.agent.preparation import Preparer
from paddler.agent.preparation_pool import PreparationFailed
from paddler.agent.serving import Engine, Serving
from paddler.agent.slots import Slots
from paddler.agent.status import StatusBoard
from paddler.config import EngineTimeouts, KvLayout
from paddler.engine.pipe import Adapter, Advance, Capacity, Embedded, EngineSettings, Held, ModelDescription
from paddler.errors import EngineDied, EngineHung, ModelUnavailable
from paddler.language.reasoning_formats import find_markers
from paddler.language.tool_formats import FALLBACK, find_format
from paddler.messages.snapshots import ModelMetadata
from paddler.messages.state import (
    AgentIssue,
    ApplicableState,
    ChatTemplateDoesNotCompile,
    ModelPath,
    SlotCannotStart,
    StateApplicationStatus,
    UnableToFindChatTemplate,
)
from paddler.messages.tokens import StreamError
from paddler.models.sources import check_projection

RETRY_INTERVAL = 1.0
"""Between attempts whose cause is outside: a missing file, a broken model, no process to check templates."""

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
"""Between restarts of a failed engine; doubled each time."""

GOOD_TIME = 30.0
"""An engine that served so long and then failed is restarted as if for the first time."""

logger = logging.getLogger(__name__)


class LoadedEngine(Engine, Protocol):
    """An engine that serves."""

    @property
    def description(self) -> ModelDescription: ...

    @property
    def capacity(self) -> Capacity: ...


class OpenEngine(Protocol):
    """`engine.handle.open_engine`, or a scripted stand-in."""

    def __call__(
        self,
        settings: EngineSettings,
        *,
        timeouts: EngineTimeouts,
        on_model: Callable[[ModelDescription], Awaitable[None]],
        on_progress: Callable[[int, int], None],
        on_turn: Callable[[list[Advance]], None],
        on_embedded: Callable[[Embedded], None],
        on_held: Callable[[Held], None],
    ) -> AbstractAsyncContextManager[LoadedEngine]: ...


@attrs.frozen
class Resolved:
    """A state whose files are on this machine."""

    state: ApplicableState
    model_path: str | None
    projection_path: str | None
    adapters: tuple[Adapter, ...] = ()


@attrs.frozen
class Outcome:
    """How far the work on a state is, and what stands in its way."""

    status: StateApplicationStatus
    issues: frozenset[AgentIssue] = frozenset()

    def next_try(self) -> "Outcome":
        """Return what is shown from the next try on (behaviour §7.2)."""
        retrying = StateApplicationStatus.ATTEMPTED_AND_RETRYING
        return attrs.evolve(
            self, status=StateApplicationStatus.STUCK if self.status is retrying else retrying
        )


def issues_of(error: ModelUnavailable) -> frozenset[AgentIssue]:
    return cast("frozenset[AgentIssue]", frozenset(error.issues))


class ModelService:
    """Runs the engine of whatever state it is given; one at a time."""

    def __init__(
        self,
        *,
        board: StatusBoard,
        slots: Slots,
        preparer: Preparer,
        open_engine: OpenEngine,
        engine_timeouts: EngineTimeouts,
        kv_layout: KvLayout,
        threads: int,
        exact: bool,
        prefix_cache: bool,
        prefix_cache_bytes: int,
    ) -> None:
        self.metadata: ModelMetadata | None = None
        """Of the model that was loaded last, also when it is unloaded."""
        self._board = board
        self._slots = slots
        self._preparer = preparer
        self._open_engine = open_engine
        self._engine_timeouts = engine_timeouts
        self._kv_layout = kv_layout
        self._threads = threads
        self._exact = exact
        self._prefix_cache = prefix_cache
        self._prefix_cache_bytes = prefix_cache_bytes
        self._serving: Serving | None = None
        self._is_withdrawn = False
        self._are_embeddings_expected: bool | None = None

    async def serve_forever(self, resolved: Resolved, show: Callable[[Outcome], None]) -> None:
        """Load and serve until cancelled, again after every failure; `show` is told how it goes."""
        self._is_withdrawn = False
        self._board.update(model_path=None)
        if resolved.model_path is None:
            logger.info("the desired state names no model: nothing is served")
            show(Outcome(StateApplicationStatus.APPLIED))
            return
        outcome = Outcome(StateApplicationStatus.FRESH)
        show(outcome)
        restarts = _Restarts()
        last_reason = ""

        def on_serving() -> None:
            nonlocal outcome, last_reason
            restarts.note_serving()
            last_reason = ""
            outcome = Outcome(StateApplicationStatus.APPLIED)
            show(outcome)

        while True:
            try:
                await self._serve(resolved, resolved.model_path, on_serving)
            except (ModelUnavailable, PreparationFailed) as error:
                issues = issues_of(error) if isinstance(error, ModelUnavailable) else frozenset()
                failed = attrs.evolve(outcome, issues=issues)
                next_try = failed.next_try()
                pause = RETRY_INTERVAL
                reason = str(error)
            except (EngineDied, EngineHung) as failure:
                self._slots.fail(StreamError(502, f"Engine stopped: {failure.cause}"))
                failed = attrs.evolve(outcome.next_try(), issues=self._slot_issues(failure))
                next_try = failed
                pause = restarts.pause()
                reason = str(failure)
            if reason != last_reason:  # one line per reason, not per try
                last_reason = reason
                logger.warning("%s is not served: %s", resolved.model_path, reason)
            show(failed)
            await trio.sleep(pause)
            outcome = next_try
            show(outcome)

    def withdraw(self) -> None:
        """Announce 0 slots and bounce what still comes; also an engine that is still loading gets nothing."""
        self._is_withdrawn = True
        self._announce()

    def expect(self, state: ApplicableState) -> None:
        """Take note of the state that was received last, which may take long to be resolved.

        From now on balancers send what it is for, tokens or embeddings: an engine for the other must not
        refuse these requests, they wait for the next. Slots go at once, or they would come back every status.
        """
        self._are_embeddings_expected = state.inference_parameters.enable_embeddings
        self._announce()

    def _announce(self) -> None:
        """Open the door to what is loaded and announce slots; 0 of them where nobody is served."""
        serving = self._serving
        expected = self._are_embeddings_expected
        is_of_old_mode = serving is not None and expected not in (None, serving.enable_embeddings)
        if serving is None or self._is_withdrawn or is_of_old_mode:
            self._slots.close_door()
            self._board.update(slots_total=0)
        else:
            self._slots.open_door(serving)
            self._board.update(slots_total=self._board.status.desired_slots_total)

    async def _serve(self, resolved: Resolved, model_path: str, on_serving: Callable[[], None]) -> NoReturn:
        """Load the model and serve it until cancelled.

        Raises ModelUnavailable, PreparationFailed, EngineDied, EngineHung.
        """

        async def on_model(description: ModelDescription) -> None:
            await self._check_model(resolved, model_path, description)

        settings = EngineSettings(
            model_path=model_path,
            slots=self._board.status.desired_slots_total,
            parameters=resolved.state.inference_parameters,
            kv_layout=self._kv_layout,
            threads=self._threads,
            exact=self._exact,
            prefix_cache=self._prefix_cache,
            prefix_cache_bytes=self._prefix_cache_bytes,
            projection_path=resolved.projection_path,
            adapters=resolved.adapters,
        )
        filename = Path(model_path).name
        try:
            async with self._open_engine(
                settings,
                timeouts=self._engine_timeouts,
                on_model=on_model,
                on_progress=lambda done, total: self._board.show_progress(done, total, filename),
                on_turn=self._slots.on_turn,
                on_embedded=self._slots.on_embedded,
                on_held=self._slots.on_held,
            ) as engine:
                self._board.clear_progress()
                self.metadata = _metadata(engine.description, engine.capacity)
                if not self._is_withdrawn:
                    self._serving = _serving(resolved.state, engine)
                    on_serving()
                    self._announce()
                    logger.info("serving %s, slots: %d", model_path, settings.slots)
                await trio.sleep_forever()
        finally:
            self._board.clear_progress()
            self._serving = None
            self._slots.on_held(Held(()))
            self._announce()
        raise AssertionError("an engine that ends by itself raises")

    async def _check_model(self, resolved: Resolved, model_path: str, description: ModelDescription) -> None:
        """Check, between weights and context, what else the state needs.

        Raises ModelUnavailable, and PreparationFailed when the template could not be checked.
        """
        self.metadata = _metadata(description)
        template = _template_of(resolved.state, description)
        if template is not None:
            error = await self._preparer.compile_error(template)
            if error is not None:
                raise ModelUnavailable((ChatTemplateDoesNotCompile(error, ModelPath(model_path), template),))
        elif not resolved.state.inference_parameters.enable_embeddings:
            raise ModelUnavailable((UnableToFindChatTemplate(model_path),))
        self._board.update(model_path=model_path)
        if resolved.projection_path is not None:
            await check_projection(resolved.projection_path)

    def _slot_issues(self, failure: EngineDied | EngineHung) -> frozenset[AgentIssue]:
        reason = str(failure)
        if failure.last_words and failure.last_words not in reason:
            reason = f"{reason} ({failure.last_words})"
        slots = range(self._board.status.desired_slots_total)
        return frozenset(SlotCannotStart(error=reason, slot_index=index) for index in slots)


class _Restarts:
    """How long to wait before an engine is started again."""

    def __init__(self) -> None:
        self._next_pause = FIRST_PAUSE
        self._served_since = math.inf

    def note_serving(self) -> None:
        self._served_since = trio.current_time()

    def pause(self) -> float:
        if trio.current_time() - self._served_since > GOOD_TIME:
            self._next_pause = FIRST_PAUSE
        self._served_since = math.inf
        pause = self._next_pause
        self._next_pause = min(2 * pause, LONGEST_PAUSE)
        return pause


def _metadata(description: ModelDescription, capacity: Capacity | None = None) -> ModelMetadata:
    """Return what the model file says, and, once it is known, how its KV cells are laid out."""
    metadata = dict(description.metadata)
    if capacity is not None:
        metadata["paddler.kv_layout"] = capacity.layout.value
        metadata["paddler.kv_layout_reason"] = capacity.reason
        metadata["paddler.cells_per_slot"] = str(capacity.cells_per_slot)
    return ModelMetadata(dict(sorted(metadata.items())))


def _serving(state: ApplicableState, engine: LoadedEngine) -> Serving:
    description = engine.description
    return Serving(
        engine=engine,
        parameters=state.inference_parameters,
        chat_template=_template_of(state, description),
        special_tokens={
            "bos_token": description.bos_text,
            "eos_token": description.eos_text,
            "nl_token": description.nl_text,
        },
        markers=find_markers(description.chat_template, description.control_tokens.values()),
        tool_format=find_format(description.chat_template, description.control_tokens.values()) or FALLBACK,
        control_tokens=description.control_tokens,
        supports_images=state.multimodal_projection != "None",
        most_image_tokens=engine.capacity.n_batch,
    )


def _template_of(state: ApplicableState, description: ModelDescription) -> str | None:
    """Return the template to serve with: the override, else the model's own unless it embeds only."""
    if state.chat_template_override is not None:
        return state.chat_template_override.content
    return None if state.inference_parameters.enable_embeddings else description.chat_template
