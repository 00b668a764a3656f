"""Embedding requests in the engine: what Turns is for generations. One batch of documents per turn.

What a turn computes is filled from the requests in order of arrival; whoever was first in one turn is
last in the next, so that a long request does not hold up the others.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import attrs

from paddler.engine.embeddings import Batch, Vector, normalize, to_json
from paddler.engine.pipe import Embed, Embedded, Finish, Generate
from paddler.engine.sequences import Ids
from paddler.engine.turns import PromptReader

_MOST_READ = 256
"""Documents of one request that are looked at in a turn: some take time although they are not computed."""


class DocumentEmbedder(Protocol):
    """What a turn needs of context.Context."""

    def embed(self, documents: Sequence[Ids]) -> list[Vector]: ...


@attrs.define(eq=False)
class _Job:
    """A request: `place` is that of its next document, `tokens` are that one's, once they are read."""

    command: Embed
    place: int = 0
    tokens: Ids | None = None
    is_reading: bool = False
    vectors: list[tuple[int, str]] = attrs.Factory(list)
    oversized: list[tuple[int, int, int]] = attrs.Factory(list)
    failed: list[tuple[int, str]] = attrs.Factory(list)

    @property
    def is_done(self) -> bool:
        return self.place == len(self.command.documents)

    def next_document(self) -> None:
        self.place += 1
        self.tokens = None


class Embedder:
    """All embedding requests of one context."""

    def __init__(self, context: DocumentEmbedder, *, slots: int, n_batch: int, prompts: PromptReader) -> None:
        """Serve with batches of at most one document per slot; none may have more than `n_batch` tokens."""
        self._context = context
        self._slots = slots
        self._n_batch = n_batch
        self._prompts = prompts
        self._jobs: deque[_Job] = deque()
        self._ended: list[Embedded] = []

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._ended

    @property
    def reading(self) -> bool:
        """Say whether nothing can be done before a document is tokenised."""
        return not self._ended and all(job.is_reading for job in self._jobs)

    def submit(self, command: Embed) -> None:
        self._jobs.append(_Job(command))

    def cancel(self, generation: int) -> None:
        """Stop a request; one that ended meanwhile has been told already."""
        for job in self._jobs:
            if job.command.generation == generation:
                self._jobs.remove(job)
                self._prompts.forget(generation)
                self._ended.append(_tell(job, Finish.STOPPED))
                return

    def run(self) -> list[Embedded]:
        """Do one turn. Raises context.DecodeFailed, after which the context is of no use."""
        self._take_what_was_read()
        first = self._jobs[0] if self._jobs else None
        self._compute()
        told, self._ended = self._ended, []
        for job in [*self._jobs]:
            if job.is_done:
                self._jobs.remove(job)
                told.append(_tell(job, Finish.END))
            elif job.vectors or job.oversized:  # of what failed alone, the end is soon enough
                told.append(_tell(job, None))
        if self._jobs and self._jobs[0] is first:
            self._jobs.rotate(-1)
        return told

    def _take_what_was_read(self) -> None:
        for generation, prompt in self._prompts.finished():
            for job in self._jobs:
                if job.command.generation == generation:
                    job.tokens, job.is_reading = prompt.tokens, False

    def _compute(self) -> None:
        """Fill a batch from the requests, one after the other, and make its vectors."""
        batch = Batch(slots=self._slots, n_batch=self._n_batch)
        places: list[tuple[_Job, int]] = []
        for job in self._jobs:
            if batch.is_full:
                break
            places += [(job, place) for place in self._fill(batch, job)]
        if not batch.documents:
            return
        for (job, place), vector in zip(places, self._context.embed(batch.documents), strict=True):
            text = to_json(normalize(vector, job.command.normalization_method))
            if text is None:
                job.failed.append((place, "has no finite vector"))
            else:
                job.vectors.append((place, text))

    def _fill(self, batch: Batch, job: _Job) -> list[int]:
        """Add documents of a request while they fit, and return their places; skip those without a vector."""
        added = []
        for _ in range(_MOST_READ):
            if job.is_done or batch.is_full or not self._read(job):
                break
            assert job.tokens is not None
            count = len(job.tokens)
            if count == 0:
                job.failed.append((job.place, "is empty"))
            elif count > self._n_batch:
                job.oversized.append((job.place, count, self._n_batch))
            elif batch.add(job.tokens):
                added.append(job.place)
            else:
                break
            job.next_document()
        return added

    def _read(self, job: _Job) -> bool:
        """Have the next document's tokens; false while they are read aside."""
        if job.is_reading:
            return False
        if job.tokens is None:
            text = job.command.documents[job.place]
            prompt = self._prompts.read(Generate(job.command.generation, text, max_tokens=0))
            job.is_reading = prompt is None
            job.tokens = None if prompt is None else prompt.tokens
        return not job.is_reading


def _tell(job: _Job, finish: Finish | None) -> Embedded:
    """Return what is new of a request, and forget it."""
    news = Embedded(
        generation=job.command.generation,
        vectors=tuple(job.vectors),
        oversized=tuple(job.oversized),
        failed=tuple(job.failed),
        finish=finish,
    )
    job.vectors, job.oversized, job.failed = [], [], []
    return news
