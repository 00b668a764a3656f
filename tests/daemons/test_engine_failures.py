"""The engine process killed, aborted or stopped under open streams: typed ends, and service again."""

import json
import os
import signal
from pathlib import Path

import pytest
import trio

from paddler.config import EngineTimeouts
from tests.cluster import ENDLESS, LOAD_WAIT, Cluster, Message, cluster, conversation, result, state, text_of

pytestmark = pytest.mark.slow

CHILDREN = Path("/proc/self/task")
HANG_WAIT = 2.0 + 3.0
"""The time until a standstill is noticed, and room for a busy machine."""


def engine_pids() -> list[int]:
    """Return the process ids of the engine processes that this process started."""
    pids = []
    for task in CHILDREN.iterdir():
        for pid in (task / "children").read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"paddler.engine" in command:
                pids.append(int(pid))
    return pids


async def four_streams(running: Cluster, failure: signal.Signals) -> list[list[Message]]:
    """Open four streams, harm the engine once all have tokens, and return what they got."""
    streams: list[list[Message]] = [[] for _ in range(4)]
    started = [trio.Event() for _ in range(4)]

    async def follow(number: int) -> None:
        async with running.post(ENDLESS) as response:
            async for line in response:
                streams[number].append(json.loads(line))
                started[number].set()

    async with trio.open_nursery() as clients:
        for number in range(4):
            clients.start_soon(follow, number)
        for event in started:
            await event.wait()
        [pid] = engine_pids()
        os.kill(pid, failure)
        clients.cancel_scope.deadline = trio.current_time() + HANG_WAIT
    return streams


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(signal.SIGKILL, "SIGKILL"), (signal.SIGABRT, "SIGABRT"), (signal.SIGSTOP, "hang")],
)
async def test_an_engine_that_fails_ends_its_streams_and_comes_back(
    failure: signal.Signals, reason: str
) -> None:
    async with cluster(slots=4, desired=state(), buffered_request_timeout=LOAD_WAIT) as running:
        [before] = await running.snapshot()
        for messages in await four_streams(running, failure):
            assert result(messages[-1]) == {
                "Error": {"code": 502, "description": f"Engine stopped: {reason}"}
            }
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"
        await running.wait_until_serving()
        [after] = await running.snapshot()
        assert after["id"] == before["id"]  # the same agent, the same link
        assert after["issues"] == []
        assert after["slots_processing"] == 0


async def test_a_failed_engine_shows_one_issue_per_slot_until_it_serves_again() -> None:
    async with cluster(slots=2, desired=state()) as running:
        seen: list[list[Message]] = []

        async def watch(task_status: trio.TaskStatus[None]) -> None:
            async with running.agents_stream() as stream:
                task_status.started()
                serves_again = False
                while not serves_again:
                    [agent] = (await stream.event())["agents"]
                    seen.append(agent["issues"])
                    serves_again = any(seen) and not agent["issues"] and agent["slots_total"] == 2

        with trio.fail_after(LOAD_WAIT):
            async with trio.open_nursery() as watchers:
                await watchers.start(watch)
                [pid] = engine_pids()
                os.kill(pid, signal.SIGKILL)
        issues = next(issues for issues in seen if issues)
        assert [issue["SlotCannotStart"]["slot_index"] for issue in issues] == [0, 1]
        assert all("SIGKILL" in issue["SlotCannotStart"]["error"] for issue in issues)


async def test_an_engine_that_stands_still_while_idle_is_noticed_by_the_next_request() -> None:
    timeouts = EngineTimeouts(standstill=0.5)
    async with cluster(
        slots=1,
        desired=state(),
        agent_changes={"engine_timeouts": timeouts},
        buffered_request_timeout=LOAD_WAIT,
    ) as running:
        [pid] = engine_pids()
        os.kill(pid, signal.SIGSTOP)
        [message] = await running.generate(conversation("Hello"))
        assert result(message) == {"Error": {"code": 502, "description": "Engine stopped: hang"}}
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"
