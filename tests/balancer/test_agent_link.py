"""One link from its first frame to its end."""

import logging
from collections.abc import Callable

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import paddler
from paddler.errors import AgentGone, AnswerTimeout, LocalProtocolError, NoSuchAgent
from paddler.messages.agent_socket import (
    PROTOCOL,
    Answer,
    Ask,
    Goodbye,
    Heartbeat,
    Register,
    SetState,
    Welcome,
)
from paddler.messages.snapshots import ModelMetadata
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    ChatTemplate,
    LocalModel,
    ModelFileDoesNotExist,
    SlotCannotStart,
)
from paddler.messages.tokens import StreamError
from tests.balancer.services import PROMPT, RecordingReply, Services, make_services
from tests.fakes.scripted_agent import ScriptedAgent, agent_status, connected_agent, decode_balancer_frame

STATE = DEFAULT_DESIRED_STATE.applicable()
OTHER_STATE = attrs.evolve(STATE, model=LocalModel("/models/other.gguf"))
AGENT_GONE = StreamError(502, "Agent controller connection closed")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def start_request(nursery: trio.Nursery, services: Services) -> RecordingReply:
    reply = RecordingReply()
    nursery.start_soon(services.relay.serve, PROMPT, reply)
    await wait_all_tasks_blocked()
    return reply


# Registration


async def test_the_balancer_greets_first_and_shows_the_agent_once_it_registered() -> None:
    services = make_services()
    async with connected_agent(services.links, register=False) as agent:
        assert await agent.next_frame() == Welcome(PROTOCOL, paddler.__version__)
        assert len(services.fleet) == 0
        agent.register("agent-a")
        await wait_all_tasks_blocked()
        [shown] = services.fleet.snapshot().agents
        assert (shown.id, shown.name, shown.slots_total) == ("agent-1", "agent-a", 1)
    assert len(services.fleet) == 0


async def test_a_newcomer_gets_the_state_in_force_before_anything_else(nursery: trio.Nursery) -> None:
    services = make_services()
    services.links.push_state(OTHER_STATE)
    services.links.push_state(STATE)
    await start_request(nursery, services)
    async with connected_agent(services.links) as agent:
        frames = [await agent.next_frame() for _ in range(3)]
        assert frames[1] == SetState(STATE)
        services.links.push_state(OTHER_STATE)
        assert await agent.next_frame() == SetState(OTHER_STATE)
        nursery.cancel_scope.cancel()


async def test_without_a_state_a_newcomer_gets_none(autojump_clock: MockClock) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        assert isinstance(await agent.next_frame(), Welcome)
        with trio.move_on_after(10) as wait:
            await agent.next_frame()
        assert wait.cancelled_caught


async def test_an_agent_that_does_not_register_in_time_is_refused(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    services = make_services(registration_timeout=2)
    async with connected_agent(services.links, register=False, alive=False) as agent:
        with trio.fail_after(2.1):
            await agent.unlinked.wait()
    assert warnings_of(caplog) == ["agent 'agent-1': link ended: it did not register within 2 s"]


@pytest.mark.parametrize(
    ("first_frame", "words"),
    [
        (
            '{"Register":{"protocol":7,"version":"9.9","somehow":"else"}}',
            "it speaks link protocol 7 (version '9.9')",
        ),
        ('{"jsonrpc":"2.0","method":"register","params":{}}', "another Paddler"),
        ('{"Notification":{"RegisterAgent":{"name":"a"}}}', "another Paddler"),
        ("GET / HTTP/1.1", "another Paddler"),
        ('"Heartbeat"', "another Paddler"),
        (f'{{"Register":{{"protocol":{PROTOCOL}}}}}', "missing field"),
    ],
)
async def test_who_speaks_another_protocol_is_refused_with_one_line(
    first_frame: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    services = make_services()
    async with connected_agent(services.links, register=False) as agent:
        agent.send_text(first_frame)
        await agent.unlinked.wait()
        assert isinstance(await agent.next_frame(), Welcome), "the other side can say why, too"
    assert len(services.fleet) == 0
    [line] = warnings_of(caplog)
    assert words in line


async def test_a_connection_that_closes_before_it_registered_is_no_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    services = make_services()
    async with connected_agent(services.links, register=False, alive=False) as agent:
        agent.hang_up()
        await agent.unlinked.wait()
    assert warnings_of(caplog) == []


# Signs of life


async def test_a_silent_agent_is_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    services = make_services(liveness_timeout=12)
    async with connected_agent(services.links, alive=False) as agent:
        reply = await start_request(nursery, services)
        with trio.fail_after(12.1):
            await agent.unlinked.wait()
        assert reply.errors == [AGENT_GONE]
    assert warnings_of(caplog) == ["agent 'agent-a' (agent-1): link ended: no sign of life for 12 s"]


async def test_any_frame_is_a_sign_of_life(autojump_clock: MockClock) -> None:
    services = make_services(liveness_timeout=12)
    async with connected_agent(services.links, alive=False) as agent:
        for frame in ('"Heartbeat"', '{"Answer":{"question":5}}', "S", '"Heartbeat"'):
            await trio.sleep(11)
            agent.send_text(frame)
        await trio.sleep(11)
        assert not agent.unlinked.is_set()


async def test_the_balancer_gives_a_sign_of_life_after_a_third_of_the_timeout_in_silence(
    autojump_clock: MockClock,
) -> None:
    services = make_services(liveness_timeout=12)
    async with connected_agent(services.links) as agent:
        await agent.next_frame()
        started = trio.current_time()
        services.links.push_state(STATE)
        await agent.next_frame()
        for number in range(1, 4):
            assert decode_balancer_frame(await agent.next_text()) == Heartbeat()
            assert trio.current_time() - started == pytest.approx(4 * number)


async def test_an_agent_that_reads_nothing_is_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    services = make_services(liveness_timeout=12)
    async with connected_agent(services.links, unread_frames=1) as agent:
        reply = await start_request(nursery, services)
        with trio.fail_after(20):
            await agent.unlinked.wait()
        assert reply.errors == [AGENT_GONE]
    assert warnings_of(caplog) == ["agent 'agent-a' (agent-1): link ended: it read nothing for 12 s"]


async def test_an_agent_whose_outbox_is_full_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    services = make_services()
    large = attrs.evolve(STATE, chat_template_override=ChatTemplate("x" * 2_000_000))
    async with connected_agent(services.links, unread_frames=1) as agent:
        for _ in range(9):
            services.links.push_state(large)
        assert len(services.fleet) == 0
        await agent.unlinked.wait()
    assert warnings_of(caplog) == ["agent 'agent-a' (agent-1): link ended: its outbox is full"]


# Frames


@pytest.mark.parametrize(
    "frame",
    [
        "S\nnonsense",
        "S\n1 Z null",
        "S\nx C null",
        "S\n99 C null",
        "S\n-1 D null",
        "S\n1 X 5",
        "{",
        "",
        '{"Status":{}}',
        '{"Unknown":{}}',
        "[" * 100_000,
    ],
)
async def test_a_broken_frame_ends_that_one_link_with_one_line(
    frame: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "broken") as broken,
        connected_agent(services.links, "whole", name="whole") as whole,
    ):
        first = await start_request(nursery, services)
        second = await start_request(nursery, services)
        broken.send_text(frame)
        await broken.unlinked.wait()
        assert first.errors == [AGENT_GONE]
        whole.done((await whole.next_request()).request)
        await second.ended.wait()
        assert second.letters == "D"
        assert services.slots() == (0, 1)
    assert len(warnings_of(caplog)) == 1


async def test_a_second_registration_on_one_connection_is_a_broken_frame() -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        agent.send_frame(Register(PROTOCOL, "test", None, agent_status()))
        await agent.unlinked.wait()


async def test_a_goodbye_removes_the_agent() -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        agent.send_frame(Goodbye())
        agent.report()
        await agent.unlinked.wait()
        assert len(services.fleet) == 0


async def test_a_failing_send_ends_the_link(nursery: trio.Nursery) -> None:
    services = make_services()

    async def read(take: Callable[[str], None]) -> None:
        async for frame in frames:
            take(frame)

    async def send(_: str) -> None:
        if services.fleet.snapshot().agents:
            raise trio.BrokenResourceError

    script, frames = trio.open_memory_channel[str](1)
    agent = ScriptedAgent(send_texts=script, receive_texts=frames, status=agent_status())
    agent.register()
    services.links.push_state(STATE)
    await services.links.serve_agent("agent-1", read=read, send=send)
    assert len(services.fleet) == 0


async def test_a_bug_in_one_link_is_logged_and_contained(
    logged_errors: list[logging.LogRecord],
) -> None:
    services = make_services()

    async def read(_: Callable[[str], None]) -> None:
        raise ZeroDivisionError

    async def send(_: str) -> None: ...

    await services.links.serve_agent("agent-1", read=read, send=send)
    [record] = logged_errors
    assert "agent-1" in record.getMessage()


async def test_only_visible_changes_are_announced() -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        changes = services.fleet_changes.subscribe()
        agent.report()
        agent.report(version=1, slots_total=4)
        agent.report(version=50, slots_total=1, slots_processing=3)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as wait:
            wait.cancel()
            await changes.wait()
        assert wait.cancelled_caught
        agent.report(slots_total=3)
        with trio.fail_after(1):
            await changes.wait()
        assert services.slots() == (0, 3)


# The same id twice


async def test_of_two_connections_with_one_id_the_newer_wins(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, "same", name="older") as older:
        reply = await start_request(nursery, services)
        async with connected_agent(services.links, "same", name="newer", slots=2) as newer:
            assert reply.errors == [AGENT_GONE]
            await older.unlinked.wait()
            [shown] = services.fleet.snapshot().agents
            assert (shown.name, shown.slots_processing, shown.slots_total) == ("newer", 0, 2)
            following = await start_request(nursery, services)
            newer.done((await newer.next_request()).request)
            await following.ended.wait()
            assert following.letters == "D"
            nursery.start_soon(answer_questions, newer)
            assert await services.links.ask("same", "model_metadata") == ModelMetadata({"a": "b"})
        assert len(services.fleet) == 0
        nursery.cancel_scope.cancel()


async def test_a_connection_that_has_not_registered_replaces_nobody() -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "same", name="older") as older,
        connected_agent(services.links, "same", register=False),
    ):
        await wait_all_tasks_blocked()
        assert not older.unlinked.is_set()
        assert len(services.fleet) == 1


# Questions


async def answer_questions(agent: ScriptedAgent) -> None:
    """Answer until the test is over."""
    while True:
        try:
            ask = await agent.next_frame_of(Ask)
        except trio.ClosedResourceError:
            return
        if ask.about == "model_metadata":
            agent.send_frame(Answer(ask.question, model_metadata=ModelMetadata({"a": "b"})))
        else:
            agent.send_frame(Answer(ask.question))


async def test_an_agent_is_asked_and_its_answer_returned(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        nursery.start_soon(answer_questions, agent)
        assert await services.links.ask("agent-1", "model_metadata") == ModelMetadata({"a": "b"})
        assert await services.links.ask("agent-1", "chat_template_override") is None
        nursery.cancel_scope.cancel()


async def test_nobody_can_ask_an_unknown_agent() -> None:
    with pytest.raises(NoSuchAgent):
        await make_services().links.ask("nobody", "model_metadata")


@pytest.mark.scenario("MA-11")
async def test_an_agent_that_never_answers_runs_into_the_deadline(autojump_clock: MockClock) -> None:
    services = make_services(answer_timeout=3)
    async with connected_agent(services.links) as agent:
        started = trio.current_time()
        with pytest.raises(AnswerTimeout):
            await services.links.ask("agent-1", "model_metadata")
        assert trio.current_time() - started == pytest.approx(3)
        ask = await agent.next_frame_of(Ask)
        agent.send_frame(Answer(ask.question))  # too late, and harmless
        await wait_all_tasks_blocked()
        assert len(services.fleet) == 1


@pytest.mark.scenario("MA-11")
async def test_a_question_ends_with_its_link(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:

        async def hang_up() -> None:
            await agent.next_frame_of(Ask)
            agent.hang_up()

        nursery.start_soon(hang_up)
        with pytest.raises(AgentGone):
            await services.links.ask("agent-1", "model_metadata")


async def test_a_question_that_does_not_fit_in_the_outbox_cannot_be_sent() -> None:
    services = make_services()
    async with connected_agent(services.links, unread_frames=1):
        with pytest.raises(LocalProtocolError):
            await services.links.ask("agent-1", "x" * 17_000_000)
        with pytest.raises(NoSuchAgent):
            await services.links.ask("agent-1", "model_metadata")


# Shutdown


async def test_shutdown_ends_all_links_and_admits_no_more() -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "1") as registered,
        connected_agent(services.links, "2", register=False) as unregistered,
    ):
        services.links.shut_down()
        await registered.unlinked.wait()
        await unregistered.unlinked.wait()
        assert len(services.fleet) == 0
        async with connected_agent(services.links, "3", register=False) as late:
            await late.unlinked.wait()


async def test_an_agent_that_registers_in_the_tick_of_the_shutdown_is_not_admitted() -> None:
    services = make_services()
    async with connected_agent(services.links, register=False) as agent:
        await wait_all_tasks_blocked()
        agent.register()
        services.links.shut_down()
        await agent.unlinked.wait()
        assert len(services.fleet) == 0


async def test_an_operator_reads_of_an_agents_issues_in_the_balancers_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "paddler")
    services = make_services()
    issues = (ModelFileDoesNotExist("/models/none.gguf"), SlotCannotStart("no memory", 0))
    async with connected_agent(services.links, name="rack-1", slots=0) as agent:
        for changes in (
            {"issues": issues},
            {"issues": issues},
            {"issues": (*issues, SlotCannotStart("no memory", 1))},
            {"issues": (), "slots_total": 2, "desired_slots_total": 2},
        ):
            agent.report(**changes)
            await wait_all_tasks_blocked()
    told = [record.getMessage() for record in caplog.records if "rack-1" in record.getMessage()]
    assert [line.partition(") ")[2] for line in told[1:5]] == [
        "has an issue: /models/none.gguf does not exist (and 1 more)",
        "has an issue: slot 1 cannot start: no memory (and 2 more)",
        "has no issue any more",
        "serves 2 of 2 slots",
    ]
