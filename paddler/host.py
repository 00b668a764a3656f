"""What a daemon owes its host: signals, logging, garbage collection, open files.

For a process, never for daemons that tests run side by side in one.
"""

import gc
import logging
import os
import resource
import signal
from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import trio

LOG_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL,
}

log = logging.getLogger(__name__)


class Daemon(Protocol):
    """A daemon that ends cleanly once `stop` is set."""

    async def __call__(self, stop: trio.Event, *, task_status: trio.TaskStatus[Any]) -> None: ...


@attrs.frozen
class LogFilter:
    """Lowest levels that are shown: of Paddler, and of the libraries it uses."""

    paddler: int
    libraries: int


def run(daemon: Daemon) -> None:
    """Run a daemon as this process until it ends or a signal stops it.

    Raises what the daemon raises, in an exception group.
    """
    write_log(log_filter(os.environ))
    _allow_many_open_files()
    gc.set_threshold(20_000, 50, 100)  # a token makes few cycles; the default looks for them far too often
    trio.run(_run_until_signal, daemon)


def log_filter(environment: Mapping[str, str]) -> LogFilter:
    """Read PADDLER_LOG, else RUST_LOG: a level, or `target=level` directives separated by commas.

    Of the directives those count that have no target or one that begins with `paddler`; anything else
    is passed over, because RUST_LOG may be meant for other programs. `trace` shows the libraries' debug
    lines too, every other level only their warnings.
    """
    general, own = "info", None
    for directive in (environment.get("PADDLER_LOG") or environment.get("RUST_LOG") or "").split(","):
        target, _, level = directive.strip().lower().rpartition("=")
        if level not in LOG_LEVELS:
            continue
        if not target:
            general = level
        elif target.startswith("paddler"):
            own = level
    shown = own or general
    return LogFilter(
        paddler=LOG_LEVELS[shown],
        libraries=logging.DEBUG if shown == "trace" else max(LOG_LEVELS[general], logging.WARNING),
    )


def write_log(shown: LogFilter) -> None:
    """Send log records to standard error, one compact line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
        )
    )
    logging.basicConfig(level=shown.libraries, handlers=[handler], force=True)
    logging.getLogger("paddler").setLevel(shown.paddler)


async def _run_until_signal(daemon: Daemon) -> None:
    stop = trio.Event()
    async with trio.open_nursery() as signals:
        await signals.start(_set_on_signal, stop)
        await daemon(stop, task_status=_FreezeObjects())
        signals.cancel_scope.cancel()


async def _set_on_signal(
    stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Set `stop` on the first SIGINT or SIGTERM; end the process at once on the second."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as receive_signals:
        task_status.started()
        async for number in receive_signals:
            name = signal.Signals(number).name
            if stop.is_set():
                log.warning("%s while stopping: ending at once", name)
                os._exit(128 + number)  # whoever asks twice does not want to wait for anything
            log.info("%s: stopping", name)
            stop.set()


class _FreezeObjects(trio.TaskStatus[Any]):
    """A task status that takes what exists at the end of the start out of the collector's sight."""

    def started(self, value: Any = None) -> None:  # noqa: ARG002 host.py has no use for it
        gc.collect()
        gc.freeze()


def _allow_many_open_files() -> None:
    """Raise the soft limit on open files to the hard one: every client is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS reports "unlimited" and does not grant it
        log.debug("the limit on open files stays as it is: %s", error)
