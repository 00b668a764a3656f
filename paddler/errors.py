"""Every failure that crosses a package boundary.

Errors carry facts and build their sentence from them. They know nothing of HTTP; the table of
status codes is in http/surface.py and the one of stream errors in balancer/relay.py.
"""

import attrs


class PaddlerError(Exception):
    """Anything that Paddler itself reports."""


@attrs.define(eq=False)
class ConfigurationError(PaddlerError):
    """A daemon cannot run as it was configured: an address in use, an unreadable database."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@attrs.define(eq=False)
class StateStoreError(PaddlerError):
    """The desired state could not be read or written."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class RequestRefused(PaddlerError):
    """A request that never reached an agent."""


@attrs.define(eq=False)
class BufferFull(RequestRefused):
    """No slot was free and the waiting line has no room."""

    max_buffered_requests: int

    def __str__(self) -> str:
        return f"no free slot and {self.max_buffered_requests} requests are waiting already"


@attrs.define(eq=False)
class BufferTimeout(RequestRefused):
    """No slot came free before the deadline of the request."""

    waited: float

    def __str__(self) -> str:
        return f"no slot came free within {self.waited:g} s"


class ShuttingDown(RequestRefused):
    """The balancer is stopping."""

    def __str__(self) -> str:
        return "balancer is shutting down"


@attrs.define(eq=False)
class NoSuchAgent(RequestRefused):
    """No connected agent has this id."""

    agent_id: str

    def __str__(self) -> str:
        return f"no agent with the id {self.agent_id} is connected"


class AgentFailed(PaddlerError):
    """An agent that had the request could not finish it."""


@attrs.define(eq=False)
class AgentGone(AgentFailed):
    """The link to the agent ended."""

    agent_id: str

    def __str__(self) -> str:
        return f"the link to agent {self.agent_id} ended"


@attrs.define(eq=False)
class AnswerTimeout(AgentFailed):
    """The agent did not answer a question in time."""

    agent_id: str
    waited: float

    def __str__(self) -> str:
        return f"agent {self.agent_id} did not answer within {self.waited:g} s"


class EngineFailed(PaddlerError):
    """The engine process cannot serve any more."""


@attrs.define(eq=False)
class EngineDied(EngineFailed):
    """The engine process ended by itself: a crash, an abort, a kill."""

    cause: str
    last_words: str = ""

    def __str__(self) -> str:
        return f"engine stopped: {self.cause}" + (f" ({self.last_words})" if self.last_words else "")


@attrs.define(eq=False)
class EngineHung(EngineFailed):
    """The engine process gave no sign of life while work was open, and was killed."""

    silent: float
    last_words: str = ""

    @property
    def cause(self) -> str:
        return "hang"

    def __str__(self) -> str:
        return f"engine stopped: hang, {self.silent:.1f} s without progress"


@attrs.define(eq=False)
class ModelUnavailable(PaddlerError):
    """The model of the desired state cannot be served.

    `issues` is what the agents snapshot shows; `reason` what llama.cpp said, for the log.
    """

    issues: tuple[object, ...]
    reason: str = ""

    def __str__(self) -> str:
        more = f" (and {len(self.issues) - 1} more)" if len(self.issues) > 1 else ""
        return self.reason or f"{self.issues[0]}{more}"


class ProtocolError(PaddlerError):
    """The rules of one of our protocols were broken."""


class LocalProtocolError(ProtocolError):
    """We broke them."""


class RemoteProtocolError(ProtocolError):
    """The other side broke them; the text says how."""
