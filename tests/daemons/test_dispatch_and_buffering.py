"""Where requests go, and how they wait: the whole cluster with the bundled model."""

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import pytest
import trio

from tests.cluster import (
    ENDLESS,
    NO_EXPIRY,
    SHORT_WAIT,
    Cluster,
    Message,
    as_delivered,
    cluster,
    conversation,
    error_code,
    raw_prompt,
    result,
    state,
    text_of,
)

pytestmark = pytest.mark.slow


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[None]:
    """Run a `paddler` command as a process of its own for the duration of the block."""
    async with trio.open_nursery() as processes:
        command = [sys.executable, "-m", "paddler", *arguments]
        child: trio.Process = await processes.start(partial(trio.run_process, command, check=False))
        yield
        child.terminate()
        with trio.fail_after(SHORT_WAIT):
            await child.wait()


@pytest.mark.scenario("BU-1")
async def test_a_request_waits_for_the_first_agent_and_is_served() -> None:
    async with (
        cluster(
            agents=0, desired=as_delivered(), buffered_request_timeout=120, max_buffered_requests=1
        ) as running,
        running.post(raw_prompt()) as response,
    ):
        await running.wait_for_buffered(1)
        await running.start_agent(4)
        assert "Response" in await response.message()
        assert await running.buffered() == 0


@pytest.mark.scenario("BU-2")
async def test_without_a_buffer_a_request_is_refused_at_once() -> None:
    async with cluster(agents=0, max_buffered_requests=0, buffered_request_timeout=0.05) as running:
        await running.start_agent(2)
        await running.wait_for_agents(lambda agents: len(agents) == 1)
        [message] = await running.generate(raw_prompt())
        assert result(message) == {"Error": {"code": 503, "description": "Buffered requests overflow"}}


@pytest.mark.scenario("BU-3")
async def test_a_buffered_request_without_agents_times_out() -> None:
    async with cluster(
        agents=0, desired=state(), max_buffered_requests=1, buffered_request_timeout=0.05
    ) as running:
        [message] = await running.generate(raw_prompt())
        assert result(message) == {
            "Error": {"code": 504, "description": "Waiting for available slot timed out"}
        }


@pytest.mark.scenario("BU-4")
@pytest.mark.parametrize("agents", [0, 1])
async def test_an_agent_without_a_model_is_like_no_agent(agents: int) -> None:
    async with cluster(agents=agents, buffered_request_timeout=0.5) as running:
        await running.wait_for_agents(lambda shown: len(shown) == agents)
        [message] = await running.generate(raw_prompt())
        assert error_code(message) == 504


@pytest.mark.scenario("BU-5")
async def test_after_a_timeout_the_next_request_is_served() -> None:
    async with cluster(agents=0, desired=state(), buffered_request_timeout=0.05) as running:
        [message] = await running.generate(raw_prompt())
        assert error_code(message) == 504
        await running.start_agent(4)
        await running.wait_until_serving()
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"


@pytest.mark.scenario("BU-6")
async def test_a_busy_agent_and_no_buffer_refuse_the_second_request() -> None:
    async with (
        cluster(slots=1, desired=state(), max_buffered_requests=0) as running,
        running.post(ENDLESS) as response,
    ):
        await response.message()
        [message] = await running.generate(raw_prompt())
        assert error_code(message) == 503


@pytest.mark.scenario("BU-7")
async def test_more_requests_than_slots_are_all_served() -> None:
    def agent_process(running: Cluster) -> AbstractAsyncContextManager[None]:
        address = running.balancer.management_address.text
        return process("agent", f"--management-addr={address}", "--slots=2", "--threads=1")

    async with (
        cluster(agents=0, desired=as_delivered(), buffered_request_timeout=120) as running,
        agent_process(running),
        agent_process(running),
    ):
        await running.wait_until_serving(2)
        firsts: list[Message] = []

        async def ask() -> None:
            firsts.append((await running.generate(raw_prompt(max_tokens=10)))[0])

        async with trio.open_nursery() as requests:
            for _ in range(5):
                requests.start_soon(ask)
        assert len(firsts) == 5
        assert all("Response" in message for message in firsts)


@pytest.mark.scenario("BU-8")
async def test_four_requests_on_four_agents_meet_four_agents() -> None:
    async with cluster(agents=4, slots=1, desired=state()) as running:
        seen: list[set[str]] = []

        async def ask() -> None:
            messages = await running.generate({**ENDLESS, "max_tokens": 16})
            seen.append({message["Response"]["generated_by"] for message in messages})

        async with trio.open_nursery() as requests:
            for _ in range(4):
                requests.start_soon(ask)
        assert all(len(names) == 1 for names in seen)
        assert set().union(*seen) == {"agent-0", "agent-1", "agent-2", "agent-3"}


@pytest.mark.scenario("BU-9")
async def test_agents_appear_in_the_snapshot_one_after_the_other() -> None:
    async with cluster(agents=0) as running:
        assert await running.snapshot() == []
        await running.start_agent()
        await running.wait_for_agents(lambda agents: len(agents) == 1)
        await running.start_agent()
        await running.wait_for_agents(lambda agents: len(agents) == 2)


@pytest.mark.scenario("BU-10")
async def test_an_item_timeout_of_zero_ends_every_request() -> None:
    async with cluster(slots=2, desired=as_delivered(), inference_item_timeout=0) as running:
        [message] = await running.generate(raw_prompt())
        assert error_code(message) == 504
        assert "Inference timed out after 0ms" in result(message)["Error"]["description"]


async def test_waiting_requests_are_served_in_order_of_arrival() -> None:
    async with cluster(slots=1, desired=state(), **NO_EXPIRY) as running, trio.open_nursery() as requests:
        send_number, receive_number = trio.open_memory_channel[int](4)

        async def ask(number: int) -> None:
            await running.generate(conversation("Hello"))
            await send_number.send(number)

        async with running.post(ENDLESS) as response:
            await response.message()
            for number in range(4):
                requests.start_soon(ask, number)
                await running.wait_for_buffered(number + 1)
        with trio.fail_after(20):
            assert [await receive_number.receive() for _ in range(4)] == [0, 1, 2, 3]
