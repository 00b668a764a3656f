"""Which sequences take part in the next turn, how much of a prompt it may hold, who yields KV cells. Pure.

A turn is at most two decodes, never mixed: one batch with the pending token of every generating
sequence, then one chunk of one prompt. Requests take slots in order of arrival, the lowest free slot
first (slots with adjacent ids are computed together); prompts take turns.
"""

import heapq
from collections import deque

from paddler.engine.sequences import EVICTED, GRID, Sequence

_MAX_CHUNK = 512

_SHORTEST_BUDGET = 0.1
_DECODES_PER_BUDGET = 4
_ALONE_BUDGET = 2.0
"""Also without company a chunk ends in time for a cancel, and for the watchdog of a slow model."""

_NEWEST_WEIGHT = 0.3


class Scheduler:
    """The sequences of one engine and the slots they hold."""

    def __init__(self, *, slots: int) -> None:
        self._free = list(range(slots))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._prompts: deque[Sequence] = deque()

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def reading(self) -> bool:
        """Say whether there is nothing to do before a prompt is tokenised."""
        admissible = self._free and self._waiting
        unread = all(sequence.prompt is None for sequence in self._running.values())
        return bool(self._running) and unread and not admissible

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def find(self, generation: int) -> Sequence | None:
        """Return an unfinished sequence, running or waiting."""
        if generation in self._running:
            return self._running[generation]
        return next((waiting for waiting in self._waiting if waiting.generation == generation), None)

    def admit(self) -> list[Sequence]:
        """Give free slots to waiting sequences and return those."""
        admitted = []
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            self._running[sequence.generation] = sequence
            self._prompts.append(sequence)
            admitted.append(sequence)
        return admitted

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence; its slot is free again."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        del self._running[sequence.generation]
        heapq.heappush(self._free, sequence.slot)
        if sequence in self._prompts:
            self._prompts.remove(sequence)

    def generating(self) -> list[Sequence]:
        """Return the sequences of the next decode, by slot."""
        generating = [sequence for sequence in self._running.values() if sequence.generating]
        return sorted(generating, key=lambda sequence: sequence.slot or 0)

    def next_prompt(self) -> Sequence | None:
        """Return the sequence whose prompt is next in turn."""
        for _ in range(len(self._prompts)):
            sequence = self._prompts.popleft()
            if sequence.generating:
                continue
            self._prompts.append(sequence)
            if sequence.ingesting:
                return sequence
        return None

    def evict(self) -> Sequence:
        """End the sequence with the most cells because there are no more, the youngest of equals."""
        victim = max(self._running.values(), key=lambda sequence: (sequence.position, sequence.generation))
        victim.fail(f"{EVICTED}: no cell is free after {victim.position} tokens")
        return victim


class TurnBudget:
    """How many prompt tokens a turn may take without stalling those who generate (engine notes §9)."""

    def __init__(self, *, n_batch: int, seconds_per_token: float) -> None:
        self._max_chunk = min(_MAX_CHUNK, n_batch)
        self._seconds_per_token = max(seconds_per_token, 1e-9)
        self._last_decode = 0.0

    def chunk_limit(self, *, company: bool) -> int:
        """Return the largest chunk for the next turn: a multiple of the grid that fits the time."""
        budget = max(_DECODES_PER_BUDGET * self._last_decode, _SHORTEST_BUDGET) if company else _ALONE_BUDGET
        affordable = int(min(budget / self._seconds_per_token, self._max_chunk))
        return min(max(affordable // GRID, 1) * GRID, self._max_chunk)

    def decoded(self, seconds: float) -> None:
        self._last_decode = seconds

    def ingested(self, n_tokens: int, seconds: float) -> None:
        if n_tokens < GRID:  # a tail costs about as much as a token: it says nothing of chunks
            return
        newest = seconds / n_tokens
        self._seconds_per_token += _NEWEST_WEIGHT * (newest - self._seconds_per_token)
