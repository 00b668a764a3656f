"""A balancer and one agent in one process: `paddler up`, for development and first steps."""

import sys
from pathlib import PurePath

import attrs
import trio

from paddler import agent_daemon, balancer_daemon
from paddler.balancer.reconciliation import Reconciliation
from paddler.config import AgentConfig, BalancerConfig, bundled_model_path
from paddler.messages.state import DETERMINISTIC_PARAMETERS, LocalModel

WELCOME = """\
Paddler serves {model} on {slots}.
  inference   {inference_url}
  management  {management_url}
Try it:
  curl -N {inference_url}/api/v1/continue_from_conversation_history -H 'Content-Type: application/json' -d '
    {{"conversation_history": [{{"role": "user", "content": "What is a slot?"}}],
     "add_generation_prompt": true, "enable_thinking": false, "max_tokens": 100}}'
Ctrl-C stops it.
"""


async def run(
    balancer: BalancerConfig,
    agent: AgentConfig,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set. Clients end first, with the balancer; then the agent.

    A state database without a model gets the bundled one. The agent connects to where the balancer
    really listens, whatever address its configuration has.
    """
    stop_agent = trio.Event()
    async with trio.open_nursery() as agents:
        async with trio.open_nursery() as balancers:
            running: balancer_daemon.RunningBalancer = await balancers.start(
                balancer_daemon.run, balancer, stop
            )
            await _store_bundled_model(running.reconciliation)
            neighbour = attrs.evolve(agent, management_address=running.management_address)
            agents.start_soon(agent_daemon.run, neighbour, stop_agent)
            task_status.started()
            with trio.CancelScope() as until_stop:
                balancers.start_soon(_cancel_when, stop, until_stop)
                await _announce_once_serving(running)
        stop_agent.set()


async def _store_bundled_model(reconciliation: Reconciliation) -> None:
    state = await reconciliation.desired_state()
    if state.model == "None":
        await reconciliation.put(
            attrs.evolve(
                state,
                inference_parameters=DETERMINISTIC_PARAMETERS,  # the tiny model's best answers
                model=LocalModel(str(bundled_model_path())),
            )
        )


async def _announce_once_serving(running: balancer_daemon.RunningBalancer) -> None:
    """Say on standard output where things are; scripts/quickstart waits for it."""
    changes = running.fleet_changes.subscribe()
    while running.fleet.totals()[1] == 0:
        await changes.wait()
    agent = next(agent for agent in running.fleet.snapshot().agents if agent.slots_total)
    sys.stdout.write(
        WELCOME.format(
            model=PurePath(agent.model_path or "").name,
            slots="1 slot" if agent.slots_total == 1 else f"{agent.slots_total} slots",
            inference_url=running.inference_address.url,
            management_url=running.management_address.url,
        )
    )
    sys.stdout.flush()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
