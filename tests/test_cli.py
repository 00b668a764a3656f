"""Flags become configurations; what is wrong is said in one line."""

import re
import signal
import socket
import subprocess
import sys

import pytest

from paddler.cli import parse
from paddler.config import Address, AgentConfig, BalancerConfig, KvLayout

LOCAL = "127.0.0.1"


def parse_balancer(*flags: str) -> BalancerConfig:
    config = parse(["balancer", *flags])
    assert isinstance(config, BalancerConfig)
    return config


def parse_agent(*flags: str) -> AgentConfig:
    config = parse(["agent", "--management-addr", "127.0.0.1:8060", "--slots=4", *flags])
    assert isinstance(config, AgentConfig)
    return config


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the line that refuses these arguments."""
    with pytest.raises(SystemExit) as ending:
        parse(arguments)
    written = capsys.readouterr()
    assert ending.value.code == 2
    assert written.out == ""
    assert written.err.count("\n") == 1
    return written.err.rstrip("\n")


def test_a_balancer_without_flags_has_the_documented_defaults() -> None:
    assert parse_balancer() == BalancerConfig(
        inference_address=Address(LOCAL, 8061, "127.0.0.1:8061"),
        management_address=Address(LOCAL, 8060, "127.0.0.1:8060"),
        inference_cors_allowed_hosts=(),
        management_cors_allowed_hosts=(),
        buffered_request_timeout=10.0,
        inference_item_timeout=30.0,
        max_buffered_requests=30,
        state_database="memory://",
        statsd_address=None,
        statsd_prefix="paddler_",
        statsd_reporting_interval=10.0,
    )


def test_every_flag_of_the_balancer_reaches_its_setting() -> None:
    config = parse_balancer(
        "--buffered-request-timeout=1",
        "--inference-addr=127.0.0.1:1",
        "--inference-cors-allowed-host=http://a",
        "--inference-cors-allowed-host=http://b",
        "--inference-item-timeout=0",
        "--management-addr=127.0.0.1:2",
        "--management-cors-allowed-host=http://c",
        "--max-buffered-requests=-5",
        "--state-database=file:///tmp/a b.json",
        "--statsd-addr=127.0.0.1:3",
        "--statsd-prefix=",
        "--statsd-reporting-interval=250",
    )
    assert config == BalancerConfig(
        inference_address=Address(LOCAL, 1, "127.0.0.1:1"),
        management_address=Address(LOCAL, 2, "127.0.0.1:2"),
        inference_cors_allowed_hosts=("http://a", "http://b"),
        management_cors_allowed_hosts=("http://c",),
        buffered_request_timeout=0.001,
        inference_item_timeout=0.0,
        max_buffered_requests=-5,
        state_database="file:///tmp/a b.json",
        statsd_address=Address(LOCAL, 3, "127.0.0.1:3"),
        statsd_prefix="",
        statsd_reporting_interval=0.25,
    )


def test_every_flag_of_the_agent_reaches_its_setting() -> None:
    assert parse_agent() == AgentConfig(
        management_address=Address(LOCAL, 8060, "127.0.0.1:8060"), slots=4, name=None
    )
    config = parse_agent(
        "--exact",
        "--kv-layout=per-slot",
        "--name=a",
        "--prefix-cache=off",
        "--prefix-cache-memory=3",
        "--threads=2",
    )
    assert config == AgentConfig(
        management_address=Address(LOCAL, 8060, "127.0.0.1:8060"),
        slots=4,
        exact=True,
        kv_layout=KvLayout.PER_SLOT,
        name="a",
        prefix_cache=False,
        prefix_cache_bytes=3 * 1024 * 1024,
        threads=2,
    )


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--exact=on", "argument --exact: ignored explicit argument 'on'"),
        ("--prefix-cache=yes", "argument --prefix-cache: expected on or off, got 'yes'"),
        (
            "--prefix-cache-memory=-1",
            f"argument --prefix-cache-memory: must be between 0 and {2**31 - 1}, got -1",
        ),
        ("--prefix-cache-memory=1G", "argument --prefix-cache-memory: expected an integer, got '1G'"),
    ],
)
def test_other_settings_of_the_cache_are_refused(
    flag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "agent", "--management-addr=127.0.0.1:8060", "--slots=4", flag)
    assert line == f"paddler agent: error: {reason}"


def test_a_flag_without_a_value_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "up", "--exact", "--exact")
    assert line == "paddler up: error: argument --exact: may be given only once"


def test_up_is_a_balancer_and_a_named_agent_beside_it() -> None:
    match parse(["up", "--management-addr", "127.0.0.1:7", "--threads=1", "--exact", "--prefix-cache=off"]):
        case (BalancerConfig() as balancer, AgentConfig() as agent):
            assert balancer.management_address == agent.management_address
            assert balancer.management_address.port == 7
            assert balancer.inference_address.port == 8061
            assert (agent.slots, agent.threads) == (4, 1)
            assert (agent.exact, agent.prefix_cache) == (True, False)
            assert agent.name
        case other:
            pytest.fail(f"unexpected {other}")


@pytest.mark.scenario("SH-7")
@pytest.mark.parametrize(("text", "seconds"), [("1500", 1.5), ("0", 0.0), ("86400000", 86400.0)])
def test_a_duration_is_milliseconds(text: str, seconds: float) -> None:
    assert parse_balancer("--inference-item-timeout", text).inference_item_timeout == seconds


@pytest.mark.scenario("SH-7")
@pytest.mark.parametrize("text", ["1.5s", "10s", "", " 5", "1_000", "+5", "1.0", "٣", "9" * 5000])
def test_other_durations_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "balancer", f"--buffered-request-timeout={text}")
    assert line == (
        "paddler balancer: error: argument --buffered-request-timeout: "
        f"expected milliseconds as a plain integer, got {text!r}"
    )


@pytest.mark.scenario("SH-8")
def test_an_address_is_resolved_and_keeps_its_spelling() -> None:
    address = parse_balancer("--management-addr", "localhost:8060").management_address
    assert address.host in (LOCAL, "::1")
    assert (address.port, str(address)) == (8060, "localhost:8060")


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6 in the C library")
def test_an_ipv6_address_stands_in_brackets() -> None:
    address = parse_balancer("--management-addr", "[::1]:8060").management_address
    assert address == Address("::1", 8060, "[::1]:8060")


@pytest.mark.scenario("SH-8")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nowhere.invalid:80", "cannot resolve 'nowhere.invalid:80'"),
        ("a..b:80", "no host can be called like that: 'a..b:80'"),
        ("8060", "expected host:port or [IPv6]:port, got '8060'"),
        (":8060", "expected host:port or [IPv6]:port, got ':8060'"),
        ("::1:8060", "expected host:port or [IPv6]:port, got '::1:8060'"),
        ("localhost:", "expected a port from 0 to 65535, got 'localhost:'"),
        ("localhost:65536", "expected a port from 0 to 65535, got 'localhost:65536'"),
        ("localhost:http", "expected a port from 0 to 65535, got 'localhost:http'"),
    ],
)
def test_other_addresses_are_refused(text: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "balancer", "--inference-addr", text)
    assert line.startswith(f"paddler balancer: error: argument --inference-addr: {reason}")


@pytest.mark.scenario("SH-10")
@pytest.mark.parametrize("url", ["memory://", "memory:", "file:///var/lib/paddler/state.json"])
def test_a_state_database_is_a_url(url: str) -> None:
    assert parse_balancer("--state-database", url).state_database == url


@pytest.mark.scenario("SH-10")
@pytest.mark.parametrize("url", ["memory", "file://", "file:/path", "file://state.json", "redis://host"])
def test_other_state_databases_are_usage_errors(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "balancer", "--state-database", url)
    assert line.startswith("paddler balancer: error: argument --state-database: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("balancer --inference-item-timeout 1 --inference-item-timeout 2", "may be given only once"),
        ("balancer --max-buffered-requests 30 --max-buffered-requests 30", "may be given only once"),
        ("balancer --max-buffered-requests -1", "argument --max-buffered-requests: expected one argument"),
        ("balancer --max-buffered-requests=2147483648", "must be between -2147483648 and 2147483647"),
        ("balancer --max-buffered-requests=1e3", "expected an integer, got '1e3'"),
        ("balancer --max-buffered", "unrecognized arguments: --max-buffered"),
        ("balancer --statsd-reporting-interval 0", "must be at least 1 ms"),
        ("balancer --statsd-prefix", "argument --statsd-prefix: expected one argument"),
        ("balancer extra", "unrecognized arguments: extra"),
        ("balancer -h", "unrecognized arguments: -h"),
        ("agent --slots 4", "the following arguments are required: --management-addr"),
        ("agent --management-addr 127.0.0.1:1", "the following arguments are required: --slots"),
        (
            "agent --slotz 4 --name=a",
            "are required: --management-addr, --slots; unrecognized arguments: --slotz",
        ),
        ("agent --management-addr 127.0.0.1:1 --slots 0", "must be between 1 and 2147483647, got 0"),
        ("agent --management-addr 127.0.0.1:1 --slots 4 --threads 0", "must be between 1"),
        ("agent --management-addr 127.0.0.1:1 --slots 4 --kv-layout x", "expected auto, shared or per-slot"),
        (
            "balancer --compat-openai-addr 127.0.0.1:1",
            "the OpenAI service is not available in this version yet",
        ),
        ("balancer --compat-openai-addr 127.0.0.1", "expected host:port or [IPv6]:port"),
        (
            "balancer --web-admin-panel-addr=127.0.0.1:1",
            "the web admin panel is not available in this version",
        ),
        ("conductor", "invalid choice: 'conductor'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = refusal(capsys, *arguments.split())
    assert re.match(r"paddler( balancer| agent)?: error: ", refused)
    assert line in refused


def test_without_a_command_the_help_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse([])
    written = capsys.readouterr()
    assert ending.value.code == 2
    assert written.out == ""
    assert "balancer" in written.err


@pytest.mark.parametrize("command", [[], ["balancer"], ["agent"], ["up"]])
def test_help_is_an_answer_on_standard_output(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse([*command, "--help"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['paddler', *command])}")


def test_help_shows_defaults_in_the_units_of_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["up", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "longest wait for a free slot (default: 10000)" in shown
    assert "requests handled in parallel (default: 4)" in shown
    assert "allowed origin of web pages that call the inference service, e.g. http://" in shown


@pytest.mark.slow
def test_the_command_line_loads_no_server_before_it_is_needed() -> None:
    program = (
        "import sys; from paddler.cli import parse; parse(['balancer']); "
        "print(sorted({'quart', 'hypercorn', 'llama_cpp', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


INTERRUPTED_IMPORT = """
import importlib.abc, os, signal, sys

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "paddler.config":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = [sys.argv[1]]
import paddler.cli
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["/usr/local/bin/paddler", "/lib/paddler/__main__.py"])
def test_ctrl_c_among_the_imports_ends_the_command_without_a_word(command: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT, command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.slow
def test_the_import_leaves_the_handler_of_another_program_alone() -> None:
    program = (
        "import signal, paddler.cli; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
