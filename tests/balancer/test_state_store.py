# ruff: noqa: ASYNC240  # nothing else runs while a test looks at its file
import json
import os
from pathlib import Path

import attrs
import pytest
import trio

from paddler.balancer.reconciliation import Reconciliation
from paddler.balancer.state_store import (
    MAX_FILE_BYTES,
    FileStore,
    MemoryStore,
    StateStore,
    open_state_store,
)
from paddler.errors import ConfigurationError, StateStoreError
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    ChatTemplate,
    DesiredState,
    HuggingFaceModel,
    LocalModel,
)
from paddler.messages.wire import unstructure
from tests.balancer.services import make_services

HUB_STATE = attrs.evolve(
    DEFAULT_DESIRED_STATE,
    model=HuggingFaceModel("a.gguf", "owner/repo", "main"),
    multimodal_projection=LocalModel("/models/größe.gguf"),
)
OVERRIDE_STATE = attrs.evolve(
    HUB_STATE, chat_template_override=ChatTemplate("{{ messages }}"), use_chat_template_override=True
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


async def restart(store: StateStore, put: DesiredState | None = None) -> DesiredState:
    """Start a balancer's reconciliation on a store, put a state if there is one, and stop."""
    reconciliation = Reconciliation(store=store, links=make_services().links)
    async with trio.open_nursery() as services:
        await services.start(lambda **status: reconciliation.keep_agents_reconciled(**status))
        if put is not None:
            await reconciliation.put(put)
        state = await reconciliation.desired_state()
        services.cancel_scope.cancel()
    return state


# URLs


@pytest.mark.scenario("SH-10")
@pytest.mark.parametrize("url", ["memory://", "memory:", "MEMORY://"])
def test_memory_urls(url: str) -> None:
    assert isinstance(open_state_store(url), MemoryStore)


@pytest.mark.scenario("SH-10")
async def test_a_file_url_names_the_file_literally(tmp_path: Path) -> None:
    store = open_state_store(f"file://{tmp_path}/a%20b.json ")
    await store.store(HUB_STATE)
    assert (tmp_path / "a%20b.json").exists()


@pytest.mark.scenario("SH-10")
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory", "is not a URL"),
        ("", "is not a URL"),
        ("/var/lib/state.json", "is not a URL"),
        ("file://", "path cannot be empty"),
        ("file://  ", "path cannot be empty"),
        ("file:/path", "invalid file URL"),
        ("file:", "invalid file URL"),
        ("etcd://host", "unsupported scheme 'etcd'"),
        ("https://host/state", "unsupported scheme 'https'"),
    ],
)
def test_urls_that_name_no_store(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        open_state_store(url)


@pytest.mark.scenario("SH-10")
@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file://state.json", Path.cwd() / "state.json"),
        ("file://./data/state.json", Path.cwd() / "data/state.json"),
        ("file://../state.json", Path.cwd() / "../state.json"),
        ("file://~/state.json", Path.home() / "state.json"),
        ("file://tmp/own/x.json", Path("/tmp/own/x.json")),  # two slashes instead of three
    ],
)
def test_a_relative_path_is_refused_with_the_absolute_one(url: str, path: Path) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        open_state_store(url)
    assert "an absolute path is required" in str(refusal.value)
    assert str(refusal.value).endswith(f"did you mean --state-database file://{path}")


# Files


@pytest.mark.scenario("SD-5", "SD-6")
@pytest.mark.parametrize("state", [HUB_STATE, OVERRIDE_STATE])
async def test_a_state_survives_a_restart(path: Path, state: DesiredState) -> None:
    await restart(FileStore(path), put=state)
    assert await restart(FileStore(path)) == state


@pytest.mark.scenario("SD-7")
async def test_a_second_state_replaces_the_first(path: Path) -> None:
    assert await restart(FileStore(path), put=HUB_STATE) == HUB_STATE
    assert await restart(FileStore(path), put=OVERRIDE_STATE) == OVERRIDE_STATE


@pytest.mark.scenario("SD-11")
@pytest.mark.parametrize("content", [None, b""])
async def test_a_missing_or_empty_file_gets_the_default(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    assert await restart(FileStore(path)) == DEFAULT_DESIRED_STATE
    document = json.loads(path.read_text())
    assert document == {"balancer_desired_state": unstructure(DEFAULT_DESIRED_STATE), "version": "1"}


@pytest.mark.scenario("SD-11")
@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        json.dumps({"balancer_desired_state": unstructure(HUB_STATE), "version": "1", "more": 1}).encode(),
        json.dumps({"balancer_desired_state": unstructure(HUB_STATE), "version": 1}).encode(),
    ],
)
async def test_an_unreadable_file_ends_the_start_and_names_the_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    reconciliation = Reconciliation(store=FileStore(path), links=make_services().links)
    with pytest.raises(ConfigurationError, match="incompatible") as failure:
        await reconciliation.keep_agents_reconciled()
    assert str(path) in str(failure.value)
    assert path.read_bytes() == content, "what cannot be read is not overwritten"


async def test_a_file_that_is_broken_later_refuses_loads_and_stores(path: Path) -> None:
    store = FileStore(path)
    await store.store(HUB_STATE)
    path.write_text("{")
    with pytest.raises(StateStoreError):
        await store.load()
    with pytest.raises(StateStoreError):
        await store.store(HUB_STATE)
    assert path.read_text() == "{"


async def test_edits_by_hand_are_seen_at_the_next_load(path: Path) -> None:
    store = FileStore(path)
    await store.store(HUB_STATE)
    path.write_text(path.read_text().replace("owner/repo", "other/repo"))
    state = await store.load()
    assert state is not None
    assert state.model == HuggingFaceModel("a.gguf", "other/repo", "main")


@pytest.mark.parametrize("version", ["", "1", "any text"])
async def test_the_version_that_was_read_is_written_again(path: Path, version: str) -> None:
    path.write_text(json.dumps({"balancer_desired_state": unstructure(HUB_STATE), "version": version}))
    await FileStore(path).store(OVERRIDE_STATE)
    assert json.loads(path.read_text())["version"] == version


async def test_a_missing_version_is_read_as_one(path: Path) -> None:
    path.write_text(json.dumps({"balancer_desired_state": unstructure(HUB_STATE)}))
    store = FileStore(path)
    assert await store.load() == HUB_STATE
    await store.store(HUB_STATE)
    assert json.loads(path.read_text())["version"] == "1"


async def test_the_file_is_pretty_with_sorted_keys(path: Path) -> None:
    await FileStore(path).store(HUB_STATE)
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert "größe" in text


async def test_a_replaced_file_keeps_its_mode_and_leaves_nothing_beside_it(path: Path) -> None:
    store = FileStore(path)
    await store.store(HUB_STATE)
    path.chmod(0o640)
    before = path.stat()
    await store.store(OVERRIDE_STATE)
    assert path.stat().st_mode == before.st_mode
    assert path.stat().st_ino != before.st_ino, "replaced, not rewritten in place"
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


async def test_a_symbolic_link_stays_one(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    path.symlink_to(target)
    await FileStore(path).store(HUB_STATE)
    assert path.is_symlink()
    assert await FileStore(target).load() == HUB_STATE


@pytest.fixture
def unusable(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    return {
        "directory": tmp_path / "directory",
        "fifo": tmp_path / "fifo",
        "huge": tmp_path / "huge",
        "orphan": tmp_path / "no" / "parent.json",
        "below a file": tmp_path / "huge" / "state.json",
    }


@pytest.mark.parametrize("kind", ["directory", "fifo", "huge", "orphan", "below a file"])
async def test_what_is_no_usable_file_is_an_error(unusable: dict[str, Path], kind: str) -> None:
    with pytest.raises(StateStoreError, match=unusable[kind].name):
        await FileStore(unusable[kind]).store(HUB_STATE)


async def test_a_missing_folder_is_named_and_no_temporary_file(unusable: dict[str, Path]) -> None:
    path = unusable["orphan"]
    with pytest.raises(StateStoreError) as failure:
        await FileStore(path).store(HUB_STATE)
    assert (
        str(failure.value) == f"cannot write state database {path}: the folder {path.parent} does not exist"
    )


async def test_what_the_system_says_is_said_without_its_number_and_another_path(
    unusable: dict[str, Path],
) -> None:
    path = unusable["below a file"]
    with pytest.raises(StateStoreError) as failure:
        await FileStore(path).store(HUB_STATE)
    assert str(failure.value) == f"cannot read state database {path}: Not a directory"
