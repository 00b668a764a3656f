"""From a model reference of the desired state to a file on this machine."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import attrs
import trio

from paddler.errors import ModelUnavailable
from paddler.messages.state import (
    HuggingFaceModel,
    LocalModel,
    LoraSource,
    ModelCannotBeLoaded,
    ModelFileDoesNotExist,
    ModelSource,
    MultimodalProjectionCannotBeLoaded,
    UrlModel,
)

_GGUF_HEADER = struct.Struct("<4sIQQ")
_GGUF_VERSIONS = (2, 3)


@attrs.define(eq=False)
class SourceNotServed(ModelUnavailable):
    """The reference is of a kind that agents cannot fetch."""

    def __str__(self) -> str:
        return "models from Hugging Face and from URLs are not served yet: download the file, use its path"


async def resolve_model(source: ModelSource) -> str | None:
    """Return the path of the model's file, verbatim as configured, or None for no model.

    Raises ModelUnavailable when there is no such file.
    """
    match source:
        case "None":
            return None
        case LocalModel(path):
            if not await _look(_exists, path):
                raise ModelUnavailable((ModelFileDoesNotExist(path),))
            return path
        case HuggingFaceModel() | UrlModel():
            raise SourceNotServed((ModelCannotBeLoaded(reference_text(source)),))
        case _:
            assert_never(source)


async def resolve_projection(source: ModelSource) -> str | None:
    """Return the path of the multimodal projection's file, or None; like `resolve_model`."""
    match source:
        case "None":
            return None
        case LocalModel(path):
            if not await _look(_exists, path):
                raise ModelUnavailable(
                    (MultimodalProjectionCannotBeLoaded(path),),
                    f"the multimodal projection {path} does not exist",
                )
            return path
        case HuggingFaceModel() | UrlModel():
            raise SourceNotServed((MultimodalProjectionCannotBeLoaded(reference_text(source)),))
        case _:
            assert_never(source)


async def resolve_adapter(source: LoraSource) -> str:
    """Return the path of a LoRA adapter's file; like `resolve_model`."""
    path = await resolve_model(source)
    assert path is not None
    return path


async def check_projection(path: str) -> None:
    """Look at the header of a projection's file. Raises ModelUnavailable when it is no GGUF file."""
    if not await _look(_is_gguf_file, path):
        raise ModelUnavailable(
            (MultimodalProjectionCannotBeLoaded(path),),
            f"the multimodal projection {path} is not a GGUF file",
        )


def reference_text(source: HuggingFaceModel | UrlModel) -> str:
    """Return the text that issues show for a model without a local file (management-api §3)."""
    if isinstance(source, UrlModel):
        return source.url
    return f"{source.repo_id}/{source.revision}/{source.filename}"


async def _look(look: Callable[[str], bool], path: str) -> bool:
    """Look at a file in a thread.

    Cancelled, the thread is left behind: a server of files that is gone answers no look, and must keep
    neither a newer state nor the end of the agent waiting.
    """
    return await trio.to_thread.run_sync(look, path, abandon_on_cancel=True)


def _exists(path: str) -> bool:
    try:
        return path != "" and Path(path).exists()
    except OSError:  # a directory on the way that may not be entered
        return False


def _is_gguf_file(path: str) -> bool:
    file = Path(path)
    try:
        if not file.is_file():  # opening a pipe would block for ever
            return False
        with file.open("rb") as opened:
            magic, version, tensors, _ = _GGUF_HEADER.unpack(opened.read(_GGUF_HEADER.size))
    except (OSError, struct.error):
        return False
    return magic == b"GGUF" and version in _GGUF_VERSIONS and tensors > 0
