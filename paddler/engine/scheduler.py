"""Which sequences take part in the next turn, how much of a prompt it may hold, who yields KV cells. Pure.

A turn decodes the pending tokens of all generating sequences, together or one by one, and then chunks
of prompts, never mixed: one of each prompt at most, as many as the time allows. Requests are admitted
in order of arrival, as many as there are slots; which slot is decided when the prompt is known
(prefixes.py). Prompts take turns.
"""

from collections import deque

from paddler.engine.sequences import EVICTED, GRID, Sequence

_MAX_CHUNK = 512

_SHORTEST_BUDGET = 0.1
_DECODES_PER_BUDGET = 4
_ALONE_BUDGET = 2.0
"""Also without company a chunk ends in time for a cancel, and for the watchdog of a slow model."""

_NEWEST_WEIGHT = 0.3

_DECODES_BETWEEN_LOOKS = 512
_DECODES_PER_LOOK = 2
_CLEARLY_FASTER = 0.9


class Scheduler:
    """The sequences of one engine: those that wait, and at most as many as there are slots that run."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._prompts: deque[Sequence] = deque()

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def reading(self) -> bool:
        """Say whether there is nothing to do before a prompt is tokenised."""
        admissible = self._waiting and len(self._running) < self._slots
        unread = all(sequence.prompt is None for sequence in self._running.values())
        return bool(self._running) and unread and not admissible

    @property
    def only_decodes(self) -> bool:
        """Say whether all sequences that there are generate."""
        running = self._running.values()
        return bool(running) and not self._waiting and all(sequence.generating for sequence in running)

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def find(self, generation: int) -> Sequence | None:
        """Return an unfinished sequence, running or waiting."""
        if generation in self._running:
            return self._running[generation]
        return next((waiting for waiting in self._waiting if waiting.generation == generation), None)

    def admit(self) -> list[Sequence]:
        """Let waiting sequences run while there are slots for them, and return those."""
        admitted = []
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting.popleft()
            self._running[sequence.generation] = sequence
            self._prompts.append(sequence)
            admitted.append(sequence)
        return admitted

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence; another can be admitted."""
        if sequence.generation not in self._running:
            self._waiting.remove(sequence)
            return
        del self._running[sequence.generation]
        if sequence in self._prompts:
            self._prompts.remove(sequence)

    def placeable(self) -> list[Sequence]:
        """Return the sequences that need a slot, in order of arrival."""
        return [sequence for sequence in self._running.values() if sequence.placeable]

    def generating(self) -> list[Sequence]:
        """Return the sequences of the next decode, by slot."""
        generating = [sequence for sequence in self._running.values() if sequence.generating]
        return sorted(generating, key=lambda sequence: sequence.slot or 0)

    def prompts(self) -> list[Sequence]:
        """Return the sequences whose prompts are being computed, the one whose turn it is first."""
        if self._prompts:
            self._prompts = deque(sequence for sequence in self._prompts if not sequence.generating)
        return [sequence for sequence in self._prompts if sequence.ingesting]

    def had_turn(self, sequence: Sequence) -> None:
        """Let the other prompts go before this one's next chunk."""
        self._prompts.remove(sequence)
        self._prompts.append(sequence)

    def evict(self) -> Sequence:
        """End the sequence with the most cells because there are no more, the youngest of equals."""
        placed = [sequence for sequence in self._running.values() if sequence.slot is not None]
        victim = max(placed, key=lambda sequence: (sequence.position, sequence.generation))
        victim.fail(f"{EVICTED}: no cell is free after {victim.position} tokens")
        return victim


class TurnBudget:
    """How many prompt tokens a turn may take without stalling those who generate (engine notes §9)."""

    def __init__(self, *, n_batch: int, seconds_per_token: float) -> None:
        self._max_chunk = min(_MAX_CHUNK, n_batch)
        self._seconds_per_token = max(seconds_per_token, 1e-9)
        self._decodes: deque[float] = deque(maxlen=2)  # the shorter one counts: not a stall of the host

    def chunk_limit(self, *, company: bool, spent: float | None = None) -> int:
        """Return the largest chunk that fits a turn, a multiple of the grid.

        The first chunk of a turn always gets one interval of the grid. Later ones may get nothing; those
        before them have `spent` so many seconds.
        """
        decode = min(self._decodes, default=0.0)
        budget = max(_DECODES_PER_BUDGET * decode, _SHORTEST_BUDGET) if company else _ALONE_BUDGET
        left = max(budget - (spent or 0.0), 0.0)
        affordable = int(min(left / self._seconds_per_token, self._max_chunk))
        least = 1 if spent is None else 0
        return min(max(affordable // GRID, least) * GRID, self._max_chunk)

    def decoded(self, seconds: float) -> None:
        self._decodes.append(seconds)

    def ingested(self, n_tokens: int, seconds: float) -> None:
        if n_tokens < GRID:  # a tail costs about as much as a token: it says nothing of chunks
            return
        newest = seconds / n_tokens
        self._seconds_per_token += _NEWEST_WEIGHT * (newest - self._seconds_per_token)


class DecodeWidth:
    """Whether pending tokens are decoded together or one by one: whichever has been faster lately.

    Together the weights are read once for all, which is what batching is for. Where they stay in the
    processor's caches, llama.cpp's kernels for a few rows can take longer than as many single rows (Q8_0, 49
    million parameters, AVX-512, one thread: 10 ms for two rows, 2.2 ms for one). Nothing is tried blindly:
    one by one is chosen when single decodes, as measured, promise it, and the batch is measured again
    now and then. A stall says little: a decode counts as at most twice as long as those before it.
    """

    def __init__(self) -> None:
        self._single: float | None = None
        self._together: dict[int, float] = {}
        self._looks_due: dict[int, int] = {}
        """Batches still to be measured; below zero, single decodes since they were."""
        self._last: tuple[int, bool] | None = None

    def is_one_by_one(self, count: int) -> bool:
        """Decide for so many pending tokens."""
        if count == 1 or self._single is None or self._looks_due.get(count, 1) > 0:
            return False
        return count * self._single < _CLEARLY_FASTER * self._together[count]

    def decoded(self, count: int, seconds: float, *, one_by_one: bool) -> None:
        """Take note of how long a decode of so many took."""
        is_first = self._last != (count, one_by_one)
        self._last = (count, one_by_one)
        due = self._looks_due.get(count, _DECODES_PER_LOOK)
        if count == 1:
            self._single = _averaged(self._single, seconds)
        elif one_by_one:
            self._single = _averaged(self._single, seconds / count)
            self._looks_due[count] = due - 1 if due > -_DECODES_BETWEEN_LOOKS else _DECODES_PER_LOOK
        elif not is_first:  # for the first, llama.cpp builds its graph anew: it says nothing
            # Only what is slower can be a neighbour's load; what is faster counts at once.
            self._together[count] = min(seconds, _averaged(self._together.get(count), seconds))
            self._looks_due[count] = max(due - 1, 0)


def _averaged(average: float | None, newest: float) -> float:
    return newest if average is None else average + _NEWEST_WEIGHT * (min(newest, 2 * average) - average)
