"""What the daemons are told: frozen, validated once, with every default that is not on the wire.

Durations are seconds. The command line (cli.py) builds these from its flags; tests build them with
short deadlines.
"""

import enum
from pathlib import Path

import attrs

MAX_JSON_BODY_BYTES = 2 * 1024 * 1024
"""Largest JSON body of a request."""

MAX_CLIENT_MESSAGE_BYTES = 50 * 1024 * 1024
"""Largest WebSocket message of a client."""

MAX_LINK_MESSAGE_BYTES = MAX_CLIENT_MESSAGE_BYTES + 1024 * 1024
"""Largest message of the agent link and frame of the engine's pipe: a client's message in its envelope."""


class KvLayout(enum.StrEnum):
    """How KV cache cells are given to slots; see docs/agent.md."""

    AUTO = "auto"
    SHARED = "shared"
    PER_SLOT = "per-slot"


@attrs.frozen
class Address:
    """A TCP address; `host` is resolved, `text` is what was typed."""

    host: str
    port: int
    text: str

    def __str__(self) -> str:
        return self.text

    def at_port(self, port: int) -> "Address":
        """Return this address with the port that was really bound, which matters when 0 was asked for."""
        return self if port == self.port else attrs.evolve(self, port=port, text=f"{self.bracketed}:{port}")

    @property
    def bracketed(self) -> str:
        """The host as it stands in a URL."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        """An HTTP URL that clients on this machine can use, also when every interface was bound."""
        local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.bracketed)  # noqa: S104 nothing is bound
        return f"http://{local}:{self.port}"


@attrs.frozen(kw_only=True)
class BalancerConfig:
    """Settings of one balancer."""

    inference_address: Address
    management_address: Address
    inference_cors_allowed_hosts: tuple[str, ...] = ()
    management_cors_allowed_hosts: tuple[str, ...] = ()
    buffered_request_timeout: float = 10.0
    inference_item_timeout: float = 30.0
    max_buffered_requests: int = 30
    state_database: str = "memory://"
    statsd_address: Address | None = None
    statsd_prefix: str = "paddler_"
    statsd_reporting_interval: float = 10.0
    liveness_timeout: float = 12.0
    registration_timeout: float = 10.0
    answer_timeout: float = 3.0


@attrs.frozen(kw_only=True)
class EngineTimeouts:
    """When an engine process counts as failed."""

    start: float = 30.0
    """From spawn to the child's first frame."""
    load_silence: float = 60.0
    """Without a progress report while loading."""
    step: float = 30.0
    """Until a frame comes while work is open; 20 times the slowest turn when that is longer."""
    encode: float = 600.0
    """Instead of `step` while an image is encoded, which is one call of unknown length."""
    standstill: float = 2.0
    """Child stopped, or its CPU time standing still, while work is open; `step` alone bounds the wait for a
    disk, and for a GPU, which take no CPU time either."""
    stop: float = 5.0
    """From `stop` to the child's end."""


@attrs.frozen(kw_only=True)
class AgentConfig:
    """Settings of one agent."""

    management_address: Address
    slots: int
    name: str | None = None
    kv_layout: KvLayout = KvLayout.AUTO
    threads: int | None = None
    """Engine threads; None chooses by the host."""
    exact: bool = False
    """The same tokens whatever else runs; see docs/agent.md for its price."""
    prefix_cache: bool = True
    """Keep the cells of finished generations for requests that begin alike."""
    prefix_cache_bytes: int = 0
    """Host memory for prefixes whose cells were needed."""
    liveness_timeout: float = 12.0
    connect_timeout: float = 5.0
    disconnect_timeout: float = 1.0
    preparation_timeout: float = 10.0
    engine_timeouts: EngineTimeouts = EngineTimeouts()


def bundled_model_path() -> Path:
    """Return the path of the chat model that comes with the package."""
    return Path(__file__).parent / "models" / "data" / "paddler-tiny-chat.gguf"
