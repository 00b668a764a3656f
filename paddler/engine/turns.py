"""One turn of the engine: admit, decode, ingest a chunk, and tell what became of every generation.

What takes part is decided by scheduler.py and sequences.py, what is computed by the context it is
given; nothing here knows of processes or sockets.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from paddler.engine.pipe import Advance, Generate
from paddler.engine.sampling import Logits, Sampler
from paddler.engine.scheduler import Scheduler, TurnBudget
from paddler.engine.sequences import Sequence
from paddler.messages.state import InferenceParameters

Ids = npt.NDArray[np.int32]


class Decoder(Protocol):
    """What a turn needs of context.Context."""

    @property
    def room(self) -> int: ...
    def clear(self, slot: int) -> None: ...
    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool: ...
    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool: ...
    def logits(self, count: int) -> Logits: ...


class PromptReader(Protocol):
    """Turns text into tokens, at once or, when it is long, in its own time."""

    def read(self, generation: int, text: str) -> Ids | None: ...
    def forget(self, generation: int) -> None: ...
    def finished(self) -> Iterable[tuple[int, Ids]]: ...


class Turns:
    """All generations of one context."""

    def __init__(
        self,
        context: Decoder,
        *,
        slots: int,
        parameters: InferenceParameters,
        pieces: Mapping[int, bytes],
        end_tokens: frozenset[int],
        prompts: PromptReader,
        budget: TurnBudget,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._context = context
        self._parameters = parameters
        self._pieces = pieces
        self._end_tokens = end_tokens
        self._prompts = prompts
        self._budget = budget
        self._clock = clock
        self._scheduler = Scheduler(slots=slots)
        self._texts: dict[int, str] = {}
        self._samplers: dict[int, Sampler] = {}
        self._advances: dict[int, Advance] = {}

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    @property
    def reading(self) -> bool:
        """Say whether nothing can be done before a prompt is tokenised."""
        return self._scheduler.reading

    def submit(self, command: Generate) -> None:
        self._texts[command.generation] = command.prompt
        self._scheduler.submit(Sequence(command.generation, command.max_tokens))

    def cancel(self, generation: int) -> None:
        """Stop a generation; one that ended meanwhile has been told already."""
        sequence = self._scheduler.find(generation)
        if sequence is not None:
            sequence.stop()
            self._tell(sequence, text=sequence.flush_text())

    def run(self) -> tuple[Advance, ...]:
        """Do one turn. Raises context.DecodeFailed, after which the context is of no use."""
        self._admit()
        self._decode()
        self._ingest()
        advances = tuple(self._advances.values())
        self._advances.clear()
        return advances

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            assert sequence.slot is not None
            self._context.clear(sequence.slot)
            tokens = self._prompts.read(sequence.generation, self._texts.pop(sequence.generation))
            if tokens is not None:
                self._take_prompt(sequence.generation, tokens)
        for generation, tokens in self._prompts.finished():
            self._take_prompt(generation, tokens)

    def _take_prompt(self, generation: int, tokens: Ids) -> None:
        """Begin with a prompt, unless its request was cancelled while it was read."""
        sequence = self._scheduler.find(generation)
        if sequence is None:
            return
        sequence.take_prompt(tokens, room=self._context.room)
        if sequence.finish is not None:
            self._tell(sequence)
        else:
            self._samplers[generation] = Sampler(self._parameters, tokens)

    def _decode(self) -> None:
        """Decode the pending tokens of all who generate, and sample their next ones."""
        while generating := self._scheduler.generating():
            began = self._clock()
            done = self._context.decode(
                [sequence.pending or 0 for sequence in generating],
                [sequence.position for sequence in generating],
                [sequence.slot or 0 for sequence in generating],
            )
            if not done:
                self._evict()
                continue
            rows = self._context.logits(len(generating))
            for sequence, row in zip(generating, rows, strict=True):
                sequence.position += 1
                self._sample(sequence, row)
            self._budget.decoded(self._clock() - began)
            return

    def _ingest(self) -> None:
        """Decode one chunk of the prompt whose turn it is; after its last one sample the first token."""
        sequence = self._scheduler.next_prompt()
        if sequence is None:
            return
        assert sequence.prompt is not None
        limit = self._budget.chunk_limit(company=bool(self._scheduler.generating()))
        count = sequence.next_chunk(limit)
        end = sequence.position + count
        chunk = sequence.prompt[sequence.position : end]
        last = end == sequence.prompt_tokens
        began = self._clock()
        while not self._context.ingest(chunk, sequence.position, sequence.slot or 0, want_logits=last):
            self._evict()
            if sequence.finish is not None:
                return
            began = self._clock()
        self._budget.ingested(count, self._clock() - began)
        sequence.position = end
        if last:
            self._sample(sequence, self._context.logits(1)[0])

    def _sample(self, sequence: Sequence, row: Logits) -> None:
        token = self._samplers[sequence.generation].pick(row)
        text = sequence.accept(token, self._pieces[token], is_end=token in self._end_tokens)
        self._tell(sequence, tokens=(token,), text=text)

    def _evict(self) -> None:
        victim = self._scheduler.evict()
        self._tell(victim, text=victim.flush_text())

    def _tell(self, sequence: Sequence, *, tokens: tuple[int, ...] = (), text: str = "") -> None:
        """Add to what this turn tells of a generation, and let go of it when it has ended."""
        told = self._advances.get(sequence.generation)
        if told is not None:
            tokens, text = told.tokens + tokens, told.text + text
        self._advances[sequence.generation] = Advance(
            generation=sequence.generation,
            tokens=tokens,
            text=text,
            finish=sequence.finish,
            failure=sequence.failure,
            prompt_tokens=sequence.prompt_tokens,
            cached_prompt_tokens=0,
        )
        if sequence.finish is not None:
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)
        self._texts.pop(sequence.generation, None)
        self._prompts.forget(sequence.generation)
        self._samplers.pop(sequence.generation, None)
        if sequence.slot is not None:
            self._context.clear(sequence.slot)  # in a shared pool its cells are others' room
