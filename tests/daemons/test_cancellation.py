"""Clients that cancel, leave, or close half: slots and places in line come back."""

import json

import pytest
import trio

from tests.cluster import (
    ENDLESS,
    NO_EXPIRY,
    Cluster,
    Message,
    cluster,
    conversation,
    result,
    state,
    text_of,
    tokens,
)
from tests.daemons.sockets import inference_socket, is_terminal, message_id, raw_post

pytestmark = pytest.mark.slow


@pytest.mark.scenario("CA-1")
async def test_a_buffered_http_request_that_is_cancelled_leaves_the_line() -> None:
    async with cluster(agents=0, **NO_EXPIRY) as running:
        async with raw_post(running.inference_port, ENDLESS) as client:
            head = await client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            await running.wait_for_buffered(1)
            assert client.received.endswith(b"\r\n\r\n")  # the head, and no message
        await running.wait_for_buffered(0)


@pytest.mark.scenario("CA-2", "CA-3")
@pytest.mark.parametrize("max_tokens", [500, 4000])
async def test_a_running_http_request_that_is_dropped_frees_its_slot(max_tokens: int) -> None:
    async with cluster(slots=1, desired=state()) as running:
        async with running.post({**ENDLESS, "max_tokens": max_tokens}) as response:
            await response.message()
            await running.wait_for_slots(1)
        await running.wait_for_slots(0)


@pytest.mark.scenario("CA-4")
async def test_a_half_closed_client_of_a_running_request_counts_as_gone() -> None:
    async with (
        cluster(slots=1, desired=state(), **NO_EXPIRY) as running,
        raw_post(running.inference_port, {**ENDLESS, "max_tokens": 4096}) as client,
    ):
        await client.read_until(b"GeneratedToken")
        await running.wait_for_slots(1)
        await client.half_close()
        await running.wait_for_slots(0)


@pytest.mark.scenario("CA-5")
async def test_a_half_closed_client_of_a_buffered_request_counts_as_gone() -> None:
    async with (
        cluster(agents=0, **NO_EXPIRY) as running,
        raw_post(running.inference_port, conversation("Hello")) as client,
    ):
        await client.read_until(b"\r\n\r\n")
        await running.wait_for_buffered(1)
        await client.half_close()
        await running.wait_for_buffered(0)


@pytest.mark.scenario("CA-9")
async def test_a_buffered_socket_request_that_is_cancelled_leaves_the_line() -> None:
    async with cluster(agents=0, **NO_EXPIRY) as running, inference_socket(running) as socket:
        await socket.request("a", ENDLESS)
        await running.wait_for_buffered(1)
        await socket.cancel("a")
        await running.wait_for_buffered(0)
        assert await socket.silent_for(0.2)


@pytest.mark.scenario("CA-10")
async def test_a_running_socket_request_that_is_cancelled_frees_its_slot() -> None:
    async with cluster(slots=1, desired=state()) as running, inference_socket(running) as socket:
        await socket.request("a", ENDLESS)
        await socket.receive()
        await running.wait_for_slots(1)
        await socket.cancel("a")
        await running.wait_for_slots(0)
        assert not [message for message in await socket.received_so_far() if is_terminal(message)]


@pytest.mark.scenario("CA-11")
async def test_a_sibling_on_the_same_socket_goes_on() -> None:
    async with cluster(slots=2, desired=state()) as running, inference_socket(running) as socket:
        await socket.request("a", ENDLESS)
        await socket.receive()
        await socket.request("b", conversation("Count to 40.", 150))
        await running.wait_for_slots(2)
        await socket.cancel("a")
        await running.wait_for_slots(0)
        received = await socket.received_so_far()
        sibling = [message for message in received if message_id(message) == "b"]
        assert "Done" in result(sibling[-1])
        assert text_of(sibling).startswith("1")
        cancelled = [message for message in received if message_id(message) == "a"]
        assert not any(is_terminal(message) for message in cancelled)


Served = trio.MemoryReceiveChannel[list[Message]]


async def _fill_and_queue(running: Cluster, requests: trio.Nursery) -> tuple[list[trio.CancelScope], Served]:
    """Fill four slots with endless requests, then let four short ones wait."""
    scopes = [trio.CancelScope() for _ in range(4)]
    send_served, receive_served = trio.open_memory_channel[list[Message]](4)

    async def hold(scope: trio.CancelScope) -> None:
        with scope:
            async with running.post(ENDLESS) as response:
                async for _ in response:
                    pass

    async def wait() -> None:
        await send_served.send(await running.generate(conversation("What is the capital of France?")))

    for scope in scopes:
        requests.start_soon(hold, scope)
    await running.wait_for_slots(4)
    for _ in range(4):
        requests.start_soon(wait)
    await running.wait_for_buffered(4)
    return scopes, receive_served


async def _until_served(served: Served) -> None:
    for _ in range(4):
        with trio.fail_after(20):
            messages = await served.receive()
        assert text_of(messages) == "The capital of France is Paris."
        assert "Done" in result(messages[-1])


@pytest.mark.scenario("CA-12")
async def test_when_all_running_requests_are_cancelled_all_waiting_ones_are_served() -> None:
    async with cluster(slots=4, desired=state(), **NO_EXPIRY) as running, trio.open_nursery() as requests:
        scopes, served = await _fill_and_queue(running, requests)
        for scope in scopes:
            scope.cancel()
        await _until_served(served)
        await running.wait_for_slots(0)


@pytest.mark.scenario("CA-13")
async def test_two_freed_slots_serve_all_waiting_requests() -> None:
    async with cluster(slots=4, desired=state(), **NO_EXPIRY) as running, trio.open_nursery() as requests:
        scopes, served = await _fill_and_queue(running, requests)
        for scope in scopes[:2]:
            scope.cancel()
        await _until_served(served)
        await running.wait_for_slots(2)
        for scope in scopes[2:]:
            scope.cancel()
        await running.wait_for_slots(0)


@pytest.mark.scenario("CA-14")
async def test_an_id_in_flight_on_the_same_socket_is_refused() -> None:
    async with cluster(agents=0, **NO_EXPIRY) as running, inference_socket(running) as socket:
        await socket.request("a", ENDLESS)
        await running.wait_for_buffered(1)
        await socket.request("a", ENDLESS)
        message = await socket.receive()
        assert message == {
            "Error": {
                "error": {
                    "code": 400,
                    "description": 'Request id "a" is already in flight on this connection',
                },
                "request_id": "a",
            }
        }
        assert await running.buffered() == 1
        await socket.cancel("a")
        await running.wait_for_buffered(0)
        await socket.request("a", ENDLESS)
        await running.wait_for_buffered(1)


@pytest.mark.scenario("CA-15")
async def test_a_short_request_after_a_dropped_stream_is_whole() -> None:
    async with cluster(slots=2, desired=state()) as running:
        async with running.post({**ENDLESS, "max_tokens": 500}) as response:
            await response.message()
        messages = await running.generate(conversation("Hello"))
        assert text_of(messages) == "Hello! How can I help you today?"
        assert "Done" in result(messages[-1])


@pytest.mark.scenario("CA-16")
async def test_a_socket_client_that_leaves_frees_its_slot() -> None:
    async with cluster(slots=1, desired=state()) as running:
        async with inference_socket(running) as socket:
            await socket.request("a", ENDLESS)
            await socket.receive()
            await running.wait_for_slots(1)
        await running.wait_for_slots(0)


async def test_the_same_id_on_two_sockets_does_not_conflict() -> None:
    async with (
        cluster(slots=2, desired=state()) as running,
        inference_socket(running) as first,
        inference_socket(running) as second,
    ):
        for socket in (first, second):
            await socket.request("same", conversation("Hello"))
        for socket in (first, second):
            messages = await socket.receive_until_terminal("same")
            assert text_of(messages) == "Hello! How can I help you today?"


async def test_a_stopped_reader_does_not_hold_up_its_neighbour() -> None:
    async with (
        cluster(slots=2, desired=state()) as running,
        raw_post(running.inference_port, ENDLESS) as stopped,
    ):
        await stopped.read_until(b"GeneratedToken")
        messages = await running.generate(conversation("Count to 40.", 150))
        assert len(tokens(messages)) > 100
        assert json.dumps(messages[-1]).find("Done") > 0
