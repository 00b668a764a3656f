"""The stock Python client against a live cluster, in a process of its own as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.cluster import cluster, state

pytestmark = pytest.mark.slow


@pytest.mark.scenario("CL-1", "CL-2")
async def test_the_stock_python_client_runs_unchanged() -> None:
    async with cluster(slots=4, desired=state()) as running:
        script = Path(__file__).with_name("stock_client_session.py")
        with trio.fail_after(60):
            finished = await trio.run_process(
                [sys.executable, str(script), running.inference_url, running.management_url],
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert finished.returncode == 0, finished.stdout.decode()
        seen = json.loads(finished.stdout.decode().splitlines()[-1])
        assert seen["health"] == ["OK", "OK"]
        assert seen["conversation"] == seen["socket conversation"] == "Hello! How can I help you today?"
        assert seen["raw prompt"].startswith("1")
        assert seen["temperature"] == 0.0
        assert seen["metadata"] == "qwen3"
        assert seen["buffered"] == [0, 0]
        assert "paddler_slots_total 4" in seen["metrics"]
        [agent] = seen["agents"]
        assert agent == seen["first agents event"][0]
        assert agent["slots_total"] == 4
        assert agent["id"]
        assert agent["state_application_status"] == "Applied"
