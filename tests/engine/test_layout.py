"""Which KV layout, how many cells, and what a host cannot hold."""

from typing import Any

import attrs
import pytest

from paddler.config import KvLayout
from paddler.engine.layout import ContextPlan, ModelShape, Refused, check_weights, plan_context
from paddler.engine.pipe import EngineSettings
from paddler.messages.state import DEFAULT_PARAMETERS, KvCacheDtype

GB = 10**9
SHAPE = ModelShape(
    weights_bytes=GB,
    n_ctx_train=4096,
    n_layer=32,
    key_width=1024,
    value_width=1024,
    hybrid=False,
    offloaded=False,
)


def plan(
    *, memory: int = 16 * GB, shape: ModelShape = SHAPE, slots: int = 4, exact: bool = False,
    layout: KvLayout = KvLayout.AUTO, **parameters: Any,
) -> ContextPlan:  # fmt: skip
    settings = EngineSettings(
        model_path="model.gguf",
        slots=slots,
        parameters=attrs.evolve(DEFAULT_PARAMETERS, **parameters),
        kv_layout=layout,
        threads=1,
        exact=exact,
    )
    return plan_context(settings, shape, host_memory_bytes=memory)


@pytest.mark.parametrize(
    ("layout", "slots", "context_size", "n_ctx"),
    [
        (KvLayout.PER_SLOT, 4, 8192, 4 * 4096),
        (KvLayout.PER_SLOT, 4, 0, 4 * 4096),
        (KvLayout.PER_SLOT, 2, 100, 2 * 256),
        (KvLayout.PER_SLOT, 2, 300, 2 * 512),
        (KvLayout.PER_SLOT, 1, 2**32 - 1, 4096),
        (KvLayout.SHARED, 4, 8192, 8192),
        (KvLayout.SHARED, 1, 8192, 4096),
        (KvLayout.SHARED, 4, 2**32 - 1, 4 * 4096),
        (KvLayout.SHARED, 4, 0, 4096),
        (KvLayout.SHARED, 4, 1, 256),
    ],
)
def test_cells_are_clamped_to_what_the_model_knows_and_padded(
    layout: KvLayout, slots: int, context_size: int, n_ctx: int
) -> None:
    assert plan(layout=layout, slots=slots, context_size=context_size).n_ctx == n_ctx


def test_auto_gives_own_cells_while_they_take_at_most_a_quarter() -> None:
    own = 4 * 4096 * 32 * 2 * 1024 * 34 // 32
    below, above = plan(memory=4 * own), plan(memory=4 * own - 1)
    assert (below.layout, below.context_bytes) == (KvLayout.PER_SLOT, own)
    assert above.layout is KvLayout.SHARED
    assert (
        below.reason == "auto: own cells for 4 slots take 1,141 MB of the host's 4,563 MB, at most a quarter."
    )
    assert above.reason.endswith("more than a quarter.")


def test_auto_shares_on_a_gpu_and_memory_of_the_host_does_not_matter_there() -> None:
    shape = attrs.evolve(SHAPE, offloaded=True)
    assert plan(shape=shape, memory=GB).layout is KvLayout.SHARED


@pytest.mark.parametrize("slots", [0, 257, 10**6])
def test_llama_has_256_sequences(slots: int) -> None:
    with pytest.raises(Refused, match="1 to 256 slots"):
        plan(slots=slots)


def test_a_context_that_does_not_fit_beside_the_weights_is_refused() -> None:
    plan(layout=KvLayout.PER_SLOT, memory=GB + 2 * GB)
    with pytest.raises(Refused, match="KV cells take 1,141 MB"):
        plan(layout=KvLayout.PER_SLOT, memory=2 * GB)


def test_absurd_sizes_are_refused() -> None:
    shape = attrs.evolve(SHAPE, n_ctx_train=2**31 - 1, key_width=0, value_width=0)
    with pytest.raises(Refused, match=r"more than llama\.cpp can count"):
        plan(shape=shape, slots=256, context_size=2**32 - 1)
    assert plan(shape=attrs.evolve(SHAPE, n_ctx_train=0)).n_ctx == 4 * 256


def test_weights_must_fit() -> None:
    check_weights(GB, host_memory_bytes=GB)
    with pytest.raises(Refused, match="its weights of 1,001 MB"):
        check_weights(1001 * 10**6, host_memory_bytes=GB)


def test_a_hybrid_model_is_estimated_low() -> None:
    assert plan(shape=attrs.evolve(SHAPE, hybrid=True)).context_bytes * 8 == plan().context_bytes


@pytest.mark.parametrize("layout", [KvLayout.SHARED, KvLayout.PER_SLOT])
def test_exact_in_the_shared_layout_is_told_to_be_in_vain(layout: KvLayout) -> None:
    assert ("in spite of `exact`" in plan(layout=layout, exact=True).reason) == (layout is KvLayout.SHARED)
    assert "exact" not in plan(layout=layout).reason


@pytest.mark.parametrize(
    ("asked", "exact", "used"),
    [
        (KvCacheDtype.Q8_0, False, KvCacheDtype.Q8_0),
        (KvCacheDtype.Q8_0, True, KvCacheDtype.F16),
        (KvCacheDtype.IQ4_NL, True, KvCacheDtype.F16),
        (KvCacheDtype.BF16, True, KvCacheDtype.BF16),
        (KvCacheDtype.F32, True, KvCacheDtype.F32),
    ],
)
def test_exact_needs_an_unquantised_v_cache(asked: KvCacheDtype, exact: bool, used: KvCacheDtype) -> None:
    planned = plan(v_cache_dtype=asked, exact=exact)
    assert (planned.v_dtype, planned.k_dtype) == (used, KvCacheDtype.Q8_0)
    assert (f"V cells are {used}, not {asked}" in planned.reason) == (used is not asked)
    assert (f"V cells are {used}, not {asked}" in planned.reason) == (used is not asked)


@pytest.mark.parametrize(
    ("n_batch", "embeddings", "expected"),
    [
        (2048, False, 512),
        (64, False, 64),
        (1, False, 4),
        (0, False, 4),
        (2048, True, 2048),
        (2**64 - 1, True, 4096),
        (1, True, 4),
    ],
)
def test_a_batch_holds_every_slot_and_a_document(n_batch: int, embeddings: bool, expected: int) -> None:
    planned = plan(n_batch=n_batch, enable_embeddings=embeddings, context_size=256)
    assert planned.n_batch == expected
    assert not embeddings or (planned.layout is KvLayout.SHARED and planned.n_ctx >= expected)


@pytest.mark.parametrize("slots", range(1, 9))
@pytest.mark.parametrize("n_batch", [1, 2048, 2**64 - 1])
def test_a_batch_of_documents_is_a_multiple_of_the_slots(slots: int, n_batch: int) -> None:
    planned = plan(slots=slots, n_batch=n_batch, enable_embeddings=True, context_size=256)
    assert planned.n_batch % slots == 0
    assert min(n_batch, 4096) <= planned.n_batch <= planned.n_ctx
