"""How long the threads of this process ran, and waited for a processor: proc(5), schedstat."""

import threading
from pathlib import Path

from paddler.engine.thread_count import ThreadTimes

_TASKS = Path("/proc/self/task")


class ThreadTimesReader:
    """Reads what the kernel counts of the threads that compute: llama.cpp's, and the one that calls it."""

    def __init__(self, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._last: dict[str, tuple[int, int]] = {}
        self()

    def __call__(self) -> ThreadTimes | None:
        """Return what they did since the last call; None where the kernel does not count it."""
        now = {}
        others = {str(thread.native_id) for thread in threading.enumerate()} - {
            str(threading.get_native_id())
        }
        try:
            tasks = {task.name for task in self._tasks.iterdir()} - others  # without those that tokenise
        except OSError:
            return None
        for task in tasks:
            times = _times_ns(self._tasks / task)
            if times is not None:  # else it has just ended
                now[task] = times
        last, self._last = self._last, now
        if not any(ran for ran, _ in now.values()):
            return None
        ran_ns = sum(ran - last.get(task, (0, 0))[0] for task, (ran, _) in now.items())
        waited_ns = sum(waited - last.get(task, (0, 0))[1] for task, (_, waited) in now.items())
        return ThreadTimes(ran_ns / 1e9, waited_ns / 1e9)


def are_waits_counted() -> bool:
    """Say whether this kernel counts how long threads wait."""
    times = _times_ns(_TASKS / str(threading.get_native_id()))
    return times is not None and times[0] > 0  # all zero where the kernel was built without


def _times_ns(task: Path) -> tuple[int, int] | None:
    try:
        ran, waited, _ = (task / "schedstat").read_text().split()
        return int(ran), int(waited)
    except (OSError, ValueError):
        return None
