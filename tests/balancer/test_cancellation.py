"""A request cancelled at each of its awaits, and many requests that come and go at random.

Afterwards the fleet is whole: no slot is taken, nobody waits, and the next request is served.
"""

import random

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.messages.agent_socket import Generate, Stop
from tests.balancer.services import PROMPT, RecordingReply, Services, make_services
from tests.fakes.scripted_agent import ScriptedAgent, connected_agent


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before the given step of the task that it watches."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None
        self.steps_left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.scope.cancel()


async def answer_everything(agent: ScriptedAgent, *, bounce_first: bool = False) -> None:
    """Answer requests with one token, bounce the first one if told so, and confirm stops."""
    running: set[int] = set()
    try:
        while True:
            match await agent.next_frame_of(Generate, Stop):
                case Generate(number) if bounce_first:
                    bounce_first = False
                    agent.report(slots_total=0)
                    agent.bounce(number)
                    await trio.sleep(1)
                    agent.report(slots_total=agent.status.desired_slots_total)
                case Generate(number):
                    agent.token(number, "x")
                    running.add(number)
                    await trio.lowlevel.checkpoint()
                    agent.done(number)
                case Stop(number) if number not in running:
                    agent.done(number)
    except (trio.ClosedResourceError, trio.EndOfChannel):
        pass


async def serve_until_step(services: Services, instrument: CancelAtStep, reply: RecordingReply) -> None:
    instrument.task = trio.lowlevel.current_task()
    with instrument.scope:
        await services.relay.serve(PROMPT, reply)


async def assert_whole(services: Services) -> None:
    await trio.sleep(2)
    assert services.buffer.buffered == 0
    assert services.slots()[0] == 0
    reply = RecordingReply()
    await services.relay.serve(PROMPT, reply)
    assert reply.letters == "CD"
    await wait_all_tasks_blocked()
    assert services.slots()[0] == 0


@pytest.mark.parametrize("bounced", [False, True])
@pytest.mark.parametrize("step", range(1, 9))
async def test_a_request_cancelled_at_any_step_leaves_the_fleet_whole(
    nursery: trio.Nursery, autojump_clock: MockClock, step: int, bounced: bool
) -> None:
    services = make_services()
    instrument = CancelAtStep(step)
    trio.lowlevel.add_instrument(instrument)
    reply = RecordingReply()
    nursery.start_soon(serve_until_step, services, instrument, reply)
    await wait_all_tasks_blocked()
    async with connected_agent(services.links) as agent:
        nursery.start_soon(lambda: answer_everything(agent, bounce_first=bounced))
        await assert_whole(services)
    trio.lowlevel.remove_instrument(instrument)
    assert instrument.scope.cancel_called or reply.letters == "CD"


@pytest.mark.parametrize("seed", range(5))
async def test_the_books_balance_after_any_traffic(
    nursery: trio.Nursery, autojump_clock: MockClock, seed: int
) -> None:
    chance = random.Random(seed)
    services = make_services(max_buffered_requests=8, buffered_request_timeout=5, item_timeout=3)
    ends: list[tuple[str, list[int]]] = []

    async def request() -> None:
        await trio.sleep(chance.uniform(0, 20))
        reply = RecordingReply()
        with trio.move_on_after(chance.choice([0, 0.1, 1, 100])) as patience:
            await services.relay.serve(PROMPT, reply)
        if not patience.cancelled_caught:
            assert reply.ended.is_set()
            ends.append((reply.letters[-1:], [error.code for error in reply.errors]))

    async def agent_that_comes_and_goes(number: int) -> None:
        while True:
            await trio.sleep(chance.uniform(0, 2))
            with trio.move_on_after(chance.uniform(1, 8)):
                async with connected_agent(services.links, f"agent-{number % 3}", slots=2) as agent:
                    await act(agent)

    async def act(agent: ScriptedAgent) -> None:
        try:
            while True:
                match await agent.next_frame_of(Generate, Stop):
                    case Generate(number):
                        await trio.sleep(chance.uniform(0, 0.3))
                        what = chance.random()
                        if what < 0.6:
                            agent.token(number, "x")
                            agent.done(number)
                        elif what < 0.8:
                            agent.bounce(number)
                            agent.report()
                    case Stop(number) if chance.random() < 0.5:
                        agent.done(number)
        except (trio.ClosedResourceError, trio.BrokenResourceError, trio.EndOfChannel):
            await trio.sleep_forever()  # its id came back on another connection

    async def audit() -> None:
        changes = services.fleet_changes.subscribe()
        while True:
            await changes.wait()
            shown = services.fleet.snapshot().agents
            assert services.slots() == (
                sum(agent.slots_processing for agent in shown),
                sum(agent.slots_total for agent in shown),
            )
            assert all(0 <= agent.slots_processing <= agent.slots_total for agent in shown)
            assert len({agent.id for agent in shown}) == len(shown)

    async with trio.open_nursery() as world:
        world.start_soon(audit)
        for number in range(4):
            world.start_soon(agent_that_comes_and_goes, number)
        async with trio.open_nursery() as requests:
            for _ in range(60):
                requests.start_soon(request)
        world.cancel_scope.cancel()
    assert any(letter == "D" for letter, _ in ends)
    assert len(services.fleet) == 0
    async with connected_agent(services.links) as agent:
        nursery.start_soon(answer_everything, agent)
        await assert_whole(services)
