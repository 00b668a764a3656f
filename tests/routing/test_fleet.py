import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.messages.snapshots import AgentSnapshot
from paddler.messages.state import StateApplicationStatus
from paddler.routing.fleet import Agent, Fleet
from tests.fakes.scripted_agent import agent_status


class CountedChanges:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def fleet_of(*slots: int) -> tuple[Fleet, list[Agent], CountedChanges]:
    changes = CountedChanges()
    fleet = Fleet(changes)
    agents = [
        fleet.register(f"agent-{number}", f"name-{number}", agent_status(slots=count))
        for number, count in enumerate(slots)
    ]
    changes.count = 0
    return fleet, agents, changes


@pytest.mark.scenario("BK-1")
def test_a_report_with_a_model_path_is_a_change_and_the_path_is_visible() -> None:
    changes = CountedChanges()
    fleet = Fleet(changes)
    agent = fleet.register("agent-1", None, agent_status(version=0, model_path=None))
    assert fleet.update(agent, agent_status(version=1, model_path="/models/a.gguf"))
    assert fleet.snapshot().agents[0].model_path == "/models/a.gguf"
    assert changes.count == 2


@pytest.mark.scenario("BK-2")
def test_a_report_older_than_the_newest_is_ignored() -> None:
    fleet, [agent], changes = fleet_of(4)
    fleet.update(agent, agent_status(version=5, slots=3))
    assert not fleet.update(agent, agent_status(version=3, slots=1))
    assert fleet.totals() == (0, 3)
    assert changes.count == 1


@pytest.mark.scenario("BK-3")
def test_the_same_report_twice_changes_nothing() -> None:
    fleet, [agent], changes = fleet_of(4)
    report = agent_status(version=2, slots=4, model_path="/models/b.gguf")
    assert fleet.update(agent, report)
    assert not fleet.update(agent, report)
    assert changes.count == 1


def test_a_report_of_equal_version_still_counts_when_a_field_differs() -> None:
    fleet, [agent], _ = fleet_of(4)
    assert fleet.update(agent, agent_status(slots=4, state_application_status=StateApplicationStatus.STUCK))


def test_a_higher_version_alone_is_no_visible_change() -> None:
    fleet, [agent], changes = fleet_of(4)
    assert not fleet.update(agent, agent_status(slots=4, version=9))
    assert changes.count == 0
    assert not fleet.update(agent, agent_status(slots=1, version=8)), "the version was noted all the same"


@pytest.mark.scenario("BK-4")
def test_the_processing_count_of_reports_is_ignored() -> None:
    fleet, [agent], _ = fleet_of(2)
    fleet.claim({})
    assert not fleet.update(agent, agent_status(slots=2, version=2, slots_processing=0))
    assert fleet.totals() == (1, 2)
    assert not fleet.update(agent, agent_status(slots=2, version=3, slots_processing=2))
    assert fleet.totals() == (1, 2)


@pytest.mark.scenario("BK-5")
def test_a_released_slot_is_counted_down() -> None:
    fleet, [agent], _ = fleet_of(1)
    assert fleet.claim({}) is agent
    assert agent.slots_processing == 1
    fleet.release(agent)
    assert agent.slots_processing == 0


@pytest.mark.scenario("BK-6")
def test_a_released_slot_is_announced() -> None:
    fleet, [agent], changes = fleet_of(1)
    fleet.claim({})
    assert changes.count == 1
    fleet.release(agent)
    assert changes.count == 2


@pytest.mark.scenario("BK-7")
def test_sixteen_callers_fill_four_agents_evenly() -> None:
    fleet, agents, _ = fleet_of(4, 4, 4, 4)
    assert all(fleet.claim({}) for _ in range(16))
    assert [agent.slots_processing for agent in agents] == [4, 4, 4, 4]
    assert fleet.claim({}) is None


@pytest.mark.scenario("BK-8")
def test_one_of_256_callers_gets_the_only_slot() -> None:
    fleet, _, _ = fleet_of(1)
    assert sum(fleet.claim({}) is not None for _ in range(256)) == 1


@pytest.mark.scenario("BK-9")
def test_a_claim_sees_what_a_rival_took_just_before() -> None:
    """Choice and claim are one step, so a rival's claim comes before the choice or after the claim."""
    fleet, [first, second], _ = fleet_of(4, 4)
    assert fleet.claim({}) is first, "the rival"
    assert fleet.claim({}) is second
    assert (first.slots_processing, second.slots_processing) == (1, 1)


def test_the_smallest_absolute_load_wins_not_the_smallest_share() -> None:
    fleet, [large, small], _ = fleet_of(8, 2)
    assert [fleet.claim({}) for _ in range(4)] == [large, small, large, small]
    assert fleet.claim({}) is large


def test_an_agent_without_slots_gets_no_work() -> None:
    fleet, _, _ = fleet_of(0)
    assert fleet.claim({}) is None


def test_a_refused_agent_is_a_candidate_again_after_its_next_report() -> None:
    fleet, [agent], _ = fleet_of(1)
    refusals = {agent: agent.reports}
    assert fleet.claim(refusals) is None
    fleet.update(agent, agent_status(version=0))
    assert fleet.claim(refusals) is None, "an old report says nothing new"
    fleet.update(agent, agent_status(version=2))
    assert fleet.claim(refusals) is agent


def test_a_claim_outlives_its_agent_and_does_not_touch_a_newcomer_of_the_same_id() -> None:
    fleet, [older], changes = fleet_of(1)
    fleet.claim({})
    fleet.remove(older)
    newer = fleet.register(older.id, "newer", agent_status(slots=1))
    assert fleet.claim({}) is newer
    changes.count = 0
    fleet.release(older)
    assert fleet.totals() == (1, 1)
    assert changes.count == 0


def test_capacity_below_the_load_stops_claims_until_the_load_fell() -> None:
    fleet, [agent], _ = fleet_of(2)
    fleet.claim({})
    fleet.claim({})
    fleet.update(agent, agent_status(slots=1, version=2))
    assert fleet.totals() == (2, 1)
    fleet.release(agent)
    assert fleet.claim({}) is None
    fleet.release(agent)
    assert fleet.claim({}) is agent


def test_the_load_at_registration_is_zero_whatever_the_agent_says() -> None:
    fleet = Fleet(lambda: None)
    fleet.register("agent-1", None, agent_status(slots=2, slots_processing=2))
    assert fleet.totals() == (0, 2)


def test_the_snapshot_shows_the_status_and_the_balancers_own_count() -> None:
    fleet, [agent], _ = fleet_of(2)
    fleet.claim({})
    assert fleet.snapshot().agents == (
        AgentSnapshot(
            **{
                field.name: getattr(agent.status, field.name)
                for field in attrs.fields(type(agent.status))
                if field.name not in ("version", "slots_processing")
            },
            id="agent-0",
            name="name-0",
            slots_processing=1,
        ),
    )


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 30),
)
def test_loads_never_differ_by_more_than_one_where_there_is_room(slots: list[int], claims: int) -> None:
    fleet, agents, _ = fleet_of(*slots)
    for _ in range(claims):
        fleet.claim({})
    assert fleet.totals()[0] == min(claims, sum(slots))
    unfilled = [a.slots_processing for a in agents if a.slots_processing < a.status.slots_total]
    if unfilled:
        assert max(unfilled) - min(unfilled) <= 1
        assert all(agent.slots_processing <= min(unfilled) + 1 for agent in agents)
