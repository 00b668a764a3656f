"""The prefixes that one agent holds, as far as it said so. Pure; dies with the agent's link.

Theory of operation. A request is *noted* with its chain when it is handed over, and *reported* as soon as the
agent says how many of its tokens can be taken over. Only reported requests count: what was just handed
over is not computed yet. One that has *ended* is forgotten with the first report that lacks it; frames of a
link keep their order, so such a report was made after the end.

A request whose chain goes on where another's ends *continues* it, and takes over its cells. The older one
then counts as a slot's content no more, and is forgotten when the newer one has ended and is held: a long
conversation is one entry, or two.

Links are cumulative hashes, so if a link of a chain is known here, all before it are: the longest
common prefix is found by bisection.

Agents that keep no prefixes report nothing, and of short prompts nothing is held. So of the requests that
ended without ever being held, only the last MAX_UNREPORTED wait for a report.

What is never true: more links than MAX_LINKS (the requests noted longest ago are forgotten first); a link
in the index whose request is forgotten.
"""

from bisect import bisect_left
from collections.abc import Mapping

import attrs

from paddler.routing.chains import Chain

MAX_LINKS = 32 * 1024
"""Over all requests of an agent: some 15 MB."""

MAX_UNREPORTED = 256
"""A report follows the end of a request at once; until it comes, as many end as the agent has slots."""


@attrs.define(eq=False)
class _Noted:
    """One request."""

    number: int
    chain: Chain
    arrival: int
    is_running: bool = True
    tokens: int = 0
    """Reported; 0 when it is not held."""
    prompt_tokens: int = 0
    """Reported first, which is while it runs: its answer is not among them."""
    continues: list["_Noted"] = attrs.Factory(list)
    is_continued: bool = False


@attrs.frozen
class Saving:
    """What an agent need not compute."""

    tokens: int = 0
    is_continuation: bool = False
    """The request goes on where a held one ended; else the two merely begin alike."""


NO_SAVING = Saving()


class HeldPrefixes:
    """Requests of one agent, by their number on its link."""

    def __init__(self) -> None:
        self._noted: dict[int, _Noted] = {}  # in order of their hand-over
        self._index: dict[int, list[_Noted]] = {}  # by link
        self._last: dict[int, list[_Noted]] = {}  # by their last link
        self._held: list[_Noted] = []  # of which tokens are reported, in order of their hand-over
        self._unreported: dict[int, _Noted] = {}  # ended since the last report, and not held before
        self._links = 0

    def note(self, number: int, chain: Chain, *, arrival: int) -> None:
        """Take note of a request that is handed over; `arrival` is its place among all requests."""
        if not chain.links:
            return
        noted = _Noted(number, chain, arrival)
        for link in chain.links:
            for older in self._last.get(link, ()):
                older.is_continued = True
                noted.continues.append(older)
            self._index.setdefault(link, []).append(noted)
        self._noted[number] = noted
        self._last.setdefault(chain.links[-1], []).append(noted)
        self._links += len(chain.links)
        while self._links > MAX_LINKS:
            self._forget(next(iter(self._noted.values())))

    def end(self, number: int) -> None:
        """Take note that a request is over."""
        noted = self._noted.get(number)
        if noted is not None:
            noted.is_running = False
            self._forget_continued(noted)
            if not noted.tokens:
                self._unreported[number] = noted
                if len(self._unreported) > MAX_UNREPORTED:
                    self._forget(next(iter(self._unreported.values())))

    def report(self, held: Mapping[int, int]) -> None:
        """Take the agent's word for what it holds now: tokens by number."""
        self._unreported.clear()
        for noted in list(self._noted.values()):
            noted.tokens = held.get(noted.number, 0)
            if noted.prompt_tokens == 0:
                noted.prompt_tokens = noted.tokens
            if noted.tokens == 0 and not noted.is_running:
                self._forget(noted)
        self._held = [noted for noted in self._noted.values() if noted.tokens]
        for noted in list(self._held):
            self._forget_continued(noted)

    def saving(self, chain: Chain) -> Saving:
        """Return what a prompt with this chain finds here."""
        shared = bisect_left(chain.links, True, key=lambda link: link not in self._index)
        while shared:  # a shorter prefix counts only where nobody of the longer one is held
            holders = [noted for noted in self._index[chain.links[shared - 1]] if noted.tokens]
            if holders:
                savings = [_saving(noted, shared) for noted in holders]
                return max(savings, key=lambda saving: (saving.is_continuation, saving.tokens))
            shared -= 1
        return NO_SAVING

    def idle(self) -> int:
        """Return how many slots hold what an ended request left in them, at least."""
        return sum(self._is_idle(noted) for noted in self._held)

    def oldest_idle(self) -> int:
        """Return the arrival of the request that gives way first, 0 if there is none."""
        return next((noted.arrival for noted in self._held if self._is_idle(noted)), 0)

    @staticmethod
    def _is_idle(noted: _Noted) -> bool:
        return not noted.is_running and not noted.is_continued

    def _forget_continued(self, noted: _Noted) -> None:
        if noted.tokens and not noted.is_running:
            for older in noted.continues:
                if not older.is_running and self._noted.get(older.number) is older:
                    self._forget(older)
            noted.continues.clear()

    def _forget(self, noted: _Noted) -> None:
        del self._noted[noted.number]
        self._unreported.pop(noted.number, None)
        if noted.tokens:
            self._held.remove(noted)
        for older in noted.continues:  # it failed before it was held: theirs are the cells again
            older.is_continued = False
        self._links -= len(noted.chain.links)
        for link in noted.chain.links:
            _strike(self._index, link, noted)
        _strike(self._last, noted.chain.links[-1], noted)


def _strike(index: dict[int, list[_Noted]], link: int, noted: _Noted) -> None:
    index[link].remove(noted)
    if not index[link]:
        del index[link]


def _saving(noted: _Noted, shared: int) -> Saving:
    """Estimate the tokens of the first links of a held request."""
    chain = noted.chain
    is_continuation = shared == len(chain.links)
    characters = chain.ends[shared - 1]
    if characters == chain.characters:
        return Saving(noted.tokens, is_continuation)
    return Saving(min(noted.tokens, noted.prompt_tokens * characters // chain.characters), is_continuation)
