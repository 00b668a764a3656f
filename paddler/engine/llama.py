"""llama.cpp's model: its file, its description, its vocabulary, and llama.cpp's log.

With context.py, adapters.py and images.py the only importer of llama_cpp. Any thread may tokenise.
"""

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import llama_cpp.llama_cpp as c
import numpy as np

from paddler.engine.layout import ModelShape, Refused
from paddler.engine.pipe import Log, ModelDescription
from paddler.engine.sequences import Ids

LogSink = Callable[[Log], None]

DEBUG, INFO, WARNING, ERROR, CONTINUED = 1, 2, 3, 4, 5
"""llama.cpp's log levels."""

_ROUTINE = (
    "decode: failed to find a memory slot",
    "state_read_meta: failed to find",
    "state_seq_set_data: error loading state: failed to restore kv cache",
)
"""Beginnings of what it says when cells are missing: calls answer that, too, and idle ones are freed then."""


class LlamaLog:
    """Hand llama.cpp's log to `sink` line by line, and remember the first error of an undertaking."""

    _in_use: ClassVar[object] = None
    """What llama.cpp calls, as long as the process lives: it must outlive its log."""

    def __init__(self, sink: LogSink) -> None:
        self._sink = sink
        self._level = INFO
        self._line = b""
        self.first_error = ""
        self.callback = c.llama_log_callback(self._take)
        c.llama_log_set(self.callback, ctypes.c_void_p(None))
        LlamaLog._in_use = self.callback

    def _take(self, level: int, text: bytes, _: object) -> None:
        if level != CONTINUED:
            self._flush()
            self._level = level
        self._line += text
        if self._line.endswith(b"\n"):
            self._flush()

    def _flush(self) -> None:
        text = self._line.decode(errors="replace").strip()
        self._line = b""
        if not text or self._level == DEBUG or text.startswith(_ROUTINE):
            return
        if self._level == ERROR:
            self.first_error = self.first_error or text
        self._sink(Log(self._level, text))


class Vocabulary(dict[int, bytes]):
    """Token id to the bytes of its visible text, filled as tokens come."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._buffer = ctypes.create_string_buffer(256)

    def __missing__(self, token: int) -> bytes:
        size = c.llama_token_to_piece(self._handle, token, self._buffer, len(self._buffer), 0, False)
        if size < 0:
            self._buffer = ctypes.create_string_buffer(-size)
            size = c.llama_token_to_piece(self._handle, token, self._buffer, len(self._buffer), 0, False)
        self[token] = self._buffer.raw[:size]
        return self[token]


@attrs.frozen
class Model:
    """A loaded model file."""

    handle: Any
    vocabulary: Any
    pieces: Vocabulary
    end_tokens: frozenset[int]
    bos_text: str
    offloaded: bool


def load_model(path: str, *, n_gpu_layers: int, on_progress: Callable[[float], bool], log: LlamaLog) -> Model:
    """Load a GGUF file; `on_progress` gets 0 to 1 and returns false to give up. Raises Refused."""
    c.llama_backend_init()
    parameters = c.llama_model_default_params()
    parameters.n_gpu_layers = n_gpu_layers
    callback = c.llama_progress_callback(lambda share, _: on_progress(share))
    parameters.progress_callback = callback
    log.first_error = ""
    handle = c.llama_model_load_from_file(path.encode(errors="surrogateescape"), parameters)
    if not handle:
        raise Refused(log.first_error or "llama.cpp cannot load it")
    vocabulary = c.llama_model_get_vocab(handle)
    n_vocab = c.llama_vocab_n_tokens(vocabulary)
    return Model(
        handle=handle,
        vocabulary=vocabulary,
        pieces=Vocabulary(vocabulary),
        end_tokens=frozenset(token for token in range(n_vocab) if c.llama_vocab_is_eog(vocabulary, token)),
        bos_text=_text_of(vocabulary, c.llama_vocab_bos(vocabulary)),
        offloaded=offloads(n_gpu_layers),
    )


def offloads(n_gpu_layers: int) -> bool:
    """Say whether layers go to a GPU."""
    return n_gpu_layers != 0 and bool(c.llama_supports_gpu_offload())


def describe(model: Model) -> ModelDescription:
    vocabulary = model.vocabulary
    n_vocab = c.llama_vocab_n_tokens(vocabulary)
    template = c.llama_model_chat_template(model.handle, None)
    newline = c.llama_vocab_nl(vocabulary)
    return ModelDescription(
        metadata=read_metadata(model.handle),
        chat_template=template.decode(errors="replace") if template else None,
        bos_text=model.bos_text,
        eos_text=_text_of(vocabulary, c.llama_vocab_eos(vocabulary)),
        nl_text=model.pieces[newline].decode(errors="replace") if newline >= 0 else "",
        control_tokens={
            token: _text_of(vocabulary, token)
            for token in range(n_vocab)
            if c.llama_vocab_is_control(vocabulary, token)
        },
        size_bytes=c.llama_model_size(model.handle),
        n_params=c.llama_model_n_params(model.handle),
        n_vocab=n_vocab,
        n_ctx_train=c.llama_model_n_ctx_train(model.handle),
    )


def shape_of(model: Model, metadata: dict[str, str]) -> ModelShape:
    """Return what decides the size of the KV cache; widths that the file leaves out follow from others."""
    handle = model.handle
    attention = f"{metadata.get('general.architecture', '')}.attention"
    heads = max(c.llama_model_n_head(handle), 1)
    head_width = c.llama_model_n_embd(handle) // heads
    kv_heads = c.llama_model_n_head_kv(handle)
    latent = metadata.get(f"{attention}.kv_lora_rank")  # latent attention: one vector, K and V in one
    return ModelShape(
        weights_bytes=c.llama_model_size(handle),
        n_ctx_train=c.llama_model_n_ctx_train(handle),
        n_layer=c.llama_model_n_layer(handle),
        key_width=int(latent or kv_heads * int(metadata.get(f"{attention}.key_length", head_width))),
        value_width=0 if latent else kv_heads * int(metadata.get(f"{attention}.value_length", head_width)),
        hybrid=bool(c.llama_model_is_recurrent(handle) or c.llama_model_is_hybrid(handle)),
        offloaded=model.offloaded,
    )


def tokenize(model: Model, text: str) -> Ids:
    """Return the ids of a prompt: special tokens are parsed, BOS is added unless the text begins with it."""
    return _tokenize(model, text, add_special=not (model.bos_text and text.startswith(model.bos_text)))


def tokenize_document(model: Model, text: str) -> Ids:
    """Return the ids of a document: special tokens are parsed, the model's own before and behind it added."""
    return _tokenize(model, text, add_special=True)


def _tokenize(model: Model, text: str, *, add_special: bool) -> Ids:
    data = text.encode(errors="replace")
    ids: Ids = np.empty(len(data) + 8, np.int32)
    for _ in range(2):
        pointer = ids.ctypes.data_as(ctypes.POINTER(c.llama_token))
        count = c.llama_tokenize(model.vocabulary, data, len(data), pointer, len(ids), add_special, True)
        if count >= 0:
            return ids[:count].copy()
        ids = np.empty(-count, np.int32)
    raise AssertionError(f"llama_tokenize wants {-count} tokens, then more")


def read_metadata(handle: Any) -> dict[str, str]:
    def read(call: Callable[..., int], index: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        size = call(handle, index, buffer, len(buffer))
        if size >= len(buffer):
            buffer = ctypes.create_string_buffer(size + 1)
            call(handle, index, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    return {
        read(c.llama_model_meta_key_by_index, index): read(c.llama_model_meta_val_str_by_index, index)
        for index in range(c.llama_model_meta_count(handle))
    }


def _text_of(vocabulary: Any, token: int) -> str:
    if token < 0:
        return ""
    text: bytes = c.llama_vocab_get_text(vocabulary, token)
    return text.decode(errors="replace")
