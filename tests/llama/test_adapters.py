"""LoRA adapters in a real engine: what they change, and files that are none."""

import os
from pathlib import Path

import numpy as np
import pytest
import trio

from paddler.config import KvLayout, bundled_model_path
from paddler.engine.pipe import Adapter
from paddler.errors import EngineDied, ModelUnavailable
from paddler.messages.state import ModelCannotBeLoaded
from tests.cluster import FIXTURES
from tests.llama.engines import chat, running
from tests.llama.lora_files import write_adapter

pytestmark = pytest.mark.slow

QUESTIONS = ["What is a slot?", "Hello", "Count to 20.", "What is a balancer?"]


async def ask(*adapters: Adapter, question: str = QUESTIONS[0]) -> tuple[int, ...]:
    async with running(adapters=adapters) as generations:
        return (await generations.ask(chat(question), max_tokens=24)).tokens


async def issue_of(path: Path) -> object:
    """Return the one issue of an engine with this adapter."""
    with pytest.raises(ModelUnavailable) as refusal:
        await ask(Adapter(str(path), 1.0))
    [issue] = refusal.value.issues
    return issue


async def test_an_adapter_changes_the_answer_by_its_scale(tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "a.gguf"))
    plain = await ask()
    assert await ask(Adapter(path, 0.0)) == plain
    changed = await ask(Adapter(path, 1.0))
    assert changed != plain
    assert await ask(Adapter(path, 1.0)) == changed
    assert await ask(Adapter(path, -1.0)) not in (plain, changed)


async def test_adapters_add_up(tmp_path: Path) -> None:
    one = str(write_adapter(tmp_path / "a.gguf"))
    other = str(write_adapter(tmp_path / "b.gguf", seed=2))
    assert await ask(Adapter(one, 1.0), Adapter(one, -1.0)) == await ask()
    both = await ask(Adapter(one, 1.0), Adapter(other, 1.0))
    assert both not in (await ask(Adapter(one, 1.0)), await ask(Adapter(other, 1.0)))
    assert await ask(Adapter(other, 1.0), Adapter(one, 1.0)) == both


@pytest.mark.parametrize(("threads", "exact"), [(1, False), (2, True)])
async def test_with_an_adapter_an_answer_is_the_same_cold_warm_and_in_company(
    tmp_path: Path, threads: int, exact: bool
) -> None:
    adapters = (Adapter(str(write_adapter(tmp_path / "a.gguf")), 0.7),)
    async with running(
        adapters=adapters, kv_layout=KvLayout.PER_SLOT, threads=threads, exact=exact
    ) as generations:
        cold = [(await generations.ask(chat(question), max_tokens=24)).tokens for question in QUESTIONS]
        warm = [(await generations.ask(chat(question), max_tokens=24)).tokens for question in QUESTIONS]
        started = [generations.start(chat(question), max_tokens=24) for question in QUESTIONS]
        company = [(await generations.answer(generation)).tokens for generation in started]
    assert cold == warm == company


async def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    for path in (
        write_adapter(tmp_path / "architecture.gguf", architecture="llama"),
        write_adapter(tmp_path / "width.gguf", width=64),
        write_adapter(tmp_path / "activated.gguf", invocation_tokens=(5, 6)),
        bundled_model_path(),
        FIXTURES / "paddler-tiny-vision-mmproj.gguf",
    ):
        assert await issue_of(path) == ModelCannotBeLoaded(str(path))


async def test_what_is_no_adapter_is_named(tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "whole.gguf").read_bytes()
    os.mkfifo(tmp_path / "fifo.gguf")
    damaged = [b"", b"GGUF", b"no adapter at all" * 10, whole[:100], whole[: len(whole) // 2], whole[:-1]]
    paths = [tmp_path / f"{number}.gguf" for number, _ in enumerate(damaged)]
    for path, content in zip(paths, damaged, strict=True):
        path.write_bytes(content)
    with trio.fail_after(30):
        for path in (*paths, tmp_path / "missing.gguf", tmp_path, tmp_path / "fifo.gguf", tmp_path / "nul\0"):
            assert await issue_of(path) == ModelCannotBeLoaded(str(path))


async def test_the_reason_names_the_file_and_what_llama_says(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", architecture="llama")
    with pytest.raises(ModelUnavailable, match=f"{path} cannot be loaded: .*arch mismatch"):
        await ask(Adapter(str(path), 1.0))
    path = write_adapter(tmp_path / "b.gguf", invocation_tokens=(5, 6))
    with pytest.raises(ModelUnavailable, match="aLoRA"):
        await ask(Adapter(str(path), 1.0))


async def test_the_second_of_two_adapters_is_the_one_at_fault(tmp_path: Path) -> None:
    good = Adapter(str(write_adapter(tmp_path / "good.gguf")), 1.0)
    bad = Adapter(str(bundled_model_path()), 1.0)
    with pytest.raises(ModelUnavailable) as refusal:
        await ask(good, bad)
    assert refusal.value.issues == (ModelCannotBeLoaded(bad.path),)


async def test_an_adapter_that_llama_dies_of_ends_its_engine_only(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "integers.gguf", strength=1, dtype=np.int32)
    with pytest.raises(EngineDied):
        await ask(Adapter(str(path), 1.0))
    assert await ask()
