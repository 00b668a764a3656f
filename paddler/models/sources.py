"""From a model reference of the desired state to a file on this machine."""

import struct
from typing import assert_never

import attrs
import trio

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
            if not await _exists(path):
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
            if not await _exists(path):
                raise ModelUnavailable((MultimodalProjectionCannotBeLoaded(path),))
            return path
        case HuggingFaceModel() | UrlModel():
            raise SourceNotServed((MultimodalProjectionCannotBeLoaded(reference_text(source)),))
        case _:
            assert_never(source)


async def check_projection(path: str) -> None:
    """Look at the header of a projection's file. Raises ModelUnavailable when it is no GGUF file."""
    try:
        async with await trio.open_file(path, "rb") as file:
            magic, version, tensors, _ = _GGUF_HEADER.unpack(await file.read(_GGUF_HEADER.size))
    except (OSError, struct.error):
        magic, version, tensors = b"", 0, 0
    if magic != b"GGUF" or version not in _GGUF_VERSIONS or not tensors:
        raise ModelUnavailable((MultimodalProjectionCannotBeLoaded(path),))


def reference_text(source: HuggingFaceModel | UrlModel) -> str:
    """Return the text that issues show for a model without a local file (management-api §3)."""
    if isinstance(source, UrlModel):
        return source.url
    return f"{source.repo_id}/{source.revision}/{source.filename}"


async def _exists(path: str) -> bool:
    try:
        return path != "" and await trio.Path(path).exists()
    except OSError:  # a directory on the way that may not be entered
        return False
