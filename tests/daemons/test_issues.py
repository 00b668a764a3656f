"""What an agent shows when it cannot serve, and how it recovers."""

from pathlib import Path

import pytest

from paddler.config import bundled_model_path
from paddler.messages.state import ChatTemplate, DesiredState, LocalModel, UrlModel
from tests.cluster import BUNDLED, FIXTURES, cluster, conversation, deterministic, state, text_of

pytestmark = pytest.mark.slow

EMBEDDING_MODEL = LocalModel(str(FIXTURES / "paddler-tiny-embed.gguf"))


async def issues_of(desired: DesiredState, *, slots: int = 1, within: float = 10) -> list[object]:
    """Return the first issues that an agent shows for this state."""
    async with cluster(slots=slots, desired=desired, serving=False) as running:
        [agent] = await running.wait_for_agents(
            lambda agents: bool(agents and agents[0]["issues"]), within=within
        )
        assert agent["slots_total"] == 0
        issues: list[object] = agent["issues"]
        return issues


@pytest.mark.scenario("IS-7")
async def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none.gguf")
    assert await issues_of(state(LocalModel(path))) == [{"ModelFileDoesNotExist": {"model_path": path}}]


@pytest.mark.scenario("IS-8")
@pytest.mark.parametrize("content", [b"", b"hello, this is no model", b"GGUF\x03\0\0\0", None])
async def test_a_broken_model_file_is_named_and_recovered_from(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.gguf"
    whole = bundled_model_path().read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    async with cluster(slots=1, desired=state(LocalModel(str(path))), serving=False) as running:
        [agent] = await running.wait_for_agents(
            lambda agents: bool(agents and agents[0]["issues"]), within=10
        )
        assert agent["issues"] == [{"ModelCannotBeLoaded": {"model_path": str(path)}}]
        path.write_bytes(whole)
        await running.wait_until_serving()
        [agent] = await running.snapshot()
        assert agent["issues"] == []
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"


@pytest.mark.scenario("IS-9")
async def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none.gguf")
    desired = state(multimodal_projection=LocalModel(path))
    assert await issues_of(desired) == [{"MultimodalProjectionCannotBeLoaded": {"model_path": path}}]


@pytest.mark.scenario("IS-10")
async def test_a_broken_projection_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"no projection")
    desired = state(multimodal_projection=LocalModel(str(path)))
    assert await issues_of(desired) == [{"MultimodalProjectionCannotBeLoaded": {"model_path": str(path)}}]


async def test_a_model_without_a_template_is_named() -> None:
    assert await issues_of(state(EMBEDDING_MODEL)) == [
        {"UnableToFindChatTemplate": {"model_path": EMBEDDING_MODEL.path}}
    ]


@pytest.mark.scenario("IS-12", "IS-13")
async def test_a_broken_override_is_named_until_it_is_replaced() -> None:
    def override(content: str) -> DesiredState:
        return state(chat_template_override=ChatTemplate(content), use_chat_template_override=True)

    async with cluster(slots=1, desired=override("{{invalid jinja template"), serving=False) as running:
        [agent] = await running.wait_for_agents(
            lambda agents: bool(agents and agents[0]["issues"]), within=10
        )
        [(variant, details)] = agent["issues"][0].items()
        assert variant == "ChatTemplateDoesNotCompile"
        assert details["model_path"] == {"model_path": BUNDLED.path}
        assert details["template_content"] == "{{invalid jinja template"
        assert details["error"]
        await running.put_state(override("{{ messages[0].content }}"))
        await running.wait_for_agents(lambda agents: not agents[0]["issues"], within=3)
        await running.wait_until_serving()


@pytest.mark.scenario("IS-14")
async def test_more_slots_than_sequences_cannot_start() -> None:
    issues = await issues_of(state(), slots=257)
    assert len(issues) == 257
    assert all(issue["SlotCannotStart"]["error"] for issue in issues)  # type: ignore[index]  # JSON
    assert [issue["SlotCannotStart"]["slot_index"] for issue in issues] == list(range(257))  # type: ignore[index]  # JSON


async def test_a_context_beyond_the_memory_is_refused() -> None:
    # A pool is bounded by the model's own 4096 tokens per slot, so a real giant is made of both.
    desired = state(parameters=deterministic(context_size=2**32 - 1))
    async with cluster(slots=1, desired=desired) as running:
        assert text_of(await running.generate(conversation("Hello"))) == "Hello! How can I help you today?"


async def test_an_unsupported_source_is_an_issue_and_the_agent_lives_on() -> None:

    url = "http://127.0.0.1:9/model.gguf"
    async with cluster(slots=1, desired=state(UrlModel(url)), serving=False) as running:
        [agent] = await running.wait_for_agents(
            lambda agents: bool(agents and agents[0]["issues"]), within=10
        )
        assert agent["issues"] == [{"ModelCannotBeLoaded": {"model_path": url}}]
        await running.put_state(state())
        await running.wait_until_serving()
        assert (await running.snapshot())[0]["issues"] == []
