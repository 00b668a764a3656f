"""The waiting line on the clock; which ticket is next is tested in tests/routing."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.balancer.request_buffer import RequestBuffer
from paddler.errors import BufferFull, BufferTimeout, ShuttingDown
from paddler.routing.fleet import Agent, Fleet
from tests.fakes.scripted_agent import agent_status


def make_buffer(*, limit: int = 10, timeout: float = 10.0) -> tuple[Fleet, RequestBuffer]:
    fleet = Fleet(lambda: None)
    return fleet, RequestBuffer(fleet, max_buffered_requests=limit, timeout=timeout)


def register(fleet: Fleet, buffer: RequestBuffer, *, slots: int = 1, agent_id: str = "agent-1") -> Agent:
    agent = fleet.register(agent_id, None, agent_status(slots=slots))
    buffer.grant_free_slots()
    return agent


class Client:
    """Holds a slot until told to let go."""

    def __init__(self, buffer: RequestBuffer, served: list["Client"] | None = None) -> None:
        self.buffer = buffer
        self.served = served
        self.agent: Agent | None = None
        self.let_go = trio.Event()
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            async with self.buffer.slot() as slot:
                self.agent = slot.agent
                if self.served is not None:
                    self.served.append(self)
                await self.let_go.wait()


@pytest.mark.scenario("BK-10", "BK-12")
async def test_a_waiter_on_an_empty_pool_gets_the_first_free_slot(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    fleet, buffer = make_buffer()
    counts = buffer.changes.subscribe()
    client = Client(buffer)
    nursery.start_soon(client.run)
    with trio.fail_after(1):
        await counts.wait()
    assert buffer.buffered == 1
    agent = register(fleet, buffer)
    await wait_all_tasks_blocked()
    assert client.agent is agent
    assert buffer.buffered == 0
    client.let_go.set()
    await wait_all_tasks_blocked()
    assert fleet.totals() == (0, 1)


@pytest.mark.scenario("BK-11")
async def test_a_request_that_gets_a_slot_at_once_never_touches_the_counter(
    autojump_clock: MockClock,
) -> None:
    fleet, buffer = make_buffer(limit=0)
    counts = buffer.changes.subscribe()
    register(fleet, buffer)
    async with buffer.slot():
        assert fleet.totals() == (1, 1)
        with trio.move_on_after(1) as wait:
            await counts.wait()
        assert wait.cancelled_caught
    assert fleet.totals() == (0, 1)


async def test_waiters_are_served_in_order_and_newcomers_do_not_overtake(nursery: trio.Nursery) -> None:
    fleet, buffer = make_buffer()
    register(fleet, buffer)
    served: list[Client] = []
    clients = [Client(buffer, served) for _ in range(8)]
    for client in clients[:5]:
        nursery.start_soon(client.run)
        await wait_all_tasks_blocked()
    for number, client in enumerate(clients):
        assert served == clients[: number + 1]
        client.let_go.set()
        if number < 3:  # a newcomer in the very tick in which the slot is freed
            nursery.start_soon(clients[5 + number].run)
        await wait_all_tasks_blocked()
    assert served == clients
    assert fleet.totals() == (0, 1)


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_of_zero_or_less_disables_buffering(limit: int) -> None:
    _, buffer = make_buffer(limit=limit)
    with pytest.raises(BufferFull):
        async with buffer.slot():
            pytest.fail("there is no slot")
    assert buffer.buffered == 0


async def test_a_full_line_refuses_at_once(nursery: trio.Nursery) -> None:
    _, buffer = make_buffer(limit=2)
    for _ in range(2):
        nursery.start_soon(Client(buffer).run)
    await wait_all_tasks_blocked()
    with pytest.raises(BufferFull):
        async with buffer.slot():
            pytest.fail("there is no slot")
    assert buffer.buffered == 2
    nursery.cancel_scope.cancel()


async def test_a_waiter_that_gives_up_is_announced(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, buffer = make_buffer()
    client = Client(buffer)
    nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    counts = buffer.changes.subscribe()
    client.scope.cancel()
    with trio.fail_after(1):
        await counts.wait()
    assert buffer.buffered == 0


async def test_the_wait_ends_at_the_deadline(autojump_clock: MockClock) -> None:
    _, buffer = make_buffer(timeout=7)
    started = trio.current_time()
    with pytest.raises(BufferTimeout):
        async with buffer.slot():
            pytest.fail("there is no slot")
    assert trio.current_time() - started == pytest.approx(7)
    assert buffer.buffered == 0


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_slot_granted_and_cancelled_in_the_same_tick_is_returned(
    nursery: trio.Nursery, cancelled_first: bool
) -> None:
    fleet, buffer = make_buffer()
    first, second = Client(buffer), Client(buffer)
    for client in (first, second):
        nursery.start_soon(client.run)
        await wait_all_tasks_blocked()
    if cancelled_first:
        first.scope.cancel()
        register(fleet, buffer)
    else:
        register(fleet, buffer)
        first.scope.cancel()
    await wait_all_tasks_blocked()
    assert second.agent is not None, "the slot went to the next in line"
    second.let_go.set()
    await wait_all_tasks_blocked()
    assert fleet.totals() == (0, 1)
    assert buffer.buffered == 0


async def test_a_slot_granted_in_the_tick_of_the_deadline_is_served(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    fleet, buffer = make_buffer(timeout=5)
    client = Client(buffer)
    nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    register(fleet, buffer)
    autojump_clock.jump(5)
    await wait_all_tasks_blocked()
    assert client.agent is not None
    nursery.cancel_scope.cancel()


async def test_an_agent_that_leaves_between_grant_and_use_sends_its_request_back_to_the_head(
    nursery: trio.Nursery,
) -> None:
    fleet, buffer = make_buffer()
    first, second = Client(buffer), Client(buffer)
    for client in (first, second):
        nursery.start_soon(client.run)
        await wait_all_tasks_blocked()
    fleet.remove(register(fleet, buffer))
    await wait_all_tasks_blocked()
    assert buffer.buffered == 2
    other = register(fleet, buffer, agent_id="agent-2")
    await wait_all_tasks_blocked()
    assert first.agent is other
    assert second.agent is None
    nursery.cancel_scope.cancel()


async def test_shutdown_refuses_who_waits_and_who_comes(nursery: trio.Nursery) -> None:
    fleet, buffer = make_buffer()
    refused: list[int] = []

    async def wait(number: int) -> None:
        with pytest.raises(ShuttingDown):
            async with buffer.slot():
                pytest.fail("there is no slot")
        refused.append(number)

    nursery.start_soon(wait, 1)
    await wait_all_tasks_blocked()
    register(fleet, buffer)  # granted, and shut down before the waiter runs
    buffer.shut_down()
    await wait_all_tasks_blocked()
    await wait(2)
    assert refused == [1, 2]
    assert fleet.totals() == (0, 1)
    assert buffer.buffered == 0
