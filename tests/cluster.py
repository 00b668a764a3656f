"""The real daemons in this process, on free ports, with real clients: `async with cluster() as c`."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from paddler import agent_daemon, balancer_daemon
from paddler.config import Address, AgentConfig, BalancerConfig, bundled_model_path
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    DEFAULT_PARAMETERS,
    DETERMINISTIC_PARAMETERS,
    DesiredState,
    InferenceParameters,
    LocalModel,
    ModelSource,
)
from paddler.messages.wire import unstructure
from tests.streams import StreamedResponse, open_stream

BUNDLED = LocalModel(str(bundled_model_path()))
FIXTURES = Path(__file__).parent / "fixtures"
LOAD_WAIT = 60.0
"""Generous: where a model may be loading."""
SHORT_WAIT = 5.0
"""For releases of slots and buffer entries."""

Message = dict[str, Any]

ENDLESS: Message = {"raw_prompt": "a b " * 9 + "a b", "max_tokens": 4000}
"""The bundled model goes on with this until its cells are full."""


def loopback(port: int = 0) -> Address:
    return Address("127.0.0.1", port, f"127.0.0.1:{port}")


def deterministic(**changes: Any) -> InferenceParameters:
    """Return the deterministic preset, changed."""
    return attrs.evolve(DETERMINISTIC_PARAMETERS, **{"context_size": 4096, **changes})


def as_delivered(**changes: Any) -> DesiredState:
    """Return a desired state with the bundled model and the parameters of a fresh balancer."""
    return state(parameters=attrs.evolve(DEFAULT_PARAMETERS, **{"context_size": 4096, **changes}))


def state(
    model: ModelSource = BUNDLED, parameters: InferenceParameters | None = None, **changes: Any
) -> DesiredState:
    """Return a desired state with this model and the deterministic preset."""
    return attrs.evolve(
        DEFAULT_DESIRED_STATE,
        model=model,
        inference_parameters=parameters or deterministic(),
        **changes,
    )


def raw_prompt(prompt: str = "Count to 40.", max_tokens: int = 20) -> Message:
    return {"raw_prompt": chat_markup(prompt), "max_tokens": max_tokens}


def chat_markup(prompt: str) -> str:
    """Return a user turn in the bundled model's markup, thinking closed."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def conversation(prompt: str, max_tokens: int = 60, *, thinking: bool = False, **changes: Any) -> Message:
    return {
        "add_generation_prompt": True,
        "conversation_history": [{"role": "user", "content": prompt}],
        "enable_thinking": thinking,
        "max_tokens": max_tokens,
        **changes,
    }


def result(message: Message) -> Any:
    """Return the GeneratedTokenResult of a message, or the error as `{"Error": …}`."""
    if "Error" in message:
        return {"Error": message["Error"]["error"]}
    return message["Response"]["response"]["GeneratedToken"]


def tokens(messages: list[Message], *kinds: str) -> list[str]:
    """Return the texts of the token messages, in order; of these kinds only, when given."""
    wanted = kinds or ("ContentToken", "ReasoningToken", "ToolCallToken", "UndeterminableToken")
    return [text for message in messages for kind, text in _items(result(message)) if kind in wanted]


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def text_of(messages: list[Message]) -> str:
    return "".join(tokens(messages))


def usage_of(messages: list[Message]) -> dict[str, int]:
    """Return the usage of the last message, which must be `Done`."""
    usage: dict[str, int] = result(messages[-1])["Done"]["usage"]
    return usage


def error_code(message: Message) -> int | None:
    return message["Error"]["error"]["code"] if "Error" in message else None


@attrs.define(eq=False)
class RunningAgent:
    """One agent daemon of the cluster."""

    name: str
    stop: trio.Event
    stopped: trio.Event


@attrs.define(eq=False)
class Cluster:
    """A balancer and its agents; `client` speaks HTTP to both services."""

    balancer: balancer_daemon.RunningBalancer
    client: httpx.AsyncClient
    daemons: trio.Nursery
    agents: list[RunningAgent] = attrs.Factory(list)
    stop: trio.Event = attrs.Factory(trio.Event)
    stopped: trio.Event = attrs.Factory(trio.Event)

    @property
    def inference_url(self) -> str:
        return self.balancer.inference_address.url

    @property
    def inference_port(self) -> int:
        return self.balancer.inference_address.port

    @property
    def management_url(self) -> str:
        return self.balancer.management_address.url

    async def start_agent(self, slots: int = 4, name: str | None = None, **changes: Any) -> RunningAgent:
        """Start one more agent; it is connecting when this returns."""
        agent = RunningAgent(name or f"agent-{len(self.agents)}", trio.Event(), trio.Event())
        config = AgentConfig(
            management_address=self.balancer.management_address,
            slots=slots,
            name=agent.name,
            threads=1,
            **changes,
        )
        self.agents.append(agent)

        async def run() -> None:
            await agent_daemon.run(config, agent.stop)
            agent.stopped.set()

        self.daemons.start_soon(run, name=agent.name)
        return agent

    async def stop_agent(self, agent: RunningAgent) -> None:
        agent.stop.set()
        with trio.fail_after(SHORT_WAIT):
            await agent.stopped.wait()
        self.agents.remove(agent)

    async def stop_balancer(self, within: float = SHORT_WAIT) -> None:
        self.stop.set()
        with trio.fail_after(within):
            await self.stopped.wait()

    async def snapshot(self) -> list[dict[str, Any]]:
        """Return the agents of the snapshot, by name."""
        response = await self.client.get(f"{self.management_url}/api/v1/agents")
        return sorted(response.json()["agents"], key=lambda agent: agent["name"] or "")

    async def buffered(self) -> int:
        response = await self.client.get(f"{self.management_url}/api/v1/buffered_requests")
        count: int = response.json()["buffered_requests_current"]
        return count

    async def put_state(self, desired: DesiredState) -> httpx.Response:
        return await self.client.put(
            f"{self.management_url}/api/v1/balancer_desired_state", json=unstructure(desired)
        )

    async def wait_for_agents(
        self, condition: Callable[[list[dict[str, Any]]], bool], *, within: float = SHORT_WAIT
    ) -> list[dict[str, Any]]:
        """Follow the agents stream until a snapshot satisfies the condition; return it, sorted by name."""
        with trio.fail_after(within):
            async with self.agents_stream() as stream:
                while True:
                    agents = sorted((await stream.event())["agents"], key=lambda agent: agent["name"] or "")
                    if condition(agents):
                        return agents

    def agents_stream(self) -> AbstractAsyncContextManager[StreamedResponse]:
        return open_stream("GET", f"{self.management_url}/api/v1/agents/stream")

    async def wait_until_serving(self, agents: int | None = None) -> None:
        """Wait until so many agents (default: all started) have all their slots."""
        count = len(self.agents) if agents is None else agents
        await self.wait_for_agents(
            lambda shown: (
                sum(agent["slots_total"] == agent["desired_slots_total"] for agent in shown) >= count
            ),
            within=LOAD_WAIT,
        )

    async def wait_for_slots(self, processing: int, *, within: float = SHORT_WAIT) -> None:
        """Wait until so many slots are processing over all agents."""
        await self.wait_for_agents(
            lambda shown: sum(agent["slots_processing"] for agent in shown) == processing, within=within
        )

    async def wait_for_buffered(self, count: int, *, within: float = SHORT_WAIT) -> None:
        url = f"{self.management_url}/api/v1/buffered_requests/stream"
        with trio.fail_after(within):
            async with open_stream("GET", url) as stream:
                while (await stream.event())["buffered_requests_current"] != count:
                    pass

    def post(self, body: Message) -> AbstractAsyncContextManager[StreamedResponse]:
        """Open the token stream of this request."""
        return open_stream("POST", f"{self.inference_url}{request_path(body)}", body)

    async def generate(self, body: Message) -> list[Message]:
        """Run one request over HTTP to its end and return its messages."""
        async with self.post(body) as response:
            assert response.status_code == 200, await response.text()
            return await response.messages()


def count_tasks() -> int:
    """Count the tasks of this Trio run."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    tasks, count = [root], 0
    while tasks:
        task = tasks.pop()
        count += 1
        tasks.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return count


def request_path(body: Message) -> str:
    route = "continue_from_raw_prompt" if "raw_prompt" in body else "continue_from_conversation_history"
    return f"/api/v1/{route}"


@asynccontextmanager
async def cluster(
    *,
    agents: int = 1,
    slots: int = 4,
    desired: DesiredState | None = None,
    serving: bool = True,
    agent_changes: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[Cluster]:
    """Run a balancer with agents; `desired` is PUT first, and with `serving` waited for.

    Everything is stopped in order when the block ends: balancer, then agents.
    """
    settings = BalancerConfig(
        **{
            "inference_address": loopback(),
            "management_address": loopback(),
            "max_buffered_requests": 10,
            **config,
        }
    )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=LOAD_WAIT, limits=limits) as client, trio.open_nursery() as daemons:
        stop, stopped = trio.Event(), trio.Event()

        async def run_balancer(task_status: trio.TaskStatus[balancer_daemon.RunningBalancer]) -> None:
            await balancer_daemon.run(settings, stop, task_status=task_status)
            stopped.set()

        balancer: balancer_daemon.RunningBalancer = await daemons.start(run_balancer)
        running = Cluster(balancer, client, daemons, stop=stop, stopped=stopped)
        try:
            if desired is not None:
                assert (await running.put_state(desired)).status_code == 204
            for _ in range(agents):
                await running.start_agent(slots, **(agent_changes or {}))
            if serving and agents and desired is not None and desired.model != "None":
                await running.wait_until_serving()
            yield running
        finally:
            stop.set()
            for agent in running.agents:
                agent.stop.set()


NO_EXPIRY: dict[str, Any] = {"buffered_request_timeout": 3600.0, "inference_item_timeout": 3600.0}
