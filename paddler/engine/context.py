"""llama.cpp's context: KV cells, batches, and decoding, the one place where tokens become logits.

Many wrong calls end the process instead of returning an error (engine notes §4), so what reaches
llama.cpp from here is made of own numbers only: own slots, ids of the vocabulary, batches within n_batch.
One thread uses a context.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt

from paddler.config import KvLayout
from paddler.engine.adapters import LoadedAdapter
from paddler.engine.layout import ContextPlan, Refused
from paddler.engine.llama import LlamaLog, Model, read_metadata
from paddler.engine.pipe import EngineSettings
from paddler.engine.prefixes import State
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
        if embeddings and parameters.pooling_type is PoolingType.RANK and not _can_rank(model.handle):
            raise Refused("the model has no classification head: it cannot rank (pooling_type Rank)")
        settings = c.llama_context_default_params()
        settings.n_ctx = plan.n_ctx
        settings.n_batch = settings.n_ubatch = plan.n_batch
        settings.n_seq_max = plan.slots
        settings.n_threads = settings.n_threads_batch = engine.threads
        settings.type_k = _GGML_TYPES[plan.k_dtype]
        settings.type_v = _GGML_TYPES[plan.v_dtype]
        settings.kv_unified = plan.layout is KvLayout.SHARED
        settings.swa_full = True  # a window that has moved on could not be cut, and would place cells anew
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
        self.cuttable = not (
            c.llama_model_is_recurrent(model.handle) or c.llama_model_is_hybrid(model.handle)
        )
        # What is saved of a sliding window is only what the last token sees: it could not be cut any more.
        self.storable = c.llama_model_n_swa(model.handle) <= 0
        self.shared = plan.layout is KvLayout.SHARED
        self.room = min(c.llama_n_ctx_seq(self._handle), c.llama_model_n_ctx_train(model.handle))
        self._n_vocab = c.llama_vocab_n_tokens(model.vocabulary)
        self._encodes = embeddings and c.llama_model_has_encoder(model.handle)
        self._pooling_type = c.llama_pooling_type(self._handle)  # the model's own where none was asked for
        is_rank = self._pooling_type == c.LLAMA_POOLING_TYPE_RANK
        width = c.llama_model_n_cls_out if is_rank else c.llama_model_n_embd_out
        self._vector_width = max(width(model.handle), 1)
        self._n_batch = plan.n_batch
        self._batch = _Batch(plan.n_batch, plan.slots)
        self._rows: tuple[int, int, npt.NDArray[np.float32]] | None = None

    def use_adapters(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Put these in force for all that is computed from now on; to be called once. Raises Refused."""
        if not adapters:
            return
        handles = (c.llama_adapter_lora_p_ctypes * len(adapters))(*(adapter.handle for adapter in adapters))
        scales = (ctypes.c_float * len(adapters))(*(adapter.scale for adapter in adapters))
        if c.llama_set_adapters_lora(self._handle, handles, len(adapters), scales) != 0:
            raise Refused("llama.cpp cannot use the adapters")

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        c.llama_set_n_threads(self._handle, count, count)

    def warm_up(self) -> bool:
        """Decode one token, so that the first request finds the buffers touched; false if that failed."""
        self._batch.fill_chunk(np.zeros(1, np.int32), 0, 0, want_logits=True)
        result = self._compute()
        c.llama_synchronize(self._handle)
        if self._memory:
            c.llama_memory_clear(self._memory, True)
        return bool(result == 0)

    def clear(self, slot: int) -> None:
        """Free the cells of a slot."""
        c.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def cut(self, slot: int, length: int) -> bool:
        """Free the cells of a slot behind the first `length`; false where the memory cannot do that."""
        return bool(c.llama_memory_seq_rm(self._memory, slot, length, -1))

    def copy(self, source: int, slot: int, length: int) -> bool:
        """Copy at least the first `length` cells of one slot to another, which is empty."""
        if self.shared and self.cuttable:  # they share the cells; elsewhere a range would abort
            c.llama_memory_seq_cp(self._memory, source, slot, 0, length)
            return True
        if not self.storable:  # all of it, at the next decode
            c.llama_memory_seq_cp(self._memory, source, slot, -1, -1)
            return True
        return self.restore(slot, self.save(source))

    def saved_bytes(self, slot: int) -> int:
        """Return how large a copy of a slot's cells is."""
        return int(c.llama_state_seq_get_size_ext(self._handle, slot, c.LLAMA_STATE_SEQ_FLAGS_NONE))

    def save(self, slot: int) -> State:
        """Return a copy of a slot's cells."""
        return self._save(slot, c.LLAMA_STATE_SEQ_FLAGS_NONE)

    def restore(self, slot: int, state: State) -> bool:
        """Fill an empty slot with such a copy; if false it does not fit, and the slot is to be cleared."""
        return self._restore(slot, state, c.LLAMA_STATE_SEQ_FLAGS_NONE)

    def save_checkpoint(self, slot: int) -> State:
        """Return a copy of what of a slot's memory cannot be cut."""
        return self._save(slot, c.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def restore_checkpoint(self, slot: int, state: State) -> bool:
        return self._restore(slot, state, c.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

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

    def ingest_foreign(self, decode: Callable[[Any, int], int], position: int, slot: int) -> bool:
        """Let another library fill cells from `position` on; false when there are too few: none is filled.

        `decode` gets the context and the size of a batch, and returns what llama_decode does.
        """
        result = decode(self._handle, self._n_batch)
        if result == 0:
            c.llama_synchronize(self._handle)
        elif result == 1:  # the batches before the one that failed are there
            if not self.cut(slot, position):  # a state that cannot go back: what follows would be wrong
                raise DecodeFailed("an image was decoded by half")
        else:
            raise DecodeFailed(f"decoding an image returned {result}")
        return result == 0

    def logits(self, count: int) -> npt.NDArray[np.float32]:
        """Return the rows of the last decode in batch order; they are valid until the next."""
        pointer = c.llama_get_logits(self._handle)
        address = ctypes.addressof(pointer.contents)
        if self._rows is None or self._rows[:2] != (address, count):
            self._rows = (address, count, np.ctypeslib.as_array(pointer, (count, self._n_vocab)))
        return self._rows[2]

    def embed(self, documents: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.float32]]:
        """Return a vector per document: at most one per slot, each of at least one token, together one batch.

        Where nothing is pooled it is that of the document's last token. Raises DecodeFailed.
        """
        if self._memory:
            c.llama_memory_clear(self._memory, False)
        self._batch.fill_documents(documents)
        result = self._compute()
        if result != 0:
            raise DecodeFailed(f"a batch of embeddings returned {result}")
        c.llama_synchronize(self._handle)
        ends = np.cumsum([len(document) for document in documents])
        return [self._vector(slot, int(end) - 1) for slot, end in enumerate(ends)]

    def _save(self, slot: int, flags: int) -> State:
        size = c.llama_state_seq_get_size_ext(self._handle, slot, flags)
        state: State = np.empty(size, np.uint8)
        written = c.llama_state_seq_get_data_ext(self._handle, _bytes_of(state), size, slot, flags)
        return state[:written]

    def _restore(self, slot: int, state: State, flags: int) -> bool:
        if not len(state):
            return False
        return bool(c.llama_state_seq_set_data_ext(self._handle, _bytes_of(state), len(state), slot, flags))

    def _vector(self, slot: int, last: int) -> npt.NDArray[np.float32]:
        if self._pooling_type == c.LLAMA_POOLING_TYPE_NONE:
            pointer = c.llama_get_embeddings_ith(self._handle, last)
        else:
            pointer = c.llama_get_embeddings_seq(self._handle, slot)
        if not pointer:
            raise DecodeFailed(f"no vector of sequence {slot}")
        return np.ctypeslib.as_array(pointer, (self._vector_width,)).copy()

    def _compute(self) -> int:
        call = c.llama_encode if self._encodes else c.llama_decode
        return int(call(self._handle, self._batch.struct))

    def _run(self) -> bool:
        result = self._compute()
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

    def fill_documents(self, documents: Sequence[npt.NDArray[np.int32]]) -> None:
        lengths = [len(document) for document in documents]
        count = sum(lengths)
        self._tokens[:count] = np.concatenate(documents)
        self._positions[:count] = np.concatenate([np.arange(length) for length in lengths])
        self._slot_pointers[:count] = np.repeat(self._slot_addresses[: len(documents)], lengths)
        self._outputs[:count] = 1
        self.struct.n_tokens = count


def _can_rank(handle: Any) -> bool:
    """Say whether the model has a classification head; without one llama.cpp gives numbers all the same.

    Its tensors cannot be asked for; files that have one name their labels, or ranking as their pooling.
    """
    metadata = read_metadata(handle)
    architecture = metadata.get("general.architecture", "")
    pooling = metadata.get(f"{architecture}.pooling_type")
    return pooling == str(_POOLING_TYPES[PoolingType.RANK]) or bool(c.llama_model_cls_label(handle, 0))


def _bytes_of(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _not_generative(handle: Any) -> str:
    if c.llama_model_has_encoder(handle):
        return "models with an encoder are not served for text generation"
    if not c.llama_model_has_decoder(handle) or c.llama_model_is_diffusion(handle):
        return "the model cannot generate text token by token"
    return ""
