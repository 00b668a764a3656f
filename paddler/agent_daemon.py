"""The agent as a whole: its nursery tree on one screen.

Nesting is shutdown order. The link says goodbye first, while its requests are still known; then the
engine ends, and the preparation processes last.
"""

import ipaddress
import logging

import trio

from paddler.agent.balancer_link import new_agent_id, stay_connected
from paddler.agent.link_session import Connection, LinkSession
from paddler.agent.model_service import ModelService
from paddler.agent.preparation import open_preparation
from paddler.agent.reconciliation import Reconciliation
from paddler.agent.slots import Slots
from paddler.agent.status import StatusBoard
from paddler.config import AgentConfig
from paddler.engine.cores import engine_threads
from paddler.engine.handle import open_engine

log = logging.getLogger(__name__)


async def run(
    config: AgentConfig,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run an agent until `stop` is set. It looks for its balancer as long as it runs."""
    agent_id = new_agent_id()
    board = StatusBoard(slots=config.slots)
    threads = config.threads or engine_threads(shared_host=is_local(config.management_address.host))
    async with open_preparation(timeout=config.preparation_timeout) as preparation:
        slots = Slots(preparer=preparation)
        service = ModelService(
            board=board,
            slots=slots,
            preparer=preparation,
            open_engine=open_engine,
            engine_timeouts=config.engine_timeouts,
            kv_layout=config.kv_layout,
            threads=threads,
            exact=config.exact,
            prefix_cache=config.prefix_cache,
            prefix_cache_bytes=config.prefix_cache_bytes,
        )
        reconciliation = Reconciliation(board=board, slots=slots, service=service)

        def open_session(connection: Connection) -> LinkSession:
            return LinkSession(
                name=config.name,
                board=board,
                slots=slots,
                reconciliation=reconciliation,
                liveness_timeout=config.liveness_timeout,
                farewell_timeout=config.disconnect_timeout,
                connection=connection,
            )

        async def stay_linked() -> None:
            await stay_connected(
                open_session,
                address=config.management_address,
                agent_id=agent_id,
                connect_timeout=config.connect_timeout,
                disconnect_timeout=config.disconnect_timeout,
            )

        log.info("agent %s: %d slots, %d engine threads", agent_id, config.slots, threads)
        async with trio.open_nursery() as services:
            services.start_soon(reconciliation.apply_desired_state)
            async with trio.open_nursery() as links:
                links.start_soon(stay_linked)
                task_status.started()
                await stop.wait()
                log.info("agent stops")
                links.cancel_scope.cancel()
            services.cancel_scope.cancel()


def is_local(host: str) -> bool:
    """Say whether an address, which may be one that a balancer on every interface has, is this host's."""
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_unspecified
