"""How many cores an engine on this host may use."""

import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def engine_threads(*, shared_host: bool) -> int:
    """Return the threads for an engine: physical cores that this process may use.

    One less where a balancer works on the same host: a foreign process on an engine's core slows every
    step of it down. More threads than cores do worse than fewer.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_siblings(cpu) for cpu in allowed})
    return max(min(cores, _quota(cores)) - shared_host, 1)


def _siblings(cpu: int) -> str:
    """Return what is the same for the logical CPUs of one physical core."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota(cores: int) -> int:
    """Return the container's CPU limit in whole cores."""
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return cores if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return cores
