import logging
import socket
import time
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.balancer.metrics import prometheus_text, report_to_statsd
from paddler.config import Address
from tests.balancer.services import PROMPT, RecordingReply, Services, make_services
from tests.fakes.scripted_agent import connected_agent


def statsd_address(receiver: socket.socket) -> Address:
    host, port = receiver.getsockname()[:2]
    return Address(host=host, port=port, text=f"{host}:{port}")


@pytest.fixture(params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["v4", "v6"])
def receiver(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family, host = request.param
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        try:
            opened.bind((host, 0))
        except OSError:
            pytest.skip(f"{host} cannot be bound here")
        opened.setblocking(False)
        yield opened


def receive_all(receiver: socket.socket) -> list[str]:
    packets = []
    while True:
        try:
            packets.append(receiver.recv(1000).decode())
        except BlockingIOError:
            return packets


async def report(services: Services, address: Address, prefix: str, interval: float) -> None:
    await report_to_statsd(services.fleet, services.buffer, address=address, prefix=prefix, interval=interval)


async def test_prometheus_text_is_exact(nursery: trio.Nursery) -> None:
    services = make_services()
    async with connected_agent(services.links, "1", slots=3), connected_agent(services.links, "2"):
        nursery.start_soon(services.relay.serve, PROMPT, RecordingReply())
        await wait_all_tasks_blocked()
        assert prometheus_text(services.fleet, services.buffer, "paddler_") == (
            "# HELP paddler_slots_processing Number of processing slots\n"
            "# TYPE paddler_slots_processing gauge\n"
            "paddler_slots_processing 1\n"
            "\n"
            "# HELP paddler_slots_total Number of total slots\n"
            "# TYPE paddler_slots_total gauge\n"
            "paddler_slots_total 4\n"
            "\n"
            "# HELP paddler_requests_buffered Number of buffered requests\n"
            "# TYPE paddler_requests_buffered gauge\n"
            "paddler_requests_buffered 0\n"
        )
        nursery.cancel_scope.cancel()


@pytest.mark.scenario("SH-11")
async def test_three_gauges_right_after_the_start_and_then_every_interval(
    receiver: socket.socket, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    services = make_services(buffered_request_timeout=100)
    nursery.start_soon(report, services, statsd_address(receiver), "paddler_", 10)
    await wait_all_tasks_blocked()
    gauges = ["paddler_.slots_processing:0|g", "paddler_.slots_total:0|g", "paddler_.requests_buffered:0|g"]
    assert receive_all(receiver) == gauges
    nursery.start_soon(services.relay.serve, PROMPT, RecordingReply())
    await trio.sleep(9.9)
    assert receive_all(receiver) == []
    await trio.sleep(0.2)
    assert receive_all(receiver) == [*gauges[:2], "paddler_.requests_buffered:1|g"]
    await trio.sleep(10)
    assert len(receive_all(receiver)) == 3
    nursery.cancel_scope.cancel()


async def test_missed_reports_are_not_caught_up(
    receiver: socket.socket, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    nursery.start_soon(report, make_services(), statsd_address(receiver), "p", 10)
    await wait_all_tasks_blocked()
    mock_clock.jump(55)
    await wait_all_tasks_blocked()
    assert len(receive_all(receiver)) == 6
    nursery.cancel_scope.cancel()


@pytest.mark.scenario("SH-11")
@pytest.mark.parametrize(
    ("prefix", "wire"),
    [
        ("paddler_", "paddler_.slots_total:0|g"),
        ("paddler", "paddler.slots_total:0|g"),
        ("a.b.", "a.b.slots_total:0|g"),
        ("", "slots_total:0|g"),
        ("...", "slots_total:0|g"),
        ("größe", "größe.slots_total:0|g"),
    ],
)
async def test_wire_names(receiver: socket.socket, nursery: trio.Nursery, prefix: str, wire: str) -> None:
    nursery.start_soon(report, make_services(), statsd_address(receiver), prefix, 1000)
    await wait_all_tasks_blocked()
    assert receive_all(receiver)[1] == wire
    nursery.cancel_scope.cancel()


async def test_failing_sends_are_logged_once_and_never_fatal(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    broadcast = Address(
        host="255.255.255.255", port=8125, text="nowhere:8125"
    )  # not allowed without an option
    nursery.start_soon(report, make_services(), broadcast, "p", 1)
    await trio.sleep(5.5)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "nowhere:8125" in record.getMessage()
    nursery.cancel_scope.cancel()


async def test_a_receiver_that_does_not_read_blocks_nothing(
    receiver: socket.socket, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    started = time.perf_counter()
    nursery.start_soon(report, make_services(), statsd_address(receiver), "p", 1)
    await trio.sleep(500)
    assert time.perf_counter() - started < 1
    nursery.cancel_scope.cancel()
