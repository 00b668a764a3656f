"""The management surface: fleet, state and metrics as REST and SSE, and the agents' WebSocket."""

from typing import TYPE_CHECKING, Final

import trio
from quart import Response, websocket

from paddler.balancer.metrics import prometheus_text
from paddler.http.replies import event_stream_response
from paddler.http.surface import (
    Refusal,
    SurfaceApp,
    json_response,
    make_app,
    read_json,
    structure,
    text_response,
)
from paddler.messages import wire
from paddler.messages.snapshots import BufferedRequestsSnapshot
from paddler.messages.state import DesiredState, invalid_parameter

if TYPE_CHECKING:
    from paddler.balancer.agent_link import AgentLinks
    from paddler.balancer.changes import Changes
    from paddler.balancer.reconciliation import Reconciliation
    from paddler.balancer.request_buffer import RequestBuffer
    from paddler.http.connection import Connection
    from paddler.routing.fleet import Fleet

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8; escaping=values"


def make_management_app(
    *,
    fleet: "Fleet",
    fleet_changes: "Changes",
    buffer: "RequestBuffer",
    links: "AgentLinks",
    reconciliation: "Reconciliation",
    metrics_prefix: str,
    cors_allowed_hosts: tuple[str, ...],
    stopping: trio.Event,
) -> SurfaceApp:
    """Return the app of the management service; its event streams end once `stopping` is set."""
    app = make_app("management", cors_allowed_hosts=cors_allowed_hosts)

    def agents_snapshot() -> str:
        return wire.encode(fleet.snapshot())

    def buffer_snapshot() -> str:
        return wire.encode(BufferedRequestsSnapshot(buffer.buffered))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus_text(fleet, buffer, metrics_prefix), content_type=METRICS_TYPE)

    @app.get("/api/v1/agents")
    async def agents() -> Response:
        return json_response(agents_snapshot())

    @app.get("/api/v1/agents/stream")
    async def agents_stream() -> Response:
        return event_stream_response(agents_snapshot, changes=fleet_changes.subscribe(), stopping=stopping)

    @app.get("/api/v1/buffered_requests")
    async def buffered_requests() -> Response:
        return json_response(buffer_snapshot())

    @app.get("/api/v1/buffered_requests/stream")
    async def buffered_requests_stream() -> Response:
        return event_stream_response(buffer_snapshot, changes=buffer.changes.subscribe(), stopping=stopping)

    @app.get("/api/v1/balancer_applicable_state")
    async def applicable_state() -> Response:
        return json_response(wire.encode(reconciliation.applicable_state))

    @app.get("/api/v1/balancer_desired_state")
    async def desired_state() -> Response:
        return json_response(wire.encode(await reconciliation.desired_state()))

    @app.put("/api/v1/balancer_desired_state")
    async def put_desired_state() -> Response:
        state = structure(await read_json(), DesiredState)
        objection = invalid_parameter(state)
        if objection is not None:
            raise Refusal(400, objection)
        await reconciliation.put(state)
        return text_response(204)

    @app.get("/api/v1/agent/<agent_id>/chat_template_override")
    async def chat_template_override(agent_id: str) -> Response:
        return json_response(wire.encode(await links.ask(agent_id, "chat_template_override")))

    @app.get("/api/v1/agent/<agent_id>/model_metadata")
    async def model_metadata(agent_id: str) -> Response:
        return json_response(wire.encode(await links.ask(agent_id, "model_metadata")))

    @app.websocket("/api/v1/agent_socket/<agent_id>")
    async def agent_socket(agent_id: str) -> None:
        if "Origin" in websocket.headers:
            # Browsers send one always, and ask nobody before they open a WebSocket; agents send none.
            raise Refusal(403, "Web pages cannot be agents")
        connection: Connection = websocket.scope["state"]["connection"]
        connection.divert_texts()
        await websocket.accept()

        async def send(message: str) -> None:
            try:
                await connection.send_texts([message])
            except trio.ClosedResourceError:
                raise EOFError from None

        # An agent that leaves cancels this call: quart-trio does, when its connection ends.
        await links.serve_agent(agent_id, read=connection.read_texts, send=send)

    return app
