"""Which tokens lie in which cells, and where a new prompt can begin behind cells that exist. Pure.

A *prefix* is a row of tokens that lie in the cells of one slot, or in a copy of such cells in the host's
memory. It is *idle* while no sequence writes to it, and stays when its sequence has ended. Prompts are
compared with prefixes in whole blocks of the grid, or up to the end of an image, which is never divided; and
at least the last token of a prompt is computed anew, for its logits. Two things bound what can be taken over:

- Only *settled* tokens count: those that were computed in whole chunks of a prompt. A tail of a chunk and
  the tokens of an answer were computed in fewer rows, which rounds differently: behind them temperature 0
  could choose other tokens than after a cold start. In a shared pool, where results depend on the
  placement of cells anyhow, all tokens count (`settled_only` is false).
- Not every memory can be cut (engine notes §3.4). A recurrent layer has a state instead of cells: there a
  prefix can be taken over only where a *checkpoint* was made, a copy of that state at the last grid line
  of a prompt.

`choose` places a prompt:

1. Another prompt that is just being ingested will soon hold more of it than anything does: wait for that.
2. An idle slot holds most of it: cut that slot there. If that would destroy what another prompt is likely
   to come back for, and there is a slot whose content is worth less, copy the prefix to that one instead.
3. Only a busy slot holds most of it: copy it (a *fork*) to the idle slot whose content is worth least.
4. Only a copy in the host's memory holds most of it: restore it into the slot that is worth least.
5. Nothing holds a block of it: begin cold in the slot that is worth least.

What a slot is worth: the blocks of its last prompt, less with every prompt that was placed since. Its
answer does not count: it is not settled, and templates often render it differently.

No key names the model or its LoRA adapters: both are the process's, for as long as it lives.

Never true: two prefixes for one slot; a prefix with more tokens than its slot has cells; a prefix that
says more than the cells hold (it may say less).
"""

from collections.abc import Iterable

import attrs
import numpy as np
import numpy.typing as npt

from paddler.engine.sequences import GRID, Ids, Prompt

State = npt.NDArray[np.uint8]
"""Cells as llama.cpp writes them into a buffer."""

_MOST_HOLDERS = 8
"""Generations remembered per prefix: the turns of a conversation, each of which holds the ones before."""

_MOST_CHECKPOINTS = 4


@attrs.frozen(eq=False)
class Checkpoint:
    """The part of a memory that cannot be cut, as it was after so many tokens."""

    tokens: int
    state: State


@attrs.define(eq=False)
class Prefix:
    """Tokens in cells."""

    tokens: Ids
    """A buffer; the first `length` are valid."""
    length: int = 0
    settled: int = 0
    prompt_tokens: int = 0
    """How many of them the last prompt had."""
    holders: list[tuple[int, int]] = attrs.Factory(list)
    """Generations whose first so many tokens these are, the newest last."""
    checkpoints: list[Checkpoint] = attrs.Factory(list)
    used: int = 0
    """When a prompt was placed here: a count of placements."""

    def append(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1

    def cut(self, length: int) -> None:
        """Forget what comes after the first `length` tokens."""
        self.length = min(self.length, length)
        self.settled = min(self.settled, length)
        self.prompt_tokens = min(self.prompt_tokens, length)
        self.holders = [(generation, min(tokens, length)) for generation, tokens in self.holders if length]
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.tokens <= length]

    def become(self, other: "Prefix", length: int) -> None:
        """Hold the first tokens of another, and for the same generations."""
        self.tokens[:length] = other.tokens[:length]
        self.length = length
        self.settled = min(other.settled, length)
        self.prompt_tokens = min(other.prompt_tokens, length)
        self.holders = [(generation, min(tokens, length)) for generation, tokens in other.holders]
        self.checkpoints = [checkpoint for checkpoint in other.checkpoints if checkpoint.tokens <= length]

    def hold(self, generation: int, tokens: int) -> None:
        self.holders.append((generation, tokens))
        del self.holders[:-_MOST_HOLDERS]

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)
        del self.checkpoints[:-_MOST_CHECKPOINTS]

    @property
    def worth(self) -> int:
        """Tokens of whole blocks that another prompt may come back for."""
        return min(self.prompt_tokens, self.length) // GRID * GRID

    @property
    def extra_bytes(self) -> int:
        """What a copy takes beside its cells."""
        checkpoints = sum(checkpoint.state.nbytes for checkpoint in self.checkpoints)
        return self.tokens.itemsize * self.length + checkpoints


@attrs.define(eq=False)
class Stored:
    """A copy of cells in the host's memory."""

    prefix: Prefix
    state: State

    @property
    def size_bytes(self) -> int:
        return self.state.nbytes + self.prefix.extra_bytes


@attrs.frozen(eq=False)
class Placement:
    """Begin in `slot` behind the first `tokens` tokens of `source`."""

    slot: int
    tokens: int = 0
    source: int | Stored | None = None
    """A slot, perhaps the same, or a stored copy; None if there are no tokens."""
    checkpoint: Checkpoint | None = None
    """To be restored on top of the source."""


class Prefixes:
    """The prefixes of one context."""

    def __init__(
        self, *, slots: int, room: int, cuttable: bool, settled_only: bool, stored_bytes: int
    ) -> None:
        self.slots = [Prefix(np.empty(room, np.int32)) for _ in range(slots)]
        self._cuttable = cuttable
        self._settled_only = settled_only
        self._most_stored_bytes = stored_bytes
        self._stored_bytes = 0
        self._stored: list[Stored] = []  # the one used last is last
        self._placements = 0

    def choose(
        self, prompt: Prompt, *, idle: Iterable[int], ingesting: Iterable[Prompt] = ()
    ) -> Placement | None:
        """Return where a prompt begins; None: behind one of the `ingesting`, but not yet.

        There must be an idle slot.
        """
        idle = set(idle)
        least = min(idle, key=lambda slot: (self._current_worth(slot), slot))
        best = Placement(least)
        for slot, prefix in enumerate(self.slots):
            tokens, checkpoint = self._reusable(prompt, prefix)
            if tokens > best.tokens or (tokens and tokens == best.tokens and best.slot not in idle):
                best = Placement(slot, tokens, slot, checkpoint)
        for stored in self._stored:
            tokens, checkpoint = self._reusable(prompt, stored.prefix)
            if tokens > best.tokens:
                best = Placement(least, tokens, stored, checkpoint)
        if self._cuttable and any(self.common(prompt, other.tokens) > best.tokens for other in ingesting):
            return None
        return self._spare(best, idle)

    def place(self, placement: Placement) -> None:
        """Write down that a placement was carried out."""
        prefix = self.slots[placement.slot]
        source = placement.source
        if isinstance(source, Stored):
            self._use(source)
            prefix.become(source.prefix, placement.tokens)
        elif source is not None and source != placement.slot:
            prefix.become(self.slots[source], placement.tokens)
        else:
            prefix.cut(placement.tokens)
        self._placements += 1
        prefix.used = self._placements

    def common(self, prompt: Prompt, tokens: Ids) -> int:
        """Return how many first tokens a prompt could take over from these.

        They end at a grid line outside spans, or with a span: there a cold start begins a chunk, too.
        """
        most = min(len(prompt) - 1, len(tokens))
        if not prompt.spans:
            most = most // GRID * GRID
            if most == 0 or prompt.tokens[GRID - 1] != tokens[GRID - 1]:
                return 0
        if most <= 0 or prompt.tokens[0] != tokens[0]:
            return 0
        differing = np.flatnonzero(prompt.tokens[:most] != tokens[:most])
        same = int(differing[0]) if len(differing) else most
        length = same // GRID * GRID
        for span in reversed(prompt.spans):
            if span.start < length < span.end:
                length = span.start // GRID * GRID
        return max([length, *(span.end for span in prompt.spans if span.end <= same)])

    def reclaimable(self, idle: Iterable[int]) -> int | None:
        """Return the idle slot that is worth least of those that hold cells."""
        holding = [slot for slot in idle if self.slots[slot].length]
        return min(holding, key=lambda slot: (self._current_worth(slot), slot), default=None)

    def worth_storing(self, slot: int, *, kept: int = 0) -> bool:
        """Say whether a copy should be made of a slot of which only `kept` tokens will stay."""
        prefix = self.slots[slot]
        worth = prefix.worth
        if not self._most_stored_bytes or worth < kept + GRID:
            return False
        held = [other for at, other in enumerate(self.slots) if at != slot]
        held += [stored.prefix for stored in self._stored]
        return not any(_begins_with(other, prefix.tokens[:worth]) for other in held)

    def can_store(self, slot: int, state_bytes: int, *, beside: Stored | None = None) -> bool:
        """Say whether a copy of a slot can be kept, if all others but one give way; that one is used next."""
        size_bytes = state_bytes + self.slots[slot].extra_bytes
        if beside is not None:
            self._use(beside)
            size_bytes += beside.size_bytes
        return size_bytes <= self._most_stored_bytes

    def store(self, slot: int, state: State) -> None:
        """Keep a copy of a slot, which must be possible; the copies used longest ago give way."""
        prefix = self.slots[slot]
        copy = attrs.evolve(
            prefix,
            tokens=prefix.tokens[: prefix.length].copy(),
            holders=list(prefix.holders),
            checkpoints=list(prefix.checkpoints),
        )
        stored = Stored(copy, state)
        for other in list(self._stored):
            if _begins_with(copy, other.prefix.tokens):
                self.drop(other)
        while self._stored_bytes + stored.size_bytes > self._most_stored_bytes:
            self.drop(self._stored[0])
        self._stored.append(stored)
        self._stored_bytes += stored.size_bytes

    def drop(self, stored: Stored) -> None:
        """Forget a copy."""
        self._stored.remove(stored)
        self._stored_bytes -= stored.size_bytes

    def held(self) -> tuple[tuple[int, int], ...]:
        """Return how many tokens of each generation can be taken over, in whole blocks, if any."""
        most: dict[int, int] = {}
        for prefix in [*self.slots, *(stored.prefix for stored in self._stored)]:
            for generation, tokens in prefix.holders:
                most[generation] = max(most.get(generation, 0), tokens // GRID * GRID)
        return tuple(sorted((generation, tokens) for generation, tokens in most.items() if tokens))

    def usable(self, prefix: Prefix) -> int:
        """Return how many of its tokens may be taken over."""
        return prefix.settled if self._settled_only else prefix.length

    def _spare(self, best: Placement, idle: set[int]) -> Placement:
        """Choose the slot for the best source: the source itself, if it is idle and cutting costs little."""
        source = best.source
        if not isinstance(source, int):
            return best
        others = idle - {source}
        least = min(others, key=lambda slot: (self._current_worth(slot), slot), default=source)
        if source in idle:
            lost = self.slots[source].worth - best.tokens
            dear = lost >= GRID and self._faded(lost, source) > self._current_worth(least)
            if least == source or not dear:
                return best
        return attrs.evolve(best, slot=least)

    def _current_worth(self, slot: int) -> float:
        return self._faded(self.slots[slot].worth, slot)

    def _faded(self, worth: int, slot: int) -> float:
        return worth / (1 + self._placements - self.slots[slot].used)

    def _reusable(self, prompt: Prompt, prefix: Prefix) -> tuple[int, Checkpoint | None]:
        """Return how many tokens of a prefix a prompt can begin behind, and the checkpoint that it takes."""
        length = self.common(prompt, prefix.tokens[: self.usable(prefix)])
        if length == 0 or self._cuttable:
            return length, None
        fitting = [checkpoint for checkpoint in prefix.checkpoints if checkpoint.tokens <= length]
        checkpoint = max(fitting, key=lambda checkpoint: checkpoint.tokens, default=None)
        return (checkpoint.tokens, checkpoint) if checkpoint is not None else (0, None)

    def _use(self, stored: Stored) -> None:
        self._stored.remove(stored)
        self._stored.append(stored)


def _begins_with(prefix: Prefix, tokens: Ids) -> bool:
    return prefix.length >= len(tokens) and bool((prefix.tokens[: len(tokens)] == tokens).all())
