"""How KV cells are shared among slots, and whether the host can hold them. Pure.

Two layouts: *per slot*, each slot has `context_size` cells of its own, which is faster and makes
answers independent of what else runs; *shared*, one pool of `context_size` cells that any slot may
take all of. `auto` prefers the first while it is cheap. What cannot fit is refused here, because
llama.cpp would fill the memory first.
"""

import attrs

from paddler.config import KvLayout
from paddler.engine.pipe import EngineSettings
from paddler.messages.state import KvCacheDtype

MAX_SLOTS = 256
"""Sequences that llama.cpp allows in one context."""

_PADDING = 256
_MOST_CELLS = 2**31 - _PADDING
"""Positions are 32-bit numbers."""

_MAX_CHUNK = 512
_SHARE_FOR_AUTO = 4
_LINEAR_LAYERS = 8
"""Of a hybrid model at least one layer in this many keeps cells; which ones the metadata does not tell."""

_BYTES_OF_32 = {
    KvCacheDtype.F32: 128,
    KvCacheDtype.F16: 64,
    KvCacheDtype.BF16: 64,
    KvCacheDtype.Q8_0: 34,
    KvCacheDtype.Q5_1: 24,
    KvCacheDtype.Q5_0: 22,
    KvCacheDtype.Q4_1: 20,
    KvCacheDtype.Q4_0: 18,
    KvCacheDtype.IQ4_NL: 18,
}
_UNQUANTISED = (KvCacheDtype.F32, KvCacheDtype.F16, KvCacheDtype.BF16)


class Refused(Exception):
    """What was asked for cannot be served; the text says why."""


@attrs.frozen(kw_only=True)
class ModelShape:
    """The facts of a model that decide what a cell costs."""

    weights_bytes: int
    n_ctx_train: int
    n_layer: int
    key_width: int
    """Elements of K per cell and layer, all heads together."""
    value_width: int
    hybrid: bool
    """Some layers, or all, keep a state of fixed size instead of cells."""
    offloaded: bool
    """Weights and cells lie in the memory of a GPU, which is not known here."""


@attrs.frozen(kw_only=True)
class ContextPlan:
    """What llama.cpp is asked for."""

    layout: KvLayout
    reason: str
    slots: int
    n_ctx: int
    n_batch: int
    k_dtype: KvCacheDtype
    v_dtype: KvCacheDtype
    context_bytes: int


def check_weights(size_bytes: int, *, host_memory_bytes: int) -> None:
    """Refuse a file that the host cannot hold."""
    if size_bytes > host_memory_bytes:
        host = _megabytes(host_memory_bytes)
        raise Refused(f"its weights of {_megabytes(size_bytes)} do not fit into the host's {host}")


def plan_context(
    settings: EngineSettings, shape: ModelShape, *, host_memory_bytes: int, whole_image: int = 0
) -> ContextPlan:
    """Choose the layout and the sizes. Raises Refused.

    A decode must hold `whole_image` tokens, those of the largest image of a projection whose images
    cannot be divided, as far as the state's n_batch allows.
    """
    if not 0 < settings.slots <= MAX_SLOTS:
        raise Refused(f"a context has 1 to {MAX_SLOTS} slots, not {settings.slots}")
    parameters = settings.parameters
    v_dtype = parameters.v_cache_dtype
    if settings.exact and v_dtype not in _UNQUANTISED:
        v_dtype = KvCacheDtype.F16  # a quantised V cache needs the flash attention that `exact` turns off
    cell_bytes = _cell_bytes(shape, parameters.k_cache_dtype, v_dtype)
    asked = parameters.context_size or shape.n_ctx_train
    own_cells = settings.slots * _padded(min(asked, shape.n_ctx_train))
    pool_cells = _padded(min(asked, shape.n_ctx_train * settings.slots))
    layout, reason = _choose_layout(
        settings, shape, own_bytes=own_cells * cell_bytes, host_memory_bytes=host_memory_bytes
    )
    if v_dtype is not parameters.v_cache_dtype:
        reason += f" V cells are {v_dtype}, not {parameters.v_cache_dtype}: exact."
    if settings.exact and layout is KvLayout.SHARED:
        reason += " Answers depend on company in it, in spite of `exact`."
    n_ctx = own_cells if layout is KvLayout.PER_SLOT else pool_cells
    n_batch = _n_batch(settings, shape, whole_image)
    if parameters.enable_embeddings:
        n_ctx = max(n_ctx, _padded(n_batch))
    context_bytes = n_ctx * cell_bytes
    if n_ctx > _MOST_CELLS:
        raise Refused(f"{n_ctx} KV cells are more than llama.cpp can count")
    free = host_memory_bytes - shape.weights_bytes
    if not shape.offloaded and context_bytes > free:
        raise Refused(
            f"{n_ctx} KV cells take {_megabytes(context_bytes)}, beside the model's "
            f"{_megabytes(shape.weights_bytes)} more than the host's {_megabytes(host_memory_bytes)}"
        )
    return ContextPlan(
        layout=layout,
        reason=reason,
        slots=settings.slots,
        n_ctx=n_ctx,
        n_batch=n_batch,
        k_dtype=parameters.k_cache_dtype,
        v_dtype=v_dtype,
        context_bytes=context_bytes,
    )


def _choose_layout(
    settings: EngineSettings, shape: ModelShape, *, own_bytes: int, host_memory_bytes: int
) -> tuple[KvLayout, str]:
    if settings.parameters.enable_embeddings:
        return KvLayout.SHARED, "embeddings are computed in batches that share one pool."
    if settings.kv_layout is not KvLayout.AUTO:
        return settings.kv_layout, "chosen by the operator."
    if shape.offloaded:
        return KvLayout.SHARED, "auto: the model runs on a GPU, whose memory one pool spares."
    slots = "the slot" if settings.slots == 1 else f"{settings.slots} slots"
    host = _megabytes(host_memory_bytes)
    sizes = f"own cells for {slots} take {_megabytes(own_bytes)} of the host's {host}"
    if own_bytes * _SHARE_FOR_AUTO <= host_memory_bytes:
        return KvLayout.PER_SLOT, f"auto: {sizes}, at most a quarter."
    return KvLayout.SHARED, f"auto: {sizes}, more than a quarter."


def _n_batch(settings: EngineSettings, shape: ModelShape, whole_image: int) -> int:
    """Return the largest decode: a token of every slot must fit, and so must a whole document.

    llama.cpp tries the graph of embeddings out with the same number of tokens for each sequence, and
    aborts when these are not a whole batch (GGML_ASSERT(ggml_can_mul_mat), mean pooling, 0.5.0-dev).
    """
    asked = max(settings.parameters.n_batch, 1)
    slots = settings.slots
    if settings.parameters.enable_embeddings:
        return -(-min(asked, max(shape.n_ctx_train, 1)) // slots) * slots
    return max(min(asked, max(_MAX_CHUNK, whole_image)), slots)


def _cell_bytes(shape: ModelShape, k_dtype: KvCacheDtype, v_dtype: KvCacheDtype) -> int:
    """Estimate a cell's memory, rather too low: a model that would fit must not be refused."""
    layers = max(shape.n_layer // _LINEAR_LAYERS, 1) if shape.hybrid else shape.n_layer
    per_layer = shape.key_width * _BYTES_OF_32[k_dtype] + shape.value_width * _BYTES_OF_32[v_dtype]
    return layers * per_layer // 32


def _padded(cells: int) -> int:
    return -(-max(cells, 1) // _PADDING) * _PADDING


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
