"""What llama.cpp says to a decode that cannot be: nothing has changed, or the engine is at its end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from paddler.config import KvLayout, bundled_model_path
from paddler.engine import llama
from paddler.engine.context import Context, DecodeFailed
from paddler.engine.layout import plan_context
from paddler.engine.pipe import EngineSettings
from paddler.messages.state import DETERMINISTIC_PARAMETERS, KvCacheDtype
from tests.llama.random_models import write_recurrent_model

CELLS = 256


def context_of(path: str, *, cells: int = CELLS, threads: int = 1, exact: bool = False) -> Context:
    log = llama.LlamaLog(lambda _: None)
    model = llama.load_model(path, n_gpu_layers=0, on_progress=lambda _: True, log=log)
    settings = EngineSettings(
        model_path=path,
        slots=2,
        parameters=attrs.evolve(
            DETERMINISTIC_PARAMETERS,
            context_size=cells,
            k_cache_dtype=KvCacheDtype.F16,
            v_cache_dtype=KvCacheDtype.F16,
        ),
        kv_layout=KvLayout.SHARED,
        threads=threads,
        exact=exact,
    )
    shape = llama.shape_of(model, llama.describe(model).metadata)
    plan = plan_context(settings, shape, host_memory_bytes=10**10)
    return Context(model, plan, settings, log=log)


def test_an_exact_answer_is_the_same_with_threads_that_come_and_go() -> None:
    context = context_of(str(bundled_model_path()), threads=2, exact=True, cells=2048)

    def logits_of_a_continuation(threads: list[int]) -> list[bytes]:
        context.clear(0)
        context.use_threads(2)
        for start in range(0, 1500, 500):
            assert context.ingest(tokens(500, first=start), start, 0, want_logits=True)
        rows = [context.logits(1)[0].copy()]
        for position, count in enumerate(threads, start=1500):
            context.use_threads(count)
            assert context.decode([int(rows[-1].argmax())], [position], [0])
            rows.append(context.logits(1)[0].copy())
        return [row.tobytes() for row in rows]

    assert logits_of_a_continuation([2, 2, 1, 1, 2, 1, 2]) == logits_of_a_continuation([2] * 7)


@pytest.fixture(scope="module")
def shared_context() -> Context:
    return context_of(str(bundled_model_path()))


@pytest.fixture
def context(shared_context: Context) -> Iterator[Context]:
    yield shared_context
    for slot in range(2):
        shared_context.clear(slot)


def tokens(count: int, *, first: int = 100) -> Any:
    return np.arange(first, first + count, dtype=np.int32)


def test_no_room_for_a_chunk_or_a_step_changes_nothing(context: Context) -> None:
    assert context.ingest(tokens(200), 0, 0, want_logits=True)
    size = context.saved_bytes(0)
    assert not context.ingest(tokens(100), 0, 1, want_logits=True)
    assert context.ingest(tokens(56), 0, 1, want_logits=True)
    assert not context.decode([1, 1], [200, 56], [0, 1])
    assert context.saved_bytes(0) == size
    context.clear(1)
    assert context.decode([1], [200], [0])


@pytest.mark.parametrize(("token", "position"), [(-1, 8), (10**6, 8), (1, 20)])
def test_what_only_a_bug_could_ask_for_ends_the_engine(context: Context, token: int, position: int) -> None:
    assert context.ingest(tokens(8), 0, 0, want_logits=True)
    with pytest.raises(DecodeFailed, match="llama_decode returned -1"):
        context.decode([token], [position], [0])


def test_an_image_that_found_no_room_leaves_none_of_it_behind(context: Context) -> None:
    assert context.ingest(tokens(8), 0, 0, want_logits=True)
    size = context.saved_bytes(0)

    def decode_half(_handle: Any, _n_batch: int) -> int:
        return 0 if not context.ingest(tokens(64), 8, 0, want_logits=False) else 1

    assert not context.ingest_foreign(decode_half, 8, 0)
    assert context.saved_bytes(0) == size


def test_half_an_image_in_a_state_that_cannot_go_back_ends_the_engine(tmp_path: Path) -> None:
    write_recurrent_model(tmp_path / "model.gguf")
    context = context_of(str(tmp_path / "model.gguf"))
    assert context.ingest(tokens(8), 0, 0, want_logits=True)

    def decode_half(_handle: Any, _n_batch: int) -> int:
        return 0 if not context.ingest(tokens(64), 8, 0, want_logits=False) else 1

    assert not context.ingest_foreign(lambda *_: 1, 8, 0), "nothing was there"
    with pytest.raises(DecodeFailed, match="by half"):
        context.ingest_foreign(decode_half, 8, 0)
