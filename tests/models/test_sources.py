"""References become files, or issues that name what the operator wrote."""

import os
from pathlib import Path

import pytest

from paddler.config import bundled_model_path
from paddler.errors import ModelUnavailable
from paddler.messages.state import (
    HuggingFaceModel,
    LocalModel,
    ModelCannotBeLoaded,
    ModelFileDoesNotExist,
    ModelSource,
    MultimodalProjectionCannotBeLoaded,
    UrlModel,
)
from paddler.models.sources import check_projection, resolve_adapter, resolve_model, resolve_projection

HUB = HuggingFaceModel(filename="a.gguf", repo_id="org/repo", revision="main")
HUB_TEXT = "org/repo/main/a.gguf"
URL = "https://models.example/a.gguf"


async def test_no_model_is_no_path() -> None:
    assert await resolve_model("None") is None
    assert await resolve_projection("None") is None


async def test_a_local_path_is_kept_verbatim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert await resolve_model(LocalModel("./a.gguf")) == "./a.gguf"
    assert await resolve_projection(LocalModel("./a.gguf")) == "./a.gguf"


@pytest.mark.scenario("IS-7")
@pytest.mark.parametrize("path", ["/nowhere/missing.gguf", "", "/dev/null/a.gguf", "/a\0b"])
async def test_a_missing_model_file_is_named(path: str) -> None:
    with pytest.raises(ModelUnavailable) as refusal:
        await resolve_model(LocalModel(path))
    assert refusal.value.issues == (ModelFileDoesNotExist(path),)


@pytest.mark.scenario("IS-9")
async def test_a_missing_projection_file_is_named() -> None:
    with pytest.raises(ModelUnavailable, match=r"projection /nowhere/mmproj.gguf does not exist") as refusal:
        await resolve_projection(LocalModel("/nowhere/mmproj.gguf"))
    assert refusal.value.issues == (MultimodalProjectionCannotBeLoaded("/nowhere/mmproj.gguf"),)


@pytest.mark.parametrize(("source", "text"), [(HUB, HUB_TEXT), (UrlModel(URL), URL)])
async def test_sources_that_are_not_served_say_so(source: ModelSource, text: str) -> None:
    with pytest.raises(ModelUnavailable, match="not served yet") as refusal:
        await resolve_model(source)
    assert refusal.value.issues == (ModelCannotBeLoaded(text),)
    with pytest.raises(ModelUnavailable) as refusal:
        await resolve_projection(source)
    assert refusal.value.issues == (MultimodalProjectionCannotBeLoaded(text),)


async def test_an_adapter_is_found_like_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(ModelUnavailable) as refusal:
        await resolve_adapter(LocalModel(str(path)))
    assert refusal.value.issues == (ModelFileDoesNotExist(str(path)),)
    path.touch()
    assert await resolve_adapter(LocalModel(str(path))) == str(path)
    with pytest.raises(ModelUnavailable, match="not served yet") as refusal:
        await resolve_adapter(HUB)
    assert refusal.value.issues == (ModelCannotBeLoaded(HUB_TEXT),)


async def test_a_gguf_file_passes_as_projection() -> None:
    await check_projection(str(bundled_model_path()))


@pytest.mark.scenario("IS-10")
@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"no model at all, but text", b"GGUF\x09\0\0\0" + bytes(40)]
)
async def test_a_broken_projection_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnavailable) as refusal:
        await check_projection(str(path))
    assert refusal.value.issues == (MultimodalProjectionCannotBeLoaded(str(path)),)


async def test_a_directory_is_no_projection_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ModelUnavailable):
            await check_projection(str(path))
