"""Images in prompts, without a model: positions, turns, what can be begun behind, how long one may take."""

from typing import Any

import attrs
import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.config import KvLayout
from paddler.engine.cells import Cells
from paddler.engine.layout import plan_context
from paddler.engine.pipe import Encoding, EngineSettings, Finish, Generate, pack
from paddler.engine.prefixes import Prefixes
from paddler.engine.scheduler import TurnBudget
from paddler.engine.sequences import GRID, Ids, Prompt, Sequence, Span
from paddler.engine.turns import Turns
from paddler.errors import EngineHung
from paddler.messages.state import DEFAULT_PARAMETERS
from tests.engine import test_conversation, test_layout, test_turns

ROOM = 2000


def prompt_of(*parts: int, kind: int = 0, positions: int | None = None) -> Prompt:
    """Return a prompt of texts and images by turns, beginning with a text; images are of one kind."""
    tokens: list[int] = []
    spans: list[Span] = []
    for number, length in enumerate(parts):
        if number % 2:
            spans.append(Span(len(tokens), length, positions, f"image {number}"))
            tokens += [-1000 * length - kind - n for n in range(length)]
        else:
            tokens += [n % 7 for n in range(length)]
    return Prompt(np.array(tokens, np.int32), tuple(spans))


def chunks(prompt: Prompt, *, begin: int = 0) -> list[tuple[int, int]]:
    """Return the chunks that a prompt is ingested in, 64 tokens at a time."""
    sequence = Sequence(1, 10)
    sequence.take_prompt(prompt, room=10_000)
    sequence.place(0, cached=begin)
    found = []
    while sequence.position < len(prompt):
        count = sequence.next_chunk(GRID)
        found.append((sequence.position, count))
        sequence.position += count
    return found


lengths = st.lists(st.integers(1, 150), min_size=3, max_size=7).filter(lambda parts: len(parts) % 2 == 1)


@given(lengths, lengths, st.integers(0, 6))
def test_wherever_a_prompt_begins_its_chunks_are_those_of_a_cold_start(
    parts: list[int], others: list[int], alike: int
) -> None:
    """Otherwise results would depend on what happened to lie in the cells."""
    prompt, other = prompt_of(*parts), prompt_of(*parts[:alike], *others[alike:])
    prefixes = Prefixes(slots=1, room=10_000, cuttable=True, settled_only=True, stored_bytes=0)
    begin = prefixes.common(prompt, other.tokens)
    assert (prompt.tokens[:begin] == other.tokens[:begin]).all()
    assert begin < len(prompt)
    cold = chunks(prompt)
    assert chunks(prompt, begin=begin) == [(start, count) for start, count in cold if start >= begin]
    starts = [start for start, _ in cold]
    assert begin in starts
    before = [start for start, _ in chunks(other)]
    assert begin in [*before, len(other)]


@pytest.mark.parametrize(
    ("prompt", "held", "expected"),
    [
        (prompt_of(3, 36, 20), prompt_of(3, 36, 30), 39),
        (prompt_of(3, 36, 20), prompt_of(3, 36, 20, kind=90), 0),
        (prompt_of(3, 36, 200), prompt_of(3, 36, 230), 192),
        (prompt_of(70, 100, 20), prompt_of(70, 100, 5), 170),
        (prompt_of(70, 100, 20), prompt_of(70, 100, 5, kind=90), 64),
        (prompt_of(10, 100, 10, 100, 9), prompt_of(10, 100, 10, 80), 110),
        (prompt_of(3, 36, 20), prompt_of(3, 20), 0),
    ],
)
def test_an_image_is_taken_over_as_a_whole(prompt: Prompt, held: Prompt, expected: int) -> None:
    prefixes = Prefixes(slots=1, room=10_000, cuttable=True, settled_only=True, stored_bytes=0)
    assert prefixes.common(prompt, held.tokens) == expected


def test_tokens_and_positions_are_counted_apart() -> None:
    prompt = prompt_of(10, 50, 5, 50, 7, positions=8)
    assert (prompt.image_tokens, prompt.text_tokens(len(prompt))) == (100, 22)
    assert [prompt.position(length) for length in (0, 10, 60, 65, 115, 122)] == [0, 10, 18, 23, 31, 38]
    assert prompt_of(10, 50, 5).position(65) == 65
    assert prompt.text.tolist() == [n % 7 for length in (10, 5, 7) for n in range(length)]


@attrs.define
class Images:
    """Encodes what it is asked to, and fills cells while there are some."""

    broken: bool = False
    cells: int = ROOM
    encoded: list[str] = attrs.Factory(list)
    ingested: list[tuple[str, int, int]] = attrs.Factory(list)

    def fetch(self, image: str) -> bool:
        return image in self.encoded

    def encode(self, image: str) -> bool:
        self.encoded.append(image)
        return not self.broken

    def ingest(self, image: str, position: int, slot: int) -> bool:
        self.ingested.append((image, position, slot))
        return self.cells > 0


class Positions(test_turns.ScriptedContext):
    """Notes which positions it is given, which jump behind an image."""

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool:
        self.calls.append(("decode", positions))
        self._last = tokens
        return True

    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool:
        self.calls.append(("ingest", position, len(tokens)))
        self._last = [int(tokens[-1])] if want_logits else []
        return True


@attrs.define
class Prompts:
    prompt: Prompt

    def read(self, _: Generate) -> Prompt:
        return self.prompt

    def forget(self, generation: int) -> None:
        """Nothing is kept."""

    def finished(self) -> tuple[tuple[int, Prompt], ...]:
        return ()


def turns_of(context: Positions, prompt: Prompt, images: Images, encodings: list[int] | None = None) -> Turns:
    return Turns(
        context,
        slots=2,
        cells=Cells(context, slots=2, keep=True, stored_bytes=0),
        make_sampler=test_turns.make_greedy,
        pieces=test_turns.LETTERS,
        end_tokens=frozenset({test_turns.END}),
        prompts=Prompts(prompt),
        budget=TurnBudget(n_batch=GRID, seconds_per_token=0.001),
        images=images,
        on_encoding=(encodings if encodings is not None else []).append,
        clock=lambda: 0.0,
    )


def test_an_image_is_encoded_in_one_turn_and_ingested_in_another() -> None:
    context, images, encodings = Positions(), Images(), list[int]()
    turns = turns_of(context, prompt_of(3, 36, 5, positions=6), images, encodings)
    turns.submit(Generate(7, "", 3))
    assert turns.run() == ()
    assert (encodings, images.encoded) == ([], [])
    assert turns.run() == ()
    assert (encodings, images.encoded, images.ingested) == ([7], ["image 1"], [])
    assert turns.run() == ()
    assert images.ingested == [("image 1", 3, 0)]
    [first] = turns.run()
    assert (first.prompt_tokens, first.cached_prompt_tokens, first.image_tokens) == (8, 0, 36)
    turns.run()
    [last] = turns.run()
    assert last.finish is Finish.LENGTH
    assert context.calls == [("ingest", 0, 3), ("ingest", 9, 5), ("decode", [14]), ("decode", [15])]


def test_the_same_picture_is_neither_encoded_nor_ingested_again() -> None:
    context, images = Positions(), Images()
    turns = turns_of(context, prompt_of(3, 36, 5), images)
    context.cut = lambda slot, length: True  # type: ignore[method-assign]
    for generation in (1, 2):
        turns.submit(Generate(generation, "", 1))
        while not turns.idle:
            told = turns.run()
    assert (len(images.encoded), len(images.ingested)) == (1, 1)
    assert (told[0].prompt_tokens, told[0].cached_prompt_tokens, told[0].image_tokens) == (8, 3, 36)


def test_an_image_that_cannot_be_encoded_ends_its_request() -> None:
    turns = turns_of(Positions(), prompt_of(3, 36, 5), Images(broken=True))
    turns.submit(Generate(1, "", 3))
    turns.run()
    [told] = turns.run()
    assert told.finish is Finish.IMAGE_INVALID
    assert turns.idle


def test_an_image_without_room_is_evicted() -> None:
    turns = turns_of(Positions(), prompt_of(3, 36, 5), Images(cells=0))
    turns.submit(Generate(1, "", 3))
    told = [advance for _ in range(3) for advance in turns.run()]
    assert [advance.finish for advance in told] == [Finish.FAILED]
    assert "KV cache pressure" in told[0].failure


def test_a_prompt_that_could_not_be_made_is_refused_with_its_reason() -> None:
    too_large = Span(3, 400)
    nothing: Ids = np.empty(0, np.int32)
    turns = turns_of(Positions(), Prompt(nothing, (too_large,), Finish.IMAGE_TOO_LARGE), Images())
    turns.submit(Generate(1, "", 3))
    [told] = turns.run()
    assert (told.finish, told.image_tokens, told.prompt_tokens) == (Finish.IMAGE_TOO_LARGE, 400, 0)


@pytest.mark.parametrize(
    ("n_batch", "whole_image", "planned"),
    [(2048, 0, 512), (2048, 729, 729), (300, 729, 300), (512, 256, 512)],
)
def test_a_batch_holds_the_largest_image_that_cannot_be_divided(
    n_batch: int, whole_image: int, planned: int
) -> None:
    settings = EngineSettings(
        model_path="model.gguf",
        slots=4,
        parameters=attrs.evolve(DEFAULT_PARAMETERS, n_batch=n_batch),
        kv_layout=KvLayout.AUTO,
        threads=1,
    )
    plan = plan_context(
        settings, test_layout.SHAPE, host_memory_bytes=16 * test_layout.GB, whole_image=whole_image
    )
    assert plan.n_batch == planned


@pytest.mark.parametrize(("turns_since", "patience"), [(0, 600), (1, 30)])
async def test_an_encode_has_a_deadline_of_its_own_until_the_next_turn(
    turns_since: int, patience: float, autojump_clock: MockClock
) -> None:
    encoding_since = 0.0
    with pytest.RaisesGroup(EngineHung):
        async with test_conversation.watched(offloaded=True) as child:
            await child.theirs.send_all(pack(Encoding(1)))
            for _ in range(turns_since):
                await child.theirs.send_all(pack(test_conversation.TURN))
            await wait_all_tasks_blocked()
            encoding_since = trio.current_time()
            await trio.sleep_forever()
    assert trio.current_time() - encoding_since == pytest.approx(patience, abs=0.6)
