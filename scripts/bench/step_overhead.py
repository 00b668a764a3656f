"""What a decode step costs outside llama.cpp, in this process: the engine's turns, and their frames.

Prints for each number of streams `streams | µs per step | µs per active slot | share of the step`, medians
over the steps in which every stream generates.

    .venv/bin/python scripts/bench/step_overhead.py MODEL STREAMS...
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from bare_loop import generation, open_turns

from paddler.engine.context import Context
from paddler.engine.pipe import Turn, pack
from paddler.engine.turns import Turns

TOKENS = 256


class TimedContext(Context):
    """Adds up the seconds that are spent in llama.cpp, and in filling its batches."""

    seconds = 0.0

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> bool:
        began = time.perf_counter()
        done = super().decode(tokens, positions, slots)
        self.seconds += time.perf_counter() - began
        return done

    def ingest(self, tokens: Any, position: int, slot: int, *, want_logits: bool) -> bool:
        began = time.perf_counter()
        done = super().ingest(tokens, position, slot, want_logits=want_logits)
        self.seconds += time.perf_counter() - began
        return done

    def logits(self, count: int) -> npt.NDArray[np.float32]:
        began = time.perf_counter()
        rows = super().logits(count)
        self.seconds += time.perf_counter() - began
        return rows


def measure(turns: Turns, context: TimedContext, *, streams: int) -> str:
    """Run `streams` generations at once and return the columns of the table."""
    for stream in range(streams):
        turns.submit(generation(stream, tokens=TOKENS))
    outside, shares = [], []
    while not turns.idle:
        context.seconds = 0.0
        began = time.perf_counter()
        advances = turns.run()
        pack(Turn(advances))
        step = time.perf_counter() - began
        if len(advances) == streams:
            outside.append(step - context.seconds)
            shares.append(1 - context.seconds / step)
    microseconds = 1e6 * statistics.median(outside)
    share = 100 * statistics.median(shares)
    return f"{streams} | {microseconds:.0f} | {microseconds / streams:.1f} | {share:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("streams", type=int, nargs="+")
    arguments = parser.parse_args()
    turns, context = open_turns(arguments.model, slots=max(arguments.streams), context_class=TimedContext)
    assert isinstance(context, TimedContext)
    for streams in arguments.streams:
        print(measure(turns, context, streams=streams), flush=True)


if __name__ == "__main__":
    main()
