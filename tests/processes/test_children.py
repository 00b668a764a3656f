"""Children are waited for with and without a pidfd, and their end is told in words."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from paddler.processes.children import cause_of, wait_for


@contextmanager
def no_more_files() -> Iterator[None]:
    """Keep this process from opening any file or descriptor within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("returncode", "cause"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "SIGKILL"), (-40, "signal 40")],
)
def test_a_return_code_in_words(returncode: int, cause: str) -> None:
    assert cause_of(returncode) == cause


async def waited_for(process: "subprocess.Popen[bytes]") -> list[str]:
    """Kill a child that is being waited for, and return what the waiting told."""
    causes: list[str] = []

    async def wait() -> None:
        causes.append(await wait_for(process))

    async with trio.open_nursery() as waiting:
        waiting.start_soon(wait)
        await wait_all_tasks_blocked()
        assert causes == []
        process.kill()
    return causes


async def test_a_child_is_waited_for_also_where_no_file_can_be_opened() -> None:
    before = open_files()
    for _ in range(2):
        process = subprocess.Popen(["sleep", "600"])  # noqa: ASYNC220  starting is not under test
        assert await waited_for(process) == ["SIGKILL"]
        assert await wait_for(process) == "SIGKILL"  # again, when it has ended
    process = subprocess.Popen(["sleep", "600"])  # noqa: ASYNC220  likewise
    with no_more_files():
        assert await waited_for(process) == ["SIGKILL"]
    assert open_files() == before
