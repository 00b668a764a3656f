"""One turn of the engine: admit, place, decode, ingest a chunk, and tell what became of every generation.

What takes part is decided by scheduler.py and sequences.py, where it is placed by cells.py, what is
computed by the context it is given; nothing here knows of processes or sockets.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from paddler.engine.cells import CellMemory, Cells
from paddler.engine.pipe import Advance, Finish, Generate, Held, Logprobs
from paddler.engine.sampling import GenerationRefused, Logits
from paddler.engine.scheduler import DecodeWidth, Scheduler, TurnBudget
from paddler.engine.sequences import Ids, Prompt, Sequence, Span
from paddler.engine.stop_strings import StopStrings

_MOST_WAITING = 32
"""Prompts for which a place is looked for in vain per turn: with 256 slots the search takes its time."""


class Decoder(CellMemory, Protocol):
    """What a turn needs of context.Context."""

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool: ...
    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool: ...
    def logits(self, count: int) -> Logits: ...


class PromptReader(Protocol):
    """Turns text into tokens, at once or, when it is long, in its own time."""

    def read(self, command: Generate) -> Prompt | None: ...
    def forget(self, generation: int) -> None: ...
    def finished(self) -> Iterable[tuple[int, Prompt]]: ...


class ImageIngester(Protocol):
    """What a turn needs of images.ImageCells; an image is what a span of a prompt has."""

    def fetch(self, image: Any) -> bool: ...
    def encode(self, image: Any) -> bool: ...
    def ingest(self, image: Any, position: int, slot: int) -> bool: ...


class TokenSampler(Protocol):
    """Chooses the tokens of one generation; sampling.Sampler."""

    @property
    def logprobs(self) -> Logprobs | None: ...
    def pick(self, row: Logits) -> int: ...


SamplerMaker = Callable[[Generate, Ids], TokenSampler]
"""Makes the sampler of a generation, given the ids of its prompt. May raise GenerationRefused, as pick()."""


class Turns:
    """All generations of one context."""

    def __init__(
        self,
        context: Decoder,
        *,
        slots: int,
        cells: Cells,
        make_sampler: SamplerMaker,
        pieces: Mapping[int, bytes],
        end_tokens: frozenset[int],
        prompts: PromptReader,
        budget: TurnBudget,
        images: ImageIngester | None = None,
        on_encoding: Callable[[int], object] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Call `on_encoding` with the generation before an image is encoded, which ends the turn."""
        self._images = images
        self._on_encoding = on_encoding
        self._context = context
        self._cells = cells
        self._make_sampler = make_sampler
        self._pieces = pieces
        self._end_tokens = end_tokens
        self._prompts = prompts
        self._budget = budget
        self._clock = clock
        self._scheduler = Scheduler(slots=slots)
        self._width = DecodeWidth()
        self._commands: dict[int, Generate] = {}
        self._samplers: dict[int, TokenSampler] = {}
        self._advances: dict[int, Advance] = {}

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    @property
    def reading(self) -> bool:
        """Say whether nothing can be done before a prompt is tokenised."""
        return self._scheduler.reading

    @property
    def only_decodes(self) -> bool:
        """Say whether the next turn has nothing to do but to decode one token each."""
        return self._scheduler.only_decodes

    def submit(self, command: Generate) -> None:
        self._commands[command.generation] = command
        stop = command.sampler.stop if command.sampler is not None else ()
        stops = StopStrings(stop) if stop else None
        self._scheduler.submit(Sequence(command.generation, command.max_tokens, stops=stops))

    def cancel(self, generation: int) -> None:
        """Stop a generation; one that ended meanwhile has been told already."""
        sequence = self._scheduler.find(generation)
        if sequence is not None:
            sequence.stop()
            self._tell(sequence, text=sequence.flush_text())

    def run(self) -> tuple[Advance, ...]:
        """Do one turn. Raises context.DecodeFailed, after which the context is of no use."""
        self._cells.begin_turn()
        self._admit()
        self._place()
        self._decode()
        self._ingest()
        advances = tuple(self._advances.values())
        self._advances.clear()
        return advances

    def held(self) -> Held | None:
        """Return whose tokens lie in cells or in memory, if that has changed since the last time."""
        return self._cells.held()

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            prompt = self._prompts.read(self._commands[sequence.generation])
            if prompt is not None:
                self._take_prompt(sequence.generation, prompt)
        for generation, prompt in self._prompts.finished():
            self._take_prompt(generation, prompt)

    def _take_prompt(self, generation: int, prompt: Prompt) -> None:
        """Begin with a prompt, unless its request was cancelled while it was read."""
        sequence = self._scheduler.find(generation)
        if sequence is None:
            return
        sequence.take_prompt(prompt, room=self._context.room)
        if sequence.finish is None:
            try:
                self._samplers[generation] = self._make_sampler(self._commands[generation], prompt.text)
            except GenerationRefused as refusal:
                sequence.refuse(refusal.finish, refusal.failure)
        if sequence.finish is not None:
            self._tell(sequence)
        else:
            self._cells.expect(sequence)

    def _place(self) -> None:
        """Give slots to the prompts that are known; some wait for cells that are being filled or copied."""
        waiting = 0
        for sequence in self._scheduler.placeable():
            waiting += not self._cells.place(sequence)
            if waiting == _MOST_WAITING:
                break

    def _decode(self) -> None:
        """Decode the pending tokens of all who generate, and sample their next ones."""
        generating = self._scheduler.generating()
        if not generating:
            return
        one_by_one = self._width.is_one_by_one(len(generating))
        began = self._clock()
        if one_by_one:
            for sequence in generating:
                self._decode_together([sequence])
        else:
            self._decode_together(generating)
        seconds = self._clock() - began
        self._width.decoded(len(generating), seconds, one_by_one=one_by_one)
        self._budget.decoded(seconds)

    def _decode_together(self, sequences: list[Sequence]) -> None:
        """Decode one batch, without those that had to yield their cells."""
        while sequences := [sequence for sequence in sequences if sequence.generating]:
            pending = [sequence.pending or 0 for sequence in sequences]
            done = self._context.decode(
                pending,
                [sequence.position - sequence.shift for sequence in sequences],
                [sequence.slot or 0 for sequence in sequences],
            )
            if not done:
                self._make_room()
                continue
            rows = self._context.logits(len(sequences))
            for sequence, token, row in zip(sequences, pending, rows, strict=True):
                sequence.position += 1
                self._cells.generated(sequence, token)
                self._sample(sequence, row)
            return

    def _ingest(self) -> None:
        """Decode a chunk of each prompt in turn while the turn has time; an image is a turn's work."""
        spent: float | None = None
        for sequence in self._scheduler.prompts():
            if not sequence.ingesting:
                continue  # it yielded its cells to one before
            span = sequence.span()
            if span is not None:
                if spent is None:
                    self._scheduler.had_turn(sequence)
                    self._ingest_image(sequence, span)
                return
            limit = self._budget.chunk_limit(company=bool(self._scheduler.generating()), spent=spent)
            if sequence.next_chunk(limit) > limit or not limit:
                return
            self._scheduler.had_turn(sequence)
            spent = (spent or 0.0) + self._ingest_chunk(sequence, limit)

    def _ingest_chunk(self, sequence: Sequence, limit: int) -> float:
        """Decode the next chunk of a prompt, after its last one sample the first token; return the time."""
        assert sequence.prompt is not None
        count = sequence.next_chunk(limit)
        end = sequence.position + count
        chunk = sequence.prompt.tokens[sequence.position : end]
        last = end == sequence.prompt_tokens
        position = sequence.prompt.position(sequence.position)
        began = self._clock()
        while not self._context.ingest(chunk, position, sequence.slot or 0, want_logits=last):
            self._make_room()
            if sequence.finish is not None:
                return 0.0
            began = self._clock()
        seconds = self._clock() - began
        self._budget.ingested(count, seconds)
        sequence.position = end
        self._cells.ingested(sequence, chunk)
        if last:
            self._sample(sequence, self._context.logits(1)[0])
        return seconds

    def _ingest_image(self, sequence: Sequence, span: Span) -> None:
        """Encode the image that is next in a prompt, or compute its cells: each is a turn's work."""
        assert self._images is not None
        assert sequence.prompt is not None
        if not self._images.fetch(span.image):
            self._on_encoding(sequence.generation)
            if not self._images.encode(span.image):
                sequence.refuse(Finish.IMAGE_INVALID, "an image of the request cannot be encoded")
                self._tell(sequence)
            return
        position = sequence.prompt.position(span.start)
        while not self._images.ingest(span.image, position, sequence.slot or 0):
            self._make_room()
            if sequence.finish is not None:
                return
        sequence.position = span.end
        self._cells.ingested(sequence, sequence.prompt.tokens[span.start : span.end])

    def _sample(self, sequence: Sequence, row: Logits) -> None:
        sampler = self._samplers[sequence.generation]
        try:
            token = sampler.pick(row)
        except GenerationRefused as refusal:
            sequence.refuse(refusal.finish, refusal.failure)
            self._tell(sequence, text=sequence.flush_text())
            return
        text = sequence.accept(token, self._pieces[token], is_end=token in self._end_tokens)
        self._tell(sequence, tokens=(token,), text=text, logprobs=sampler.logprobs)

    def _make_room(self) -> None:
        """Free idle cells, or the longest sequence's if there are none: no cell was left for a decode."""
        if self._cells.reclaim():
            return
        victim = self._scheduler.evict()
        self._tell(victim, text=victim.flush_text())
        self._cells.reclaim()

    def _tell(
        self,
        sequence: Sequence,
        *,
        tokens: tuple[int, ...] = (),
        text: str = "",
        logprobs: Logprobs | None = None,
    ) -> None:
        """Add to what this turn tells of a generation, and let go of it when it has ended."""
        told = self._advances.get(sequence.generation)
        if told is not None:
            tokens, text = told.tokens + tokens, told.text + text
            if told.logprobs is not None:
                logprobs = told.logprobs + (logprobs or ())
        self._advances[sequence.generation] = Advance(
            generation=sequence.generation,
            tokens=tokens,
            text=text,
            finish=sequence.finish,
            failure=sequence.failure,
            prompt_tokens=sequence.text_tokens,
            cached_prompt_tokens=sequence.cached_text_tokens,
            image_tokens=sequence.image_tokens,
            logprobs=logprobs,
        )
        if sequence.finish is not None:
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)
        self._commands.pop(sequence.generation, None)
        self._prompts.forget(sequence.generation)
        self._samplers.pop(sequence.generation, None)
        self._cells.release(sequence)
