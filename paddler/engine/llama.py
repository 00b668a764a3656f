"""llama.cpp: the only importer of llama_cpp. Model, context, batch, vocabulary, log.

Many wrong calls end the process instead of returning an error (engine notes §4), so what reaches
llama.cpp from here is made of own numbers only: own slots, ids of the vocabulary, batches within n_batch.
One thread uses a context; tokenising alone may happen in another.
"""

import ctypes
from collections.abc import Callable
from typing import Any, cast

import attrs
import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt

from paddler.config import KvLayout
from paddler.engine.layout import ContextPlan, ModelShape, Refused
from paddler.engine.pipe import EngineSettings, Log, ModelDescription
from paddler.messages.state import KvCacheDtype, PoolingType

LogSink = Callable[[Log], None]
Ids = npt.NDArray[np.int32]

DEBUG, INFO, WARNING, ERROR, CONTINUED = 1, 2, 3, 4, 5
"""llama.cpp's log levels."""

_GGML_TYPES = {
    KvCacheDtype.F32: c.GGML_TYPE_F32,
    KvCacheDtype.F16: c.GGML_TYPE_F16,
    KvCacheDtype.BF16: 30,  # the binding does not name it
    KvCacheDtype.Q8_0: c.GGML_TYPE_Q8_0,
    KvCacheDtype.Q4_0: c.GGML_TYPE_Q4_0,
    KvCacheDtype.Q4_1: c.GGML_TYPE_Q4_1,
    KvCacheDtype.IQ4_NL: c.GGML_TYPE_IQ4_NL,
    KvCacheDtype.Q5_0: c.GGML_TYPE_Q5_0,
    KvCacheDtype.Q5_1: c.GGML_TYPE_Q5_1,
}
_POOLING_TYPES = {
    PoolingType.UNSPECIFIED: -1,
    PoolingType.NONE: 0,
    PoolingType.MEAN: 1,
    PoolingType.CLS: 2,
    PoolingType.LAST: 3,
    PoolingType.RANK: 4,
}


class DecodeFailed(Exception):
    """llama.cpp failed in a way that leaves the context in an unknown state."""


class LlamaLog:
    """Hand llama.cpp's log to `sink` line by line, and remember the first error of an undertaking."""

    def __init__(self, sink: LogSink) -> None:
        self._sink = sink
        self._level = INFO
        self._line = b""
        self.first_error = ""
        self._callback = c.llama_log_callback(self._take)
        c.llama_log_set(self._callback, ctypes.c_void_p(None))

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
        if not text or self._level == DEBUG:
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
        metadata=_metadata(model.handle),
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
    data = text.encode(errors="replace")
    add_special = not (model.bos_text and text.startswith(model.bos_text))
    ids: Ids = np.empty(len(data) + 8, np.int32)
    for _ in range(2):
        pointer = ids.ctypes.data_as(ctypes.POINTER(c.llama_token))
        count = c.llama_tokenize(model.vocabulary, data, len(data), pointer, len(ids), add_special, True)
        if count >= 0:
            return ids[:count].copy()
        ids = np.empty(-count, np.int32)
    raise AssertionError(f"llama_tokenize wants {-count} tokens, then more")


class Context:
    """KV cells and compute buffers: the one place where tokens become logits."""

    def __init__(self, model: Model, plan: ContextPlan, engine: EngineSettings, *, log: LlamaLog) -> None:
        """Make what was planned. Raises Refused."""
        parameters = engine.parameters
        embeddings = parameters.enable_embeddings
        if not embeddings and (reason := _not_generative(model.handle)):
            raise Refused(reason)
        settings = c.llama_context_default_params()
        settings.n_ctx = plan.n_ctx
        settings.n_batch = settings.n_ubatch = plan.n_batch
        settings.n_seq_max = plan.slots
        settings.n_threads = settings.n_threads_batch = max(engine.threads, 1)
        settings.type_k = _GGML_TYPES[plan.k_dtype]
        settings.type_v = _GGML_TYPES[plan.v_dtype]
        settings.kv_unified = plan.layout is KvLayout.SHARED
        settings.embeddings = embeddings
        if embeddings:
            settings.pooling_type = _POOLING_TYPES[parameters.pooling_type]
            settings.n_outputs_max = settings.n_outputs_max_per_seq = 0  # a row per token
        else:
            settings.n_outputs_max = plan.slots
        if engine.exact:
            settings.flash_attn_type = 0
        log.first_error = ""
        self._handle = c.llama_init_from_model(model.handle, settings)
        if not self._handle:
            raise Refused(log.first_error or "llama.cpp cannot make a context")
        self._memory = c.llama_get_memory(self._handle)
        if not embeddings and not self._memory:
            raise Refused("the model keeps no context between tokens: it cannot generate text")
        self.room = min(c.llama_n_ctx_seq(self._handle), c.llama_model_n_ctx_train(model.handle))
        self._n_vocab = c.llama_vocab_n_tokens(model.vocabulary)
        self._batch = _Batch(plan.n_batch, plan.slots)
        self._rows: tuple[int, int, npt.NDArray[np.float32]] | None = None

    def warm_up(self) -> bool:
        """Decode one token, so that the first request finds the buffers touched; false if that failed."""
        self._batch.fill_chunk(np.zeros(1, np.int32), 0, 0, want_logits=True)
        result = c.llama_decode(self._handle, self._batch.struct)
        c.llama_synchronize(self._handle)
        if self._memory:
            c.llama_memory_clear(self._memory, True)
        return bool(result == 0)

    def clear(self, slot: int) -> None:
        """Free the cells of a slot."""
        c.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool:
        """Decode one token per slot; false when no cells are left, and then nothing has changed."""
        self._batch.fill_step(tokens, positions, slots)
        return self._run()

    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool:
        """Decode a chunk of a prompt; likewise. The logits are those of its last token."""
        self._batch.fill_chunk(tokens, position, slot, want_logits=want_logits)
        done = self._run()
        if done and not want_logits:
            c.llama_synchronize(self._handle)  # else the next decode would pay, and be measured, for it
        return done

    def logits(self, count: int) -> npt.NDArray[np.float32]:
        """Return the rows of the last decode in batch order; they are valid until the next."""
        pointer = c.llama_get_logits(self._handle)
        address = ctypes.addressof(pointer.contents)
        if self._rows is None or self._rows[:2] != (address, count):
            self._rows = (address, count, np.ctypeslib.as_array(pointer, (count, self._n_vocab)))
        return self._rows[2]

    def _run(self) -> bool:
        result = c.llama_decode(self._handle, self._batch.struct)
        if result not in (0, 1):
            raise DecodeFailed(f"llama_decode returned {result}")
        return bool(result == 0)


class _Batch:
    """A llama_batch whose arrays are numpy's, filled anew for each decode."""

    def __init__(self, n_batch: int, slots: int) -> None:
        self._tokens = np.zeros(n_batch, np.int32)
        self._positions = np.zeros(n_batch, np.int32)
        self._ones = np.ones(n_batch, np.int32)
        self._slots = np.arange(slots, dtype=np.int32)
        self._slot_addresses = self._slots.ctypes.data + 4 * np.arange(slots, dtype=np.uintp)
        self._slot_pointers = np.zeros(n_batch, np.uintp)
        self._outputs = np.zeros(n_batch, np.int8)
        self.struct = cast("Any", c.llama_batch())  # the binding declares arrays where C has pointers
        self.struct.token = self._tokens.ctypes.data_as(ctypes.POINTER(c.llama_token))
        self.struct.pos = self._positions.ctypes.data_as(ctypes.POINTER(c.llama_pos))
        self.struct.n_seq_id = self._ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.seq_id = ctypes.cast(
            self._slot_pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(c.llama_seq_id))
        )
        self.struct.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def fill_step(self, tokens: list[int], positions: list[int], slots: list[int]) -> None:
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._slot_pointers[:count] = self._slot_addresses[slots]
        self._outputs[:count] = 1
        self.struct.n_tokens = count

    def fill_chunk(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> None:
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(position, position + count)
        self._slot_pointers[:count] = self._slot_addresses[slot]
        self._outputs[:count] = 0
        self._outputs[count - 1] = want_logits
        self.struct.n_tokens = count


def _not_generative(handle: Any) -> str:
    if c.llama_model_has_encoder(handle):
        return "models with an encoder are not served for text generation"
    if not c.llama_model_has_decoder(handle) or c.llama_model_is_diffusion(handle):
        return "the model cannot generate text token by token"
    return ""


def _metadata(handle: Any) -> dict[str, str]:
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
