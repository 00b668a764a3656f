"""Which of several agents with a free slot gets a request. Pure; never touches the ledger it chooses from.

Theory of operation. An offer says how busy an agent is, how many tokens of the prompt it need not compute,
and whether the newcomer would drive out what another conversation comes back for. In this order:

1. A saving counts in whole blocks of the cache; less than one is none. It counts twice for a conversation
   that goes on: elsewhere it would drive out another one, and what it leaves behind is of no use to anybody.
2. Who merely begins like a held request (the same system prompt, say) brings a prefix of its own. On an agent
   without spare room, that one destroys another, again and again, while elsewhere the common beginning
   is computed once: so its saving there counts nothing, as long as another agent has room.
3. The best balance of saved tokens and load wins. A request more on an agent slows the others down by about
   as much as computing NEIGHBOUR_TOKENS of a prompt: an answer has some hundred tokens, and shares the turns.
   So no saving moves a request past the least busy agent unless it is worth that, and prompts that have
   nothing in common go to the least busy, in absolute numbers. A beginning that all agents hold makes no
   difference between them.
4. Of equals, the one that saves more; then the one with most spare room, so that conversations settle
   evenly; if none has any, the one whose oldest prefix is the oldest, so that no agent keeps dead
   conversations while living ones drive each other out; then the first.

Nobody waits for a warm agent while another is free. An agent is full when every slot computes; the cells of
an idle conversation have been taken by then, and what may be left of it (a copy in memory, a relative's
prefix) must be weighed against a wait of which nothing is known but that it may be the rest of a long
answer. Going elsewhere costs one prefill, and the conversation is warm there from then on.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import attrs

CACHE_BLOCK_TOKENS = 64
NEIGHBOUR_TOKENS = 128


@attrs.frozen(kw_only=True)
class Offer:
    """What speaks for an agent, and against it."""

    slots_processing: int
    saved_tokens: int = 0
    is_continuation: bool = False
    """The saving is the conversation's own prefix: it needs no further room."""
    spare_slots: int = 0
    """Slots that neither compute nor hold a prefix."""
    oldest_prefix: int = 0
    """When the prefix that gives way first was made; smaller is earlier."""


Candidate = TypeVar("Candidate", bound=Hashable)


def choose(offers: Mapping[Candidate, Offer]) -> Candidate | None:
    """Return the candidate with the best offer, or None if there is none."""
    has_room = any(offer.spare_slots > 0 for offer in offers.values())

    def merit(candidate: Candidate) -> tuple[int, int, int, int]:
        offer = offers[candidate]
        saved = offer.saved_tokens // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS  # 1
        if offer.is_continuation:
            saved *= 2
        elif offer.spare_slots <= 0 and has_room:  # 2
            saved = 0
        balance = saved - NEIGHBOUR_TOKENS * offer.slots_processing  # 3
        return balance, saved, max(offer.spare_slots, 0), -offer.oldest_prefix  # 4

    return max(offers, key=merit, default=None)
