"""The fleet and the buffer as the management API shows them."""

import attrs

from paddler.messages.numbers import Int32, Unsigned
from paddler.messages.state import AgentIssue, StateApplicationStatus


@attrs.frozen
class AgentSnapshot:
    """One connected agent; strict clients refuse further keys."""

    desired_slots_total: Int32
    download_current: Unsigned
    download_filename: str | None
    download_indeterminate: bool
    download_total: Unsigned
    id: str
    issues: tuple[AgentIssue, ...]
    model_path: str | None
    name: str | None
    slots_processing: Int32
    slots_total: Int32
    state_application_status: StateApplicationStatus
    uses_chat_template_override: bool


@attrs.frozen
class AgentsSnapshot:
    agents: tuple[AgentSnapshot, ...]


@attrs.frozen
class BufferedRequestsSnapshot:
    buffered_requests_current: Int32


@attrs.frozen
class ModelMetadata:
    """GGUF header as llama.cpp prints it; keys sorted, values are strings."""

    metadata: dict[str, str]
