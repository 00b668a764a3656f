"""The balancer as a whole: its nursery tree on one screen.

Nesting is shutdown order. Clients end first, while agents are still there to be told to stop; then the
agents' links; then the services.
"""

import logging
from functools import partial

import attrs
import trio

from paddler.balancer.agent_link import AgentLinks, LinkTimeouts
from paddler.balancer.changes import Changes
from paddler.balancer.metrics import report_to_statsd
from paddler.balancer.reconciliation import Reconciliation
from paddler.balancer.relay import Relay
from paddler.balancer.request_buffer import RequestBuffer
from paddler.balancer.state_store import open_state_store
from paddler.config import MAX_CLIENT_MESSAGE_BYTES, MAX_LINK_MESSAGE_BYTES, Address, BalancerConfig
from paddler.http.inference import make_inference_app
from paddler.http.management import make_management_app
from paddler.http.surface import open_surface
from paddler.routing.fleet import Fleet

log = logging.getLogger(__name__)


@attrs.frozen
class RunningBalancer:
    """A balancer that has started: where it listens, and what a program around it may look at."""

    inference_address: Address
    management_address: Address
    fleet: Fleet
    fleet_changes: Changes
    reconciliation: Reconciliation


async def run(
    config: BalancerConfig,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[RunningBalancer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a balancer until `stop` is set.

    Raises ConfigurationError, in an exception group, when a service cannot listen or the state cannot
    be read.
    """
    fleet_changes = Changes()
    fleet = Fleet(fleet_changes.notify)
    buffer = RequestBuffer(
        fleet, max_buffered_requests=config.max_buffered_requests, timeout=config.buffered_request_timeout
    )
    links = AgentLinks(
        fleet=fleet,
        buffer=buffer,
        timeouts=LinkTimeouts(
            registration=config.registration_timeout,
            liveness=config.liveness_timeout,
            answer=config.answer_timeout,
            item=config.inference_item_timeout,
        ),
    )
    relay = Relay(buffer=buffer, links=links, item_timeout=config.inference_item_timeout)
    reconciliation = Reconciliation(store=open_state_store(config.state_database), links=links)
    stopping = trio.Event()
    management_app = make_management_app(
        fleet=fleet,
        fleet_changes=fleet_changes,
        buffer=buffer,
        links=links,
        reconciliation=reconciliation,
        metrics_prefix=config.statsd_prefix,
        cors_allowed_hosts=config.management_cors_allowed_hosts,
        stopping=stopping,
    )
    inference_app = make_inference_app(
        relay=relay,
        reconciliation=reconciliation,
        fleet=fleet,
        cors_allowed_hosts=config.inference_cors_allowed_hosts,
        stopping=stopping,
    )

    async with trio.open_nursery() as services:
        await services.start(reconciliation.keep_agents_reconciled)
        async with open_surface(
            management_app,
            name="management",
            address=config.management_address,
            stopping=stopping,
            max_message_bytes=MAX_LINK_MESSAGE_BYTES,
        ) as management:
            async with open_surface(
                inference_app,
                name="inference",
                address=config.inference_address,
                stopping=stopping,
                max_message_bytes=MAX_CLIENT_MESSAGE_BYTES,
            ) as inference:
                if config.statsd_address is not None:
                    services.start_soon(
                        partial(
                            report_to_statsd,
                            fleet,
                            buffer,
                            address=config.statsd_address,
                            prefix=config.statsd_prefix,
                            interval=config.statsd_reporting_interval,
                        )
                    )
                task_status.started(
                    RunningBalancer(
                        inference_address=config.inference_address.at_port(inference.port),
                        management_address=config.management_address.at_port(management.port),
                        fleet=fleet,
                        fleet_changes=fleet_changes,
                        reconciliation=reconciliation,
                    )
                )
                await stop.wait()
                log.info("balancer stops: requests end, then agents, then services")
                relay.shut_down()
                stopping.set()
            links.shut_down()
        services.cancel_scope.cancel()
