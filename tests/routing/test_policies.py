from collections import Counter

import pytest

from paddler.routing.chains import Chain
from paddler.routing.fleet import Fleet
from paddler.routing.policies import NEIGHBOUR_TOKENS, Offer, choose
from tests.fakes.scripted_agent import agent_status


def offer(
    load: int, saved: int = 0, *, own: bool = False, spare: int | None = None, oldest: int = 0
) -> Offer:
    """Return the offer of an agent of four slots."""
    return Offer(
        slots_processing=load,
        saved_tokens=saved,
        is_continuation=own,
        spare_slots=4 - load if spare is None else spare,
        oldest_prefix=oldest,
    )


@pytest.mark.parametrize(
    ("reason", "one", "other", "chosen"),
    [
        ("the least busy", offer(1), offer(0), "other"),
        ("of equals the first", offer(1), offer(1), "one"),
        ("the saving, of equals", offer(0), offer(0, 64), "other"),
        ("less than a block is no saving", offer(0), offer(0, 63), "one"),
        ("a large saving moves past an idle agent", offer(0), offer(3, 1500), "other"),
        ("a small saving does not", offer(0), offer(1, 127), "one"),
        ("not even one that is worth one neighbour, if there are two", offer(0), offer(2, 255), "one"),
        ("a conversation that goes on is worth double", offer(0), offer(3, 192, own=True), "other"),
        ("but not everything", offer(0), offer(3, 191, own=True), "one"),
        ("what both hold makes no difference", offer(0, 1500), offer(3, 1500), "one"),
        ("the better of two savings", offer(1, 1500), offer(1, 1000), "one"),
        ("most room, if nothing matches", offer(0, spare=2), offer(0, spare=3), "other"),
        ("no room for a newcomer there", offer(0, spare=1), offer(0, 1500, spare=0), "one"),
        ("room is no matter if nobody has it", offer(0, spare=0), offer(0, 1500, spare=0), "other"),
        ("who goes on needs no room", offer(0, spare=1), offer(0, 1500, own=True, spare=0), "other"),
        ("the oldest prefix gives way", offer(0, spare=0, oldest=9), offer(0, spare=0, oldest=5), "other"),
        ("copies in memory are no debt", offer(0, spare=-9, oldest=9), offer(0, spare=0, oldest=10), "one"),
    ],
)
def test_the_best_offer_is_chosen(reason: str, one: Offer, other: Offer, chosen: str) -> None:
    assert choose({"one": one, "other": other}) == chosen, reason


def test_no_offer_no_choice() -> None:
    offers: dict[str, Offer] = {}
    assert choose(offers) is None


def chain(*messages: str, characters: int) -> Chain:
    """Return a chain of messages with so many characters each."""
    links = tuple(hash(messages[: count + 1]) for count in range(len(messages)))
    ends = tuple(characters * (count + 1) for count in range(len(messages)))
    return Chain(links, ends, ends[-1])


class WarmFleet:
    """Agents that hold what they served; like real ones they tell when a request runs, and when it ended."""

    def __init__(self, agents: int, slots: int) -> None:
        self.fleet = Fleet(lambda: None)
        self.agents = [
            self.fleet.register(str(number), None, agent_status(slots=slots)) for number in range(agents)
        ]
        self.held: dict[str, dict[int, int]] = {agent.id: {} for agent in self.agents}
        self.requests = 0

    def arrive(self, wanted: Chain, *, tokens: int) -> tuple[int, str]:
        """Hand a request to an agent, which begins to compute it."""
        agent = self.fleet.claim({}, wanted)
        assert agent is not None
        self.requests += 1
        agent.prefixes.note(self.requests, wanted, arrival=self.requests)
        self.held[agent.id][self.requests] = tokens
        return self.requests, agent.id

    def tell(self) -> None:
        for agent in self.agents:
            agent.prefixes.report(self.held[agent.id])

    def end(self, number: int, agent_id: str) -> None:
        [agent] = [agent for agent in self.agents if agent.id == agent_id]
        agent.prefixes.end(number)
        self.fleet.release(agent)


def test_conversations_that_start_together_with_one_system_prompt_spread_evenly() -> None:
    house = WarmFleet(agents=4, slots=4)
    placed = [house.arrive(chain("system", f"{n}", characters=3000), tokens=1500) for n in range(16)]
    assert set(Counter(agent for _, agent in placed).values()) == {4}


def test_a_system_prompt_that_all_hold_does_not_draw_requests_together() -> None:
    house = WarmFleet(agents=4, slots=16)
    first = [house.arrive(chain("system", f"{n}", characters=3000), tokens=1500) for n in range(4)]
    house.tell()
    for place in first:
        house.end(*place)
    placed = [house.arrive(chain("system", f"new {n}", characters=3000), tokens=1500) for n in range(16)]
    assert set(Counter(agent for _, agent in placed).values()) == {4}


def test_a_short_system_prompt_that_one_agent_holds_unbalances_nothing() -> None:
    house = WarmFleet(agents=2, slots=16)
    house.end(*house.arrive(chain("system", "x", characters=200), tokens=100))
    house.tell()
    placed = [house.arrive(chain("system", f"{n}", characters=200), tokens=100) for n in range(16)]
    assert set(Counter(agent for _, agent in placed).values()) == {8}


def test_conversations_one_at_a_time_settle_where_there_is_room_and_come_back() -> None:
    house = WarmFleet(agents=2, slots=4)
    homes = []
    for turn in range(3):
        for number in range(8):
            messages = ["system", *(f"{number} {message}" for message in range(2 * turn + 1))]
            place = house.arrive(chain(*messages, characters=2000), tokens=1000 * len(messages))
            house.tell()
            house.end(*place)
            homes.append(place[1])
    assert Counter(homes[:8]) == {"0": 4, "1": 4}
    assert homes[8:16] == homes[16:] == homes[:8]


def test_a_full_house_of_warm_conversations_still_serves_strangers_on_the_least_busy() -> None:
    house = WarmFleet(agents=2, slots=2)
    warm = [house.arrive(chain(f"{n}", characters=9000), tokens=4000) for n in range(4)]
    house.tell()
    for place in warm:
        house.end(*place)
    placed = [house.arrive(chain(f"stranger {n}", characters=9000), tokens=4000) for n in range(4)]
    assert Counter(agent for _, agent in placed) == {"0": 2, "1": 2}


def test_a_busier_agent_is_left_when_its_neighbours_cost_more_than_the_saving() -> None:
    house = WarmFleet(agents=2, slots=16)
    talk = chain("question", characters=1000)
    house.end(*house.arrive(talk, tokens=256))
    house.tell()
    # Worth 512 tokens in all: as much as four neighbours, and with a fifth it goes elsewhere.
    tolerated = 2 * 256 // NEIGHBOUR_TOKENS
    [warm, other] = house.agents
    for load, expected in ((tolerated, warm), (tolerated + 1, other)):
        warm.slots_processing = load
        assert house.fleet.claim({}, talk) is expected
        other.slots_processing = 0
