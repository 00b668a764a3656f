import errno
import json
import socket

import pytest
import trio
import trio.testing
from quart import request

from paddler.config import Address
from paddler.errors import AgentGone, AnswerTimeout, ConfigurationError, NoSuchAgent, PaddlerError
from paddler.http.surface import SHORTAGE_MEMORY, accept_forever, make_app, open_surface, read_json
from tests.http.support import LOOPBACK, UPGRADE, RawClient, connect, http_request, inference_room, serving

ORIGIN = "http://127.0.0.1:8062"
PREFLIGHT = ("Access-Control-Request-Method: POST",)


def loopback_6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_an_address_in_use_is_a_configuration_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = Address("127.0.0.1", port, f"localhost:{port}")
        with pytest.raises(ConfigurationError) as caught:
            async with open_surface(
                make_app("x", cors_allowed_hosts=()),
                name="management",
                address=address,
                stopping=trio.Event(),
                max_message_bytes=1,
            ):
                pass
    assert (
        str(caught.value) == f"management service cannot listen on localhost:{port}: Address already in use"
    )


@pytest.mark.skipif(not loopback_6(), reason="this host has no IPv6 loopback")
async def test_a_surface_listens_on_ipv6_too() -> None:
    async with open_surface(
        make_app("x", cors_allowed_hosts=()),
        name="x",
        address=Address("::1", 0, "[::1]:0"),
        stopping=trio.Event(),
        max_message_bytes=1,
    ) as surface:
        assert surface.host == "::1"
        async with RawClient(await trio.open_tcp_stream("::1", surface.port)) as client:
            assert (await client.request("GET", "/health", None, "Connection: close")).text == "OK"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
async def test_accepted_sockets_notice_dead_peers() -> None:
    app = make_app("x", cors_allowed_hosts=())

    @app.get("/options")
    async def options() -> dict[str, int]:
        raw = request.scope["state"]["connection"].stream.socket
        return {
            "user timeout": raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            "keep alive": raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        }

    async with serving(app, stopping=trio.Event()) as surface, await connect(surface.port) as client:
        answer = await client.request("GET", "/options")
    assert json.loads(answer.text) == {"user timeout": 10_000, "keep alive": 1}


class ScriptedListener(trio.abc.Listener[trio.SocketStream]):
    """Does one thing after the other: fail with a number, be quiet for some seconds, accept."""

    def __init__(self, script: list[int | float | None]) -> None:
        self._script = script

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        while self._script:
            match self._script.pop(0):
                case int(number):
                    raise OSError(number, "scripted")
                case float(seconds):
                    await trio.sleep(seconds)
                case None:
                    return trio.SocketStream(trio.socket.socket())
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_shortage_of_descriptors_is_said_once_and_its_end_too(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    served = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal served
        served += 1
        stream.socket.close()

    short, quiet = errno.EMFILE, SHORTAGE_MEMORY + 1
    script = [None, *[short] * 30, None, short, None, quiet, None, None, quiet, short]
    with trio.move_on_after(60):
        async with trio.open_nursery() as connections:
            await accept_forever(ScriptedListener(script), serve, connections)
    assert served == 5
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "new connections have to wait: Too many open files"),
        ("WARNING", "new connections are accepted again"),
        ("WARNING", "new connections have to wait: Too many open files"),
    ]


async def test_an_error_of_the_listener_itself_is_not_survived() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        raise AssertionError

    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as connections:
            await accept_forever(ScriptedListener([errno.EINVAL]), serve, connections)
    assert caught.group_contains(OSError)


async def test_a_body_that_never_comes_is_a_408_and_holds_nobody_up() -> None:
    app = make_app("x", cors_allowed_hosts=(), body_timeout=0.1)

    @app.post("/value")
    async def value() -> str:
        return str(await read_json())

    async with serving(app, stopping=trio.Event()) as surface, await connect(surface.port) as slow:
        await slow.send(
            http_request("POST", "/value", None, "Content-Length: 10", "Content-Type: application/json")
            + b"{"
        )
        async with await connect(surface.port) as neighbour:
            assert (await neighbour.request("POST", "/value", b"{}")).text == "{}"
        answer = await slow.answer()
        assert (answer.status, answer.text) == (408, "The body was not complete within 0.1 s")
        assert await slow.ends()


@pytest.mark.parametrize("path", ["//health", "///health", "/%2Fhealth", "http://test//health"])
async def test_slashes_in_front_make_another_path(path: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        for method in ("GET", "POST"):
            answer = await client.request(method, path)
            assert (answer.status, answer.text) == (404, "")
        await client.send(http_request("GET", "//api/v1/inference_socket", None, *UPGRADE))
        answer = await client.answer()
        assert (answer.status, answer.text) == (404, "")


async def test_leaving_the_block_closes_idle_connections_at_once() -> None:
    clients = []
    with trio.fail_after(3):  # neither a deadline nor the grace ends them
        async with open_surface(
            make_app("x", cors_allowed_hosts=()),
            name="x",
            address=LOOPBACK,
            stopping=trio.Event(),
            max_message_bytes=1,
            graceful_timeout=60,
        ) as surface:
            for _ in range(3):
                client = await connect(surface.port)
                assert (await client.request("GET", "/health")).status == 200
                clients.append(client)
    for client in clients:
        assert await client.ends()
        await trio.aclose_forcefully(client.stream)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (NoSuchAgent("a"), 404, ""),
        (AgentGone("a"), 502, ""),
        (AnswerTimeout("a", 3), 504, ""),
    ],
)
async def test_errors_have_one_status_each(error: PaddlerError, status: int, text: str) -> None:
    app = make_app("x", cors_allowed_hosts=())

    @app.get("/fails")
    async def fails() -> str:
        raise error

    async with serving(app, stopping=trio.Event()) as surface, await connect(surface.port) as client:
        answer = await client.request("GET", "/fails")
    assert (answer.status, answer.text) == (status, text)


async def test_a_bug_is_logged_and_answered_without_its_details(logged_errors: list[object]) -> None:
    app = make_app("x", cors_allowed_hosts=())

    @app.get("/fails")
    async def fails() -> str:
        raise RuntimeError("secret")

    async with serving(app, stopping=trio.Event()) as surface, await connect(surface.port) as client:
        answer = await client.request("GET", "/fails")
    assert answer.status == 500
    assert "secret" not in answer.text
    assert len(logged_errors) == 1


@pytest.mark.parametrize("path", ["/health", "/api/v1/continue_from_raw_prompt", "/anything"])
async def test_a_preflight_of_an_allowed_origin_is_granted_on_any_path(path: str) -> None:
    async with inference_room(cors=(ORIGIN,)) as room, await room.connect() as client:
        answer = await client.request(
            "OPTIONS",
            path,
            None,
            f"Origin: {ORIGIN}",
            *PREFLIGHT,
            "Access-Control-Request-Headers: content-type, Accept",
        )
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-methods"] == "DELETE, GET, POST, PUT, OPTIONS"
    assert answer.headers["access-control-allow-headers"] == "Accept, Authorization, Content-Type"
    assert answer.headers["access-control-max-age"] == "3600"
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "headers",
    [
        PREFLIGHT,
        ("Origin: http://other", *PREFLIGHT),
        ("Origin: 127.0.0.1:8062", *PREFLIGHT),
        (f"Origin: {ORIGIN}/", *PREFLIGHT),
        (f"Origin: {ORIGIN}", "Access-Control-Request-Method: PATCH"),
        (f"Origin: {ORIGIN}", *PREFLIGHT, "Access-Control-Request-Headers: X-Other"),
    ],
)
async def test_other_preflights_are_refused(headers: tuple[str, ...]) -> None:
    async with inference_room(cors=(ORIGIN,)) as room, await room.connect() as client:
        answer = await client.request("OPTIONS", "/health", None, *headers)
    assert answer.status == 400
    assert answer.text
    assert "access-control-allow-methods" not in answer.headers


@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [
        ((ORIGIN,), ORIGIN, ORIGIN),
        ((ORIGIN,), "http://other", None),
        ((ORIGIN,), None, None),
        ((), ORIGIN, None),
        (("127.0.0.1",), ORIGIN, None),
    ],
)
async def test_ordinary_answers_name_an_allowed_origin_only(
    allowed: tuple[str, ...], origin: str | None, answered: str | None
) -> None:
    headers = () if origin is None else (f"Origin: {origin}",)
    async with inference_room(cors=allowed) as room, await room.connect() as client:
        for path, status in (("/health", 200), ("/nothing", 404)):
            answer = await client.request("GET", path, None, *headers)
            assert answer.status == status
            assert answer.headers.get("access-control-allow-origin") == answered
            assert answer.headers["vary"] == (
                "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
            )
