"""How many threads compute while others want the processors, too.

Every step of a graph ends when its slowest thread has finished. One that waits for a processor makes all the
others wait, and these spin: with two threads and one foreign busy loop on two cores a decode takes 14 times
as long, and with one thread hardly longer than on a quiet host. What the kernel counts of each thread tells:
on a quiet host the threads wait for a twentieth of a core or two, because of agent and balancer.

So the engine gives up a thread where for a second at least a quarter of a core was not to be had. From time
to time it takes one back, and keeps it if the others are gone. Images are encoded with all threads.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import attrs

LOOK_INTERVAL = 0.25
LEAST_SHARE = 0.4
"""Of the time of a look in which the threads were at work, or the look counts for nothing."""

CROWDED_CORES = 0.25
CROWDED_LOOKS = 4

FIRST_PATIENCE = 5.0
LONGEST_PATIENCE = 320.0
"""A thread that is taken back in vain costs the next look's time, at a fourteenth of the speed."""

CALM = 60.0
"""With all threads for so long, the others are gone; before that they come and go."""

_TASKS = Path("/proc/self/task")


@attrs.frozen
class ThreadTimes:
    """What all threads of this process did between two looks, in seconds."""

    ran: float
    waited: float
    """For a processor, while they could have run."""


class ThreadCount:
    """Chooses the number of threads; `use` puts it in force."""

    def __init__(
        self,
        most: int,
        *,
        use: Callable[[int], object],
        look: Callable[[], ThreadTimes | None],
        report: Callable[[str], object],
        clock: Callable[[], float],
    ) -> None:
        """Begin with `most` threads. Where `look` sees nothing it stays so."""
        self._most = self._count = most
        self._use = use
        self._look = look
        self._report = report
        self._clock = clock
        self._last_look = clock()
        self._crowded_looks = 0
        self._is_trial = False
        self._patience = FIRST_PATIENCE
        self._changed = self._last_look
        self._is_told = False

    def turn_ended(self) -> None:
        """Look around, if it is time."""
        now = self._clock()
        elapsed = now - self._last_look
        if self._most == 1 or elapsed < LOOK_INTERVAL:
            return
        self._last_look = now
        times = self._look()
        if times is None or times.ran + times.waited < LEAST_SHARE * elapsed:
            self._crowded_looks = 0
            return
        # Idle time counts for neither: what was not to be had, as a part of what was wanted.
        missing = self._count * times.waited / (times.ran + times.waited)
        if missing >= CROWDED_CORES:
            self._was_crowded(now)
        else:
            self._had_room(now)

    def _was_crowded(self, now: float) -> None:
        self._crowded_looks += 1
        if self._count == 1 or not (self._is_trial or self._crowded_looks >= CROWDED_LOOKS):
            return
        if not self._is_told:
            self._is_told = True
            self._report(
                "the engine does not get the processors it needs, others use them: it computes with fewer"
                f" than {self._most} threads, more slowly, until they are free"
            )
        elif self._is_trial or self._count == self._most:
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
        self._change(self._count - 1, now)

    def _had_room(self, now: float) -> None:
        self._crowded_looks = 0
        waited = now - self._changed
        if self._count < self._most:
            if self._is_trial or waited >= self._patience:
                self._change(self._count + 1, now)
                self._is_trial = True
            return
        self._is_trial = False
        if self._is_told and waited >= CALM:
            self._is_told = False
            self._patience = FIRST_PATIENCE
            self._report(f"the engine computes with all of its {self._most} threads again")

    def _change(self, count: int, now: float) -> None:
        self._crowded_looks = 0
        self._is_trial = False
        self._changed = now
        self._count = count
        self._use(count)


class ThreadTimesReader:
    """Reads what the kernel counts of the threads of this process; proc(5), schedstat."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}
        self()

    def __call__(self) -> ThreadTimes | None:
        """Return what they did since the last call; None where the kernel does not count it."""
        now = {}
        try:
            for task in _TASKS.iterdir():
                ran, waited, _ = (task / "schedstat").read_text().split()
                now[task.name] = (int(ran), int(waited))
        except (OSError, ValueError):  # also when a thread has just ended
            return None
        last, self._last = self._last, now
        ran_ns = sum(ran - last.get(task, (0, 0))[0] for task, (ran, _) in now.items())
        waited_ns = sum(waited - last.get(task, (0, 0))[1] for task, (_, waited) in now.items())
        return ThreadTimes(ran_ns / 1e9, waited_ns / 1e9)


def is_counted() -> bool:
    """Say whether this kernel counts how long threads wait."""
    try:
        ran, _, _ = (_TASKS / str(threading.get_native_id()) / "schedstat").read_text().split()
    except (OSError, ValueError):
        return False
    return int(ran) > 0  # the file is there, but all zero, where the kernel was built without
