"""The same three gauges as Prometheus text and as StatsD packets."""

import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NoReturn

import trio
from statsd import StatsClient

from paddler.balancer.request_buffer import RequestBuffer
from paddler.config import Address
from paddler.routing.fleet import Fleet

log = logging.getLogger(__name__)


def prometheus_text(fleet: Fleet, buffer: RequestBuffer, prefix: str) -> str:
    """Return the body of `/metrics`."""
    return "\n".join(
        f"# HELP {prefix}{name} {help_text}\n# TYPE {prefix}{name} gauge\n{prefix}{name} {value}\n"
        for name, help_text, value in _gauges(fleet, buffer)
    )


async def report_to_statsd(
    fleet: Fleet, buffer: RequestBuffer, *, address: Address, prefix: str, interval: float
) -> NoReturn:
    """Send the gauges now and then every `interval`, until cancelled."""
    with closing(_StatsdClient(address, prefix)) as client:
        while True:
            for name, _, value in _gauges(fleet, buffer):
                client.gauge(name, value)
            await trio.sleep(interval)


def _gauges(fleet: Fleet, buffer: RequestBuffer) -> Iterator[tuple[str, str, int]]:
    slots_processing, slots_total = fleet.totals()
    yield "slots_processing", "Number of processing slots", slots_processing
    yield "slots_total", "Number of total slots", slots_total
    yield "requests_buffered", "Number of buffered requests", buffer.buffered


class _StatsdClient(StatsClient):  # type: ignore[misc]  # statsd has no type information
    """A client that never blocks and says when sending fails; statsd 4.0's own blocks and is silent."""

    def __init__(self, address: Address, prefix: str) -> None:
        # The client itself puts a dot between prefix and name, and none where the prefix is empty.
        super().__init__(address.host, address.port, prefix=prefix.rstrip("."), ipv6=":" in address.host)
        self._sock: Any
        self._sock.setblocking(False)
        self._address = address
        self._failing = False

    def _send(self, data: str) -> None:
        try:
            self._sock.sendto(data.encode(), self._addr)
        except OSError as error:
            if not self._failing:
                log.warning("cannot send metrics to StatsD at %s: %s", self._address, error)
            self._failing = True
        else:
            self._failing = False
