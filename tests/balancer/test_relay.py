"""One request from its arrival to its end, with agents that do as they are told."""

import json

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.messages.agent_socket import Stop
from paddler.messages.inference import ContinueFromRawPrompt, TokenRequest
from paddler.messages.tokens import StreamError
from tests.balancer.services import PROMPT, RecordingReply, Services, make_services
from tests.fakes.scripted_agent import ScriptedAgent, connected_agent

OVERFLOW = StreamError(503, "Buffered requests overflow")
BUFFER_TIMEOUT = StreamError(504, "Waiting for available slot timed out")
SHUTTING_DOWN = StreamError(503, "balancer is shutting down")
AGENT_GONE = StreamError(502, "Agent controller connection closed")


class Client:
    """A request under way, and what came of it."""

    def __init__(self, services: Services, request: TokenRequest = PROMPT) -> None:
        self.reply = RecordingReply()
        self.scope = trio.CancelScope()
        self.gone = trio.Event()
        self._services = services
        self._request = request

    async def run(self) -> None:
        with self.scope:
            await self._services.relay.serve(self._request, self.reply)
        self.gone.set()


async def frames_within(agent: ScriptedAgent, seconds: float) -> list[str]:
    """Return the names of the frames, heartbeats apart, that reach the agent in this time."""
    names: list[str] = []
    with trio.move_on_after(seconds):
        while True:
            names.append(type(await agent.next_frame()).__name__)
    return names


async def start(nursery: trio.Nursery, services: Services, request: TokenRequest = PROMPT) -> Client:
    client = Client(services, request)
    nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    return client


def prompt(text: str) -> ContinueFromRawPrompt:
    return attrs.evolve(PROMPT, raw_prompt=text)


async def test_pieces_reach_the_reply_and_the_terminal_frees_the_slot(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, name="agent-a") as agent:
        client = await start(nursery, services)
        assert services.slots() == (1, 1)
        request = await agent.next_request()
        assert request.body == PROMPT
        agent.token(request.request, "Hi", "R")
        agent.step((request.request, "C", '" you"'), (request.request, "E", '{"ToolCallParsed":[]}'))
        agent.done(request.request)
        await client.gone.wait()
        assert [piece[:2] for piece in client.reply.pieces] == [
            ("agent-a", "R"),
            ("agent-a", "C"),
            ("agent-a", "E"),
            ("agent-a", "D"),
        ]
        assert json.loads(client.reply.pieces[0][2]) == "Hi"
        assert client.reply.errors == []
        assert services.slots() == (0, 1)


async def test_pieces_that_came_together_travel_together(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2) as agent:
        clients = [await start(nursery, services), await start(nursery, services)]
        first, second = (await agent.next_request()).request, (await agent.next_request()).request
        agent.step(
            (first, "C", '"a"'),
            (first, "C", '"b"'),
            (second, "C", '"c"'),
            (first, "C", '"d"'),
            (first, "D", "{}"),
        )
        agent.done(second)
        for client in clients:
            await client.gone.wait()
        assert [client.reply.letters for client in clients] == ["CCCD", "CD"]
        assert [client.reply.writes for client in clients] == [2, 2]


async def test_an_agents_error_becomes_the_replys_error(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        client = await start(nursery, services)
        error = StreamError(502, "Engine stopped: SIGKILL")
        agent.error((await agent.next_request()).request, error)
        await client.gone.wait()
        assert client.reply.errors == [error]
        assert services.slots() == (0, 1)


@pytest.mark.scenario("BU-2")
async def test_without_slots_and_buffering_a_request_overflows() -> None:
    services = make_services(max_buffered_requests=0, buffered_request_timeout=0.05)
    async with connected_agent(services.links, slots=0):
        reply = RecordingReply()
        await services.relay.serve(PROMPT, reply)
        assert reply.errors == [OVERFLOW]


@pytest.mark.scenario("BU-3", "BU-4")
@pytest.mark.parametrize("with_agent", [False, True])
async def test_a_request_that_no_agent_can_serve_times_out(
    with_agent: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    services = make_services(max_buffered_requests=1, buffered_request_timeout=0.05)
    reply = RecordingReply()
    if with_agent:
        async with connected_agent(services.links, slots=0):
            await services.relay.serve(PROMPT, reply)
    else:
        await services.relay.serve(PROMPT, reply)
    assert reply.errors == [BUFFER_TIMEOUT]
    assert services.buffer.buffered == 0


@pytest.mark.scenario("BU-5")
async def test_after_a_timeout_the_next_request_is_served(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(buffered_request_timeout=0.05)
    first = await start(nursery, services)
    await first.gone.wait()
    assert first.reply.errors == [BUFFER_TIMEOUT]
    async with connected_agent(services.links, slots=4) as agent:
        second = await start(nursery, services)
        agent.done((await agent.next_request()).request)
        await second.gone.wait()
        assert second.reply.letters == "D"


@pytest.mark.scenario("BU-6")
async def test_a_busy_agent_without_buffering_refuses_the_second_request(nursery: trio.Nursery) -> None:
    services = make_services(max_buffered_requests=0)
    async with connected_agent(services.links) as agent:
        first = await start(nursery, services)
        second = await start(nursery, services)
        assert second.reply.errors == [OVERFLOW]
        agent.done((await agent.next_request()).request)
        await first.gone.wait()
        assert first.reply.letters == "D"


@pytest.mark.scenario("BU-8")
async def test_four_simultaneous_requests_reach_four_agents(nursery: trio.Nursery) -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "1", name="a") as one,
        connected_agent(services.links, "2", name="b") as two,
        connected_agent(services.links, "3", name="c") as three,
        connected_agent(services.links, "4", name="d") as four,
    ):
        clients = [await start(nursery, services) for _ in range(4)]
        for agent in (one, two, three, four):
            agent.done((await agent.next_request()).request)
        await wait_all_tasks_blocked()
        assert sorted(str(client.reply.pieces[0][0]) for client in clients) == ["a", "b", "c", "d"]


@pytest.mark.scenario("BU-10")
async def test_an_item_timeout_of_zero_wins_over_everything(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(item_timeout=0)
    async with connected_agent(services.links, slots=2) as agent:
        client = await start(nursery, services)
        assert [error.code for error in client.reply.errors] == [504]
        assert services.slots() == (0, 2)
        assert await frames_within(agent, 10) == ["Welcome"], "the request never left the outbox"


@pytest.mark.scenario("ST-1")
async def test_an_agent_that_sends_no_item_ends_the_request(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(item_timeout=0.15)
    async with connected_agent(services.links) as agent:
        client = await start(nursery, services)
        request = (await agent.next_request()).request
        with trio.fail_after(1.5):
            await client.gone.wait()
        assert client.reply.errors == [
            StreamError(
                504,
                "Inference timed out after 150ms waiting for next token. "
                "Increase --inference-item-timeout if the prompt requires longer processing.",
            )
        ]
        assert await agent.next_frame() == Stop(request)


async def test_the_item_clock_starts_again_with_every_item(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(item_timeout=1)
    async with connected_agent(services.links) as agent:
        started = trio.current_time()
        client = await start(nursery, services)
        request = (await agent.next_request()).request
        for _ in range(5):
            await trio.sleep(0.9)
            agent.token(request, "x")
        await client.gone.wait()
        assert client.reply.letters == "CCCCC"
        assert client.reply.errors[0].code == 504
        assert trio.current_time() - started == pytest.approx(5 * 0.9 + 1)


@pytest.mark.scenario("ST-2")
@pytest.mark.parametrize("goodbye", [False, True])
async def test_requests_of_an_agent_that_leaves_end_with_502(nursery: trio.Nursery, goodbye: bool) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2) as agent:
        clients = [await start(nursery, services) for _ in range(2)]
        waiting = await start(nursery, services)
        agent.token((await agent.next_request()).request, "x")
        if goodbye:
            agent.send_text('"Goodbye"')
        else:
            agent.hang_up()
        for client in clients:
            await client.gone.wait()
            assert client.reply.errors == [AGENT_GONE]
        await agent.unlinked.wait()
        assert len(services.fleet) == 0
        assert not waiting.gone.is_set(), "who waits is served by another agent"
        nursery.cancel_scope.cancel()


@pytest.mark.slow
@pytest.mark.scenario("ST-3")
async def test_a_request_that_the_link_cannot_take_ends_with_500(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2, unread_frames=1):
        huge = prompt("x" * (27 * 1024 * 1024))
        first = await start(nursery, services, huge)
        second = await start(nursery, services, huge)
        assert second.reply.errors == [StreamError(500, "Failed to generate response")]
        assert not first.gone.is_set()
        assert services.slots() == (1, 2)
        nursery.cancel_scope.cancel()


async def test_a_request_that_comes_after_shutdown_is_refused() -> None:
    services = make_services()
    async with connected_agent(services.links):
        services.relay.shut_down()
        reply = RecordingReply()
        await services.relay.serve(PROMPT, reply)
        assert reply.errors == [SHUTTING_DOWN]


async def test_shutdown_ends_waiting_running_and_draining_requests(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2) as agent:
        running = await start(nursery, services)
        draining = await start(nursery, services)
        waiting = await start(nursery, services)
        first, second = [(await agent.next_request()).request for _ in range(2)]
        draining.scope.cancel()
        await draining.gone.wait()
        assert await agent.next_frame() == Stop(second)
        services.relay.shut_down()
        for client in (running, waiting):
            await client.gone.wait()
            assert client.reply.errors == [SHUTTING_DOWN]
        assert draining.reply.errors == []
        assert services.slots() == (0, 2)
        assert services.buffer.buffered == 0
        assert await agent.next_frame() == Stop(first)


async def test_shutdown_comes_before_the_end_of_the_link(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links):
        client = await start(nursery, services)
        services.relay.shut_down()
        services.links.shut_down()
        await client.gone.wait()
        assert client.reply.errors == [SHUTTING_DOWN]


async def test_a_cancelled_request_keeps_its_slot_until_the_agent_confirms(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        first = await start(nursery, services)
        second = await start(nursery, services)
        request = (await agent.next_request()).request
        agent.token(request, "x")
        await wait_all_tasks_blocked()
        first.scope.cancel()
        await first.gone.wait()
        assert await agent.next_frame() == Stop(request)
        agent.token(request, "late")
        await wait_all_tasks_blocked()
        assert services.buffer.buffered == 1
        agent.done(request)
        following = (await agent.next_request()).request
        agent.done(following)
        await second.gone.wait()
        assert first.reply.letters == "C"
        assert second.reply.letters == "D"
        assert services.slots() == (0, 1)


async def test_a_stop_that_is_never_confirmed_frees_the_slot_after_the_item_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(item_timeout=5, buffered_request_timeout=60)
    async with connected_agent(services.links) as agent:
        first = await start(nursery, services)
        second = await start(nursery, services)
        request = (await agent.next_request()).request
        await trio.sleep(3)
        first.scope.cancel()
        await trio.sleep(4)
        agent.token(request, "late")  # a sign that the agent computes still: the wait starts again
        await trio.sleep(4.9)
        assert services.buffer.buffered == 1
        await trio.sleep(0.2)
        assert services.buffer.buffered == 0
        following = (await agent.next_request()).request
        agent.token(request, "later still")
        agent.done(request)
        agent.token(following, "x")
        agent.done(following)
        await second.gone.wait()
        assert second.reply.letters == "CD"
        assert first.reply.pieces == []
        assert services.slots() == (0, 1)


async def confirm_stops(agent: ScriptedAgent) -> None:
    while True:
        stop = await agent.next_frame_of(Stop)
        agent.done(stop.request)


@pytest.mark.scenario("CA-12", "CA-13")
@pytest.mark.parametrize("cancelled", [4, 2])
async def test_waiting_requests_are_served_through_the_slots_of_cancelled_ones(
    nursery: trio.Nursery, cancelled: int
) -> None:
    services = make_services(buffered_request_timeout=3600, item_timeout=3600)
    async with connected_agent(services.links, slots=4) as agent:
        running = [await start(nursery, services) for _ in range(4)]
        numbers = [(await agent.next_request()).request for _ in range(4)]
        waiting = [await start(nursery, services) for _ in range(4)]
        assert services.buffer.buffered == 4
        for client in running[:cancelled]:
            client.scope.cancel()
        stops = [(await agent.next_frame_of(Stop)).request for _ in range(cancelled)]
        assert sorted(stops) == numbers[:cancelled]
        for number in stops:
            agent.done(number)
        for _ in range(4):
            request = (await agent.next_request()).request
            agent.token(request, "x")
            agent.done(request)
        for client in waiting:
            await client.gone.wait()
            assert client.reply.letters == "CD"
        assert services.slots() == (4 - cancelled, 4)
        for client in running:
            client.scope.cancel()
        nursery.start_soon(confirm_stops, agent)
        await wait_all_tasks_blocked()
        assert services.slots() == (0, 4)
        nursery.cancel_scope.cancel()


async def test_a_request_cancelled_before_it_was_sent_never_reaches_the_agent(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=3, unread_frames=1) as agent:
        await start(nursery, services)  # occupies the connection, as the agent has not read its welcome
        await start(nursery, services)
        unsent = await start(nursery, services)
        unsent.scope.cancel()
        await unsent.gone.wait()
        assert services.slots() == (2, 3)
        assert await frames_within(agent, 10) == ["Welcome", "Generate", "Generate"]
        assert services.slots() == (2, 3)
        nursery.cancel_scope.cancel()


async def test_a_request_cancelled_between_its_parts_leaves_the_link_whole(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2, unread_frames=1) as agent:
        long = await start(nursery, services, prompt("x" * 2_000_000))
        short = await start(nursery, services)
        long.scope.cancel()
        await long.gone.wait()
        assert services.slots() == (1, 2), "the agent cannot compute a request it has only parts of"
        frames = [await agent.next_frame() for _ in range(4)]
        assert [type(frame).__name__ for frame in frames] == ["Welcome", "Part", "Stop", "Generate"]
        agent.done(1)  # whatever the agent says about the stopped one
        agent.done(2)
        await short.gone.wait()
        assert short.reply.letters == "D"
        assert services.slots() == (0, 2)


async def test_a_stop_does_not_wait_behind_the_parts_of_another_request(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, slots=2, unread_frames=1) as agent:
        short = await start(nursery, services)
        assert (await agent.next_request()).request == 1
        long = await start(nursery, services, prompt("x" * 2_000_000))
        short.scope.cancel()
        await short.gone.wait()
        kinds = [type(await agent.next_frame()).__name__ for _ in range(4)]
        assert kinds.index("Stop") <= 2, kinds
        long.scope.cancel()
        nursery.cancel_scope.cancel()


async def test_a_request_in_parts_arrives_whole(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        long = prompt('"\\ä' * 300_000)
        client = await start(nursery, services, long)
        request = await agent.next_request()
        assert request.body == long
        agent.done(request.request)
        await client.gone.wait()


async def test_a_bounced_request_goes_to_another_agent(nursery: trio.Nursery) -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "1", name="a") as first,
        connected_agent(services.links, "2", name="b") as second,
    ):
        client = await start(nursery, services)
        request = (await first.next_request()).request
        first.bounce(request)
        following = (await second.next_request()).request
        assert services.slots() == (1, 2)
        second.done(following)
        await client.gone.wait()
        assert client.reply.pieces[0][0] == "b"
        assert services.slots() == (0, 2)


async def test_a_bounced_request_waits_at_the_head_past_the_limit_until_the_agents_next_status(
    nursery: trio.Nursery,
) -> None:
    services = make_services(max_buffered_requests=1)
    async with connected_agent(services.links, slots=1) as agent:
        bounced = await start(nursery, services, prompt("bounced"))
        other = await start(nursery, services, prompt("other"))
        agent.report(slots_total=0)
        agent.bounce((await agent.next_request()).request)
        await wait_all_tasks_blocked()
        assert services.buffer.buffered == 2
        assert services.slots() == (0, 0)
        agent.report(slots_total=1)
        request = await agent.next_request()
        assert request.body == prompt("bounced")
        agent.done(request.request)
        request = await agent.next_request()
        assert request.body == prompt("other")
        agent.done(request.request)
        for client in (bounced, other):
            await client.gone.wait()
            assert client.reply.letters == "D"


async def test_a_bounced_request_is_not_sent_back_before_the_agent_reported(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(max_buffered_requests=0)
    async with connected_agent(services.links, slots=1) as agent:
        client = await start(nursery, services)
        agent.bounce((await agent.next_request()).request)
        await trio.sleep(3)
        assert services.slots() == (0, 1)
        agent.report()  # shows nothing new, and is a status all the same
        agent.done((await agent.next_request()).request)
        await client.gone.wait()
        assert client.reply.letters == "D"


async def test_a_bounced_request_keeps_its_first_deadline(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(buffered_request_timeout=10)
    started = trio.current_time()
    async with connected_agent(services.links) as agent:
        client = await start(nursery, services)
        request = (await agent.next_request()).request
        await trio.sleep(6)
        agent.bounce(request)
        await client.gone.wait()
        assert client.reply.errors == [BUFFER_TIMEOUT]
        assert trio.current_time() - started == pytest.approx(10)


async def test_a_request_bounced_during_its_drain_frees_the_slot(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links) as agent:
        client = await start(nursery, services)
        request = (await agent.next_request()).request
        client.scope.cancel()
        await client.gone.wait()
        agent.bounce(request)
        await wait_all_tasks_blocked()
        assert services.slots() == (0, 1)
        assert services.buffer.buffered == 0


async def test_failing_requests_are_told_to_the_operator_but_not_one_by_one(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    services = make_services(max_buffered_requests=0)
    for pause in (0.0, 1.0, 1.0, 10.0):
        await trio.sleep(pause)
        await services.relay.serve(PROMPT, RecordingReply())
    assert [record.getMessage() for record in caplog.records] == [
        "requests fail, 1 since the last such line: 503 Buffered requests overflow",
        "requests fail, 3 since the last such line: 503 Buffered requests overflow",
    ]
