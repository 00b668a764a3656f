"""LoRA adapters: loaded beside the model, in force for all that its context computes.

The set and its scales never change while an engine process lives. So cells, and prefixes kept in host
memory, are of this set by construction: it is part of every cache key without standing in one.
"""

import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import llama_cpp.llama_cpp as c

from paddler.engine.layout import Refused
from paddler.engine.llama import LlamaLog, Model
from paddler.engine.pipe import Adapter


@attrs.frozen
class LoadedAdapter:
    """An adapter of one model. It is freed with the process, as the model is: its context refers to it."""

    handle: Any
    scale: float


class AdapterRefused(Refused):
    """This adapter cannot be used."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the adapter {path} cannot be loaded: {reason}")
        self.path = path


def size_of(adapter: Adapter) -> int:
    """Return the bytes of an adapter's file. Raises AdapterRefused when it cannot be one."""
    try:
        state = Path(adapter.path).stat()
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise AdapterRefused(adapter.path, str(error)) from None
    if not stat.S_ISREG(state.st_mode):
        raise AdapterRefused(adapter.path, "not a regular file")  # opening a pipe would block for ever
    return state.st_size


def load_adapters(
    model: Model, adapters: Sequence[Adapter], *, on_next: Callable[[], None], log: LlamaLog
) -> list[LoadedAdapter]:
    """Load adapters of this model; `on_next` is called before each. Raises AdapterRefused."""
    loaded = []
    for adapter in adapters:
        on_next()
        loaded.append(LoadedAdapter(_load(model, adapter.path, log), adapter.scale))
    return loaded


def _load(model: Model, path: str, log: LlamaLog) -> Any:
    log.first_error = ""
    handle = c.llama_adapter_lora_init(model.handle, path.encode(errors="surrogateescape"))
    if not handle:
        raise AdapterRefused(path, log.first_error or "llama.cpp gives no reason")
    if c.llama_adapter_get_alora_n_invocation_tokens(handle):
        # It was trained to be off for what stands before these tokens; a context has it on for all.
        raise AdapterRefused(path, "adapters with invocation tokens (aLoRA) are not served")
    return handle
