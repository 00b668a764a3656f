"""The management service of a running cluster: snapshots, streams, state, questions, metrics."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    DETERMINISTIC_PARAMETERS,
    ChatTemplate,
    DesiredState,
    HuggingFaceModel,
    LocalModel,
    UrlModel,
)
from paddler.messages.wire import unstructure
from tests.cluster import Cluster, as_delivered, cluster, count_tasks, raw_prompt, state

pytestmark = pytest.mark.slow

HUB = HuggingFaceModel(filename="a.gguf", repo_id="o/r", revision="main")


async def get(running: Cluster, path: str) -> Any:
    response = await running.client.get(f"{running.management_url}{path}")
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.scenario("MA-1", "MA-4", "MA-5", "SD-1", "SD-2", "SD-3", "SD-9", "SD-10")
async def test_a_fresh_balancer() -> None:
    async with cluster(agents=0) as running:
        assert await get(running, "/api/v1/agents") == {"agents": []}
        assert await get(running, "/api/v1/buffered_requests") == {"buffered_requests_current": 0}
        await running.wait_for_buffered(0, within=1)
        for url in (running.management_url, running.inference_url):
            response = await running.client.get(f"{url}/health")
            assert (response.status_code, response.text) == (200, "OK")
            assert response.headers["content-type"] == "text/plain; charset=utf-8"

        state_path = "/api/v1/balancer_desired_state"
        assert await get(running, state_path) == unstructure(DEFAULT_DESIRED_STATE)
        applicable = await get(running, "/api/v1/balancer_applicable_state")
        assert set(applicable) == {
            "chat_template_override", "inference_parameters", "model", "multimodal_projection",
        }  # fmt: skip
        assert applicable["model"] == "None"
        desired = DesiredState(
            inference_parameters=DETERMINISTIC_PARAMETERS,
            model="None",
            multimodal_projection="None",
            use_chat_template_override=False,
        )
        response = await running.put_state(desired)
        assert (response.status_code, response.content) == (204, b"")
        assert await get(running, state_path) == unstructure(desired)

        async def refused(change: dict[str, Any], *, parameters: dict[str, Any] | None = None) -> str:
            body = unstructure(desired)
            body["inference_parameters"] |= parameters or {}
            response = await running.client.put(f"{running.management_url}{state_path}", json=body | change)
            assert response.status_code == 400
            return response.text

        assert await refused({}, parameters={"image_resize_to_fit": 0}) == (
            "image_resize_to_fit must be greater than zero"
        )
        assert await refused({}, parameters={"embedding_batch_size": 0}) == (
            "embedding_batch_size must be greater than zero"
        )
        assert "`more`" in await refused({"more": 1})
        assert "Q9" in await refused({}, parameters={"k_cache_dtype": "Q9"})
        assert await get(running, state_path) == unstructure(desired)


@pytest.mark.scenario("SD-4", "SD-8")
@pytest.mark.parametrize(
    "desired",
    [
        state(HUB),
        state(multimodal_projection=HUB),
        state(multimodal_projection=LocalModel("/models/p.gguf")),
        state(UrlModel("https://example.com/a.gguf")),
    ],
)
async def test_every_source_is_stored_unchanged(desired: DesiredState) -> None:
    async with cluster(agents=0, desired=desired) as running:
        assert await get(running, "/api/v1/balancer_desired_state") == unstructure(desired)


@pytest.mark.scenario("SD-5", "SD-6", "SD-7")
async def test_the_state_survives_a_restart(tmp_path: Path) -> None:
    database = f"file://{tmp_path / 'state.json'}"
    first = state(HUB, chat_template_override=ChatTemplate("{{ x }}"), use_chat_template_override=True)
    second = state(UrlModel("https://example.com/a.gguf"))
    async with cluster(agents=0, state_database=database, desired=first) as running:
        await running.stop_balancer()
    async with cluster(agents=0, state_database=database) as running:
        assert await get(running, "/api/v1/balancer_desired_state") == unstructure(first)
        applicable = await get(running, "/api/v1/balancer_applicable_state")
        assert applicable["chat_template_override"] == {"content": "{{ x }}"}
        assert (await running.put_state(second)).status_code == 204
        assert await get(running, "/api/v1/balancer_desired_state") == unstructure(second)
    stored = json.loads((tmp_path / "state.json").read_text())
    assert stored["balancer_desired_state"] == unstructure(second)


@pytest.mark.scenario("MA-2", "MA-6", "MA-7", "MA-8", "MA-10")
async def test_a_serving_agent() -> None:
    async with cluster(slots=2, desired=state()) as running:
        [agent] = await running.wait_for_agents(lambda agents: bool(agents), within=1)
        assert agent == {
            "desired_slots_total": 2,
            "download_current": 0,
            "download_filename": None,
            "download_indeterminate": True,
            "download_total": 0,
            "id": agent["id"],
            "issues": [],
            "model_path": state().model.path,  # type: ignore[union-attr]  # a local model
            "name": "agent-0",
            "slots_processing": 0,
            "slots_total": 2,
            "state_application_status": "Applied",
            "uses_chat_template_override": False,
        }
        assert len(agent["id"]) == 21
        questions = f"/api/v1/agent/{agent['id']}"
        metadata = (await get(running, f"{questions}/model_metadata"))["metadata"]
        assert metadata["general.architecture"] == "qwen3"
        assert "im_start" in metadata["tokenizer.chat_template"]
        assert list(metadata) == sorted(metadata)
        assert metadata["paddler.kv_layout"] == "per-slot"
        assert metadata["paddler.kv_layout_reason"]
        assert await get(running, f"{questions}/chat_template_override") is None
        for question in ("model_metadata", "chat_template_override"):
            response = await running.client.get(f"{running.management_url}/api/v1/agent/nobody/{question}")
            assert (response.status_code, response.content) == (404, b"")
        metrics = await running.client.get(f"{running.management_url}/metrics")
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8; escaping=values"
        assert metrics.text == (
            "# HELP paddler_slots_processing Number of processing slots\n"
            "# TYPE paddler_slots_processing gauge\n"
            "paddler_slots_processing 0\n\n"
            "# HELP paddler_slots_total Number of total slots\n"
            "# TYPE paddler_slots_total gauge\n"
            "paddler_slots_total 2\n\n"
            "# HELP paddler_requests_buffered Number of buffered requests\n"
            "# TYPE paddler_requests_buffered gauge\n"
            "paddler_requests_buffered 0\n"
        )


@pytest.mark.scenario("MA-3")
async def test_a_subscriber_that_leaves_is_forgotten() -> None:
    async with cluster(agents=0) as running:
        await trio.testing.wait_all_tasks_blocked(0.1)  # the services have started all of theirs
        before = count_tasks()
        for _ in range(20):
            async with running.agents_stream() as stream:
                assert await stream.event() == {"agents": []}
        with trio.fail_after(5):
            while count_tasks() > before:  # noqa: ASYNC110 no event for these
                await trio.sleep(0.02)
        assert await get(running, "/api/v1/agents") == {"agents": []}


@pytest.mark.scenario("MA-9")
async def test_two_subscribers_see_a_short_request_come_and_go() -> None:
    async with cluster(slots=1, desired=as_delivered()) as running:
        ready = [trio.Event(), trio.Event()]

        async def watch(number: int) -> None:
            seen: list[int] = []
            async with running.agents_stream() as stream:
                while 1 not in seen or seen[-1] != 0:
                    seen.append((await stream.event())["agents"][0]["slots_processing"])
                    ready[number].set()

        with trio.fail_after(10):
            async with trio.open_nursery() as watchers:
                watchers.start_soon(watch, 0)
                watchers.start_soon(watch, 1)
                for event in ready:
                    await event.wait()
                await running.generate(raw_prompt(max_tokens=8))


@pytest.mark.scenario("MA-12")
async def test_an_allowed_origin_may_ask_both_services() -> None:
    origin = "http://panel.example:8062"
    async with cluster(
        agents=0, inference_cors_allowed_hosts=(origin,), management_cors_allowed_hosts=(origin,)
    ) as running:
        for url in (running.management_url, running.inference_url):
            headers = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            response = await running.client.options(f"{url}/health", headers=headers)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin


@pytest.mark.scenario("EM-18", "EM-19")
async def test_embedding_batches_are_refused_with_the_reason() -> None:
    body = {"input_batch": [{"id": "a", "content": "x"}], "normalization_method": "L2"}

    async def ask(running: Cluster) -> tuple[int, str]:
        url = f"{running.inference_url}/api/v1/generate_embedding_batch"
        response = await running.client.post(url, json=body)
        return response.status_code, response.text

    async with cluster(agents=0) as running:
        assert await ask(running) == (
            501,
            "Embedding generation is not enabled in the inference parameters",
        )
        desired = state("None")
        parameters = json.loads(json.dumps(unstructure(desired)))
        parameters["inference_parameters"]["enable_embeddings"] = True
        url = f"{running.management_url}/api/v1/balancer_desired_state"
        assert (await running.client.put(url, json=parameters)).status_code == 204
        assert await ask(running) == (503, "No agents are currently connected")
