import json
import logging
import re

import pytest
import trio

from paddler.balancer.running_requests import Reply
from paddler.messages.inference import ContinueFromRawPrompt, TokenRequest
from paddler.messages.state import ApplicableState
from paddler.messages.tokens import StreamError
from tests.http.support import RAW_PROMPT, applicable, inference_room, messages

RAW = "/api/v1/continue_from_raw_prompt"
CONVERSATION = "/api/v1/continue_from_conversation_history"
EMBEDDINGS = "/api/v1/generate_embedding_batch"


def conversation(**changes: object) -> bytes:
    request = {
        "add_generation_prompt": True,
        "conversation_history": [],
        "enable_thinking": False,
        "max_tokens": 1,
    }
    return json.dumps({**request, **changes}).encode()


def tool(required: list[str]) -> dict[str, object]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": required}
    return {
        "type": "function",
        "function": {"name": "weather", "description": "", "parameters": parameters},
    }


async def test_a_token_request_streams_one_line_per_message() -> None:
    async def script(request: TokenRequest, reply: Reply) -> None:
        assert request == ContinueFromRawPrompt(max_tokens=3, raw_prompt="Once")
        for letter in "CRTU":
            reply.piece("agent-a", letter, '"x\\n"')
        reply.piece(None, "E", '{"ToolCallParsed":[]}')
        reply.piece("agent 0", "D", '{"Done":{"usage":{}}}')

    async with inference_room(script) as room, await room.connect() as client:
        answer = await client.request("POST", RAW, RAW_PROMPT)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-cache"
    assert not {"server", "set-cookie", "content-length"} & answer.headers.keys()
    lines = messages(answer.body)
    [request_id] = {line["Response"]["request_id"] for line in lines}
    assert re.fullmatch(r"[A-Za-z0-9_-]{21}", request_id)
    assert [line["Response"]["generated_by"] for line in lines] == ["agent-a"] * 4 + [None, "agent 0"]
    assert [line["Response"]["response"]["GeneratedToken"] for line in lines] == [
        {"ContentToken": "x\n"},
        {"ReasoningToken": "x\n"},
        {"ToolCallToken": "x\n"},
        {"UndeterminableToken": "x\n"},
        {"ToolCallParsed": []},
        {"Done": {"usage": {}}},
    ]


async def test_every_message_is_a_chunk_of_its_own_and_sent_at_once() -> None:
    go_on = trio.Event()

    async def script(_: TokenRequest, reply: Reply) -> None:
        reply.piece("a", "C", '"1"')
        await go_on.wait()
        reply.piece("a", "D", "{}")

    async with inference_room(script) as room, await room.connect() as client:
        await client.generate()
        await client.head()
        first = await client.chunk()
        assert first.endswith(b'"response":{"GeneratedToken":{"ContentToken":"1"}}}}\n')
        go_on.set()
        assert (await client.chunk()).endswith(b'{"GeneratedToken":{}}}}\n')
        assert await client.chunk() == b""


async def test_status_and_headers_go_out_while_the_request_still_waits() -> None:
    async def script(_: TokenRequest, reply: Reply) -> None:
        await trio.sleep_forever()

    async with inference_room(script) as room, await room.connect() as client:
        await client.generate()
        status, headers = await client.head()
        assert (status, headers["transfer-encoding"]) == (200, "chunked")


async def test_errors_of_the_relay_are_lines_of_the_stream() -> None:
    async def script(_: TokenRequest, reply: Reply) -> None:
        reply.error(StreamError(503, "Buffered requests overflow"))

    async with inference_room(script) as room, await room.connect() as client:
        [line] = messages((await client.request("POST", RAW, RAW_PROMPT)).body)
    assert line["Error"]["error"] == {"code": 503, "description": "Buffered requests overflow"}
    assert len(line["Error"]["request_id"]) == 21


async def test_a_request_that_breaks_the_relay_ends_with_an_error(
    logged_errors: list[logging.LogRecord],
) -> None:
    async def script(_: TokenRequest, reply: Reply) -> None:
        raise RuntimeError("a bug")

    async with inference_room(script) as room, await room.connect() as client:
        [line] = messages((await client.request("POST", RAW, RAW_PROMPT)).body)
        assert line["Error"]["error"] == {"code": 500, "description": "Internal server error"}
        assert len(logged_errors) == 1
        assert (await client.request("GET", "/health")).text == "OK"


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data", "text/x+json"])
async def test_other_content_types_are_refused(content_type: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        answer = await client.request("POST", RAW, b"{", f"Content-Type: {content_type}")
    assert (answer.status, answer.text) == (400, "Content type error")
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/vnd.api+json"])
async def test_json_content_types_are_accepted(content_type: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        assert (await client.request("POST", RAW, RAW_PROMPT, f"Content-Type: {content_type}")).status == 200


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", ""),
        (b'{"max_tokens": 1}', "missing field `raw_prompt`"),
        (b'{"max_tokens": 1.5, "raw_prompt": "a"}', "expected an integer"),
        (b'{"max_tokens": 1, "raw_prompt": "a", "n": 1}', "unknown field `n`"),
        (b"[" * 100_000, ""),
    ],
)
async def test_bad_json_is_refused_with_its_reason(body: bytes, detail: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        answer = await client.request("POST", RAW, body)
    assert answer.status == 400
    assert answer.text.startswith("Json deserialize error: ")
    assert detail in answer.text


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_two_mebibytes_is_refused(chunked: bool) -> None:
    body = b'{"max_tokens": 1, "raw_prompt": "%b"}' % (b"a" * 2 * 1024 * 1024)
    async with inference_room() as room:
        async with await room.connect() as client:
            if chunked:
                head = f"POST {RAW} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
                await client.send(head.encode() + b"Content-Type: application/json\r\n\r\n")
                await client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
                answer = await client.answer()
            else:
                answer = await client.request("POST", RAW, body)
            assert (answer.status, answer.text) == (413, "The JSON body is larger than 2097152 bytes")
        async with await room.connect() as client:
            assert (await client.request("GET", "/health")).status == 200


@pytest.mark.scenario("TC-6")
async def test_checks_come_in_the_documented_order() -> None:
    bad_tool = conversation(tools=[tool(["country"])], parse_tool_calls=True)
    state = applicable(enable_embeddings=True)
    async with inference_room(state=state) as room, await room.connect() as client:
        assert (await client.request("POST", CONVERSATION, b"{}")).status == 400
        answer = await client.request("POST", CONVERSATION, bad_tool)
        assert (answer.status, answer.text) == (
            501,
            "Token generation is disabled while the cluster is configured for embeddings",
        )
        room.reconciliation.apply(applicable(enable_embeddings=False))
        answer = await client.request("POST", CONVERSATION, bad_tool)
        assert (answer.status, answer.text) == (
            400,
            "Invalid request parameters: Required field 'country' not found in properties",
        )
        answer = await client.request("POST", CONVERSATION, conversation(tools=[tool(["city"])]))
        assert answer.status == 200


@pytest.mark.parametrize(
    ("state", "status", "text"),
    [
        (None, 503, "Balancer applicable state is not yet set"),
        (applicable(), 501, "Embedding generation is not enabled in the inference parameters"),
        (applicable(enable_embeddings=True), 503, "No agents are currently connected"),
    ],
)
@pytest.mark.parametrize("key", ["input_batch", "input_documents"])
@pytest.mark.scenario("EM-18", "EM-19")
async def test_embedding_batches_are_refused_in_order(
    state: ApplicableState | None, status: int, text: str, key: str
) -> None:
    body = json.dumps({key: [{"id": "a", "content": "b"}], "normalization_method": "L2"}).encode()
    async with inference_room(state=state) as room, await room.connect() as client:
        assert (await client.request("POST", EMBEDDINGS, b"{}")).status == 400
        answer = await client.request("POST", EMBEDDINGS, body)
    assert (answer.status, answer.text) == (status, text)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/health/"),
        ("POST", "/api/v1//continue_from_raw_prompt"),
        ("GET", "/api/v1/nothing"),
        ("GET", RAW),
        ("POST", "/health"),
        ("HEAD", "/health"),
        ("OPTIONS", "/health"),
        ("OPTIONS", "*"),
        ("DELETE", RAW),
        ("POST", "/api/v1/inference_socket"),
        ("GET", "http://other"),
        ("GET", "/%ff%fe"),
    ],
)
async def test_unknown_paths_and_methods_are_not_found(method: str, path: str) -> None:
    async with inference_room() as room, await room.connect() as client:
        answer = await client.request(method, path)
        assert (answer.status, answer.body) == (404, b"")
        assert (await client.request("GET", "/health")).text == "OK"


async def test_health_is_text() -> None:
    async with inference_room() as room, await room.connect() as client:
        answer = await client.request("GET", "/health")
    assert (answer.status, answer.text) == (200, "OK")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


async def test_http_1_0_clients_get_an_unframed_body_and_the_end_of_the_connection() -> None:
    async with inference_room() as room, await room.connect() as client:
        answer = await client.request("POST", RAW, RAW_PROMPT, version="1.0")
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert len(messages(answer.body)) == 2


@pytest.mark.scenario("ST-4")
async def test_a_request_during_shutdown_gets_its_error_line() -> None:
    begun = trio.Event()

    async def script(_: TokenRequest, reply: Reply) -> None:
        begun.set()
        reply.error(StreamError(503, "balancer is shutting down"))

    async with inference_room(script) as room, await room.connect() as client:
        await client.request("GET", "/health")
        async with await room.connect() as other:
            await other.generate()
            await begun.wait()
            room.stop()
            [line] = messages((await other.answer()).body)
    assert line["Error"]["error"]["code"] == 503
