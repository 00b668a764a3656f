"""How much memory this host gives a process: the RAM, or what a control group leaves of it."""

import os

from paddler.engine.cgroups import own_limits


def host_memory_bytes() -> int:
    """Return the smallest of RAM and the limits of all control groups around this process."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return smallest_limit(ram, own_limits("memory.max", v1=("memory", "memory.limit_in_bytes")))


def smallest_limit(ram: int, limits: list[str]) -> int:
    """Return the smallest number; `max` and the huge number of "no limit" leave the RAM."""
    return min([ram, *(int(limit) for limit in limits if limit.strip().isdigit())])
