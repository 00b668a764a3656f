"""The ledger of connected agents and their slots. Decides who serves a request; never waits.

Theory of operation. An agent is in the ledger from `register` to `remove`. Its capacity is the
`slots_total` of its newest status, its load is counted here alone: `claim` adds one, `release`
takes one away. Choice and claim are one synchronous step, so nothing can come between them.

What is never true: a claim that lifts an agent's load above its capacity (a load above it appears
only when the capacity shrinks below what is running); a load below zero; a release that changes
another agent of the same id, because the `Agent` object is the identity and not its id, which may
come back on a newer connection while requests of the older one are still ending.
"""

from collections.abc import Callable, Mapping

import attrs

from paddler.messages.agent_socket import AgentStatus
from paddler.messages.snapshots import AgentSnapshot, AgentsSnapshot
from paddler.routing.chains import NO_CHAIN, Chain
from paddler.routing.held_prefixes import NO_SAVING, HeldPrefixes
from paddler.routing.policies import Offer, choose


@attrs.define(eq=False)
class Agent:
    """One registered agent."""

    id: str
    name: str | None
    status: AgentStatus
    slots_processing: int = 0
    reports: int = 0
    """How many statuses followed the first; tells a later status from the one a request was bounced under."""
    connected: bool = True
    prefixes: HeldPrefixes = attrs.field(factory=HeldPrefixes)

    def offer(self, chain: Chain) -> Offer:
        """Return what the agent has to offer to a request with this chain."""
        saving = self.prefixes.saving(chain) if chain.links else NO_SAVING
        return Offer(
            slots_processing=self.slots_processing,
            saved_tokens=saving.tokens,
            is_continuation=saving.is_continuation,
            spare_slots=self.status.slots_total - self.slots_processing - self.prefixes.idle(),
            oldest_prefix=self.prefixes.oldest_idle(),
        )


class Fleet:
    """All registered agents; `on_change` is called after every change that a snapshot shows."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._agents: dict[str, Agent] = {}

    def __len__(self) -> int:
        return len(self._agents)

    def register(self, agent_id: str, name: str | None, status: AgentStatus) -> Agent:
        """Enter an agent; whoever holds an older entry of this id has removed it before.

        The load starts at zero whatever the status says: requests that an agent still counts came
        over a link that is gone, and nobody is left to release them.
        """
        assert agent_id not in self._agents, f"agent {agent_id} is registered already"
        agent = Agent(agent_id, name, status)
        self._agents[agent_id] = agent
        self._on_change()
        return agent

    def remove(self, agent: Agent) -> None:
        """Strike an agent; claims that are still open may be released afterwards."""
        assert self._agents.get(agent.id) is agent, f"agent {agent.id} is not registered"
        del self._agents[agent.id]
        agent.connected = False
        self._on_change()

    def update(self, agent: Agent, status: AgentStatus) -> bool:
        """Take a newer status; return whether it showed something new.

        An older version is ignored. Of an equal one the fields still count.
        """
        known = agent.status
        if status.version < known.version:
            return False
        agent.status = status
        agent.reports += 1
        unchanged = attrs.evolve(status, version=known.version, slots_processing=known.slots_processing)
        if unchanged == known:
            return False
        self._on_change()
        return True

    def claim(self, refusals: Mapping[Agent, int], chain: Chain = NO_CHAIN) -> Agent | None:
        """Choose an agent with a free slot and take the slot, in one step; None when there is none.

        An agent in `refusals` is no candidate until it has reported more often than noted there.
        """
        agent = choose(
            {
                agent: agent.offer(chain)
                for agent in self._agents.values()
                if agent.slots_processing < agent.status.slots_total and refusals.get(agent) != agent.reports
            }
        )
        if agent is not None:
            agent.slots_processing += 1
            self._on_change()
        return agent

    def release(self, agent: Agent) -> None:
        """Give a claimed slot back."""
        assert agent.slots_processing > 0, f"agent {agent.id} has no claimed slot"
        agent.slots_processing -= 1
        if agent.connected:
            self._on_change()

    def totals(self) -> tuple[int, int]:
        """Return the sums of `slots_processing` and `slots_total` over all agents."""
        agents = self._agents.values()
        slots_processing = sum(agent.slots_processing for agent in agents)
        return slots_processing, sum(agent.status.slots_total for agent in agents)

    def snapshot(self) -> AgentsSnapshot:
        """Return the picture that the management API shows."""
        return AgentsSnapshot(tuple(_snapshot(agent) for agent in self._agents.values()))


def _snapshot(agent: Agent) -> AgentSnapshot:
    status = agent.status
    return AgentSnapshot(
        desired_slots_total=status.desired_slots_total,
        download_current=status.download_current,
        download_filename=status.download_filename,
        download_indeterminate=status.download_indeterminate,
        download_total=status.download_total,
        id=agent.id,
        issues=status.issues,
        model_path=status.model_path,
        name=agent.name,
        slots_processing=agent.slots_processing,
        slots_total=status.slots_total,
        state_application_status=status.state_application_status,
        uses_chat_template_override=status.uses_chat_template_override,
    )
