"""A thread is given up where others take its processor, and taken back when they are done."""

import attrs
import pytest

from paddler.engine.thread_count import (
    CALM,
    CROWDED_LOOKS,
    FIRST_PATIENCE,
    LONGEST_PATIENCE,
    LOOK_INTERVAL,
    ThreadCount,
    ThreadTimes,
)


@attrs.define
class Host:
    """Cores for the threads of an engine and for others; nobody is favoured."""

    cores: int = 2
    others: float = 0.0
    friction: float = 0.0
    """Of its time, what each thread waits for in any case."""
    busy: float = 1.0
    count: int = 2
    is_blind: bool = False
    now: float = 100.0
    looks: int = 0
    used: list[int] = attrs.Factory(list)
    reports: list[str] = attrs.Factory(list)

    def use(self, count: int) -> None:
        self.count = count
        self.used.append(count)

    def look(self) -> ThreadTimes | None:
        self.looks += 1
        wanted = self.count * LOOK_INTERVAL * self.busy
        share = self.friction + max(self.count + self.others - self.cores, 0) / self.count / 2
        return None if self.is_blind else ThreadTimes(wanted * (1 - share), wanted * share)

    def thread_count(self) -> ThreadCount:
        return ThreadCount(
            self.count, use=self.use, look=self.look, report=self.reports.append, clock=lambda: self.now
        )

    def run(self, threads: ThreadCount, *, seconds: float) -> None:
        """Do turns of a look's length."""
        for _ in range(round(seconds / LOOK_INTERVAL)):
            self.now += LOOK_INTERVAL
            threads.turn_ended()


def test_a_quiet_host_serves_all_threads() -> None:
    host = Host(others=0.2)
    host.run(host.thread_count(), seconds=60)
    assert host.used == []
    assert host.reports == []


def test_a_thread_is_given_up_after_a_second_and_taken_back_when_there_is_room() -> None:
    host = Host(others=1)
    threads = host.thread_count()
    host.run(threads, seconds=LOOK_INTERVAL * (CROWDED_LOOKS - 1))
    assert host.used == []
    host.run(threads, seconds=LOOK_INTERVAL)
    assert host.used == [1]
    host.run(threads, seconds=LOOK_INTERVAL)
    assert "fewer than 2 threads" in host.reports[0]
    host.others = 0
    host.run(threads, seconds=FIRST_PATIENCE + LOOK_INTERVAL)
    assert host.used == [1, 2]
    assert len(host.reports) == 1
    host.run(threads, seconds=CALM)
    assert "all of its 2 threads" in host.reports[1]


def test_of_many_threads_as_many_are_given_up_as_others_need() -> None:
    host = Host(cores=8, count=8, others=3)
    threads = host.thread_count()
    host.run(threads, seconds=4)
    assert host.used == [7, 6, 5]
    host.others = 0
    host.run(threads, seconds=FIRST_PATIENCE + 1 + CALM)
    assert host.used == [7, 6, 5, 6, 7, 8]
    assert len(host.reports) == 2


def test_the_last_thread_stays() -> None:
    host = Host(others=4)
    host.run(host.thread_count(), seconds=4)
    assert host.used == [1]


@pytest.mark.parametrize("count", [16, 64, 128])
def test_threads_given_up_for_nothing_are_taken_back(count: int) -> None:
    host = Host(cores=count, count=count, friction=0.02)
    threads = host.thread_count()
    host.run(threads, seconds=600)
    assert min(host.used) == count - 1
    assert host.used.count(count - 1) <= 8  # after 10, 20, … 320 seconds each
    assert host.count == count
    assert host.reports == []
    host.others = 2
    host.run(threads, seconds=LONGEST_PATIENCE + 4)
    assert host.count == count - 2


def test_what_was_for_nothing_is_forgotten_on_a_calm_host() -> None:
    host = Host(cores=64, count=64, friction=0.02)
    threads = host.thread_count()
    host.run(threads, seconds=100)
    host.friction = 0
    host.run(threads, seconds=CALM + 20)
    host.others = 1
    host.run(threads, seconds=2)
    assert host.count == 63
    host.others = 0
    host.run(threads, seconds=FIRST_PATIENCE + 1)
    assert host.count == 64


def test_trials_get_rarer_and_are_not_reported() -> None:
    host = Host(others=1)
    host.run(host.thread_count(), seconds=4 * LONGEST_PATIENCE)
    trials = host.used.count(2)
    assert 7 <= trials <= 10  # after 5, 10, 20, … 320 seconds each
    assert len(host.reports) == 1


def test_others_that_come_and_go_are_reported_once_and_tried_more_rarely() -> None:
    host = Host()
    threads = host.thread_count()
    for _ in range(100):
        host.others = 1
        host.run(threads, seconds=3)
        host.others = 0
        host.run(threads, seconds=7)
    assert len(host.reports) == 1
    assert host.used.count(2) <= 10


def test_looks_far_apart_do_not_add_up() -> None:
    host = Host(others=1)
    threads = host.thread_count()
    for _ in range(4 * CROWDED_LOOKS):
        host.busy = 1
        host.run(threads, seconds=LOOK_INTERVAL)
        host.busy = 0.1
        host.run(threads, seconds=10)
    assert host.used == []


def test_a_short_crowd_does_not_count() -> None:
    host = Host()
    threads = host.thread_count()
    for _ in range(20):
        host.others = 1
        host.run(threads, seconds=LOOK_INTERVAL * (CROWDED_LOOKS - 1))
        host.others = 0
        host.run(threads, seconds=LOOK_INTERVAL)
    assert host.used == []


@pytest.mark.parametrize("count", [2, 8, 64])
def test_what_an_idle_engine_waits_for_does_not_count(count: int) -> None:
    host = Host(cores=count, count=count, others=1, busy=0.1)
    host.run(host.thread_count(), seconds=60)
    assert host.used == []


def test_a_host_that_tells_nothing_is_let_alone() -> None:
    host = Host(others=1, is_blind=True)
    host.run(host.thread_count(), seconds=60)
    assert host.used == []


def test_one_thread_needs_no_looks() -> None:
    host = Host(others=1, count=1)
    host.run(host.thread_count(), seconds=60)
    assert host.looks == 0
