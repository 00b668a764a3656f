"""Start and stop: in time, in order, leaving nothing behind."""

import os
import socket
from pathlib import Path

import pytest
import trio

from paddler import agent_daemon, balancer_daemon
from paddler.config import Address, AgentConfig, BalancerConfig
from paddler.errors import ConfigurationError
from tests.cluster import ENDLESS, NO_EXPIRY, cluster, loopback, raw_prompt, result, state
from tests.daemons.sockets import inference_socket, post_bytes, raw_post

pytestmark = pytest.mark.slow


def open_descriptors() -> set[str]:
    """Return what the open file descriptors of this process point at, without this very listing."""
    links = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 a snapshot of names, before any is read
        try:
            links.add(f"{name} {Path(f'/proc/self/fd/{name}').readlink()}")
        except FileNotFoundError:
            continue
    return links


@pytest.mark.scenario("SH-1")
async def test_a_balancer_with_an_open_subscriber_stops_within_a_second() -> None:
    async with (
        cluster(agents=0) as running,
        running.agents_stream() as stream,
    ):
        with trio.fail_after(1):
            assert await stream.event() == {"agents": []}
        await running.stop_balancer(within=1)
        assert "data: " not in await stream.text()


@pytest.mark.scenario("SH-2", "SH-3")
@pytest.mark.parametrize("slots", [1, 4])
async def test_a_cluster_without_a_model_stops_within_five_seconds(slots: int) -> None:
    with trio.fail_after(10):
        async with cluster(slots=slots) as running:
            await running.wait_for_agents(lambda agents: len(agents) == 1)
            await running.stop_balancer()
            await running.stop_agent(running.agents[0])


@pytest.mark.scenario("SH-4")
async def test_start_and_stop_leave_no_descriptors() -> None:
    async def one_life() -> None:
        async with cluster(slots=2, desired=state()) as running:
            await running.generate(raw_prompt(max_tokens=3))

    await one_life()  # what the first life opens for the whole process stays open
    before = open_descriptors()
    await one_life()
    with trio.fail_after(5):
        while len(open_descriptors()) > len(before):  # noqa: ASYNC110 the kernel's table has no event
            await trio.sleep(0.05)


@pytest.mark.scenario("SH-5")
async def test_an_agent_stops_while_its_model_loads() -> None:
    async with cluster(slots=4, desired=state(), serving=False) as running:
        await running.wait_for_agents(lambda agents: len(agents) == 1)
        await running.stop_agent(running.agents[0])


@pytest.mark.scenario("SH-6")
@pytest.mark.parametrize("service", ["inference", "management"])
async def test_a_port_in_use_names_the_service(service: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = BalancerConfig(
            inference_address=loopback(port if service == "inference" else 0),
            management_address=loopback(port if service == "management" else 0),
        )
        with pytest.RaisesGroup(ConfigurationError, flatten_subgroups=True) as refusal:
            await balancer_daemon.run(config, trio.Event())
        [error] = _leaves(refusal.value)
        assert service in str(error)
        assert str(port) in str(error)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


@pytest.mark.scenario("SH-12")
async def test_an_agent_whose_balancer_never_answers_stops() -> None:
    async def say_nothing(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as servers:
        [listener, *_] = await servers.start(trio.serve_tcp, say_nothing, 0)
        port = listener.socket.getsockname()[1]
        await _stop_after(Address("127.0.0.1", port, "silent"))
        servers.cancel_scope.cancel()


@pytest.mark.scenario("SH-13")
async def test_an_agent_with_nobody_at_its_address_stops() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        await _stop_after(loopback(free.getsockname()[1]))


async def _stop_after(address: Address) -> None:
    stop = trio.Event()
    with trio.fail_after(5):
        async with trio.open_nursery() as daemons:
            daemons.start_soon(agent_daemon.run, AgentConfig(management_address=address, slots=1), stop)
            await trio.sleep(0.3)
            stop.set()


@pytest.mark.scenario("ST-5")
async def test_a_buffered_request_is_told_of_the_shutdown() -> None:
    async with (
        cluster(agents=0, buffered_request_timeout=60) as running,
        raw_post(running.inference_port, ENDLESS) as client,
    ):
        await client.read_until(b"\r\n\r\n")
        await running.wait_for_buffered(1)
        await running.stop_balancer(within=2)
        received = await client.read_to_end()
        assert b"balancer is shutting down" in received
        assert received.endswith(b"0\r\n\r\n")


async def test_running_requests_are_told_of_the_shutdown() -> None:
    async with cluster(slots=2, desired=state(), **NO_EXPIRY) as running, inference_socket(running) as client:
        await client.request("a", ENDLESS)
        await client.receive()
        async with running.post(ENDLESS) as response:
            await response.message()
            await running.stop_balancer()
        messages = await client.receive_until_terminal("a")
        assert result(messages[-1]) == {"Error": {"code": 503, "description": "balancer is shutting down"}}


async def test_a_client_that_never_reads_does_not_delay_the_stop() -> None:
    async with cluster(slots=4, desired=state(), **NO_EXPIRY) as running, trio.open_nursery() as clients:
        for _ in range(4):
            stream = await trio.open_tcp_stream("127.0.0.1", running.inference_port)
            clients.start_soon(_post_and_sleep, stream)
        await running.wait_for_slots(4)
        await trio.sleep(1)
        await running.stop_balancer(within=4)
        clients.cancel_scope.cancel()


async def _post_and_sleep(stream: trio.SocketStream) -> None:
    async with stream:
        await stream.send_all(post_bytes(ENDLESS))
        await trio.sleep_forever()


async def test_an_agent_that_stops_ends_its_requests_and_leaves_the_snapshot() -> None:
    async with cluster(slots=1, desired=state()) as running, running.post(ENDLESS) as response:
        await response.message()
        await running.stop_agent(running.agents[0])
        await running.wait_for_agents(lambda agents: not agents)
        *_, last = [line async for line in response]
        assert "Agent controller connection closed" in last


async def test_agents_outlive_a_restart_of_the_balancer() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with trio.open_nursery() as daemons:
        stop_agent = trio.Event()
        config = AgentConfig(management_address=loopback(port), slots=1, name="a")
        daemons.start_soon(agent_daemon.run, config, stop_agent)
        for _ in range(2):
            async with cluster(agents=0, management_address=loopback(port), desired=state()) as running:
                await running.wait_until_serving(1)
                assert await running.generate(raw_prompt(max_tokens=2))
        stop_agent.set()
