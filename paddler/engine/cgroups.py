"""Which files of control groups limit a process: of its own group, and of every group around it."""

from pathlib import Path, PurePosixPath

_ROOT = Path("/sys/fs/cgroup")


def own_limits(name: str, *, v1: tuple[str, str] | None) -> list[str]:
    """Return what the limits of this process say, the own group's first; nothing where there is none.

    `name` is the file of a limit in version 2 of control groups, `v1` controller and file in version 1,
    or None for a limit that is not looked for there.
    """
    files = limit_files(_read(Path("/proc/self/cgroup")), name, v1=v1)
    return [text for file in files if (text := _read(_ROOT / file))]


def limit_files(membership: str, name: str, *, v1: tuple[str, str] | None) -> list[PurePosixPath]:
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
            files += [place / name for place in (group, *group.parents)]
        elif v1 is not None and v1[0] in controllers.split(","):
            mounted = v1[0] / group
            files += [place / v1[1] for place in (mounted, *mounted.parents[:-1])]
    return list(dict.fromkeys(files))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
