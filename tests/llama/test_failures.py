"""A real engine process that cannot load, dies, hangs, or is left: what its agent gets, what stays behind."""

import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from paddler.config import bundled_model_path
from paddler.engine.handle import open_engine
from paddler.engine.pipe import Finish, ModelDescription
from paddler.errors import EngineDied, EngineHung, ModelUnavailable
from paddler.messages.state import ModelCannotBeLoaded, PoolingType, SlotCannotStart, UnableToFindChatTemplate
from tests.llama.engines import (
    SHORT,
    Generations,
    Turns,
    accept_model,
    chat,
    child_pids,
    ignore_progress,
    running,
    settings,
)

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parent.parent / "fixtures"
ENDLESS = "a b a b a b a b a b"


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Any:
    """Compare processes and file descriptors before and after."""
    before = open_fds()
    yield
    assert child_pids() == []
    assert open_fds() == before


async def issues_of(**changes: Any) -> tuple[object, ...]:
    with pytest.raises(ModelUnavailable) as caught:
        async with running(**changes):
            pass
    return caught.value.issues


def whole() -> bytes:
    return bundled_model_path().read_bytes()


def wrong_shape() -> bytes:
    """Return a file whose embedding_length is 191 instead of 192."""
    key = b"qwen3.embedding_length"
    data = bytearray(whole())
    value = data.index(key) + len(key) + 4
    data[value : value + 4] = (191).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"GGUF",
        lambda: os.urandom(5000),
        lambda: whole()[:-1],
        lambda: whole()[:1_000_000],
        lambda: whole()[:2000],
        lambda: whole()[:4] + b"\xff" * 20 + whole()[24:],
        wrong_shape,
    ],
)
async def test_a_damaged_file_is_an_issue(tmp_path: Path, content: Callable[[], bytes]) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content())
    assert await issues_of(model_path=str(path)) == (ModelCannotBeLoaded(str(path)),)


async def test_what_is_no_model_is_an_issue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "paddler.engine")
    os.mkfifo(tmp_path / "fifo.gguf")
    split = "model-00001-of-00002.gguf"
    (tmp_path / split).write_bytes(whole())
    for path in (
        tmp_path / "missing.gguf",
        tmp_path,
        tmp_path / "fifo.gguf",
        tmp_path / split,
        tmp_path / "nul\0.gguf",
        FIXTURES / "paddler-tiny-vision-mmproj.gguf",
    ):
        assert await issues_of(model_path=str(path)) == (ModelCannotBeLoaded(str(path)),)
    assert "CLIP cannot be used as main model" in caplog.text


async def test_more_memory_than_the_host_has_is_refused_before_llama_is_asked() -> None:
    [weights] = await issues_of(host_memory_bytes=3_000_000)
    assert isinstance(weights, ModelCannotBeLoaded)
    issues = await issues_of(host_memory_bytes=3_500_000)
    assert [issue.slot_index for issue in issues if isinstance(issue, SlotCannotStart)] == [0, 1, 2, 3]
    assert "KV cells take" in str(issues[0])


async def test_257_slots_cannot_start_and_256_do() -> None:
    issues = await issues_of(slots=257)
    assert len(issues) == 257
    assert issues[256] == SlotCannotStart("a context has 1 to 256 slots, not 257", 256)
    async with running(slots=256, context_size=256) as generations:
        started = [generations.start(chat("Hello"), max_tokens=2) for _ in range(300)]
        for generation in started:
            assert (await generations.answer(generation)).finish == Finish.LENGTH


@pytest.mark.parametrize("pooling", [pooling for pooling in PoolingType if pooling != PoolingType.RANK])
async def test_an_embedding_model_loads_and_reports_its_slots(pooling: PoolingType) -> None:
    path = FIXTURES / "paddler-tiny-embed.gguf"
    for n_batch in (1, 2048, 2**64 - 1):
        async with running(
            model_path=str(path), enable_embeddings=True, pooling_type=pooling, n_batch=n_batch
        ) as generations:
            assert generations.engine.capacity.slots == 4


@pytest.mark.parametrize("slots", range(1, 9))
async def test_an_embedding_model_loads_with_any_number_of_slots(slots: int) -> None:
    path = FIXTURES / "paddler-tiny-embed.gguf"
    async with running(
        model_path=str(path), enable_embeddings=True, pooling_type=PoolingType.MEAN, n_batch=2048, slots=slots
    ) as generations:
        assert generations.engine.capacity.slots == slots


async def test_the_description_is_that_of_the_file_and_progress_counts_its_bytes() -> None:
    progress: list[tuple[int, int]] = []
    seen: list[ModelDescription] = []

    async def on_model(description: ModelDescription) -> None:
        seen.append(description)

    async with open_engine(
        settings(),
        timeouts=SHORT,
        on_model=on_model,
        on_progress=lambda done, total: progress.append((done, total)),
        on_turn=Turns().take,
    ) as engine:
        [description] = seen
        assert engine.description == description
    size = bundled_model_path().stat().st_size
    assert (progress[0], progress[-1]) == ((0, size), (size, size))
    assert progress == sorted(progress)
    assert len(progress) > 10
    assert description.metadata["general.architecture"] == "qwen3"
    assert (description.chat_template or "").startswith("{#-")
    assert description.control_tokens[3639] == description.eos_text == "<|im_end|>"
    assert (description.bos_text, description.nl_text) == ("<|endoftext|>", "\n")


async def test_a_refusal_of_the_caller_is_raised_as_it_is() -> None:
    async def refuse(_: ModelDescription) -> None:
        raise ModelUnavailable((UnableToFindChatTemplate("here"),))

    with pytest.raises(ModelUnavailable, match="here"):
        async with open_engine(
            settings(), timeouts=SHORT, on_model=refuse, on_progress=ignore_progress, on_turn=Turns().take
        ):
            pytest.fail("not reached")


async def test_an_exception_of_the_block_is_raised_as_it_is() -> None:
    cause = ValueError("cause")
    with pytest.raises(KeyError) as caught:
        async with running():
            raise KeyError("mine") from cause
    assert caught.value.__cause__ is cause


async def under_load(attack: Callable[[int], None]) -> tuple[Exception, float]:
    """Do something to the process of an engine with 4 open generations; return how that ended, and when."""
    attacked = 0.0

    async def serve_under_attack() -> None:
        nonlocal attacked
        async with running(context_size=4096) as generations:
            started = [generations.start(ENDLESS, max_tokens=4000) for _ in range(4)]
            for generation in started:
                await generations.tokens_of(generation, 2)
            attacked = trio.current_time()
            attack(child_pids()[0])
            await trio.sleep(5)

    with pytest.raises((EngineDied, EngineHung)) as caught:
        await serve_under_attack()
    return caught.value, trio.current_time() - attacked


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGTERM])
async def test_a_killed_engine_is_told_at_once(number: signal.Signals) -> None:
    error, seconds = await under_load(lambda pid: os.kill(pid, number))
    assert isinstance(error, EngineDied)
    assert error.cause == number.name
    assert seconds < 1


async def test_a_stopped_engine_is_hung_after_the_standstill() -> None:
    error, seconds = await under_load(lambda pid: os.kill(pid, signal.SIGSTOP))
    assert isinstance(error, EngineHung)
    assert SHORT.standstill <= seconds < 2 * SHORT.standstill + 0.2


async def test_ctrl_c_is_for_the_agent() -> None:
    async with running() as generations:
        os.kill(child_pids()[0], signal.SIGINT)
        assert (await generations.ask(chat("What is 7 + 8?"))).text == "7 + 8 = 15."


async def test_an_idle_engine_cannot_hang_and_a_stopped_one_is_noticed_with_the_next_request() -> None:
    rested = False

    async def serve_stopped() -> None:
        nonlocal rested
        async with running() as generations:
            os.kill(child_pids()[0], signal.SIGSTOP)
            await trio.sleep(2 * SHORT.standstill)
            rested = True
            await generations.ask(chat("Hello"))

    with pytest.raises(EngineHung):
        await serve_stopped()
    assert rested


async def test_an_engine_without_a_sign_of_life_is_hung_although_it_computes() -> None:
    """A prompt's first chunk of 512 tokens takes longer than this step."""
    timeouts = attrs.evolve(SHORT, step=0.01, standstill=0.04)
    with pytest.raises(EngineHung):
        async with running(context_size=4096, timeouts=timeouts) as generations:
            await generations.ask("0123456789" * 300)


async def test_a_long_prompt_is_no_hang() -> None:
    timeouts = attrs.evolve(SHORT, standstill=0.2)
    async with running(context_size=4096, timeouts=timeouts) as generations:
        answer = await generations.ask("0123456789" * 150, max_tokens=2)
    assert answer.finish == Finish.LENGTH


async def test_stopped_while_loading_is_hung() -> None:
    def stop_it(done: int, _: int) -> None:
        if done == 0:
            os.kill(child_pids()[0], signal.SIGSTOP)

    began = trio.current_time()
    with pytest.raises(EngineHung):
        async with open_engine(
            settings(), timeouts=SHORT, on_model=accept_model, on_progress=stop_it, on_turn=Turns().take
        ):
            pytest.fail("not reached")
    assert trio.current_time() - began < 2.5


async def test_killed_while_loading_is_dead() -> None:
    def kill_it(done: int, _: int) -> None:
        if done == 0:
            os.kill(child_pids()[0], signal.SIGKILL)

    with pytest.raises(EngineDied, match="SIGKILL"):
        async with open_engine(
            settings(), timeouts=SHORT, on_model=accept_model, on_progress=kill_it, on_turn=Turns().take
        ):
            pytest.fail("not reached")


async def test_a_load_can_be_cancelled() -> None:
    with trio.CancelScope() as load:
        began = trio.current_time()
        async with open_engine(
            settings(),
            timeouts=attrs.evolve(SHORT, stop=30),
            on_model=accept_model,
            on_progress=lambda _done, _total: load.cancel(),
            on_turn=Turns().take,
        ):
            pytest.fail("not reached")
    assert load.cancelled_caught
    assert trio.current_time() - began < 2


async def test_cancelled_with_open_generations_ends_politely() -> None:
    with trio.CancelScope() as serving:
        async with running(timeouts=attrs.evolve(SHORT, stop=30)) as generations:
            for _ in range(8):
                generations.start("0123456789", max_tokens=1000)
            began = trio.current_time()
            serving.cancel()
            await trio.sleep_forever()
    assert trio.current_time() - began < 1


async def test_a_stopped_engine_is_killed_when_it_does_not_end_in_time() -> None:
    async with running(timeouts=attrs.evolve(SHORT, stop=0.1)):
        os.kill(child_pids()[0], signal.SIGSTOP)


async def test_a_failing_engine_is_told_with_its_last_words(caplog: pytest.LogCaptureFixture) -> None:
    """A command that the agent never sends: the loop ends with a traceback."""

    async def break_it(generations: Generations) -> None:
        generations.engine.generate("no number", prompt=None, max_tokens=1)  # type: ignore[arg-type]
        await trio.sleep(5)

    with pytest.raises(EngineDied) as caught:
        async with running() as generations:
            await break_it(generations)
    assert caught.value.cause == "exit code 1"
    assert "NoneType" in caught.value.last_words
    assert "Traceback" in caplog.text


def test_the_engine_dies_with_its_agent_and_does_not_depend_on_the_directory(tmp_path: Path) -> None:
    """The agent is killed while its engine computes."""
    (tmp_path / "attrs.py").write_text("raise SystemExit('imported from the current directory')")
    agent = f"""
import sys
sys.path[:] = {[entry or str(Path.cwd()) for entry in sys.path]!r}
import os, signal, trio
from tests.llama.engines import child_pids, running
async def main():
    async with running(context_size=4096) as generations:
        one = generations.start("a b a b a b a b a b", max_tokens=4000)
        await generations.tokens_of(one, 2)
        print(child_pids()[0], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""
    run = subprocess.run([sys.executable, "-P", "-c", agent], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    pid = int(run.stdout)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the engine outlived its agent"


def limit_for(spare: int) -> int:
    """Return the limit of file descriptors that leaves exactly so many."""
    used = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    return next(limit for limit in itertools.count() if limit - sum(fd < limit for fd in used) == spare + 1)


@pytest.mark.parametrize("spare", range(5))
async def test_an_engine_that_cannot_be_spawned_counts_as_dead(spare: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit_for(spare), hard))
    try:
        with pytest.raises(EngineDied, match="Too many open files"):
            async with running():
                pytest.fail("not reached")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
