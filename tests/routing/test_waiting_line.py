from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paddler.routing.fleet import Agent, Fleet
from paddler.routing.policies import Offer, choose
from paddler.routing.waiting_line import Ticket, WaitingLine
from tests.fakes.scripted_agent import agent_status


def waiting(line: WaitingLine, count: int) -> list[Ticket]:
    tickets = [line.issue() for _ in range(count)]
    for ticket in tickets:
        line.join(ticket)
    return tickets


def test_no_candidate_no_choice() -> None:
    candidates: dict[Agent, Offer] = {}
    assert choose(candidates) is None


def test_tickets_are_served_in_order_of_arrival() -> None:
    fleet = Fleet(lambda: None)
    line = WaitingLine(10)
    first, second, third = waiting(line, 3)
    agent = fleet.register("agent-1", None, agent_status(slots=2))
    assert line.grant(fleet) == [(first, agent), (second, agent)]
    assert third in line
    assert len(line) == 1


def test_who_left_is_not_served() -> None:
    fleet = Fleet(lambda: None)
    line = WaitingLine(10)
    first, second = waiting(line, 2)
    line.leave(first)
    agent = fleet.register("agent-1", None, agent_status(slots=2))
    assert line.grant(fleet) == [(second, agent)]
    assert fleet.totals() == (1, 2)


def test_a_line_is_full_at_its_limit_and_always_without_one() -> None:
    def is_full(limit: int, count: int) -> bool:
        line = WaitingLine(limit)
        waiting(line, count)
        return line.is_full

    assert [is_full(2, count) for count in range(4)] == [False, False, True, True]
    assert is_full(0, 0)
    assert is_full(-3, 0)


@given(st.permutations(range(6)))
def test_who_comes_back_stands_where_arrival_puts_it(order: list[int]) -> None:
    line = WaitingLine(0)
    tickets = [line.issue() for _ in range(6)]
    for place in order:
        line.join(tickets[place])
    fleet = Fleet(lambda: None)
    fleet.register("agent-1", None, agent_status(slots=6))
    assert [ticket for ticket, _ in line.grant(fleet)] == tickets


def test_a_bounced_ticket_does_not_hold_up_those_behind_it() -> None:
    fleet = Fleet(lambda: None)
    agent = fleet.register("agent-1", None, agent_status(slots=1))
    line = WaitingLine(10)
    bounced, other = waiting(line, 2)
    bounced.refuse(agent)
    assert line.grant(fleet) == [(other, agent)]
    fleet.update(agent, agent_status(slots=2, version=2))
    assert line.grant(fleet) == [(bounced, agent)]


class FleetAndLine(RuleBasedStateMachine):
    """Requests and agents come, go, bounce and report in any order; the books must balance."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(lambda: None)
        self.line = WaitingLine(5)
        self.agents: list[Agent] = []
        self.waiting: list[Ticket] = []
        self.running: list[tuple[Ticket, Agent]] = []
        self.version = 1

    def grant(self) -> None:
        granted = self.line.grant(self.fleet)
        numbers = [ticket.number for ticket, _ in granted]
        assert numbers == sorted(numbers)
        for ticket, agent in granted:
            self.waiting.remove(ticket)
            self.running.append((ticket, agent))

    @rule(slots=st.integers(0, 3))
    def agent_registers(self, slots: int) -> None:
        self.version += 1
        agent_id = f"agent-{self.version}"
        self.agents.append(self.fleet.register(agent_id, None, agent_status(slots=slots)))
        self.grant()

    @rule(choice=st.integers(0), slots=st.integers(0, 3))
    def agent_reports(self, choice: int, slots: int) -> None:
        if self.agents:
            self.version += 1
            agent = self.agents[choice % len(self.agents)]
            self.fleet.update(agent, agent_status(slots=slots, version=self.version))
            self.grant()

    @rule(choice=st.integers(0))
    def agent_leaves(self, choice: int) -> None:
        if self.agents:
            self.fleet.remove(self.agents.pop(choice % len(self.agents)))

    @rule()
    def request_arrives(self) -> None:
        ticket = self.line.issue()
        agent = self.fleet.claim(ticket.refusals)
        if agent is not None:
            self.running.append((ticket, agent))
        elif not self.line.is_full:
            self.line.join(ticket)
            self.waiting.append(ticket)

    @rule(choice=st.integers(0))
    def waiting_request_gives_up(self, choice: int) -> None:
        if self.waiting:
            self.line.leave(self.waiting.pop(choice % len(self.waiting)))

    @rule(choice=st.integers(0))
    def request_ends(self, choice: int) -> None:
        if self.running:
            _, agent = self.running.pop(choice % len(self.running))
            self.fleet.release(agent)
            self.grant()

    @rule(choice=st.integers(0))
    def request_is_bounced(self, choice: int) -> None:
        if self.running:
            ticket, agent = self.running.pop(choice % len(self.running))
            ticket.refuse(agent)
            self.line.join(ticket)
            self.waiting.append(ticket)
            self.fleet.release(agent)
            self.grant()

    @invariant()
    def books_balance(self) -> None:
        assert len(self.line) == len(self.waiting)
        assert all(ticket in self.line for ticket in self.waiting)
        for agent in self.agents:
            assert agent.slots_processing == sum(of is agent for _, of in self.running)
        processing, total = self.fleet.totals()
        assert processing == sum(agent.slots_processing for agent in self.agents)
        assert total == sum(agent.status.slots_total for agent in self.agents)
        shown = self.fleet.snapshot().agents
        assert [agent.slots_processing for agent in shown] == [a.slots_processing for a in self.agents]

    @invariant()
    def nobody_waits_who_could_be_served(self) -> None:
        for ticket in self.waiting:
            agent = self.fleet.claim(ticket.refusals)
            assert agent is None


TestFleetAndLine = FleetAndLine.TestCase
TestFleetAndLine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
