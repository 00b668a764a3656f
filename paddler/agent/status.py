"""The versioned picture of itself an agent publishes, and a way to wait for a newer one."""

from typing import Any, Generic, TypeVar

import attrs
import trio

from paddler.messages.agent_socket import AgentStatus
from paddler.messages.state import StateApplicationStatus

T = TypeVar("T")


class Latest(Generic[T]):
    """The newest of a series of values; values that nobody looked at in time are skipped."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._changed = trio.Event()

    @property
    def value(self) -> T:
        return self._value

    def set(self, value: T) -> None:
        """Replace the value and wake who waits for another; an equal one changes nothing."""
        if value == self._value:
            return
        self._value = value
        self._changed.set()
        self._changed = trio.Event()

    async def other_than(self, known: T) -> T:
        """Wait for a value that is not equal to this one, and return it."""
        while self._value == known:
            await self._changed.wait()
        return self._value


class StatusBoard:
    """Where the agent's services write what is going on, and the link reads it."""

    def __init__(self, *, slots: int) -> None:
        self._latest = Latest(
            AgentStatus(
                version=0,
                desired_slots_total=slots,
                slots_processing=0,  # the balancer counts: none of a link's requests outlives it
                slots_total=0,
                download_current=0,
                download_filename=None,
                download_indeterminate=True,
                download_total=0,
                issues=(),
                model_path=None,
                state_application_status=StateApplicationStatus.FRESH,
                uses_chat_template_override=False,
            )
        )

    @property
    def status(self) -> AgentStatus:
        return self._latest.value

    def update(self, **changes: Any) -> None:
        """Set some fields of the status; the version grows when one of them really changed."""
        status = attrs.evolve(self.status, **changes)
        if status != self.status:
            self._latest.set(attrs.evolve(status, version=status.version + 1))

    def show_progress(self, current: int, total: int, filename: str) -> None:
        """Show how far a file is downloaded or loaded; a total of 0 is not known."""
        self.update(
            download_current=current,
            download_total=total,
            download_filename=filename,
            download_indeterminate=total == 0,
        )

    def clear_progress(self) -> None:
        self.update(download_current=0, download_total=0, download_filename=None, download_indeterminate=True)

    async def newer_than(self, status: AgentStatus) -> AgentStatus:
        """Wait for a status other than this one, and return it."""
        return await self._latest.other_than(status)
