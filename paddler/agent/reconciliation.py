"""Desired state is resolved and applied; the newest one wins, at every step."""

import logging
from collections.abc import Awaitable, Callable

import attrs
import trio

from paddler.agent.model_service import RETRY_INTERVAL, ModelService, Outcome, Resolved, issues_of
from paddler.agent.slots import Slots
from paddler.agent.status import Latest, StatusBoard
from paddler.engine.pipe import Adapter
from paddler.errors import ModelUnavailable
from paddler.messages.snapshots import ModelMetadata
from paddler.messages.state import (
    ApplicableState,
    LoraSource,
    ModelSource,
    StateApplicationStatus,
    sorted_issues,
)
from paddler.models.sources import resolve_adapter, resolve_model, resolve_projection

# Theory of operation
#
# A state is *received*, then *resolved* (its files are found), then *applied*. Two tasks:
#
#   resolve   takes the newest received state and tries every second until its files are there; a
#             newer state replaces it at once. What serves is not touched meanwhile.
#   apply     takes the newest resolved state and has it served until a newer one is resolved. Then 0
#             slots are announced, the accepted requests finish, and the engine is left.
#
# One thing happens as soon as a state is received: if it is one for tokens and an engine for embeddings
# serves, 0 slots are announced until this changes, because nothing that comes from now on is for that engine.
#
# A state equal to the one that serves changes nothing, also when one in between could not be resolved.
# What a newer state has made either task leave is begun anew, also when that state is gone again by the
# time it is left: both take whatever is the newest then, never only what differs from what they left.
# The status shows the newest state: that of applying while it is the one in hand, otherwise Fresh, from
# its receipt to the end of the drain; but that of resolving as long as its files cannot be found.

Resolve = Callable[[ModelSource], Awaitable[str | None]]
ResolveAdapter = Callable[[LoraSource], Awaitable[str]]

logger = logging.getLogger(__name__)


class Reconciliation:
    """Keeps the newest state served: `receive` takes it, `apply_desired_state` is the service."""

    def __init__(
        self,
        *,
        board: StatusBoard,
        slots: Slots,
        service: ModelService,
        find_model: Resolve = resolve_model,
        find_projection: Resolve = resolve_projection,
        find_adapter: ResolveAdapter = resolve_adapter,
    ) -> None:
        self._board = board
        self._slots = slots
        self._service = service
        self._find_model = find_model
        self._find_projection = find_projection
        self._find_adapter = find_adapter
        self._newest = Latest[ApplicableState | None](None)
        self._resolved = Latest[Resolved | None](None)
        self._searched: ApplicableState | None = None
        self._resolving: Outcome | None = None
        """Of the search for the files of `_searched`, once it has failed, until it succeeds."""
        self._in_hand: ApplicableState | None = None
        """What is being applied or serves; None during its drain."""
        self._applying = _FRESH

    @property
    def newest_state(self) -> ApplicableState | None:
        """The state received last."""
        return self._newest.value

    @property
    def model_metadata(self) -> ModelMetadata | None:
        """What the model that was loaded last says of itself."""
        return self._service.metadata

    def receive(self, state: ApplicableState) -> None:
        """Take a state from the balancer; it replaces any other. An equal one changes nothing."""
        self._newest.set(state)
        self._service.expect(state)
        self._show()

    async def apply_desired_state(self) -> None:
        """Resolve and apply states for ever. Cancelled, it leaves no engine behind."""
        async with trio.open_nursery() as services:
            services.start_soon(self._resolve_forever)
            services.start_soon(self._apply_forever)

    async def _resolve_forever(self) -> None:
        while True:
            state = await self._newest.other_than(None)
            assert state is not None
            async with trio.open_nursery() as attempt:
                attempt.start_soon(self._resolve, state)
                await self._newest.other_than(state)
                attempt.cancel_scope.cancel()

    async def _resolve(self, state: ApplicableState) -> None:
        """Find the files of a state, trying until they are there, and hand it over."""
        self._searched = state
        outcome = _FRESH
        self._show_resolving(None)
        while True:
            try:
                model_path = await self._find_model(state.model)
                projection_path = await self._find_projection(state.multimodal_projection)
                adapters = await self._adapters_of(state)
                break
            except ModelUnavailable as error:
                if not outcome.issues:
                    logger.warning("the new state waits for its files: %s", error)
                outcome = attrs.evolve(outcome, issues=issues_of(error))
                self._show_resolving(outcome)
                await trio.sleep(RETRY_INTERVAL)
                outcome = outcome.next_try()
                self._show_resolving(outcome)
        self._board.update(uses_chat_template_override=state.chat_template_override is not None)
        self._resolved.set(Resolved(state, model_path, projection_path, adapters))
        self._show_resolving(None)

    async def _adapters_of(self, state: ApplicableState) -> tuple[Adapter, ...]:
        """Find the LoRA adapters of a state; none is looked for where no model would use them."""
        if state.model == "None":
            return ()
        adapters = state.lora_adapters
        return tuple(
            [Adapter(await self._find_adapter(adapter.source), adapter.scale) for adapter in adapters]
        )

    async def _apply_forever(self) -> None:
        while True:
            resolved = await self._resolved.other_than(None)
            assert resolved is not None
            self._in_hand = resolved.state
            self._applying = attrs.evolve(self._applying, status=StateApplicationStatus.FRESH)
            async with trio.open_nursery() as serving:
                serving.start_soon(self._service.serve_forever, resolved, self._show_applying)
                await self._resolved.other_than(resolved)
                self._in_hand = None
                self._show()
                self._service.withdraw()
                await self._slots.emptied()
                serving.cancel_scope.cancel()

    def _show_resolving(self, outcome: Outcome | None) -> None:
        self._resolving = outcome
        self._show()

    def _show_applying(self, outcome: Outcome) -> None:
        self._applying = outcome
        self._show()

    def _show(self) -> None:
        newest = self._outcome_of_newest()
        self._board.update(
            issues=sorted_issues(self._applying.issues | newest.issues),
            state_application_status=newest.status,
        )

    def _outcome_of_newest(self) -> Outcome:
        if self._resolving is not None and self._searched == self._newest.value:
            return self._resolving
        return self._applying if self._in_hand == self._newest.value else _FRESH


_FRESH = Outcome(StateApplicationStatus.FRESH)
