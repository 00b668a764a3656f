import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paddler.routing.chains import NO_CHAIN, Chain
from paddler.routing.held_prefixes import MAX_LINKS, MAX_UNREPORTED, NO_SAVING, HeldPrefixes, Saving


def chain(messages: str, *, rest: int = 0) -> Chain:
    """Return the chain of a prompt whose messages are letters of 100 characters each."""
    links = tuple(hash(messages[: count + 1]) for count in range(len(messages)))
    ends = tuple(100 * (count + 1) for count in range(len(messages)))
    return Chain(links, ends, 100 * len(messages) + rest)


def holding(**tokens: int) -> HeldPrefixes:
    """Return the ledger of an agent with ended requests of these messages."""
    prefixes = HeldPrefixes()
    for number, messages in enumerate(tokens, start=1):
        prefixes.note(number, chain(messages), arrival=number)
    prefixes.report(dict(enumerate(tokens.values(), start=1)))
    for number in range(1, len(tokens) + 1):
        prefixes.end(number)
    return prefixes


@pytest.mark.parametrize(
    ("messages", "saving"),
    [
        ("ab", Saving(640, is_continuation=True)),
        ("abc", Saving(640, is_continuation=True)),
        ("a", Saving(320)),
        ("axy", Saving(320)),
        ("x", NO_SAVING),
        ("xab", NO_SAVING),
    ],
)
def test_a_prompt_saves_what_it_shares_with_a_held_one(messages: str, saving: Saving) -> None:
    assert holding(ab=640).saving(chain(messages)) == saving


def test_the_longest_common_prefix_counts() -> None:
    prefixes = holding(ab=640, abcd=1280, x=900)
    assert prefixes.saving(chain("abcdef")) == Saving(1280, is_continuation=True)
    assert prefixes.saving(chain("abcx")) == Saving(960)


def test_an_answer_does_not_count_for_those_who_only_begin_alike() -> None:
    prefixes = HeldPrefixes()
    prefixes.note(1, chain("ab"), arrival=1)
    prefixes.report({1: 100})
    prefixes.end(1)
    prefixes.report({1: 2000})
    assert prefixes.saving(chain("ax")) == Saving(50)
    assert prefixes.saving(chain("abc")) == Saving(2000, is_continuation=True)


def test_what_was_handed_over_saves_nothing_before_it_is_reported() -> None:
    prefixes = HeldPrefixes()
    prefixes.note(1, chain("ab"), arrival=1)
    assert prefixes.saving(chain("ab")) == NO_SAVING
    prefixes.report({1: 128})
    assert prefixes.saving(chain("ab")) == Saving(128, is_continuation=True)


def test_what_is_not_reported_any_more_is_forgotten_once_it_has_ended() -> None:
    prefixes = HeldPrefixes()
    prefixes.note(1, chain("ab"), arrival=1)
    prefixes.report({1: 128})
    prefixes.report({})
    assert prefixes.saving(chain("ab")) == NO_SAVING
    prefixes.report({1: 128})
    assert prefixes.saving(chain("ab")).tokens == 128, "it runs, and came back"
    prefixes.end(1)
    prefixes.report({})
    prefixes.report({1: 128})
    assert prefixes.saving(chain("ab")) == NO_SAVING


def test_what_only_a_longer_prompt_that_is_not_held_has_does_not_hide_a_shorter_one() -> None:
    prefixes = holding(ab=640)
    prefixes.note(9, chain("abcd"), arrival=9)
    assert prefixes.saving(chain("abcde")) == Saving(640, is_continuation=True)


def test_a_prompt_that_goes_on_after_its_last_link_is_held_in_part() -> None:
    prefixes = HeldPrefixes()
    prefixes.note(1, chain("ab", rest=200), arrival=1)
    prefixes.report({1: 800})
    assert prefixes.saving(chain("abc")) == Saving(400, is_continuation=True)


def test_a_conversation_takes_one_slot_however_many_turns_are_held() -> None:
    prefixes = holding(a=64)
    assert prefixes.idle() == 1
    prefixes.note(2, chain("abc"), arrival=2)
    assert prefixes.idle() == 0, "its slot computes"
    prefixes.report({1: 64, 2: 192})
    prefixes.end(2)
    assert prefixes.idle() == 1
    assert prefixes.saving(chain("abc")) == Saving(192, is_continuation=True)
    assert prefixes.saving(chain("a")) == Saving(64)


def test_a_turn_that_failed_gives_the_cells_back_to_the_one_before() -> None:
    prefixes = holding(a=64)
    prefixes.note(2, chain("abc"), arrival=2)
    prefixes.end(2)
    prefixes.report({1: 64})
    assert prefixes.idle() == 1
    assert prefixes.saving(chain("abc")) == Saving(64, is_continuation=True)


def test_the_oldest_idle_prefix_is_that_of_the_earliest_request() -> None:
    assert HeldPrefixes().oldest_idle() == 0
    prefixes = holding(a=64, x=64)
    assert prefixes.oldest_idle() == 1
    prefixes.note(3, chain("ab"), arrival=3)
    assert prefixes.oldest_idle() == 2


def test_the_requests_noted_longest_ago_give_way() -> None:
    prefixes = HeldPrefixes()
    length = 1024
    for number in range(MAX_LINKS // length + 1):
        links = tuple(hash((number, link)) for link in range(length))
        prefixes.note(number, Chain(links, links, 1), arrival=number)
    prefixes.report(dict.fromkeys(range(MAX_LINKS // length + 1), 64))
    assert prefixes.saving(Chain((hash((0, 0)),), (1,), 1)) == NO_SAVING
    assert prefixes.saving(Chain((hash((1, 0)),), (1,), 1)) != NO_SAVING


@pytest.mark.parametrize("are_alike", [False, True])
def test_an_agent_that_reports_nothing_is_not_remembered_without_end(*, are_alike: bool) -> None:
    prefixes = HeldPrefixes()
    for number in range(1, MAX_UNREPORTED + 2):
        prefixes.note(number, chain("a" if are_alike else chr(number)), arrival=number)
        prefixes.end(number)
    prefixes.report(dict.fromkeys(range(1, MAX_UNREPORTED + 2), 64))
    assert prefixes.saving(chain("a" if are_alike else chr(2))) == Saving(64, is_continuation=True)
    assert are_alike or prefixes.saving(chain(chr(1))) == NO_SAVING


def test_what_gives_way_may_have_ended_unreported() -> None:
    prefixes = HeldPrefixes()
    links = [tuple(hash((number, link)) for link in range(1024)) for number in range(MAX_LINKS // 1024 + 2)]
    for number, each in enumerate(links):
        prefixes.note(number, Chain(each, (1,) * 1024, 1), arrival=number)
        prefixes.end(number)
    prefixes.report(dict.fromkeys(range(len(links)), 64))
    assert [prefixes.saving(Chain(each[:1], (1,), 1)).tokens > 0 for each in links].count(False) == 2


def test_a_request_without_a_chain_and_unknown_numbers_leave_no_trace() -> None:
    prefixes = HeldPrefixes()
    prefixes.note(1, NO_CHAIN, arrival=1)
    prefixes.report({1: 64, 2: 64})
    prefixes.end(1)
    prefixes.end(7)
    assert prefixes.idle() == 0
    assert prefixes.saving(NO_CHAIN) == NO_SAVING


class AgentThatHolds(RuleBasedStateMachine):
    """Requests come, end and are reported in any order; the answers are those of a plain search."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = HeldPrefixes()
        self.chains: dict[int, str] = {}
        self.running: set[int] = set()
        self.held: dict[int, int] = {}
        self.given = 0

    @rule(messages=st.text(alphabet="ab", min_size=1, max_size=4))
    def hand_over(self, messages: str) -> None:
        self.given += 1
        self.prefixes.note(self.given, chain(messages), arrival=self.given)
        self.chains[self.given] = messages
        self.running.add(self.given)

    @rule(choice=st.integers(0))
    def end(self, choice: int) -> None:
        if self.running:
            number = sorted(self.running)[choice % len(self.running)]
            self.running.remove(number)
            self.prefixes.end(number)

    @rule(forgotten=st.sets(st.integers(1, 20)))
    def report(self, forgotten: set[int]) -> None:
        for number in forgotten - self.running:
            self.chains.pop(number, None)
        self.held = {number: 64 * len(messages) for number, messages in self.chains.items()}
        self.prefixes.report(self.held)

    @invariant()
    def the_longest_common_prefix_is_found(self) -> None:
        for wanted in ("a", "b", "abab", "bbaa", "aaaa"):
            common = 0
            for number in self.held:
                while self.chains[number][: common + 1] == wanted[: common + 1] and common < len(wanted):
                    common += 1
            assert self.prefixes.saving(chain(wanted)).tokens == 64 * common

    @invariant()
    def no_more_slots_are_idle_than_requests_that_ended(self) -> None:
        assert 0 <= self.prefixes.idle() <= len(self.held.keys() - self.running)


TestAgentThatHolds = AgentThatHolds.TestCase
TestAgentThatHolds.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
