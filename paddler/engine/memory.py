"""How much memory this host gives a process: the RAM, or what a control group leaves of it."""

import os
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")


def host_memory_bytes() -> int:
    """Return the smallest of RAM and the limits of all control groups around this process."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    membership = _read(Path("/proc/self/cgroup"))
    return smallest_limit(ram, [_read(_CGROUPS / path) for path in limit_files(membership)])


def limit_files(membership: str) -> list[PurePosixPath]:
    """Return which files below /sys/fs/cgroup may limit a process with this /proc/self/cgroup.

    A limit of any group above counts too. Within a container the groups above are not visible and the
    own one may lie at the root, so every path is tried up to there.
    """
    files = []
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = PurePosixPath(path.lstrip("/"))
        if number == "0":
            files += [place / "memory.max" for place in (group, *group.parents)]
        elif "memory" in controllers.split(","):
            v1 = "memory" / group
            files += [place / "memory.limit_in_bytes" for place in (v1, *v1.parents[:-1])]
    return list(dict.fromkeys(files))


def smallest_limit(ram: int, limits: list[str]) -> int:
    """Return the smallest number; `max`, missing files and the huge number of "no limit" leave the RAM."""
    return min([ram, *(int(limit) for limit in limits if limit.strip().isdigit())])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
