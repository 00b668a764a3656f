"""Conversations come back to the agent that holds their beginning: the cluster with the bundled model."""

from collections import Counter

import attrs
import pytest
import trio

from tests.cluster import Cluster, Message, cluster, conversation, state, text_of, usage_of

pytestmark = pytest.mark.slow

SYSTEM = "You are the assistant of number {number}. " + "Be brief, be kind, be exact. " * 30


@attrs.define
class Conversation:
    """A client that says the same again and again, each time with the whole history."""

    system: str
    history: list[Message] = attrs.Factory(list)
    agents: list[str] = attrs.Factory(list)
    cached: list[int] = attrs.Factory(list)

    async def turn(self, running: Cluster) -> None:
        if not self.history:
            self.history.append({"role": "system", "content": self.system})
        self.history.append({"role": "user", "content": "Hello"})
        messages = await running.generate(conversation("", max_tokens=12, conversation_history=self.history))
        self.history.append({"role": "assistant", "content": text_of(messages)})
        self.agents += {message["Response"]["generated_by"] for message in messages}
        self.cached.append(usage_of(messages)["cached_prompt_tokens"])


async def take_turns(running: Cluster, conversations: list[Conversation]) -> None:
    async with trio.open_nursery() as turns:
        for each in conversations:
            turns.start_soon(each.turn, running)


async def test_every_turn_of_eight_conversations_lands_where_the_one_before_did() -> None:
    conversations = [Conversation(SYSTEM.format(number=number)) for number in range(8)]
    async with cluster(agents=2, slots=4, desired=state()) as running:
        for _ in range(3):
            await take_turns(running, conversations)
    assert Counter(each.agents[0] for each in conversations) == {"agent-0": 4, "agent-1": 4}
    for each in conversations:
        assert len(set(each.agents)) == 1
        assert len(each.agents) == 3
        assert min(each.cached[1:]) > 0


async def test_conversations_with_one_system_prompt_settle_evenly_also_one_after_the_other() -> None:
    conversations = [Conversation(SYSTEM.format(number=0)) for _ in range(8)]
    for number, each in enumerate(conversations):
        each.history = [
            {"role": "system", "content": each.system},
            {"role": "user", "content": f"This is the conversation of client {number}."},
            {"role": "assistant", "content": "Good."},
        ]
    async with cluster(agents=2, slots=4, desired=state()) as running:
        for each in conversations:
            await each.turn(running)
        for each in conversations:
            await each.turn(running)
    assert Counter(each.agents[0] for each in conversations) == {"agent-0": 4, "agent-1": 4}
    assert all(each.agents[0] == each.agents[1] for each in conversations)


async def test_a_warm_agent_that_left_is_not_waited_for() -> None:
    talk = Conversation(SYSTEM.format(number=1))
    async with cluster(agents=2, slots=4, desired=state()) as running:
        await talk.turn(running)
        [agent] = [agent for agent in running.agents if agent.name == talk.agents[0]]
        await running.stop_agent(agent)
        await talk.turn(running)
        await talk.turn(running)
    assert talk.agents[1] == talk.agents[2] != talk.agents[0]
    assert talk.cached[1] == 0
    assert talk.cached[2] > 0
