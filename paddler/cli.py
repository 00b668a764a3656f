"""The command line: `paddler balancer`, `paddler agent`, `paddler up`.

Turns flags into configurations and hands those to a daemon; how a value is written is in flag_values.py.
"""

import signal
import sys

if sys.argv[0].endswith(("/paddler", "/paddler/__main__.py")):
    # The imports below take a while, and a Ctrl-C among them would be a traceback by Python's own handler.
    # Only where this is the command: whoever imports this module otherwise has a handler to keep.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import errno
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import attrs

from paddler import __version__, host
from paddler.config import AgentConfig, BalancerConfig
from paddler.errors import ConfigurationError
from paddler.flag_values import (
    address,
    duration,
    integer,
    kv_layout,
    mebibytes,
    not_yet,
    on_or_off,
    reporting_interval,
    state_database,
)

INFERENCE_ADDRESS = "127.0.0.1:8061"
MANAGEMENT_ADDRESS = "127.0.0.1:8060"
SLOTS_OF_A_SINGLE_NODE = 4

CONFIG_FIELDS = {
    "--inference-addr": "inference_address",
    "--inference-cors-allowed-host": "inference_cors_allowed_hosts",
    "--management-addr": "management_address",
    "--management-cors-allowed-host": "management_cors_allowed_hosts",
    "--prefix-cache-memory": "prefix_cache_bytes",
    "--statsd-addr": "statsd_address",
}
"""Flags whose field in config.py is not called like them."""

OTHER_PORTS = (
    " Is another Paddler running? Choose other ports, for example "
    "--inference-addr 127.0.0.1:9061 --management-addr 127.0.0.1:9060"
)

Command = BalancerConfig | AgentConfig | tuple[BalancerConfig, AgentConfig]
"""What the flags ask for; both configurations stand for `paddler up`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code. Usage errors end the process with exit code 2."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until host.py listens, Ctrl-C ends without a traceback
    command = parse(arguments)
    exit_code = 0
    try:
        host.run(_daemon_of(command))
    except* ConfigurationError as errors:
        for error in _leaves(errors):
            sys.stderr.write(f"paddler: error: {_with_advice(error)}\n")
        exit_code = 1
    return exit_code


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Turn the command line into configurations. Exits with code 2 and one line when it is wrong."""
    parser = _build_parser()
    given = vars(parser.parse_args(arguments))
    match given.pop("command", None):
        case "balancer":
            return BalancerConfig(**_with_services(given))
        case "agent":
            return AgentConfig(**given)
        case "up":
            return _single_node(given)
        case _:
            parser.print_help(sys.stderr)
            sys.exit(2)


def _daemon_of(command: Command) -> host.Daemon:
    """Bind a daemon to its configuration; each command imports only what it runs."""
    match command:
        case BalancerConfig():
            from paddler import balancer_daemon

            return partial(balancer_daemon.run, command)
        case AgentConfig():
            from paddler import agent_daemon

            return partial(agent_daemon.run, command)
        case (balancer, agent):
            from paddler import single_node

            return partial(single_node.run, balancer, agent)


def _with_advice(error: ConfigurationError) -> str:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
        return f"{error}.{OTHER_PORTS}"
    return str(error)


def _leaves(errors: BaseExceptionGroup[ConfigurationError]) -> list[ConfigurationError]:
    leaves: list[ConfigurationError] = []
    for error in errors.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves


def _with_services(given: dict[str, Any]) -> dict[str, Any]:
    """Add the addresses that were not given, and make tuples of what was repeated."""
    services = {
        "inference_address": given.get("inference_address") or address(INFERENCE_ADDRESS),
        "management_address": given.get("management_address") or address(MANAGEMENT_ADDRESS),
    }
    repeated = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return given | repeated | services


def _single_node(given: dict[str, Any]) -> tuple[BalancerConfig, AgentConfig]:
    agent: dict[str, Any] = {"name": socket.gethostname() or "local", "slots": SLOTS_OF_A_SINGLE_NODE}
    for field in attrs.fields_dict(AgentConfig):
        if field in given and field != "management_address":
            agent[field] = given.pop(field)
    balancer = BalancerConfig(**_with_services(given))
    return balancer, AgentConfig(management_address=balancer.management_address, **agent)


# The flags. One that is not given leaves no attribute behind, so that defaults stand in config.py only.


class _Parser(argparse.ArgumentParser):
    """A parser of long flags, written out, that reports an error in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.add_argument("--help", action="help", help="show this text")
        self._has_negative_number_optionals.append(True)  # argparse's own switch: `--flag -1` lacks its value
        self._unknown: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        flags = [text.partition("=")[0] for text in given if text.startswith("--")]
        self._unknown = [flag for flag in flags if flag not in self._option_string_actions]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with one line. A missing flag is often a misspelt one, so the unknown are named with it."""
        if self._unknown and "are required" in message:
            message += f"; unrecognized arguments: {' '.join(self._unknown)}"
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Once(argparse.Action):
    """Store a value, or the constant of a flag that takes none; refuse a second one."""

    def __call__(  # argparse calls it with the parser and the flag, too
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "may be given only once")
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def _build_parser() -> _Parser:
    parser = _Parser(prog="paddler", description="Serve llama.cpp models: one balancer, many agents.")
    parser.add_argument(
        "--version", action="version", version=f"paddler {__version__}", help="show the version"
    )
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="COMMAND", parser_class=_Parser
    )

    def add_command(name: str, text: str) -> _Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    balancer = add_command("balancer", "take requests and hand them to agents")
    _add_balancer_flags(balancer)
    agent = add_command("agent", "serve the balancer's model on this machine")
    _add_flag(agent, "--management-addr", address, "ADDR", "the balancer's management service", required=True)
    _add_agent_flags(agent, slots_required=True)
    up = add_command("up", "run a balancer and one agent in one process, for development")
    _add_balancer_flags(up)
    _add_agent_flags(up, slots_required=False)
    return parser


def _add_balancer_flags(parser: _Parser) -> None:
    add = partial(_add_flag, parser)
    add("--buffered-request-timeout", duration, "MS", "longest wait for a free slot")
    add("--compat-openai-addr", not_yet("the OpenAI service"), "ADDR", "not available yet")
    add("--inference-addr", address, "ADDR", f"inference service (default: {INFERENCE_ADDRESS})")
    add("--inference-cors-allowed-host", str, "ORIGIN", _origin_help("inference"), repeatable=True)
    add("--inference-item-timeout", duration, "MS", "longest gap between two items of a request")
    add(
        "--management-addr",
        address,
        "ADDR",
        f"management service, for agents too (default: {MANAGEMENT_ADDRESS})",
    )
    add("--management-cors-allowed-host", str, "ORIGIN", _origin_help("management"), repeatable=True)
    add(
        "--max-buffered-requests",
        integer(-(2**31)),
        "N",
        "requests that may wait for a slot; with 0 or less (--max-buffered-requests=-1) none waits: "
        "one without a free slot is refused at once",
    )
    add("--state-database", state_database, "URL", "memory:// or file:///absolute/path")
    add("--statsd-addr", address, "ADDR", "where StatsD reports go (default: nowhere)")
    add("--statsd-prefix", str, "TEXT", "prefix of metric names, also of /metrics")
    add("--statsd-reporting-interval", reporting_interval, "MS", "time between two reports")
    add("--web-admin-panel-addr", not_yet("the web admin panel"), "ADDR", "not available yet")


def _origin_help(service: str) -> str:
    example = "http://panel.example:8062"
    return f"allowed origin of web pages that call the {service} service, e.g. {example}; repeatable"


def _add_agent_flags(parser: _Parser, *, slots_required: bool) -> None:
    add = partial(_add_flag, parser)
    parser.add_argument(
        "--exact",
        action=_Once,
        nargs=0,
        const=True,
        help="the same answer whatever else runs, also with several threads; slower",
    )
    add("--kv-layout", kv_layout, "LAYOUT", "auto, shared or per-slot: how slots get KV cache")
    add("--name", str, "TEXT", "shown to people, sent as `generated_by`")
    add("--prefix-cache", on_or_off, "on|off", "compute no beginning of a prompt that a slot still holds")
    add("--prefix-cache-memory", mebibytes, "MIB", "host memory for what slots can no longer hold")
    slots_default = "" if slots_required else f" (default: {SLOTS_OF_A_SINGLE_NODE})"
    add("--slots", integer(1), "N", f"requests handled in parallel{slots_default}", required=slots_required)
    add("--threads", integer(1), "N", "threads of the engine (default: chosen by the host)")


def _add_flag(
    parser: _Parser,
    flag: str,
    kind: Callable[[str], Any],
    metavar: str,
    text: str,
    *,
    required: bool = False,
    repeatable: bool = False,
) -> None:
    field = CONFIG_FIELDS.get(flag, flag.removeprefix("--").replace("-", "_"))
    parser.add_argument(
        flag,
        dest=field,
        type=kind,
        metavar=metavar,
        help=text + _default_of(field, kind),
        required=required,
        action="append" if repeatable else _Once,
    )


def _default_of(field: str, kind: Callable[[str], Any]) -> str:
    """Return the default of config.py as the flag would be typed, where there is one to show."""
    for config in (BalancerConfig, AgentConfig):
        default = getattr(getattr(attrs.fields(config), field, None), "default", None)
        if isinstance(default, float) and kind in (duration, reporting_interval):
            return f" (default: {round(default * 1000)})"
        if isinstance(default, bool):
            return f" (default: {'on' if default else 'off'})"
        if isinstance(default, (int, str)):
            return f" (default: {default})"
    return ""


if __name__ == "__main__":
    sys.exit(main())
