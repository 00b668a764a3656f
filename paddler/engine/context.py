"""llama.cpp's context: KV cells, batches, and decoding, the one place where tokens become logits.

Many wrong calls end the process instead of returning an error (engine notes §4), so what reaches
llama.cpp from here is made of own numbers only: own slots, ids of the vocabulary, batches within n_batch.
One thread uses a context.
"""

import ctypes
from typing import Any, cast

import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt

from paddler.config import KvLayout
from paddler.engine.layout import ContextPlan, Refused
from paddler.engine.llama import LlamaLog, Model
from paddler.engine.pipe import EngineSettings
from paddler.messages.state import KvCacheDtype, PoolingType

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


class Context:
    """KV cells and compute buffers of one model."""

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
