"""Signals, log levels and the exit code of a process that runs a daemon."""

import logging
import signal
import subprocess
import sys

import pytest

from paddler.host import LogFilter, log_filter

INFO = LogFilter(paddler=logging.INFO, libraries=logging.WARNING)
DEBUG = LogFilter(paddler=logging.DEBUG, libraries=logging.WARNING)

PROGRAM = """
import sys, trio
from paddler import host

async def daemon(stop, *, task_status):
    task_status.started()
    print("serving", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await trio.sleep(float(sys.argv[1]))

host.run(daemon)
"""


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, INFO),
        ({"RUST_LOG": ""}, INFO),
        ({"RUST_LOG": "debug"}, DEBUG),
        ({"RUST_LOG": "debug", "PADDLER_LOG": "INFO"}, INFO),
        ({"RUST_LOG": "debug", "PADDLER_LOG": ""}, DEBUG),
        ({"RUST_LOG": "paddler=debug,info"}, DEBUG),
        ({"RUST_LOG": "warn,paddler_balancer::http=debug"}, DEBUG),
        ({"RUST_LOG": "hyper=trace, info"}, INFO),
        ({"RUST_LOG": "loud, =,,paddler"}, INFO),
        ({"PADDLER_LOG": "warn"}, LogFilter(logging.WARNING, logging.WARNING)),
        ({"PADDLER_LOG": "error"}, LogFilter(logging.ERROR, logging.ERROR)),
        ({"PADDLER_LOG": "trace"}, LogFilter(logging.DEBUG, logging.DEBUG)),
    ],
)
def test_the_log_level_comes_from_the_environment(environment: dict[str, str], shown: LogFilter) -> None:
    assert log_filter(environment) == shown


def run_and_signal(*numbers: signal.Signals, farewell_seconds: int = 0) -> tuple[int, str, str]:
    """Start a daemon, send each signal once the one before took effect; return exit code and output."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(farewell_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for number in numbers:
            said += process.stdout.readline()
            process.send_signal(number)
        rest, log = process.communicate(timeout=20)
        return process.returncode, said + rest, log


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_daemon_cleanly(number: signal.Signals) -> None:
    code, said, log = run_and_signal(number)
    assert (code, said) == (0, "serving\nstopping\n")
    assert log.endswith(f"INFO    paddler.host: {number.name}: stopping\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals, exit_code: int) -> None:
    code, said, log = run_and_signal(signal.SIGTERM, number, farewell_seconds=60)
    assert (code, said) == (exit_code, "serving\nstopping\n")
    assert f"{number.name} while stopping: ending at once" in log
