"""Changes of the desired state while requests run: overrides, models, embeddings mode."""

from pathlib import Path

import pytest
import trio

from paddler.messages.state import ChatTemplate, DesiredState, LocalModel, PoolingType
from tests.cluster import (
    FIXTURES,
    LOAD_WAIT,
    Cluster,
    chat_markup,
    cluster,
    conversation,
    deterministic,
    raw_prompt,
    result,
    state,
    text_of,
    tokens,
)
from tests.daemons.sockets import inference_socket

pytestmark = pytest.mark.slow

GREETING = "Hello! How can I help you today?"
OVERRIDE_A = chat_markup("{{ messages[0].content }}") + "{{ '' }}"  # else Jinja takes the last line feed off
OVERRIDE_B = "{# the other #}" + OVERRIDE_A


def override(content: str) -> DesiredState:
    return state(chat_template_override=ChatTemplate(content), use_chat_template_override=True)


async def shown_override(running: Cluster) -> str | None:
    [agent] = await running.snapshot()
    url = f"{running.management_url}/api/v1/agent/{agent['id']}/chat_template_override"
    answer = (await running.client.get(url)).json()
    return None if answer is None else answer["content"]


async def until_override(running: Cluster, content: str) -> None:
    with trio.fail_after(LOAD_WAIT):
        while await shown_override(running) != content:  # noqa: ASYNC110 the agent is asked over HTTP
            await trio.sleep(0.05)


@pytest.mark.scenario("SW-1")
async def test_a_running_answer_is_whole_when_the_next_model_does_not_exist(tmp_path: Path) -> None:
    async with cluster(slots=1, desired=state()) as running:
        async with running.post(conversation("Count to 40.", 200)) as response:
            first = await response.message()
            gone = state(LocalModel(str(tmp_path / "none.gguf")))
            assert (await running.put_state(gone)).status_code == 204
            messages = [first, *await response.messages()]
        assert len(tokens(messages)) > 100
        assert list(result(messages[-1])) == ["Done"]
        [agent] = await running.wait_for_agents(lambda agents: bool(agents[0]["issues"]))
        assert agent["issues"] == [{"ModelFileDoesNotExist": {"model_path": str(tmp_path / "none.gguf")}}]
        assert text_of(await running.generate(conversation("Hello"))) == GREETING  # the old model serves on


@pytest.mark.scenario("SW-2", "SW-3")
async def test_an_override_changes_under_a_running_request() -> None:
    async with cluster(slots=1, desired=override(OVERRIDE_A)) as running:
        assert await shown_override(running) == OVERRIDE_A
        async with running.post(conversation("Count to 40.", 150)) as response:
            messages = [await response.message()]
            assert (await running.put_state(override(OVERRIDE_B))).status_code == 204
            messages += await response.messages()
        assert len(tokens(messages)) > 100
        assert list(result(messages[-1])) == ["Done"]
        await until_override(running, OVERRIDE_B)
        assert text_of(await running.generate(conversation("Hello"))) == GREETING
        [agent] = await running.snapshot()
        assert agent["uses_chat_template_override"] is True


@pytest.mark.scenario("SW-4")
async def test_a_simple_override_serves_a_conversation() -> None:
    async with cluster(slots=1, desired=override("{{ messages[0].content }}")) as running:
        assert await shown_override(running) == "{{ messages[0].content }}"
        assert tokens(await running.generate(conversation("Hello", 10)))


@pytest.mark.scenario("SW-6", "SW-7", "SW-8")
async def test_embeddings_mode_and_back_on_one_socket() -> None:
    embeddings = state(
        LocalModel(str(FIXTURES / "paddler-tiny-embed.gguf")),
        deterministic(context_size=512, enable_embeddings=True, pooling_type=PoolingType.MEAN),
    )
    async with (
        cluster(slots=2, desired=embeddings, buffered_request_timeout=120) as running,
        inference_socket(running) as socket,
    ):
        assert await socket.receive() == {"Notification": "TokenGenerationDisabled"}
        await socket.request("a", conversation("Hello"))
        message = await socket.receive()
        assert list(result(message)) == ["TokenGenerationDisabled"]
        assert message["Response"]["generated_by"] is None
        for body in (conversation("Hello"), raw_prompt()):
            async with running.post(body) as response:
                assert response.status_code == 501
                assert await response.text() == (
                    "Token generation is disabled while the cluster is configured for embeddings"
                )
        assert (await running.put_state(state())).status_code == 204
        assert await socket.receive() == {"Notification": "TokenGenerationEnabled"}
        await socket.request("b", conversation("Hello"))
        assert text_of(await socket.receive_until_terminal("b")) == GREETING


async def test_requests_sent_during_a_switch_are_all_served() -> None:
    async with cluster(slots=2, desired=state(), buffered_request_timeout=60) as running:
        answers: list[str] = []

        async def ask() -> None:
            answers.append(text_of(await running.generate(conversation("Hello"))))

        async with trio.open_nursery() as requests:
            for number in range(12):
                requests.start_soon(ask)
                if number % 4 == 1:
                    await running.put_state(state(parameters=deterministic(context_size=2048 + number)))
                await trio.sleep(0.05)
        assert answers == [GREETING] * 12


async def test_an_equal_state_is_not_applied_again() -> None:
    async with cluster(slots=1, desired=state()) as running:
        async with running.post(conversation("Count to 40.", 150)) as response:
            await response.message()
            assert (await running.put_state(state())).status_code == 204
            shown = await running.snapshot()
        assert shown[0]["state_application_status"] == "Applied"
        assert shown[0]["slots_total"] == 1
