"""How many threads compute while others want the processors, too.

Every step of a graph ends when its slowest thread has finished. One that waits for a processor makes all the
others wait, and these spin: with two threads and one foreign busy loop on two cores a decode takes 14 times
as long, and with one thread hardly longer than on a quiet host. What the kernel counts of each thread tells:
on a quiet host the threads wait for a twentieth of a core or two, because of agent and balancer.

So the engine gives up a thread where for a second at least a quarter of a core was not to be had, one after
another while that helps. From time to time it takes one back, and keeps it if the others are gone. Images
are encoded with all threads.
"""

from collections.abc import Callable

import attrs

LOOK_INTERVAL = 0.25
LEAST_SHARE = 0.4
"""Of their time between two looks the threads must have worked, or wanted to: else it counts for nothing."""

CROWDED_CORES = 0.25
"""So much is missing where it is crowded, and a thread given up must make it less by as much: a busy
neighbour takes half a core from the thread it meets; what all threads wait for evenly is no neighbour."""

CROWDED_LOOKS = 4

FIRST_PATIENCE = 5.0
LONGEST_PATIENCE = 320.0
"""A thread that is taken back in vain costs the next look's time, at a fourteenth of the speed."""

CALM = 60.0
"""With all threads for so long, the others are gone; before that they come and go."""


@attrs.frozen
class ThreadTimes:
    """What all threads that compute did between two looks, in seconds."""

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
        self._looked_at = self._changed_at = clock()
        self._crowded_looks: list[float] = []
        self._missing_before: float | None = None
        self._is_trial = False
        self._patience = FIRST_PATIENCE
        self._in_vain_until = self._changed_at
        self._is_told = False

    def turn_ended(self) -> None:
        """Look around, if it is time."""
        now = self._clock()
        elapsed = now - self._looked_at
        if self._most == 1 or elapsed < LOOK_INTERVAL:
            return
        self._looked_at = now
        times = self._look()
        if times is None or times.ran + times.waited < LEAST_SHARE * elapsed * self._count:
            self._crowded_looks.clear()
            return
        # Idle time counts for neither: what was not to be had, as a part of what was wanted.
        missing = self._count * times.waited / (times.ran + times.waited)
        if missing >= CROWDED_CORES:
            self._was_crowded(now, missing)
        else:
            self._had_room(now)

    def _was_crowded(self, now: float, missing: float) -> None:
        self._crowded_looks.append(missing)
        if self._is_trial:
            self._be_patient()
            self._change(self._count - 1, now)
        elif len(self._crowded_looks) == CROWDED_LOOKS:
            self._judge(now, sum(self._crowded_looks) / CROWDED_LOOKS)
            self._crowded_looks.clear()

    def _judge(self, now: float, missing: float) -> None:
        """Give up a thread, or take back the last one if it was given up for nothing."""
        if self._missing_before is not None and missing > self._missing_before - CROWDED_CORES:
            self._be_patient()
            self._in_vain_until = now + self._patience
            self._change(self._count + 1, now)
            return
        if self._missing_before is not None:
            self._has_helped()
        if self._count > 1 and now >= self._in_vain_until:
            if self._is_told and self._count == self._most:
                self._be_patient()
            self._change(self._count - 1, now)
            self._missing_before = missing

    def _had_room(self, now: float) -> None:
        self._crowded_looks.clear()
        self._missing_before = None
        unchanged = now - self._changed_at
        if self._count < self._most:
            self._has_helped()
            if self._is_trial or unchanged >= self._patience:
                self._change(self._count + 1, now)
                self._is_trial = True
            return
        self._is_trial = False
        if unchanged < CALM:
            return
        self._patience = FIRST_PATIENCE
        self._in_vain_until = now
        if self._is_told:
            self._is_told = False
            self._report(f"the engine computes with all of its {self._most} threads again")

    def _has_helped(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._report(
                "the engine does not get the processors it needs, others use them: it computes with fewer"
                f" than {self._most} threads, more slowly, until they are free"
            )

    def _be_patient(self) -> None:
        self._patience = min(2 * self._patience, LONGEST_PATIENCE)

    def _change(self, count: int, now: float) -> None:
        self._crowded_looks.clear()
        self._missing_before = None
        self._is_trial = False
        self._changed_at = now
        self._count = count
        self._use(count)
