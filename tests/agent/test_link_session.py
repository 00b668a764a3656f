"""The frames of one connection, from the greeting to the farewell; the test is the balancer."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import paddler
from paddler.agent import link_session
from paddler.agent.link_session import LinkSession
from paddler.agent.model_service import ModelService
from paddler.agent.reconciliation import Reconciliation
from paddler.agent.slots import Slots
from paddler.agent.status import StatusBoard
from paddler.config import EngineTimeouts, KvLayout
from paddler.engine import pipe
from paddler.messages.agent_socket import (
    PROTOCOL,
    AgentFrame,
    Answer,
    Ask,
    BalancerFrame,
    Generate,
    Goodbye,
    Heartbeat,
    Held,
    HeldPrefix,
    Part,
    Register,
    SetState,
    Status,
    Stop,
    Welcome,
    decode_step,
)
from paddler.messages.inference import ContinueFromRawPrompt
from paddler.messages.state import DEFAULT_DESIRED_STATE, ChatTemplate, LocalModel, ModelSource
from paddler.messages.wire import decode, encode
from tests.agent.local_renderer import LocalRenderer
from tests.fakes.scripted_engine import ScriptedEngines

LIVENESS_TIMEOUT = 12.0
WELCOME = Welcome(PROTOCOL, "0.1.0")
MODEL = attrs.evolve(DEFAULT_DESIRED_STATE, model=LocalModel("/models/a.gguf")).applicable()
RAW = ContinueFromRawPrompt(max_tokens=3, raw_prompt="one two three four")


async def find(source: ModelSource) -> str | None:
    return source.path if isinstance(source, LocalModel) else None


class Wire:
    """Both directions of a connection. What the agent sent is taken by `sent`."""

    def __init__(self) -> None:
        self.send_frames, self._frames = trio.open_memory_channel[str](math.inf)
        self.outgoing: list[str] = []
        self._written: list[str] = []
        self.may_send = trio.Event()
        self.may_send.set()
        self.is_broken = False

    async def receive(self) -> str:
        try:
            return await self._frames.receive()
        except trio.EndOfChannel:
            raise EOFError from None

    def write(self, text: str) -> bool:
        if self.is_broken:
            raise EOFError
        self._written.append(text)
        if self.may_send.is_set():
            self._send()
        return not self._written

    async def flush(self) -> None:
        await self.may_send.wait()
        self._send()

    def _send(self) -> None:
        self.outgoing += self._written
        self._written.clear()

    def say(self, frame: BalancerFrame) -> None:
        self.send_frames.send_nowait(encode(frame, BalancerFrame))

    def hang_up(self) -> None:
        self.send_frames.close()

    def sent(self) -> list[Any]:
        """Return what the agent sent since the last call; step frames as their pieces."""
        frames = [*self.outgoing]
        self.outgoing.clear()
        return [
            decode_step(frame) if frame.startswith("S") else decode(frame, cast("type[Any]", AgentFrame))
            for frame in frames
        ]


class Agent:
    def __init__(self) -> None:
        self.wire = Wire()
        self.engines = ScriptedEngines(turn=0.1)
        self.board = StatusBoard(slots=2)
        renderer = LocalRenderer()
        self.slots = Slots(preparer=renderer)
        service = ModelService(
            board=self.board,
            slots=self.slots,
            preparer=renderer,
            open_engine=self.engines.open_engine,
            engine_timeouts=EngineTimeouts(),
            kv_layout=KvLayout.AUTO,
            threads=1,
            exact=False,
            prefix_cache=True,
            prefix_cache_bytes=0,
        )
        self.reconciliation = Reconciliation(
            board=self.board, slots=self.slots, service=service, find_model=find, find_projection=find
        )
        self.link: LinkSession | None = None
        self.reason: str | None = None

    def session(self) -> LinkSession:
        return LinkSession(
            name="agent-a",
            board=self.board,
            slots=self.slots,
            reconciliation=self.reconciliation,
            liveness_timeout=LIVENESS_TIMEOUT,
            farewell_timeout=1.0,
            connection=self.wire,
        )

    async def run(self) -> None:
        self.link = self.session()
        self.reason = await self.link.run()

    async def serves(self) -> None:
        self.wire.say(SetState(MODEL))
        with trio.fail_after(5):
            status = self.board.status
            while status.slots_total == 0:
                status = await self.board.newer_than(status)
        await wait_all_tasks_blocked()
        self.wire.sent()


@asynccontextmanager
async def open_agent(*, welcome: BalancerFrame | None = WELCOME) -> AsyncIterator[Agent]:
    """An agent at the other end of a wire, greeted already."""
    agent = Agent()
    async with trio.open_nursery() as services:
        services.start_soon(agent.reconciliation.apply_desired_state)
        services.start_soon(agent.run)
        await wait_all_tasks_blocked()
        [register] = agent.wire.sent()
        assert register == Register(PROTOCOL, paddler.__version__, "agent-a", StatusBoard(slots=2).status)
        if welcome is not None:
            agent.wire.say(welcome)
            await wait_all_tasks_blocked()
        yield agent
        services.cancel_scope.cancel()


async def test_an_agent_registers_and_says_goodbye(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        assert agent.wire.sent() == []
    assert agent.wire.sent() == [Goodbye()]


@pytest.mark.parametrize(
    ("welcome", "words"),
    [
        (Welcome(PROTOCOL + 1, "9.9.9"), f"link protocol {PROTOCOL + 1} (Paddler 9.9.9)"),
        (Heartbeat(), "does not speak the link protocol"),
    ],
)
async def test_another_protocol_is_refused_in_one_sentence(
    autojump_clock: MockClock, welcome: BalancerFrame, words: str
) -> None:
    async with open_agent(welcome=welcome) as agent:
        assert agent.reason is not None
        assert words in agent.reason
    assert agent.wire.sent() == []


async def test_a_stock_balancer_is_refused(autojump_clock: MockClock) -> None:
    async with open_agent(welcome=None) as agent:
        agent.wire.send_frames.send_nowait('{"Notification":{"Version":{"version":"4.1.0"}}}')
        await wait_all_tasks_blocked()
        assert agent.reason == "it does not speak the link protocol of this Paddler"


@pytest.mark.scenario("SH-12")
async def test_a_balancer_that_never_answers_is_left(autojump_clock: MockClock) -> None:
    async with open_agent(welcome=None) as agent:
        await trio.sleep(LIVENESS_TIMEOUT + 1)
        assert agent.reason == "it did not answer within 12 s"


async def test_every_status_change_is_published_and_silence_is_filled(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        for slots_total in (1, 0, 2):
            agent.board.update(slots_total=slots_total)
        await wait_all_tasks_blocked()
        [status] = agent.wire.sent()
        assert status == Status(agent.board.status)
        for _ in range(5):
            await trio.sleep(LIVENESS_TIMEOUT / 3 + 0.01)
            assert agent.wire.sent() == [Status(agent.board.status)]
            agent.wire.say(Heartbeat())


async def test_changes_behind_a_slow_reader_are_merged_into_the_latest(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.wire.may_send = trio.Event()
        for slots_total in (1, 0, 2):
            agent.board.update(slots_total=slots_total)
            await wait_all_tasks_blocked()
        agent.wire.may_send.set()
        await wait_all_tasks_blocked()
        first, last = agent.wire.sent()
        assert first.status.slots_total == 1  # was on its way already
        assert last == Status(agent.board.status)


async def test_a_silent_balancer_is_left(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await trio.sleep(LIVENESS_TIMEOUT - 1)
        agent.wire.say(Heartbeat())
        await trio.sleep(LIVENESS_TIMEOUT - 1)
        assert Status(agent.board.status) in agent.wire.sent()  # still there
        await trio.sleep(2)
        assert agent.reason == "no sign of life for 12 s"
    assert Goodbye() not in agent.wire.sent()


async def test_a_request_is_served_over_the_link(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await agent.serves()
        agent.wire.say(Generate(7, RAW))
        await trio.sleep(1)
        steps = [frame for frame in agent.wire.sent() if isinstance(frame, list)]
        assert [step[0][:2] for step in steps] == [(7, "C")] * 3
        assert [piece[1] for piece in steps[-1]] == ["C", "D"]
        assert [piece[2] for step in steps for piece in step][:3] == ['"one "', '"two "', '"three "']


async def test_what_the_engine_holds_is_told_behind_the_answer_and_until_the_engine_ends(
    autojump_clock: MockClock,
) -> None:
    async with open_agent() as agent:
        await agent.serves()
        agent.wire.say(Generate(7, RAW))
        await trio.sleep(1)
        agent.slots.on_held(pipe.Held(((1, 64),)))
        await wait_all_tasks_blocked()
        [*_, last_step, held] = [frame for frame in agent.wire.sent() if isinstance(frame, list | Held)]
        assert isinstance(last_step, list)
        assert last_step[-1][1] == "D"
        assert held == Held((HeldPrefix(7, 64),))
        agent.wire.say(SetState(attrs.evolve(MODEL, model=LocalModel("/models/b.gguf"))))
        await trio.sleep(1)
        assert [frame for frame in agent.wire.sent() if isinstance(frame, Held)] == [Held(())]


async def test_a_long_request_arrives_in_parts_among_others(autojump_clock: MockClock) -> None:
    text = encode(Generate(8, RAW), BalancerFrame)
    async with open_agent() as agent:
        await agent.serves()
        agent.wire.say(Part(8, text[:5], last=False))
        agent.wire.say(Generate(7, RAW))
        agent.wire.say(Part(8, text[5:20], last=False))
        agent.wire.say(Part(8, text[20:], last=True))
        await trio.sleep(1)
        steps = [frame for frame in agent.wire.sent() if isinstance(frame, list)]
        assert {request for step in steps for request, *_ in step} == {7, 8}


async def test_a_request_stopped_before_its_last_part_ends(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await agent.serves()
        agent.wire.say(Part(8, "{", last=False))
        agent.wire.say(Stop(8))
        agent.wire.say(Generate(9, RAW))
        agent.wire.say(Stop(9))
        await trio.sleep(1)
        steps = [frame for frame in agent.wire.sent() if isinstance(frame, list)]
        assert [(request, letter) for [(request, letter, _)] in steps] == [(8, "D"), (9, "D")]


@pytest.mark.parametrize(
    "frames",
    [
        [Welcome(PROTOCOL, "0.1.0")],
        [Generate(7, RAW), Generate(7, RAW)],
        [Part(7, encode(Generate(8, RAW), BalancerFrame), last=True)],
        [Part(7, encode(Heartbeat(), BalancerFrame), last=True)],
        [Part(7, "{", last=True)],
    ],
)
async def test_a_broken_protocol_ends_the_link(
    autojump_clock: MockClock, frames: list[BalancerFrame]
) -> None:
    async with open_agent() as agent:
        await agent.serves()
        for frame in frames:
            agent.wire.say(frame)
        await wait_all_tasks_blocked()
        assert agent.reason is not None
        assert agent.reason.startswith("it broke the protocol: ")


@pytest.mark.slow
async def test_parts_have_a_limit(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        half = "x" * (link_session.MAX_OUTBOX_CHARACTERS // 2 + 1)
        agent.wire.say(Part(7, half, last=False))
        agent.wire.say(Part(7, half, last=False))
        await wait_all_tasks_blocked()
        assert agent.reason is not None
        assert "longer than" in agent.reason


@pytest.mark.scenario("SW-5")
async def test_the_override_of_the_newest_state_is_known_before_it_is_applied(
    autojump_clock: MockClock,
) -> None:
    override = ChatTemplate("{{ messages[0].content }}")
    async with open_agent() as agent:
        agent.wire.say(Ask(1, "chat_template_override"))
        agent.wire.say(SetState(attrs.evolve(MODEL, chat_template_override=override)))
        agent.wire.say(Ask(2, "chat_template_override"))
        agent.wire.say(Ask(3, "model_metadata"))
        agent.wire.say(Ask(4, "the weather"))
        await wait_all_tasks_blocked()
        answers = [frame for frame in agent.wire.sent() if isinstance(frame, Answer)]
        assert answers == [Answer(1), Answer(2, chat_template_override=override), Answer(3), Answer(4)]
        await trio.sleep(1)
        agent.wire.sent()
        agent.wire.say(Ask(5, "model_metadata"))
        await wait_all_tasks_blocked()
        [answer] = agent.wire.sent()
        assert answer.model_metadata == agent.reconciliation.model_metadata is not None


async def test_requests_end_with_the_link_and_the_model_goes_on(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await agent.serves()
        agent.wire.say(Generate(7, attrs.evolve(RAW, max_tokens=1000)))
        await wait_all_tasks_blocked()
        agent.wire.hang_up()
        await wait_all_tasks_blocked()
        assert agent.reason == "the connection was closed"
        with trio.fail_after(1):
            await agent.slots.emptied()
        assert agent.engines.current.cancelled == [1]
        assert agent.board.status.slots_total == 2


async def test_a_balancer_that_does_not_read_is_left(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.wire.may_send = trio.Event()
        agent.board.update(slots_total=1)
        for _ in range(4):
            await trio.sleep(LIVENESS_TIMEOUT / 2)
            agent.wire.say(Heartbeat())
        assert agent.reason == "it read nothing for 12 s"


async def test_frames_keep_their_order_around_a_jam(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.wire.may_send = trio.Event()
        for question in (1, 2, 3):
            agent.wire.say(Ask(question, "the weather"))
        await wait_all_tasks_blocked()
        agent.wire.say(Ask(4, "the weather"))
        agent.wire.may_send.set()
        await wait_all_tasks_blocked()
        agent.wire.say(Ask(5, "the weather"))
        await wait_all_tasks_blocked()
        assert agent.wire.sent() == [Answer(number) for number in (1, 2, 3, 4, 5)]


async def test_a_step_frame_leaves_within_the_call_that_brings_it(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        assert agent.link is not None
        for _ in range(3):
            agent.link._send_step([(7, "C", '"x"')])
            assert agent.wire.sent() == [[(7, "C", '"x"')]]


async def test_what_waits_for_a_reader_has_a_limit(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_session, "MAX_OUTBOX_CHARACTERS", 1000)
    async with open_agent() as agent:
        agent.wire.may_send = trio.Event()
        for question in range(100):
            agent.wire.say(Ask(question, "the weather"))
        await wait_all_tasks_blocked()
        assert agent.reason == "it does not read"


async def test_nothing_follows_a_frame_that_was_left_half_sent(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.wire.may_send = trio.Event()
        agent.board.update(slots_total=1)
        await wait_all_tasks_blocked()
    agent.wire.may_send.set()
    assert agent.wire.sent() == []


async def test_a_farewell_that_nobody_takes_is_given_up(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.wire.may_send = trio.Event()
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(1.0)


async def test_a_connection_that_breaks_while_sending_ends_the_link(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.wire.is_broken = True
        agent.board.update(slots_total=1)
        await wait_all_tasks_blocked()
        assert agent.reason == "the connection was closed"
