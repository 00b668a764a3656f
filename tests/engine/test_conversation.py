"""The talk with a scripted engine process: one that says what it should not, or nothing for too long."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.config import EngineTimeouts
from paddler.engine.conversation import Conversation
from paddler.engine.pipe import Advance, Log, Progress, Turn, pack
from paddler.engine.vitals import Vitals
from paddler.errors import EngineDied, EngineHung


class ScriptedChild:
    """What a conversation needs of EngineChild; the other end of `stream` is the test's."""

    def __init__(self) -> None:
        self.stream, self.theirs = map(trio.SocketStream, trio.socket.socketpair())
        self.pid = 0
        self.is_killed = False
        self.at_work = True
        self.stopped = False

    def vitals(self) -> Vitals:
        """Show a process that uses no CPU time."""
        return Vitals(stopped=self.stopped, at_work=self.at_work, cpu_ticks=0)

    def kill(self) -> None:
        self.is_killed = True


@asynccontextmanager
async def scripted_child() -> AsyncIterator[ScriptedChild]:
    child = ScriptedChild()
    async with child.stream, child.theirs:
        yield child


def frame(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "little") + body


TURN = Turn((Advance(1, (5,), "a", None, "", 3, 0),))


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (pack(Progress(1, 2)), "Progress out of turn"),
        (b"\x02\0\0\0{}", "an unknown message"),
        (b"\x02\0\0\0{{", "an unreadable frame"),
        (b"\xff" * 4, "a frame of 4294967295 bytes on its pipe"),
        (frame(["Log", {"level": "loud", "text": "a"}]), "level is of another type"),
        (frame(["Turn", [[[], [5], "a", None, "", 3, 0, 0, None]]]), "an advance has other fields"),
        (frame(["Turn", [[1, [None], "a", None, "", 3, 0, 0, None]]]), "a token is no integer"),
    ],
)
async def test_an_engine_that_breaks_the_rules_is_killed_and_counts_as_dead(said: bytes, cause: str) -> None:
    turns: list[list[Advance]] = []
    async with scripted_child() as child:
        talk = Conversation(cast("Any", child), EngineTimeouts())
        talk.begin_serving({1}, offloaded=False)
        with pytest.RaisesGroup(pytest.RaisesExc(EngineDied, match=cause)):
            async with trio.open_nursery() as reading:
                reading.start_soon(talk.read_turns, turns.append)
                await child.theirs.send_all(pack(Log(2, "a line of llama.cpp")) + pack(TURN))
                await wait_all_tasks_blocked()
                await child.theirs.send_all(said)
    assert turns == [list(TURN.advances)]
    assert child.is_killed


@asynccontextmanager
async def watched(*, offloaded: bool = False) -> AsyncIterator[ScriptedChild]:
    """Watch a child that has one open generation; the block ends when it counts as failed."""
    async with scripted_child() as child, trio.open_nursery() as tasks:
        talk = Conversation(cast("Any", child), EngineTimeouts(step=30, standstill=2))
        talk.begin_serving({1}, offloaded=offloaded)
        tasks.start_soon(talk.watch)
        tasks.start_soon(talk.read_turns, lambda _: None)
        yield child


async def hang_after(*, offloaded: bool = False, at_work: bool = False, stopped: bool = False) -> float:
    began = trio.current_time()
    with pytest.RaisesGroup(EngineHung):
        async with watched(offloaded=offloaded) as child:
            child.at_work, child.stopped = at_work, stopped
            await trio.sleep_forever()
    assert child.is_killed
    return trio.current_time() - began


async def test_asleep_is_hung_after_the_standstill_but_not_on_a_gpu(autojump_clock: MockClock) -> None:
    assert await hang_after() == pytest.approx(2, abs=0.6)
    assert await hang_after(offloaded=True) == pytest.approx(30, abs=0.6)


async def test_stopped_is_hung_after_the_standstill_on_a_gpu_too(autojump_clock: MockClock) -> None:
    assert await hang_after(offloaded=True, stopped=True) == pytest.approx(2, abs=0.6)


async def test_waiting_for_a_disk_for_ever_is_hung_after_the_step(autojump_clock: MockClock) -> None:
    assert await hang_after(at_work=True) == pytest.approx(30, abs=0.6)


@pytest.mark.parametrize(("turns_since", "patience"), [(0, 20 * 29), (63, 20 * 29), (64, 30)])
async def test_a_stall_makes_the_watch_patient_for_the_next_turns_only(
    turns_since: int, patience: float, autojump_clock: MockClock
) -> None:
    stalled_until = 0.0
    with pytest.RaisesGroup(EngineHung):
        async with watched() as child:
            await trio.sleep(29.01)
            for _ in range(1 + turns_since):
                await child.theirs.send_all(pack(TURN))
                await wait_all_tasks_blocked()
            stalled_until = trio.current_time()
            await trio.sleep_forever()
    assert trio.current_time() - stalled_until == pytest.approx(patience, abs=0.6)
