"""What a host and its control groups leave to an engine: memory and cores."""

import os

import pytest

from paddler.engine.cgroups import limit_files
from paddler.engine.cores import engine_threads, threads_for
from paddler.engine.memory import host_memory_bytes, smallest_limit

MEMORY_V1 = ("memory", "memory.limit_in_bytes")
FOUR_CORES = ["0,4\n", "1,5\n", "2,6\n", "3,7\n"] * 2


def test_limits_of_all_groups_above_count() -> None:
    v2 = limit_files("0::/system.slice/paddler.service\n", "memory.max", v1=MEMORY_V1)
    assert [str(path) for path in v2] == [
        "system.slice/paddler.service/memory.max",
        "system.slice/memory.max",
        "memory.max",
    ]
    v1 = limit_files("3:cpu,cpuacct:/x\n5:memory:/docker/abc\n", "memory.max", v1=MEMORY_V1)
    assert [str(path) for path in v1] == [
        "memory/docker/abc/memory.limit_in_bytes",
        "memory/docker/memory.limit_in_bytes",
        "memory/memory.limit_in_bytes",
    ]


def test_a_limit_that_version_1_writes_otherwise_is_looked_for_in_version_2_only() -> None:
    files = limit_files("3:cpu,cpuacct:/x\n0::/y\n", "cpu.max", v1=None)
    assert [str(path) for path in files] == ["y/cpu.max", "cpu.max"]


def test_the_smallest_memory_limit_counts() -> None:
    assert smallest_limit(100, ["max\n", "70\n", "9223372036854771712\n", "80"]) == 70
    assert smallest_limit(100, []) == 100


@pytest.mark.parametrize(
    ("siblings", "quotas", "alone", "beside_a_balancer"),
    [
        (FOUR_CORES, [], 4, 3),  # physical cores, not their threads
        (["0", "1"], [], 2, 1),  # where the topology is not known
        (["0"], [], 1, 1),
        (FOUR_CORES, ["max 100000\n"], 4, 3),
        (FOUR_CORES, ["250000 100000\n"], 3, 2),
        (FOUR_CORES, ["max 100000\n", "100000 50000\n", "600000 100000\n"], 2, 1),
        (FOUR_CORES, ["5000 100000\n"], 1, 1),
        (FOUR_CORES, ["9900000 100000\n"], 4, 3),
    ],
)
def test_threads_are_physical_cores_within_the_quota_less_the_balancers(
    siblings: list[str], quotas: list[str], alone: int, beside_a_balancer: int
) -> None:
    assert threads_for(siblings, quotas, shared_host=False) == alone
    assert threads_for(siblings, quotas, shared_host=True) == beside_a_balancer


def test_this_host_has_some_of_both() -> None:
    assert 1 <= engine_threads(shared_host=True) <= engine_threads(shared_host=False) <= (os.cpu_count() or 1)
    assert host_memory_bytes() > 0
