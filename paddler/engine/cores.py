"""How many cores an engine on this host may use."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from paddler.engine.cgroups import own_limits

_TOPOLOGY = Path("/sys/devices/system/cpu")


def engine_threads(*, shared_host: bool) -> int:
    """Return the threads for an engine: physical cores that this process may use.

    One less where a balancer works on the same host: a foreign process on an engine's core slows every
    step of it down. More threads than cores do worse than fewer.
    """
    return threads_for(map(_siblings, _allowed()), _quotas(), shared_host=shared_host)


def processors() -> int:
    """Return how many threads of this process can run at a time; siblings of a physical core count each."""
    return threads_for(map(str, _allowed()), _quotas(), shared_host=False)


def threads_for(siblings: Iterable[str], quotas: Iterable[str], *, shared_host: bool) -> int:
    """Choose the threads, at least one.

    `siblings` has an entry per logical CPU, equal for those of one physical core; `quotas` are texts of
    cpu.max, "QUOTA PERIOD" in microseconds or "max PERIOD"; the smallest counts, in whole cores.
    """
    cores = float(len(set(siblings)))
    for quota, period in (text.split() for text in quotas):
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return max(math.ceil(cores) - shared_host, 1)


def _allowed() -> Iterable[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _quotas() -> list[str]:
    return own_limits("cpu.max", v1=None)


def _siblings(cpu: int) -> str:
    """Return what is the same for the logical CPUs of one physical core."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
