"""A real engine process for tests: generations are started, and their answers collected."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from paddler.config import EngineTimeouts, KvLayout, bundled_model_path
from paddler.engine.handle import Engine, open_engine
from paddler.engine.pipe import Advance, EngineSettings, Finish, Held, Logprobs, ModelDescription
from paddler.messages.state import DETERMINISTIC_PARAMETERS

SHORT = EngineTimeouts(start=10, load_silence=5, step=5, standstill=0.4, stop=1)
PATIENCE = 20.0


def chat(question: str) -> str:
    """Return the prompt that the bundled model's template makes of a question, thinking off."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@attrs.define
class Answer:
    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    image_tokens: int = 0
    finish: Finish | None = None
    failure: str = ""
    logprobs: Logprobs = ()


class Generations:
    """The generations of one engine and what they have answered so far."""

    def __init__(self, engine: Engine, turns: "Turns") -> None:
        self.engine = engine
        self._turns = turns
        self._ids = itertools.count(1)

    def start(self, prompt: str, *, max_tokens: int = 300, **more: Any) -> int:
        generation = next(self._ids)
        self._turns.answers[generation] = Answer()
        self.engine.generate(generation, prompt=prompt, max_tokens=max_tokens, **more)
        return generation

    async def answer(self, generation: int) -> Answer:
        """Wait until a generation has ended."""
        answer = self._turns.answers[generation]
        await self._turns.wait_until(lambda: answer.finish is not None)
        return answer

    async def ask(self, prompt: str, *, max_tokens: int = 300, **more: Any) -> Answer:
        return await self.answer(self.start(prompt, max_tokens=max_tokens, **more))

    async def tokens_of(self, generation: int, count: int) -> None:
        """Wait until a generation has at least so many tokens."""
        await self._turns.wait_until(lambda: len(self._turns.answers[generation].tokens) >= count)

    def __getitem__(self, generation: int) -> Answer:
        return self._turns.answers[generation]

    async def holding(self, expected: dict[int, int]) -> None:
        """Wait until the engine says that it holds so many tokens of these generations, and of no others."""
        await self._turns.wait_until(lambda: dict(self._turns.held) == expected)


class Turns:
    """Takes what on_turn brings."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.held: tuple[tuple[int, int], ...] = ()
        self._news = trio.Event()

    def take(self, advances: list[Advance]) -> None:
        for advance in advances:
            answer = self.answers[advance.generation]
            assert answer.finish is None, "nothing comes after the end"
            answer.text += advance.text
            answer.tokens += advance.tokens
            answer.prompt_tokens = advance.prompt_tokens
            answer.cached_prompt_tokens = advance.cached_prompt_tokens
            answer.image_tokens = advance.image_tokens
            answer.finish = advance.finish
            answer.failure = advance.failure
            answer.logprobs += advance.logprobs or ()
        self._news.set()

    def take_held(self, held: Held) -> None:
        self.held = held.prefixes
        self._news.set()

    async def wait_until(self, condition: Any) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():
                self._news = trio.Event()
                await self._news.wait()


def settings(**changes: Any) -> EngineSettings:
    """Return settings for the bundled model: parameters by their names, everything else by its own."""
    names = {field.name for field in attrs.fields(type(DETERMINISTIC_PARAMETERS))}
    parameters = {name: changes.pop(name) for name in list(changes) if name in names}
    plain = EngineSettings(
        model_path=str(bundled_model_path()),
        slots=4,
        parameters=attrs.evolve(DETERMINISTIC_PARAMETERS, **{"context_size": 1024, **parameters}),
        kv_layout=KvLayout.AUTO,
        threads=1,
    )
    return attrs.evolve(plain, **changes)


async def accept_model(_: ModelDescription) -> None:
    """Let any model pass."""


def ignore_progress(done: int, total: int) -> None:
    """Progress of no interest."""


@asynccontextmanager
async def running(*, timeouts: EngineTimeouts = SHORT, **changes: Any) -> AsyncIterator[Generations]:
    """Run an engine for the block."""
    turns = Turns()
    async with open_engine(
        settings(**changes),
        timeouts=timeouts,
        on_model=accept_model,
        on_progress=ignore_progress,
        on_turn=turns.take,
        on_held=turns.take_held,
    ) as engine:
        yield Generations(engine, turns)


def child_pids() -> list[int]:
    """Return the processes of this one."""
    children = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in children for pid in task.read_text().split()]
