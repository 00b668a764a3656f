"""When a process counts as standing still."""

import os

import pytest

from paddler.engine.vitals import Pulse, Vitals, any_at_work, read_vitals

STOPPED = Vitals(stopped=True, at_work=False, cpu_ticks=5)
ASLEEP = Vitals(stopped=False, at_work=False, cpu_ticks=5)
STARVED = Vitals(stopped=False, at_work=True, cpu_ticks=5)


def still_after(*looks: Vitals | None, must_work: bool = True, elapsed: float = 0.5) -> float:
    pulse = Pulse(longest_gap=1.0)
    for look in looks:
        pulse.look(look, elapsed, must_work=must_work)
    return pulse.standing_still


def test_stopped_counts_from_the_first_look_that_saw_it() -> None:
    assert still_after(STOPPED) == 0
    assert still_after(STOPPED, STOPPED, STOPPED) == 1.0
    assert still_after(STOPPED, STOPPED, must_work=False) == 0.5


def test_asleep_without_cpu_time_counts_only_while_it_must_work() -> None:
    assert still_after(ASLEEP, ASLEEP, ASLEEP, ASLEEP) == 1.0
    assert still_after(ASLEEP, ASLEEP, ASLEEP, must_work=False) == 0


def test_starved_busy_and_gone_processes_do_not_stand_still() -> None:
    busy = [Vitals(stopped=False, at_work=False, cpu_ticks=ticks) for ticks in range(9)]
    assert still_after(*busy) == 0
    assert still_after(*[STARVED] * 9) == 0
    assert still_after(ASLEEP, ASLEEP, ASLEEP, None) == 0


def test_an_observer_that_was_suspended_has_seen_nothing() -> None:
    assert still_after(ASLEEP, ASLEEP, ASLEEP, elapsed=60.0) == 1.0


def test_rest_forgets() -> None:
    pulse = Pulse(longest_gap=1.0)
    for _ in range(4):
        pulse.look(STOPPED, 0.5, must_work=True)
    pulse.rest()
    assert pulse.standing_still == 0
    pulse.look(STOPPED, 0.5, must_work=True)
    assert pulse.standing_still == 0


@pytest.mark.parametrize(
    ("states", "at_work"), [("SS", False), ("SR", True), ("DS", True), ("ST", False), ("Z", False)]
)
def test_who_waits_for_a_processor_or_a_disk_is_at_work(states: str, at_work: bool) -> None:
    assert any_at_work(states) == at_work


def test_this_process_runs_and_no_other_has_the_pid_0() -> None:
    vitals = read_vitals(os.getpid())
    assert vitals is not None
    assert (vitals.stopped, vitals.at_work) == (False, True)
    assert read_vitals(0) is None
