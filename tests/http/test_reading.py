from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from paddler.http.reading import INBOX_BYTES, Reader


class Protocol:
    """Remembers what it was handed, and takes as long for each piece as it is told."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.handled: list[bytes] = []
        self.cancelled = 0

    async def handle(self, data: bytes) -> None:
        try:
            await trio.sleep(self._seconds.pop(0) if self._seconds else 0)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        self.handled.append(data)


class LongStream:
    """As many bytes as are asked for, up to a size."""

    def __init__(self, size: int) -> None:
        self.received = 0
        self._size = size

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        count = min(max_bytes, self._size - self.received)
        self.received += count
        return b"x" * count


@asynccontextmanager
async def reading(
    handle: Callable[[bytes], Awaitable[None]], *, patience: float = 0
) -> AsyncIterator[tuple[trio.abc.SendStream, Reader]]:
    """Run a reader for the duration of the block and until it ends."""
    theirs, ours = trio.testing.memory_stream_one_way_pair()
    reader = Reader(ours, handle, patience=lambda: patience)  # type: ignore[arg-type]  # a stream of bytes too
    async with trio.open_nursery() as readers:
        readers.start_soon(reader.run)
        yield theirs, reader


async def test_what_was_handled_before_the_end_is_followed_by_an_empty_piece(
    autojump_clock: trio.testing.MockClock,
) -> None:
    protocol = Protocol()
    async with reading(protocol.handle) as (peer, _):
        await peer.send_all(b"one")
        await trio.sleep(1)
        await peer.send_all(b"two")
        await trio.sleep(1)
        await peer.aclose()
    assert protocol.handled == [b"one", b"two", b""]


async def test_what_comes_meanwhile_is_handled_afterwards_in_one_piece(
    autojump_clock: trio.testing.MockClock,
) -> None:
    protocol = Protocol(10)
    async with reading(protocol.handle) as (peer, _):
        for data in (b"one", b"two", b"three"):
            await peer.send_all(data)
            await trio.sleep(1)
        await trio.sleep(10)
        await peer.aclose()
    assert protocol.handled == [b"one", b"twothree", b""]


@pytest.mark.parametrize(
    ("patience", "takes", "handled", "ends_at"),
    [
        (0, 100, [], 1),
        (5, 100, [], 6),
        (5, 4, [b"one", b"two", b""], 4),
    ],
)
async def test_an_end_amid_a_piece_grants_no_more_than_the_patience(
    autojump_clock: trio.testing.MockClock,
    patience: float,
    takes: float,
    handled: list[bytes],
    ends_at: float,
) -> None:
    protocol = Protocol(takes)
    started = trio.current_time()
    async with reading(protocol.handle, patience=patience) as (peer, _):
        await peer.send_all(b"one")
        await trio.sleep(1)
        await peer.send_all(b"two")
        await peer.aclose()
    assert protocol.handled == handled
    assert protocol.cancelled == (not handled)
    assert trio.current_time() - started == pytest.approx(ends_at)


async def test_a_peer_that_sends_faster_than_is_handled_has_to_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    taken = 0
    go_on = trio.Event()

    async def handle(data: bytes) -> None:
        nonlocal taken
        assert len(data) <= INBOX_BYTES
        taken += len(data)
        await go_on.wait()

    stream = LongStream(10 * INBOX_BYTES)
    reader = Reader(stream, handle, patience=lambda: 1)  # type: ignore[arg-type]  # a stream of bytes too
    async with trio.open_nursery() as readers:
        readers.start_soon(reader.run)
        await trio.sleep(1)
        assert stream.received == 2 * INBOX_BYTES, "one inbox is handled, one waits"
        go_on.set()
    assert taken == 10 * INBOX_BYTES


@pytest.mark.parametrize("is_full", [False, True])
async def test_the_rest_is_received_and_dropped_but_not_for_ever(
    autojump_clock: trio.testing.MockClock, is_full: bool
) -> None:
    protocol = Protocol(100)
    async with reading(protocol.handle) as (peer, reader):
        await peer.send_all(b"one")
        await trio.sleep(1)
        if is_full:
            await peer.send_all(b"x" * INBOX_BYTES)
            await trio.sleep(1)
        dropped_from = trio.current_time()
        reader.drop_rest(within=3)
        await peer.send_all(b"x" * 3 * INBOX_BYTES)
    assert protocol.handled == []
    assert trio.current_time() - dropped_from == pytest.approx(3)


async def test_a_reader_that_waits_for_its_protocol_can_be_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    protocol = Protocol(100)
    async with reading(protocol.handle) as (peer, reader):
        await peer.send_all(b"x" * 2 * INBOX_BYTES)
        await trio.sleep(1)
        reader.cancel()
    assert protocol.handled == []
