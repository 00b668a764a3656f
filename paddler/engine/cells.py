"""Who writes into which cells: prompts are placed behind what cells hold already, and nothing is freed early.

What is decided in prefixes.py is carried out here. At most one copy of cells is made per turn, so that
those who generate wait for one at most.
"""

from typing import Protocol

from paddler.engine.pipe import Held
from paddler.engine.prefixes import Checkpoint, Placement, Prefixes, State, Stored
from paddler.engine.sequences import GRID, Ids, Sequence


class CellMemory(Protocol):
    """What is needed of context.Context; a slot is one of its sequences."""

    @property
    def room(self) -> int: ...
    @property
    def cuttable(self) -> bool: ...
    @property
    def storable(self) -> bool: ...
    @property
    def shared(self) -> bool: ...
    def clear(self, slot: int) -> None: ...
    def cut(self, slot: int, length: int) -> bool: ...
    def copy(self, source: int, slot: int, length: int) -> bool: ...
    def saved_bytes(self, slot: int) -> int: ...
    def save(self, slot: int) -> State: ...
    def restore(self, slot: int, state: State) -> bool: ...
    def save_checkpoint(self, slot: int) -> State: ...
    def restore_checkpoint(self, slot: int, state: State) -> bool: ...


class Cells:
    """The cells of one context and the sequences that write into them."""

    def __init__(self, context: CellMemory, *, slots: int, keep: bool, stored_bytes: int) -> None:
        """Keep what ended sequences leave, if `keep`, and up to so many bytes of copies of it."""
        self._context = context
        self._keep = keep = keep and (context.cuttable or context.storable)
        self._prefixes = Prefixes(
            slots=slots,
            room=context.room,
            cuttable=context.cuttable,
            settled_only=not context.shared,
            stored_bytes=stored_bytes if keep and context.storable else 0,
        )
        self._idle = set(range(slots))
        self._writers: dict[int, Sequence] = {}
        self._known: dict[int, int] = {}  # generations whose prompts are read but not yet placed
        self._told: tuple[tuple[int, int], ...] = ()
        self._changed = False
        self._may_copy = True

    def begin_turn(self) -> None:
        self._may_copy = True

    def expect(self, sequence: Sequence) -> None:
        """Take note of a prompt that will be placed: whoever continues it is at home here."""
        self._known[sequence.generation] = sequence.prompt_tokens
        self._changed = True

    def place(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and what there is of its prompt; false if it has to wait for that."""
        assert sequence.prompt is not None
        ingesting = [writer.prompt for writer in self._writers.values() if writer.ingesting and writer.prompt]
        if not self._keep:
            placement: Placement | None = Placement(min(self._idle))
        else:
            placement = self._prefixes.choose(sequence.prompt, idle=self._idle, ingesting=ingesting)
        if placement is None or not self._make_way(placement):
            return False
        if not self._carry_out(placement, sequence.prompt.position(placement.tokens)):
            if isinstance(placement.source, Stored):
                self._prefixes.drop(placement.source)
            self._context.clear(placement.slot)
            placement = Placement(placement.slot)
        self._prefixes.place(placement)
        pause = sequence.prompt.last_line if self._keep and not self._context.cuttable else 0
        sequence.place(placement.slot, cached=placement.tokens, pause=pause)
        prefix = self._prefixes.slots[placement.slot]
        prefix.prompt_tokens = sequence.prompt_tokens
        prefix.hold(sequence.generation, self._known.pop(sequence.generation, sequence.prompt_tokens))
        self._idle.remove(placement.slot)
        self._writers[placement.slot] = sequence
        self._changed = True
        return True

    def generated(self, sequence: Sequence, token: int) -> None:
        """Take note of the next token in the cells of a sequence that generates."""
        assert sequence.slot is not None
        self._prefixes.slots[sequence.slot].append(token)

    def ingested(self, sequence: Sequence, tokens: Ids) -> None:
        """Take note of the next chunk in the cells of a sequence, up to its `position`."""
        assert sequence.slot is not None
        prefix = self._prefixes.slots[sequence.slot]
        prefix.tokens[prefix.length : sequence.position] = tokens
        prefix.length = sequence.position
        prefix.settled = max(prefix.settled, sequence.position // GRID * GRID)
        if len(tokens) and tokens[-1] < 0:  # an image, which was computed as a whole
            prefix.settled = sequence.position
        if sequence.position == sequence.pause:
            state = self._context.save_checkpoint(sequence.slot)
            prefix.add_checkpoint(Checkpoint(sequence.position, state))

    def release(self, sequence: Sequence) -> None:
        """Let the cells of an ended sequence be used by others, or free them."""
        self._changed |= self._known.pop(sequence.generation, None) is not None
        slot = sequence.slot
        if slot is None:
            return
        del self._writers[slot]
        self._idle.add(slot)
        prefix = self._prefixes.slots[slot]
        if self._keep:
            usable = self._prefixes.usable(prefix)
            prefix.holders = [(generation, min(tokens, usable)) for generation, tokens in prefix.holders[:-1]]
            prefix.hold(sequence.generation, usable)
        else:
            self._free(slot)
        self._changed = True

    def reclaim(self) -> bool:
        """Free the idle cells that are worth least; false when there are none."""
        slot = self._prefixes.reclaimable(self._idle)
        if slot is None:
            return False
        if self._may_copy and self._is_worth_storing(slot):
            self._store(slot)
        self._free(slot)
        return True

    def held(self) -> Held | None:
        """Return what is held for which generation, if that has changed since the last time."""
        if not self._changed or not self._keep:
            return None
        self._changed = False
        known = ((generation, tokens // GRID * GRID) for generation, tokens in self._known.items())
        prefixes = (*self._prefixes.held(), *(pair for pair in known if pair[1]))
        if prefixes == self._told:
            return None
        self._told = prefixes
        return Held(prefixes)

    def _make_way(self, placement: Placement) -> bool:
        """Save what the placement destroys; false if this turn has no copy left for what is to be done."""
        copies = placement.source is not None and placement.source != placement.slot
        stores = self._is_worth_storing(
            placement.slot, kept=0 if copies else placement.tokens, beside=placement.source
        )
        if (copies or stores) and not self._may_copy:
            return False
        if not stores:
            return True
        self._store(placement.slot)
        return not copies  # else the next turn's copy; what is stored now is not stored again

    def _is_worth_storing(self, slot: int, *, kept: int = 0, beside: int | Stored | None = None) -> bool:
        if not self._prefixes.worth_storing(slot, kept=kept):
            return False
        state_bytes = self._context.saved_bytes(slot)
        return self._prefixes.can_store(
            slot, state_bytes, beside=beside if isinstance(beside, Stored) else None
        )

    def _store(self, slot: int) -> None:
        self._prefixes.store(slot, self._context.save(slot))
        self._may_copy = False
        self._changed = True

    def _carry_out(self, placement: Placement, position: int) -> bool:
        """Make the cells what the placement says, which end before `position`; false if that failed."""
        context, slot, source = self._context, placement.slot, placement.source
        if placement.tokens == 0:
            context.clear(slot)
            return True
        if isinstance(source, Stored):
            done = self._restore(slot, source.state)
        elif source is not None and source != slot:
            self._may_copy = False
            context.clear(slot)
            done = context.copy(source, slot, position)
        else:
            done = True
        if done and placement.checkpoint is not None:
            done = context.restore_checkpoint(slot, placement.checkpoint.state)
        return done and context.cut(slot, position)

    def _restore(self, slot: int, state: State) -> bool:
        self._may_copy = False
        while True:
            self._context.clear(slot)
            if self._context.restore(slot, state):
                return True
            if not self._context.shared or not self.reclaim():
                return False

    def _free(self, slot: int) -> None:
        self._context.clear(slot)
        self._prefixes.slots[slot].cut(0)
        self._changed = True
