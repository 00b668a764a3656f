"""Two hundred clients that leave at random moments in every way there is; nothing stays behind."""

import random
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.cluster import ENDLESS, LOAD_WAIT, Cluster, cluster, conversation, count_tasks, state, text_of
from tests.daemons.sockets import RawClient, inference_socket, post_bytes, raw_post

pytestmark = pytest.mark.slow

CLIENTS = 200
AT_ONCE = 40
LONG_PROMPT = {"raw_prompt": "the quick brown fox " * 900, "max_tokens": 4000}
"""A few thousand tokens: most clients of it leave during its prefill."""


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def leave(client: RawClient, how: str) -> None:
    match how:
        case "fin":
            await client.stream.aclose()
        case "rst":
            await client.reset()
        case "half":
            await client.half_close()
            with trio.move_on_after(1):
                await client.read_to_end()


async def vanish(running: Cluster, seed: int) -> None:
    """Be one client: ask, wait for a phase, stay a random moment, leave."""
    dice = random.Random(seed)
    body = dice.choice([ENDLESS, LONG_PROMPT])
    how = dice.choice(["fin", "rst", "half", "socket"])
    phase = dice.choice([b"", b"\r\n\r\n", b"GeneratedToken"])
    moment = dice.uniform(0, 0.05)
    if how == "socket":
        async with inference_socket(running) as socket:
            await socket.request(str(seed), body)
            if phase == b"GeneratedToken":
                with trio.move_on_after(2):
                    await socket.receive()
            await trio.sleep(moment)
        return
    async with raw_post(running.inference_port, body) as client:
        with trio.move_on_after(2):  # a refused or waiting request never gets to its tokens
            await client.read_until(phase)
        await trio.sleep(moment)
        await leave(client, how)


async def send_half_a_request(running: Cluster) -> None:
    """Leave in the middle of the request itself."""
    stream = await trio.open_tcp_stream("127.0.0.1", running.inference_port)
    async with stream:
        data = post_bytes(ENDLESS)
        await stream.send_all(data[: len(data) // 2])


async def test_two_hundred_vanishing_clients_leave_no_trace() -> None:
    async with cluster(agents=2, slots=2, desired=state(), max_buffered_requests=30) as running:
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"
        await running.wait_for_slots(0)
        await trio.testing.wait_all_tasks_blocked(0.2)
        tasks, descriptors = count_tasks(), count_descriptors()

        limit = trio.CapacityLimiter(AT_ONCE)

        async def one(number: int) -> None:
            async with limit:
                if number % 20 == 0:
                    await send_half_a_request(running)
                else:
                    await vanish(running, number)

        with trio.fail_after(120):
            async with trio.open_nursery() as clients:
                for number in range(CLIENTS):
                    clients.start_soon(one, number)

        await running.wait_for_buffered(0)
        await running.wait_for_slots(0, within=LOAD_WAIT)
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"
        with trio.fail_after(20):
            while count_tasks() > tasks or count_descriptors() > descriptors:  # noqa: ASYNC110 no event for these
                await trio.sleep(0.1)
        agents = await running.snapshot()
        assert [agent["slots_total"] for agent in agents] == [2, 2]
        assert await running.buffered() == 0
