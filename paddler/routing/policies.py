"""Which of several agents gets a request. Never touches the ledger it chooses from."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """Whatever has a number of requests to compare."""

    @property
    def slots_processing(self) -> int: ...


Candidate = TypeVar("Candidate", bound=Loaded)


def least_busy(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate with the fewest requests in absolute numbers, or None if there is none.

    Of equals the first wins: requests that come one at a time stay on one agent, whose
    cached prefixes they can use.
    """
    return min(candidates, key=lambda candidate: candidate.slots_processing, default=None)
