"""The talk with a scripted engine process that says what it should not."""

from typing import Any, cast

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from paddler.config import EngineTimeouts
from paddler.engine.conversation import Conversation
from paddler.engine.pipe import Advance, Log, Progress, Turn, pack
from paddler.errors import EngineDied


class ScriptedChild:
    """What a conversation needs of EngineChild to read; the other end of `stream` is the test's."""

    def __init__(self) -> None:
        self.stream, self.theirs = memory_stream_pair()
        self.pid = 0
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True


TURN = Turn((Advance(1, (5,), "a", None, "", 3, 0),))


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (pack(Progress(1, 2)), "Progress out of turn"),
        (b"\x02\0\0\0{}", "an unknown message"),
        (b"\x02\0\0\0{{", "an unreadable frame"),
        (b"\xff" * 4, "a frame of 4294967295 bytes on its pipe"),
    ],
)
async def test_an_engine_that_breaks_the_rules_is_killed_and_counts_as_dead(said: bytes, cause: str) -> None:
    child = ScriptedChild()
    talk = Conversation(cast("Any", child), EngineTimeouts())
    turns: list[list[Advance]] = []
    talk.begin_serving({1})
    with pytest.RaisesGroup(pytest.RaisesExc(EngineDied, match=cause)):
        async with trio.open_nursery() as reading:
            reading.start_soon(talk.read_turns, turns.append)
            await child.theirs.send_all(pack(Log(2, "a line of llama.cpp")) + pack(TURN))
            await wait_all_tasks_blocked()
            await child.theirs.send_all(said)
    assert turns == [list(TURN.advances)]
    assert child.is_killed
