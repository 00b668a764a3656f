"""How the values of flags are written: cli.py hands each to one of these.

Each reader raises ArgumentTypeError with the rest of the sentence that begins `argument --flag:`.
"""

import argparse
import socket
from collections.abc import Callable
from typing import NoReturn

from paddler.balancer.state_store import open_state_store
from paddler.config import Address, KvLayout
from paddler.errors import ConfigurationError


def duration(text: str) -> float:
    """Read milliseconds, return seconds."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise argparse.ArgumentTypeError(f"expected milliseconds as a plain integer, got {text!r}")
    return int(text) / 1000


def reporting_interval(text: str) -> float:
    """Read a duration that is not zero: nothing else paces the reports."""
    seconds = duration(text)
    if seconds == 0:
        raise argparse.ArgumentTypeError("must be at least 1 ms")
    return seconds


def integer(lowest: int) -> Callable[[str], int]:
    """Return a reader of 32-bit integers that are at least `lowest`."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}")
        if not (len(digits) <= 10 and lowest <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(f"must be between {lowest} and {2**31 - 1}, got {text}")
        return int(text)

    return read


def address(text: str) -> Address:
    """Read `host:port` or `[IPv6]:port` and resolve the host, once; IPv4 first, as most clients do."""
    name, separator, port = text.rpartition(":")
    bracketed = name.startswith("[") and name.endswith("]")
    if not separator or not name or (":" in name and not bracketed):
        raise argparse.ArgumentTypeError(f"expected host:port or [IPv6]:port, got {text!r}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    try:
        found = socket.getaddrinfo(name[1:-1] if bracketed else name, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot resolve {text!r}: {error.strerror}") from None
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"no host can be called like that: {text!r}") from None
    resolved = min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0]
    return Address(host=str(resolved), port=int(port), text=text)


def state_database(text: str) -> str:
    """Let the state store judge its URL now, before anything is started."""
    try:
        open_state_store(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def kv_layout(text: str) -> KvLayout:
    try:
        return KvLayout(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto, shared or per-slot, got {text!r}") from None


def mebibytes(text: str) -> int:
    """Read mebibytes, return bytes."""
    return integer(0)(text) << 20


def on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return text == "on"


def not_yet(service: str) -> Callable[[str], NoReturn]:
    """Return a reader of addresses that says what is missing, once the value is right."""

    def refuse(text: str) -> NoReturn:
        address(text)
        raise argparse.ArgumentTypeError(f"{service} is not available in this version yet")

    return refuse
