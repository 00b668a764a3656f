"""Agents say what they hold, and requests go where their beginning is; scripted agents, real links."""

import attrs
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.messages.agent_socket import Held, HeldPrefix
from paddler.messages.inference import ContinueFromConversationHistory, ConversationMessage
from tests.balancer.services import RecordingReply, Services, make_services
from tests.fakes.scripted_agent import ScriptedAgent, connected_agent


def conversation(*messages: str) -> ContinueFromConversationHistory:
    return ContinueFromConversationHistory(
        add_generation_prompt=True,
        conversation_history=tuple(ConversationMessage("user", message) for message in messages),
        enable_thinking=False,
        max_tokens=16,
    )


@attrs.frozen
class Room:
    """A balancer with agents, by their ids."""

    services: Services
    agents: dict[str, ScriptedAgent]

    def loads(self) -> dict[str, int]:
        return {agent.id: agent.slots_processing for agent in self.services.fleet.snapshot().agents}

    async def place(self, requests: trio.Nursery, *messages: str) -> tuple[str, int]:
        """Bring a conversation to an agent; return which, and the request's number there."""
        before = self.loads()
        requests.start_soon(self.services.relay.serve, conversation(*messages), RecordingReply())
        await wait_all_tasks_blocked()
        [agent_id] = [agent_id for agent_id, load in self.loads().items() if load > before[agent_id]]
        return agent_id, (await self.agents[agent_id].next_request()).request

    async def finish(self, agent_id: str, request: int) -> None:
        self.agents[agent_id].done(request)
        await wait_all_tasks_blocked()

    async def hold(self, agent_id: str, **tokens: int) -> None:
        """Have an agent say what it holds; `r1=64` are 64 tokens of its first request."""
        prefixes = tuple(HeldPrefix(int(name[1:]), count) for name, count in tokens.items())
        self.agents[agent_id].send_frame(Held(prefixes))
        await wait_all_tasks_blocked()


async def test_a_conversation_returns_to_the_agent_that_holds_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "1", slots=4) as first,
        connected_agent(services.links, "2", slots=4) as second,
    ):
        room = Room(services, {"1": first, "2": second})
        assert await room.place(nursery, "other") == ("1", 1)
        assert await room.place(nursery, "Hi") == ("2", 1)
        await room.hold("2", r1=640)
        await room.finish("2", 1)
        await room.finish("1", 1)
        assert await room.place(nursery, "Hi", "Hello!", "How are you?") == ("2", 2)
        await room.hold("2", r1=640, r2=1280)
        assert await room.place(nursery, "Hi", "Hello!", "Who are you?") == ("2", 3)
        await room.hold("2")
        assert await room.place(nursery, "Hi", "Hello!", "Where are you?") == ("1", 2)


async def test_a_full_warm_agent_is_not_waited_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "1", slots=1) as first,
        connected_agent(services.links, "2", slots=1) as second,
    ):
        room = Room(services, {"1": first, "2": second})
        place = await room.place(nursery, "Hi")
        await room.hold("1", r1=640)
        await room.finish(*place)
        assert await room.place(nursery, "Hi", "again") == ("1", 2)
        assert await room.place(nursery, "Hi", "once more") == ("2", 1)


async def test_requests_that_waited_go_to_their_warm_agents(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services()
    async with (
        connected_agent(services.links, "1", slots=1) as first,
        connected_agent(services.links, "2", slots=1) as second,
    ):
        room = Room(services, {"1": first, "2": second})
        assert await room.place(nursery, "one") == ("1", 1)
        assert await room.place(nursery, "two") == ("2", 1)
        await room.hold("1", r1=640)
        await room.hold("2", r1=640)
        for messages in (("two", "goes on"), ("one", "goes on")):
            services_of = services.relay.serve
            nursery.start_soon(services_of, conversation(*messages), RecordingReply())
            await wait_all_tasks_blocked()
        assert services.buffer.buffered == 2
        # Both slots come free before a turn is granted: the first in line has the choice.
        first.report(slots_total=0)
        second.report(slots_total=0)
        await wait_all_tasks_blocked()
        await room.finish("1", 1)
        await room.finish("2", 1)
        assert services.buffer.buffered == 2
        first.report(slots_total=1)
        await wait_all_tasks_blocked()
        assert services.buffer.buffered == 1
        assert (await first.next_request()).body == conversation("two", "goes on"), "nobody waits for warmth"


async def test_what_an_agent_held_is_forgotten_with_its_link(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services()
    async with connected_agent(services.links, "1", slots=4) as first:
        async with connected_agent(services.links, "2", slots=4) as second:
            room = Room(services, {"1": first, "2": second})
            await room.place(nursery, "other")
            assert await room.place(nursery, "Hi") == ("2", 1)
            await room.hold("2", r1=640)
            await room.finish("2", 1)
        async with connected_agent(services.links, "2", slots=4) as second:
            room = Room(services, {"1": first, "2": second})
            await room.finish("1", 1)
            assert await room.place(nursery, "Hi", "again") == ("1", 2)


async def test_a_bounced_request_leaves_no_trace_at_the_agent(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services()
    async with connected_agent(services.links, "1", slots=4) as first:
        room = Room(services, {"1": first})
        place = await room.place(nursery, "Hi")
        first.bounce(place[1])
        first.report()
        await wait_all_tasks_blocked()
        assert (await first.next_request()).request == 2
        await room.hold("1", r1=640, r2=64)
        assert await room.place(nursery, "Hi", "again") == ("1", 3)
        await room.finish("1", 2)
        await room.finish("1", 3)
        assert room.loads() == {"1": 0}
