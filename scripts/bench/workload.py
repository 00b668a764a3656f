"""What the benchmarks ask for: the same parameters and prompts on both sides of a comparison."""

import attrs

from paddler.messages.state import DETERMINISTIC_PARAMETERS

CONTEXT_SIZE = 1024
"""Cells of each slot."""

PARAMETERS = attrs.evolve(DETERMINISTIC_PARAMETERS, context_size=CONTEXT_SIZE)

WORDS = "the cat sat on the mat and the dog ran after it all the way home to see what was for tea"


def prompt_of(stream: int) -> str:
    """Return a prompt of about 32 tokens that differs between streams."""
    words = WORDS.split()
    turn = stream % len(words)
    return " ".join(words[turn:] + words[:turn])
