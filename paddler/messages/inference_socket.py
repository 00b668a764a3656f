"""Frames between a client and the inference WebSocket."""

import enum

import attrs

from paddler.messages.inference import TokenRequest
from paddler.messages.tokens import StreamError


@attrs.frozen
class Request:
    """Run `request` under an id of the client's choice."""

    id: str
    request: TokenRequest


@attrs.frozen
class StopRespondingTo:
    payload: str


@attrs.frozen
class Notification:
    """A client's notification; the only one there is stops a request."""

    payload: StopRespondingTo


@attrs.frozen
class Error:
    """A client reports an error; it is only logged."""

    request_id: str
    error: StreamError


ClientFrame = Request | Notification | Error


class ServerNotification(enum.StrEnum):
    TOKEN_GENERATION_DISABLED = "TokenGenerationDisabled"  # noqa: S105 no secret
    TOKEN_GENERATION_ENABLED = "TokenGenerationEnabled"  # noqa: S105 no secret
