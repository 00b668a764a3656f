"""Is a process at work, waiting for its turn, or standing still?

CPU time counts in ticks of 10 ms, which an engine that decodes on the CPU always advances. A process
without CPU time that waits for a processor is starved by others, and one that waits for a disk reads
weights that the host dropped from its memory: neither stands still. One that sleeps otherwise, or was
stopped, does. A process that waits for ever is ended by `EngineTimeouts.step`, not by this rule.
"""

from collections.abc import Iterable
from pathlib import Path

import attrs

_AT_WORK = frozenset("RD")
"""Runs or could run; reads from a disk, for which `EngineTimeouts.step` is the only bound."""

_STOPPED = "Tt"
_UTIME, _STIME = 11, 12  # counted from the state, field 3 of proc_pid_stat(5)


@attrs.frozen
class Vitals:
    """One look at a process."""

    stopped: bool
    at_work: bool
    """Whether any of its threads is, or would be if a processor or a disk served it."""
    cpu_ticks: int


class Pulse:
    """Add up for how long a process has stood still, look by look.

    Only the time between two looks that both found it still counts, and no more of it than
    `longest_gap`: when the observer itself was suspended, it has seen nothing in the meantime.
    """

    def __init__(self, *, longest_gap: float) -> None:
        self._longest_gap = longest_gap
        self._last: Vitals | None = None
        self._still = False
        self.standing_still = 0.0

    def look(self, vitals: Vitals | None, elapsed: float, *, must_work: bool) -> None:
        """Take the next look; unless the process must use CPU time, only being stopped is standing still."""
        if vitals is None:
            still = False
        elif vitals.stopped:
            still = True
        else:
            advanced = self._last is None or vitals.cpu_ticks != self._last.cpu_ticks
            still = must_work and not vitals.at_work and not advanced
        both_still = still and self._still
        self.standing_still = self.standing_still + min(elapsed, self._longest_gap) if both_still else 0.0
        self._last, self._still = vitals, still

    def rest(self) -> None:
        """Start anew: the process has nothing to do."""
        self._last, self._still = None, False
        self.standing_still = 0.0


def read_vitals(pid: int) -> Vitals | None:
    """Look at a process, or return None where there is no /proc or no such process any more."""
    process = Path("/proc") / str(pid)
    try:
        own = _fields(process / "stat")
        states = [_fields(task / "stat")[0] for task in (process / "task").iterdir()]
    except (OSError, IndexError):  # a thread that ends meanwhile, too: the next look is soon
        return None
    return Vitals(
        stopped=own[0] in _STOPPED,
        at_work=any_at_work(states),
        cpu_ticks=int(own[_UTIME]) + int(own[_STIME]),
    )


def any_at_work(states: Iterable[str]) -> bool:
    """Judge the states of a process's threads, as proc_pid_stat(5) writes them."""
    return not _AT_WORK.isdisjoint(states)


def _fields(stat: Path) -> list[str]:
    """Return the fields from the state on; the name before it may hold anything."""
    return stat.read_text(errors="replace").rpartition(")")[2].split()
