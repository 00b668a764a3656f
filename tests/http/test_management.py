import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from wsproto.events import BytesMessage

from paddler.balancer.changes import Changes
from paddler.balancer.request_buffer import RequestBuffer
from paddler.config import MAX_LINK_MESSAGE_BYTES
from paddler.errors import AgentGone, AnswerTimeout, LocalProtocolError, NoSuchAgent, StateStoreError
from paddler.http.management import make_management_app
from paddler.messages.agent_socket import AgentStatus
from paddler.messages.snapshots import ModelMetadata
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    ChatTemplate,
    DesiredState,
    SlotCannotStart,
    StateApplicationStatus,
)
from paddler.messages.wire import unstructure
from paddler.routing.fleet import Fleet
from tests.http.support import (
    UPGRADE,
    FakeReconciliation,
    RawClient,
    applicable,
    connect,
    http_request,
    open_socket,
    serving,
)

STATUS = AgentStatus(
    version=1,
    desired_slots_total=4,
    slots_processing=0,
    slots_total=4,
    download_current=0,
    download_filename=None,
    download_indeterminate=True,
    download_total=0,
    issues=(SlotCannotStart("no memory", 0),),
    model_path="/models/a.gguf",
    state_application_status=StateApplicationStatus.APPLIED,
    uses_chat_template_override=False,
)

Read = Callable[[Callable[[str], None]], Awaitable[None]]
Send = Callable[[str], Awaitable[None]]


class FakeLinks:
    """Answers questions as told; serves agents by echoing."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.asked: list[tuple[str, str]] = []
        self.served: list[str] = []
        self.ended = trio.Event()

    async def ask(self, agent_id: str, about: str) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append((agent_id, about))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def serve_agent(self, agent_id: str, *, read: Read, send: Send) -> None:
        self.served.append(agent_id)
        send_texts, texts = trio.open_memory_channel[str](100)
        try:
            async with trio.open_nursery() as link:
                link.start_soon(read, send_texts.send_nowait)
                async for text in texts:
                    if text == '"leave"':
                        break
                    await send(text)
                link.cancel_scope.cancel()
        finally:
            self.ended.set()


@attrs.define
class ManagementRoom:
    fleet: Fleet
    buffer: RequestBuffer
    links: FakeLinks
    reconciliation: FakeReconciliation
    stopping: trio.Event
    port: int

    async def connect(self) -> RawClient:
        return await connect(self.port)

    async def get(self, path: str) -> Any:
        async with await self.connect() as client:
            return await client.request("GET", path)

    async def put(self, body: object) -> Any:
        async with await self.connect() as client:
            return await client.request("PUT", "/api/v1/balancer_desired_state", json.dumps(body).encode())


@asynccontextmanager
async def management_room(links: FakeLinks | None = None) -> AsyncIterator[ManagementRoom]:
    fleet_changes = Changes()
    fleet = Fleet(fleet_changes.notify)
    buffer = RequestBuffer(fleet, max_buffered_requests=10, timeout=10)
    links, reconciliation, stopping = links or FakeLinks(), FakeReconciliation(), trio.Event()
    app = make_management_app(
        fleet=fleet,
        fleet_changes=fleet_changes,
        buffer=buffer,
        links=links,  # type: ignore[arg-type]  # fakes with the same signatures
        reconciliation=reconciliation,  # type: ignore[arg-type]
        metrics_prefix="paddler_",
        cors_allowed_hosts=(),
        stopping=stopping,
    )
    async with serving(app, stopping=stopping, max_message_bytes=MAX_LINK_MESSAGE_BYTES) as surface:
        yield ManagementRoom(fleet, buffer, links, reconciliation, stopping, surface.port)


def desired(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = unstructure(DEFAULT_DESIRED_STATE, DesiredState)
    return {**state, **changes}


async def test_agents_have_exactly_the_documented_fields() -> None:
    async with management_room() as room:
        assert (await room.get("/api/v1/agents")).body == b'{"agents":[]}'
        room.fleet.register("id-1", "agent-a", STATUS)
        answer = await room.get("/api/v1/agents")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == {
        "agents": [
            {
                "desired_slots_total": 4,
                "download_current": 0,
                "download_filename": None,
                "download_indeterminate": True,
                "download_total": 0,
                "id": "id-1",
                "issues": [{"SlotCannotStart": {"error": "no memory", "slot_index": 0}}],
                "model_path": "/models/a.gguf",
                "name": "agent-a",
                "slots_processing": 0,
                "slots_total": 4,
                "state_application_status": "Applied",
                "uses_chat_template_override": False,
            }
        ]
    }


async def test_states_are_shown_as_documented() -> None:
    async with management_room() as room:
        assert (await room.get("/api/v1/balancer_applicable_state")).body == b"null"
        assert json.loads((await room.get("/api/v1/balancer_desired_state")).body) == desired()
        room.reconciliation.applicable_state = applicable()
        shown = json.loads((await room.get("/api/v1/balancer_applicable_state")).body)
    assert set(shown) == {"chat_template_override", "inference_parameters", "model", "multimodal_projection"}
    assert shown["chat_template_override"] is None
    assert shown["model"] == "None"


async def test_a_put_state_is_stored_and_shown_again() -> None:
    state = desired(model={"LocalToAgent": "/models/a.gguf"}, chat_template_override={"content": "x"})
    async with management_room() as room:
        answer = await room.put(state)
        assert (answer.status, answer.body) == (204, b"")
        assert json.loads((await room.get("/api/v1/balancer_desired_state")).body) == state
        del state["chat_template_override"]
        assert (await room.put(state)).status == 204


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ([], "Json deserialize error: "),
        (desired(extra=1), "Json deserialize error: "),
        (desired(model="Some"), "Json deserialize error: "),
        (
            desired(inference_parameters={**desired()["inference_parameters"], "image_resize_to_fit": 0}),
            "image_resize_to_fit must be greater than zero",
        ),
        (
            desired(inference_parameters={**desired()["inference_parameters"], "embedding_batch_size": 0}),
            "embedding_batch_size must be greater than zero",
        ),
    ],
)
async def test_a_state_that_cannot_be_stored_is_refused(body: object, text: str) -> None:
    async with management_room() as room:
        answer = await room.put(body)
        assert answer.status == 400
        assert answer.text.startswith(text)
        assert room.reconciliation.stored == DEFAULT_DESIRED_STATE


async def test_a_broken_store_is_a_500_with_its_reason() -> None:
    async with management_room() as room:
        room.reconciliation.failure = StateStoreError("the disk is on fire")
        answer = await room.get("/api/v1/balancer_desired_state")
        assert (answer.status, answer.text) == (500, "the disk is on fire")
        answer = await room.put(desired())
        assert (answer.status, answer.text) == (500, "the disk is on fire")


@pytest.mark.parametrize("about", ["chat_template_override", "model_metadata"])
@pytest.mark.scenario("MA-10", "MA-11")
@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (NoSuchAgent("a"), 404, ""),
        (AgentGone("a"), 502, ""),
        (AnswerTimeout("a", 3.0), 504, ""),
        (LocalProtocolError("the outbox is full"), 500, "the outbox is full"),
    ],
)
async def test_questions_that_get_no_answer(about: str, failure: Exception, status: int, text: str) -> None:
    async with management_room() as room:
        room.links.answer = failure
        answer = await room.get(f"/api/v1/agent/a-1/{about}")
        assert room.links.asked == [("a-1", about)]
    assert (answer.status, answer.text) == (status, text)


async def test_questions_are_answered_with_an_object_or_null() -> None:
    async with management_room() as room:
        path = "/api/v1/agent/a/chat_template_override"
        assert (await room.get(path)).body == b"null"
        room.links.answer = ChatTemplate("{{ x }}")
        assert json.loads((await room.get(path)).body) == {"content": "{{ x }}"}
        room.links.answer = ModelMetadata({"general.architecture": "llama"})
        answer = await room.get("/api/v1/agent/a/model_metadata")
        assert json.loads(answer.body) == {"metadata": {"general.architecture": "llama"}}


async def test_metrics_have_their_content_type() -> None:
    async with management_room() as room:
        room.fleet.register("id-1", None, STATUS)
        answer = await room.get("/metrics")
    assert answer.headers["content-type"] == ("text/plain; version=0.0.4; charset=utf-8; escaping=values")
    assert "\npaddler_slots_total 4\n" in answer.text


async def test_the_agents_stream_shows_every_change_at_once() -> None:
    async with management_room() as room, await room.connect() as client:
        await client.send(b"GET /api/v1/agents/stream HTTP/1.1\r\nHost: a\r\n\r\n")
        status, headers = await client.head()
        assert status == 200
        assert headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-cache"
        assert headers["content-encoding"] == "identity"
        assert await client.chunk() == b'data: {"agents":[]}\n\n: keep-alive\n\n'
        agent = room.fleet.register("id-1", None, STATUS)
        assert slots(await client.chunk()) == [0]
        claimed = room.fleet.claim({})
        assert claimed is agent
        assert slots(await client.chunk()) == [1]
        room.fleet.release(agent)
        assert slots(await client.chunk()) == [0]
        room.stopping.set()
        assert await client.chunk() == b""
        assert await client.ends()


def slots(event: bytes) -> list[int]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return [agent["slots_processing"] for agent in json.loads(event[6:])["agents"]]


async def test_two_subscribers_of_the_buffer_stream_are_independent() -> None:
    async def wait_in_line() -> None:
        with line:
            async with room.buffer.slot():
                pass

    line = trio.CancelScope()
    async with management_room() as room, await room.connect() as first, await room.connect() as second:
        for client in (first, second):
            await client.send(b"GET /api/v1/buffered_requests/stream HTTP/1.1\r\nHost: a\r\n\r\n")
            await client.head()
            assert await client.chunk() == b'data: {"buffered_requests_current":0}\n\n: keep-alive\n\n'
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_in_line)
            for client in (first, second):
                assert await client.chunk() == b'data: {"buffered_requests_current":1}\n\n'
            assert (await room.get("/api/v1/buffered_requests")).body == b'{"buffered_requests_current":1}'
            line.cancel()
            for client in (first, second):
                assert await client.chunk() == b'data: {"buffered_requests_current":0}\n\n'


async def test_an_agent_is_served_over_its_websocket() -> None:
    async with management_room() as room, await room.connect() as client:
        websocket = await open_socket(client, "/api/v1/agent_socket/agent%20one")
        await websocket.send_event(BytesMessage(data=b"ignored"))
        await websocket.send_event(BytesMessage(data=b""))
        await websocket.send({"Register": "é" * 1000})
        assert await websocket.receive() == {"Register": "é" * 1000}
        assert room.links.served == ["agent one"]
        await websocket.send("leave")
        await websocket.send('"leave"')
        with pytest.raises(json.JSONDecodeError):
            await websocket.receive()
        assert await websocket.receive() is None
        assert websocket.closed is not None
        assert websocket.closed.code == 1000


@pytest.mark.parametrize("half", [True, False])
async def test_an_agent_that_leaves_ends_its_link(half: bool) -> None:
    async with management_room() as room, await room.connect() as client:
        await open_socket(client, "/api/v1/agent_socket/a")
        with trio.fail_after(5):
            await client.stream.send_eof() if half else await client.stream.aclose()
            await room.links.ended.wait()


async def test_an_agent_that_leaves_amid_a_send_loop_ends_it() -> None:
    class Talkative(FakeLinks):
        async def serve_agent(self, agent_id: str, *, read: Read, send: Send) -> None:
            try:
                while True:
                    await send("x" * 1000)
            except EOFError:
                pass  # told by the send, where the cancellation did not come first
            finally:
                self.ended.set()

    async with management_room(Talkative()) as room, await room.connect() as client:
        await open_socket(client, "/api/v1/agent_socket/a")
        await client.stream.aclose()
        with trio.fail_after(5):
            await room.links.ended.wait()


@pytest.mark.parametrize("half", [True, False])
async def test_an_agent_that_leaves_before_its_upgrade_is_accepted_is_no_error(half: bool) -> None:
    class Greeting(FakeLinks):
        async def serve_agent(self, agent_id: str, *, read: Read, send: Send) -> None:
            try:
                await send("hello")
            except EOFError:
                pass

    async with management_room(Greeting()) as room:
        for _ in range(10):  # which of the two comes first is the scheduler's choice
            async with await room.connect() as client:
                await client.send(http_request("GET", "/api/v1/agent_socket/a", None, *UPGRADE))
                await client.stream.send_eof() if half else await client.stream.aclose()
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await room.get("/health")).status == 200


async def test_an_agent_is_served_until_the_surface_ends_not_only_until_it_stops() -> None:
    async with management_room() as room:
        async with await room.connect() as client:
            websocket = await open_socket(client, "/api/v1/agent_socket/a")
            room.stopping.set()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await websocket.send('"still here"')
            assert await websocket.receive() == "still here"
        with trio.fail_after(5):
            await room.links.ended.wait()


async def test_the_agent_socket_needs_an_upgrade_and_an_id() -> None:
    async with management_room() as room:
        assert (await room.get("/api/v1/agent_socket/a")).status == 400
        assert (await room.get("/api/v1/agent_socket/")).status == 404
        assert (await room.get("/api/v1/agent/a")).status == 404


@pytest.mark.parametrize("origin", ["http://evil.example", "null", ""])
async def test_a_web_page_cannot_register_as_an_agent(origin: str) -> None:
    async with management_room() as room, await room.connect() as client:
        path = "/api/v1/agent_socket/a"
        await client.send(http_request("GET", path, None, *UPGRADE, f"Origin: {origin}"))
        answer = await client.answer()
        assert (answer.status, answer.text) == (403, "Web pages cannot be agents")
        assert room.links.served == []


async def test_a_stored_state_is_answered_with_no_content_and_no_length() -> None:
    async with management_room() as room, await room.connect() as client:
        body = json.dumps(desired()).encode()
        for _ in range(2):  # the connection is used again
            answer = await client.request("PUT", "/api/v1/balancer_desired_state", body)
            assert answer.status == 204
            assert not answer.headers.keys() & {"content-length", "transfer-encoding", "content-type"}


async def test_many_slashes_do_not_lead_to_the_agents() -> None:
    async with management_room() as room:
        answer = await room.get("//api/v1/agents")
        assert (answer.status, answer.body) == (404, b"")
