"""A balancer and an agent as processes of their own, with the bench's model, for the benchmarks to ask."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
from workload import PARAMETERS

from paddler.messages.state import DEFAULT_DESIRED_STATE, InferenceParameters, LocalModel
from paddler.messages.wire import unstructure

START_WAIT = 60.0
ITEM_WAIT_MS = 600_000
"""Long prompts of many streams on few cores: the benchmarks wait for them."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(*command: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a process for the duration of the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(START_WAIT)


def ask(port: int, method: str, path: str, body: object = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_WAIT)
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status >= 300:
        raise SystemExit(f"{method} {path}: {response.status} {answer.decode()}")
    return answer


def wait_until(condition: str, port: int, *, slots: int, agents: int = 1) -> None:
    """Wait until the management service answers, and then until so many agents have their slots."""
    deadline = time.monotonic() + START_WAIT
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            shown = json.loads(ask(port, "GET", "/api/v1/agents"))["agents"]
            if condition == "answers" or sum(agent["slots_total"] == slots for agent in shown) == agents:
                return
        time.sleep(0.1)
    raise SystemExit(f"gave up waiting: {condition}")


@contextlib.contextmanager
def running_system(
    model: Path,
    *,
    slots: int,
    threads: int = 1,
    parameters: InferenceParameters = PARAMETERS,
    flags: tuple[str, ...] = (),
    agents: int = 1,
) -> Iterator[int]:
    """Run a balancer and agents with these further flags; yield the port of the inference service."""
    inference, management = free_port(), free_port()
    paddler = (sys.executable, "-m", "paddler")
    environment = os.environ | {"PADDLER_LOG": "warn"}
    balancer = (
        *paddler, "balancer",
        f"--inference-addr=127.0.0.1:{inference}", f"--management-addr=127.0.0.1:{management}",
        f"--inference-item-timeout={ITEM_WAIT_MS}",
    )  # fmt: skip
    agent = (
        *paddler, "agent", f"--management-addr=127.0.0.1:{management}", f"--slots={slots}",
        "--kv-layout=per-slot", f"--threads={threads}", *flags,
    )  # fmt: skip
    with contextlib.ExitStack() as processes:
        processes.enter_context(running(*balancer, environment=environment))
        for number in range(agents):
            processes.enter_context(running(*agent, f"--name=agent-{number}", environment=environment))
        wait_until("answers", management, slots=slots)
        state = attrs.evolve(
            DEFAULT_DESIRED_STATE, model=LocalModel(str(model)), inference_parameters=parameters
        )
        ask(management, "PUT", "/api/v1/balancer_desired_state", unstructure(state))
        wait_until("serves", management, slots=slots, agents=agents)
        yield inference
