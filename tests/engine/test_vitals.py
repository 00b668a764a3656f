"""When a process counts as standing still."""

import os

from paddler.engine.vitals import Pulse, Vitals, read_vitals

STOPPED = Vitals(stopped=True, runnable=False, cpu_ticks=5)
ASLEEP = Vitals(stopped=False, runnable=False, cpu_ticks=5)
STARVED = Vitals(stopped=False, runnable=True, cpu_ticks=5)


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
    busy = [Vitals(stopped=False, runnable=False, cpu_ticks=ticks) for ticks in range(9)]
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


def test_this_process_runs_and_no_other_has_the_pid_0() -> None:
    vitals = read_vitals(os.getpid())
    assert vitals is not None
    assert (vitals.stopped, vitals.runnable) == (False, True)
    assert read_vitals(0) is None
