"""Bring the desired state to every agent: one service task stores and applies, one change after the other.

To apply is to put the state into each agent's outbox, so no agent can hold up another, and an agent
whose link breaks gets the state again when it registers. There is nothing to retry.
"""

import logging
from typing import NoReturn

import attrs
import trio

from paddler.balancer.agent_link import AgentLinks
from paddler.balancer.changes import Changes
from paddler.balancer.state_store import StateStore
from paddler.errors import ConfigurationError, StateStoreError
from paddler.messages.state import DEFAULT_DESIRED_STATE, ApplicableState, DesiredState

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class _Change:
    """Work for the service task: a state to store and apply, or None to supply a missing one."""

    state: DesiredState | None
    error: StateStoreError | None = None
    done: trio.Event = attrs.field(factory=trio.Event)


class Reconciliation:
    """The state in force; `changes` is notified when `applicable_state` changed."""

    def __init__(self, *, store: StateStore, links: AgentLinks) -> None:
        self.applicable_state: ApplicableState | None = None
        self.changes = Changes()
        self._store = store
        self._links = links
        # No room: a change that the service has not taken yet is withdrawn with the client who waits.
        self._send_changes, self._receive_changes = trio.open_memory_channel[_Change](0)

    async def desired_state(self) -> DesiredState:
        """Read the state from the store. Raises StateStoreError.

        When the store has lost it, the default is stored and applied.
        """
        state = await self._store.load()
        if state is None:
            await self._hand_to_service(_Change(None))
            state = await self._store.load()
        return state if state is not None else DEFAULT_DESIRED_STATE

    async def put(self, state: DesiredState) -> None:
        """Store and apply a state. Raises StateStoreError.

        Cancellation leaves it either untouched or both stored and applied.
        """
        await self._hand_to_service(_Change(state))

    async def keep_agents_reconciled(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Apply the stored state, then carry out changes until cancelled.

        Raises ConfigurationError when the state cannot be read at the start.
        """
        try:
            await self._carry_out(None)
        except StateStoreError as error:
            raise ConfigurationError(str(error)) from error
        task_status.started()
        while True:
            change = await self._receive_changes.receive()
            try:
                await self._carry_out(change.state)
            except StateStoreError as error:
                log.warning("desired state not changed: %s", error)
                change.error = error
            change.done.set()

    async def _hand_to_service(self, change: _Change) -> None:
        await self._send_changes.send(change)
        await change.done.wait()
        if change.error is not None:
            raise change.error

    async def _carry_out(self, state: DesiredState | None) -> None:
        if state is None:
            state = await self._store.load()
        else:
            await self._store.store(state)
        if state is None:
            state = DEFAULT_DESIRED_STATE
            await self._store.store(state)
        self._apply(state)

    def _apply(self, state: DesiredState) -> None:
        """Put the state into force; one that is in force already changes nothing on any agent."""
        applicable = state.applicable()
        if applicable == self.applicable_state:
            return
        self.applicable_state = applicable
        self._links.push_state(applicable)
        self.changes.notify()
        log.info("desired state accepted, agents are told: model %s", state.model)
