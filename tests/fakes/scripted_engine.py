"""A stand-in for engine.handle.open_engine: it ticks on the Trio clock and answers from a script."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager

import attrs
import trio

from paddler.config import EngineTimeouts, KvLayout
from paddler.engine.pipe import (
    Advance,
    Capacity,
    Embedded,
    EngineSettings,
    Finish,
    GrammarRule,
    Held,
    ModelDescription,
    Picture,
    SamplerSettings,
)
from paddler.errors import EngineFailed
from paddler.messages.inference import NormalizationMethod

END_TOKEN = 2
CONTROL_TOKENS = {END_TOKEN: "<|im_end|>", 3: "<think>", 4: "</think>"}

SIMPLE_TEMPLATE = "{{ messages[-1].content }}{% if add_generation_prompt %}|answer:{% endif %}"

Script = Callable[[str], Iterable[str | int]]
"""What to answer to a prompt: visible tokens as text, control tokens as numbers."""


def model(*, chat_template: str | None = SIMPLE_TEMPLATE, architecture: str = "scripted") -> ModelDescription:
    """Describe a model; give another template or architecture to tell models apart."""
    return ModelDescription(
        metadata={"tokenizer.chat_template": chat_template or "", "general.architecture": architecture},
        chat_template=chat_template,
        bos_text="<s>",
        eos_text="</s>",
        nl_text="\n",
        control_tokens=CONTROL_TOKENS,
        size_bytes=1000,
        n_params=1000,
        n_vocab=1000,
        n_ctx_train=4096,
    )


def echo(prompt: str) -> Iterator[str | int]:
    """Answer with the words of the prompt, each a token."""
    return iter(prompt.replace(" ", " \0").split("\0"))


@attrs.define
class _Generation:
    prompt: str
    tokens: Iterator[str | int]
    max_tokens: int
    produced: int = 0
    is_cancelled: bool = False


class ScriptedEngine:
    """A serving engine. Every `turn` seconds each slot gets one token."""

    def __init__(
        self,
        description: ModelDescription,
        settings: EngineSettings,
        *,
        script: Script,
        turn: float,
        on_turn: Callable[[list[Advance]], None],
    ) -> None:
        self.description = description
        self.capacity = Capacity(
            layout=KvLayout.PER_SLOT,
            reason="scripted",
            slots=settings.slots,
            cells_per_slot=4096,
            context_bytes=0,
            warm_up_seconds=0.0,
        )
        self.prompts: list[str] = []
        self.cancelled: list[int] = []
        self.embeddings: dict[int, tuple[str, ...]] = {}
        self._script = script
        self._turn = turn
        self._on_turn = on_turn
        self._generations: dict[int, _Generation] = {}
        self._failure: EngineFailed | None = None
        self._woken = trio.Event()

    def generate(
        self,
        generation: int,
        *,
        prompt: str,
        max_tokens: int,
        sampler: SamplerSettings | None = None,
        grammar: GrammarRule | None = None,
        pictures: tuple[Picture, ...] = (),
    ) -> None:
        """Follow the script; it knows no samplers, grammars and pictures."""
        assert (sampler, grammar, pictures) == (None, None, ())
        self.prompts.append(prompt)
        self._generations[generation] = _Generation(prompt, iter(self._script(prompt)), max_tokens)
        self._woken.set()

    def embed(
        self, generation: int, *, documents: tuple[str, ...], normalization_method: NormalizationMethod
    ) -> None:
        """Wait for what the test says of these documents."""
        self.embeddings[generation] = documents

    def cancel(self, generation: int) -> None:
        self.cancelled.append(generation)
        if generation in self._generations:
            self._generations[generation].is_cancelled = True

    def die(self, failure: EngineFailed) -> None:
        """Fail like an engine whose process is gone."""
        self._failure = failure
        self._woken.set()

    async def run(self) -> None:
        while True:
            if not self._generations and self._failure is None:
                self._woken = trio.Event()
                await self._woken.wait()
            if self._failure is None:
                await trio.sleep(self._turn)
            if self._failure is not None:
                raise self._failure
            busy = [*self._generations][: self.capacity.slots]
            self._on_turn([self._advance(number) for number in busy])

    def _advance(self, number: int) -> Advance:
        generation = self._generations[number]
        tokens: tuple[int, ...] = ()
        text = ""
        finish: Finish | None = None
        failure = ""
        if generation.is_cancelled:
            finish = Finish.STOPPED
        else:
            try:
                token = next(generation.tokens, END_TOKEN)
            except ArithmeticError as error:  # a script's way to fail
                token, finish, failure = "", Finish.FAILED, str(error)
            tokens, text = ((100,), token) if isinstance(token, str) else ((token,), "")
            generation.produced += 1
            if finish is None and token == END_TOKEN:
                finish = Finish.END
            elif finish is None and generation.produced >= generation.max_tokens:
                finish = Finish.LENGTH
        if finish is not None:
            del self._generations[number]
        return Advance(
            generation=number,
            tokens=tokens,
            text=text,
            finish=finish,
            failure=failure,
            prompt_tokens=len(generation.prompt.split()),
            cached_prompt_tokens=0,
        )


@attrs.define
class ScriptedEngines:
    """Opens scripted engines one after the other; give its `open_engine` to what needs one."""

    script: Script = echo
    turn: float = 0.01
    load_time: float = 0.1
    models: dict[str, ModelDescription] = attrs.Factory(dict)
    """By path; any other path has `model()`."""
    refusals: deque[Exception] = attrs.Factory(deque)
    """Raised, one each, by the next loads."""
    loads: list[EngineSettings] = attrs.Factory(list)
    running: list[ScriptedEngine] = attrs.Factory(list)

    @property
    def current(self) -> ScriptedEngine:
        [engine] = self.running
        return engine

    @asynccontextmanager
    async def open_engine(
        self,
        settings: EngineSettings,
        *,
        timeouts: EngineTimeouts,
        on_model: Callable[[ModelDescription], Awaitable[None]],
        on_progress: Callable[[int, int], None],
        on_turn: Callable[[list[Advance]], None],
        on_embedded: Callable[[Embedded], None] = lambda _: None,
        on_held: Callable[[Held], None] = lambda _: None,
    ) -> AsyncIterator[ScriptedEngine]:
        self.loads.append(settings)
        description = self.models.get(settings.model_path, model())
        on_progress(description.size_bytes // 2, description.size_bytes)
        await trio.sleep(self.load_time)
        if self.refusals:
            raise self.refusals.popleft()
        await on_model(description)
        engine = ScriptedEngine(description, settings, script=self.script, turn=self.turn, on_turn=on_turn)
        failure: Exception | None = None
        self.running.append(engine)
        try:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(engine.run)
                yield engine
                tasks.cancel_scope.cancel()
        except* EngineFailed as group:
            failure = group.exceptions[0]
        finally:
            self.running.remove(engine)
        if failure is not None:
            raise failure
