"""LoRA adapters of the desired state, from the PUT to the answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from paddler.config import bundled_model_path
from paddler.messages.state import DesiredState, LocalModel, LoraAdapter, LoraSource, UrlModel
from paddler.messages.wire import unstructure
from tests.cluster import Cluster, cluster, conversation, state, text_of
from tests.llama.lora_files import write_adapter

pytestmark = pytest.mark.slow

QUESTION = conversation("What is a slot?", max_tokens=30)
ANSWER = "A slot is a place in an agent that handles one request at a time."


def with_adapter(source: LoraSource | Path, scale: float = 1.0) -> DesiredState:
    where = LocalModel(str(source)) if isinstance(source, Path) else source
    return state(lora_adapters=(LoraAdapter(where, scale),))


async def get(running: Cluster, name: str) -> dict[str, Any]:
    response = await running.client.get(f"{running.management_url}/api/v1/{name}")
    answer: dict[str, Any] = response.json()
    return answer


async def switch(running: Cluster, desired: DesiredState) -> None:
    """Put a state whose model is not the one that serves, and wait until it serves."""
    assert (await running.put_state(desired)).status_code == 204
    await running.wait_for_agents(lambda agents: agents[0]["slots_total"] == 0)
    await running.wait_until_serving()


async def wait_for_issue(running: Cluster, issue: dict[str, Any]) -> None:
    await running.wait_for_agents(lambda agents: bool(agents) and issue in agents[0]["issues"], within=10)


async def test_adapters_of_the_state_change_the_answer_until_it_has_none(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter.gguf")
    async with cluster(slots=1, desired=state()) as running:
        assert text_of(await running.generate(QUESTION)) == ANSWER
        await switch(running, with_adapter(path))
        assert text_of(await running.generate(QUESTION)) != ANSWER
        await switch(running, with_adapter(path, scale=0.0))
        assert text_of(await running.generate(QUESTION)) == ANSWER
        await switch(running, with_adapter(path, scale=1.0))
        await switch(running, state())
        assert text_of(await running.generate(QUESTION)) == ANSWER


async def test_the_key_is_shown_and_stored_only_while_there_are_adapters(tmp_path: Path) -> None:
    stored = tmp_path / "state.json"
    with_one, without = with_adapter(tmp_path / "a.gguf"), state()
    async with cluster(agents=0, state_database=f"file://{stored}") as running:
        for desired, adapters in ((without, None), (with_one, unstructure(with_one)["lora_adapters"])):
            for put in (desired, with_one, desired):
                assert (await running.put_state(put)).status_code == 204
            shown = [
                await get(running, "balancer_desired_state"),
                await get(running, "balancer_applicable_state"),
                json.loads(stored.read_text())["balancer_desired_state"],
            ]
            assert [answer.get("lora_adapters", None) for answer in shown] == [adapters] * 3
            assert all(("lora_adapters" in answer) == (adapters is not None) for answer in shown)


async def test_adapters_that_cannot_be_are_refused() -> None:
    url = "/api/v1/balancer_desired_state"
    async with cluster(agents=0, desired=state()) as running:

        async def refusal(*adapters: Any) -> str:
            body = unstructure(state()) | {"lora_adapters": list(adapters)}
            response = await running.client.put(running.management_url + url, json=body)
            assert response.status_code == 400
            return response.text

        good = {"source": {"LocalToAgent": "/a.gguf"}, "scale": 1.0}
        assert "unknown variant `None`" in await refusal(good, good | {"source": "None"})
        assert "out of range @ $.lora_adapters[0].scale" in await refusal(good | {"scale": 101})
        assert await refusal(*[good] * 17) == "lora_adapters must be at most 16"
        assert await get(running, "balancer_desired_state") == unstructure(state())


async def test_a_missing_adapter_is_named_while_the_old_state_serves(tmp_path: Path) -> None:
    path = tmp_path / "later.gguf"
    async with cluster(slots=1, desired=state()) as running:
        await running.put_state(with_adapter(path))
        [agent] = await running.wait_for_agents(lambda agents: bool(agents[0]["issues"]))
        assert agent["issues"] == [{"ModelFileDoesNotExist": {"model_path": str(path)}}]
        assert text_of(await running.generate(QUESTION)) == ANSWER
        write_adapter(tmp_path / "elsewhere.gguf").rename(path)
        await running.wait_for_agents(lambda agents: agents[0]["slots_total"] == 0)
        await running.wait_until_serving()
        assert text_of(await running.generate(QUESTION)) != ANSWER
        assert (await running.snapshot())[0]["issues"] == []


async def test_an_adapter_that_cannot_be_loaded_is_named_and_recovered_from(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing more")
    url = "https://example.com/adapter.gguf"
    async with cluster(slots=1, serving=False, desired=with_adapter(broken)) as running:
        sources: list[tuple[LoraSource | Path, str]] = [
            (broken, str(broken)),
            (bundled_model_path(), str(bundled_model_path())),
            (UrlModel(url), url),
        ]
        for source, shown in sources:
            await running.put_state(with_adapter(source))
            await wait_for_issue(running, {"ModelCannotBeLoaded": {"model_path": shown}})
        write_adapter(tmp_path / "good.gguf").rename(broken)
        await running.put_state(with_adapter(broken))
        await running.wait_until_serving()
        assert (await running.snapshot())[0]["issues"] == []
        assert text_of(await running.generate(QUESTION)) != ANSWER
