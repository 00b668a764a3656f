"""`paddler up` and the second half of the quickstart, as a newcomer runs them."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
ANY_PORTS = ("--inference-addr=127.0.0.1:0", "--management-addr=127.0.0.1:0", "--threads=1", "--slots=2")
ANSWER = "A slot is a place in an agent that handles one request at a time."

pytestmark = pytest.mark.slow


@contextmanager
def started(*command: str, log: str = "info") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PADDLER_LOG": log, "RUST_LOG": ""},
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # and not kill: the quickstart takes its server along
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def read_welcome(process: subprocess.Popen[str]) -> str:
    """Return what `paddler up` says once it serves."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    return "".join(lines)


def ask(*arguments: str) -> tuple[int, str, str]:
    """Run scripts/ask.py; return its exit code, answer and complaint."""
    asked = subprocess.run(
        [sys.executable, SCRIPTS / "ask.py", *arguments], capture_output=True, text=True, timeout=30
    )
    return asked.returncode, asked.stdout, asked.stderr


def test_up_says_where_it_serves_and_ends_cleanly_on_a_signal() -> None:
    with started("-m", "paddler", "up", *ANY_PORTS) as up:
        welcome = read_welcome(up)
        assert welcome.startswith("Paddler serves paddler-tiny-chat.gguf on 2 slots.\n")
        [url] = set(re.findall(r"http://127\.0\.0\.1:\d+(?=/api)", welcome))
        assert ask("What is 2 + 2?", "--url", url) == (0, "2 + 2 = 4.\n", "")
        up.send_signal(signal.SIGINT)
        _, log = up.communicate(timeout=10)
        assert up.returncode == 0
        assert "ERROR" not in log


def test_the_body_of_the_curl_example_is_a_request(tmp_path: Path) -> None:
    with started("-m", "paddler", "up", *ANY_PORTS) as up:
        example = re.search(r"-d '(.*?)'", read_welcome(up), re.DOTALL)
        assert example is not None
        assert json.loads(example[1])["conversation_history"][0]["content"] == "What is a slot?"


def test_up_keeps_the_model_that_its_database_has(tmp_path: Path) -> None:
    database = tmp_path / "state.json"
    with started("-m", "paddler", "up", *ANY_PORTS, f"--state-database=file://{database}") as up:
        read_welcome(up)
    document = json.loads(database.read_text())
    assert document["balancer_desired_state"]["model"]["LocalToAgent"].endswith("paddler-tiny-chat.gguf")
    document["balancer_desired_state"]["inference_parameters"]["context_size"] = 1024
    database.write_text(json.dumps(document))
    with started("-m", "paddler", "up", *ANY_PORTS, f"--state-database=file://{database}") as up:
        read_welcome(up)
    assert json.loads(database.read_text()) == document


def test_the_quickstart_shows_one_answer_and_ends() -> None:
    with started(str(SCRIPTS / "serve_and_ask.py"), "--once", *ANY_PORTS, log="") as quickstart:
        said, log = quickstart.communicate(timeout=60)
        assert quickstart.returncode == 0
        assert said.endswith(f"> What is a slot?\n{ANSWER}\n")
        assert "Ctrl-C" not in said
        assert "INFO" not in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_quickstart_serves_on_until_it_is_told_to_stop(number: signal.Signals) -> None:
    with started(str(SCRIPTS / "serve_and_ask.py"), *ANY_PORTS) as quickstart:
        said = read_welcome(quickstart)
        assert ANSWER in said
        assert f"{shlex.quote(str(SCRIPTS / 'ask.py'))} 'What is 2 + 2?' --url http://127.0.0.1:" in said
        quickstart.send_signal(number)
        _, log = quickstart.communicate(timeout=10)
        assert quickstart.returncode == 0
        assert log.count(": stopping") == 1


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_quickstart_interrupted_before_the_question_asks_nothing_and_leaves_nobody(
    number: signal.Signals, exit_code: int
) -> None:
    with started(str(SCRIPTS / "serve_and_ask.py"), *ANY_PORTS) as quickstart:
        assert quickstart.stderr is not None
        listening = next(line for line in quickstart.stderr if "inference service listens" in line)
        quickstart.send_signal(number)
        said, log = quickstart.communicate(timeout=10)
        assert quickstart.returncode == exit_code
        assert "slot?\n" not in said
        assert "Traceback" not in log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(listening.rpartition(":")[2])))


def test_a_signal_during_the_start_of_a_process_reaches_it() -> None:
    program = (
        f"import os, signal, sys; sys.path.insert(0, {str(SCRIPTS)!r}); from serve_and_ask import Ending\n"
        "ending = Ending(); os.kill(os.getpid(), signal.SIGINT)\n"
        "print(ending.start(sys.executable, '-c', 'import time; time.sleep(60)').wait(), ending.signal)"
    )
    with started("-c", program) as process:
        said, _ = process.communicate(timeout=20)
        assert said == f"{-signal.SIGTERM} {signal.SIGINT}\n"


def test_the_quickstart_explains_itself_without_setting_anything_up() -> None:
    done = subprocess.run(
        ["sh", SCRIPTS / "quickstart", "--help"], capture_output=True, text=True, check=True
    )
    assert "--once" in done.stdout
    assert "paddler up --help" in done.stdout
    assert done.stderr == ""


def test_ask_tells_thoughts_from_the_answer_and_says_what_is_wrong_with_an_address() -> None:
    with started("-m", "paddler", "up", *ANY_PORTS) as up:
        inference, management = re.findall(r"(?:inference|management) +http://(\S+)", read_welcome(up))
        code, answer, _ = ask("What is 7 + 8?", "--thinking", "--url", inference)
        *thoughts, last = answer.splitlines()
        assert (code, last) == (0, "7 + 8 = 15.")
        assert thoughts
        assert all(line.startswith("| ") and line != "| " for line in thoughts)
        code, _, complaint = ask("Hello", "--url", management)
        assert code == 1
        assert "is this the inference service?" in complaint
    code, _, complaint = ask("Hello", "--url", inference)
    assert code == 1
    assert "scripts/quickstart starts Paddler" in complaint
    code, _, complaint = ask("Hello", "--url", f"https://{inference}")
    assert code == 2
    assert "plain HTTP, not https" in complaint


def test_a_port_in_use_is_one_line_and_a_way_out() -> None:
    with started("-m", "paddler", "up", *ANY_PORTS) as first:
        found = re.search(r"inference +http://(\S+)", read_welcome(first))
        assert found is not None
        flags = [*ANY_PORTS[1:], f"--inference-addr={found[1]}"]
        with started(str(SCRIPTS / "serve_and_ask.py"), *flags) as second:
            said, log = second.communicate(timeout=30)
            assert (second.returncode, said) == (1, "")
            assert f"paddler: error: inference service cannot listen on {found[1]}" in log
            assert log.count("Is another Paddler running? Choose other ports") == 1
            assert log.count("--inference-addr 127.0.0.1:9061 --management-addr 127.0.0.1:9060") == 1
            assert "Traceback" not in log
