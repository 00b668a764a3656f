"""The engine's turns alone, in this process: no pipe, no agent, no network.

Reads lines `STREAMS TOKENS` from standard input; for each it runs that many generations at once and
prints the seconds they took. throughput.py compares the whole system with it.
"""

import argparse
import sys
import time

from workload import PARAMETERS, prompt_of

from paddler.config import KvLayout
from paddler.engine import llama
from paddler.engine.context import Context
from paddler.engine.layout import plan_context
from paddler.engine.memory import host_memory_bytes
from paddler.engine.pipe import EngineSettings, Generate
from paddler.engine.scheduler import TurnBudget
from paddler.engine.turns import Turns


class InlinePrompts:
    """Tokenises on the spot."""

    def __init__(self, model: llama.Model) -> None:
        self._model = model

    def read(self, _generation: int, text: str) -> llama.Ids:
        return llama.tokenize(self._model, text)

    def forget(self, _generation: int) -> None:
        """Do nothing: no prompt waits here."""

    def finished(self) -> list[tuple[int, llama.Ids]]:
        return []


def open_turns(path: str, *, slots: int) -> Turns:
    """Load the model as the engine process does."""
    log = llama.LlamaLog(lambda _: None)
    settings = EngineSettings(
        model_path=path, slots=slots, parameters=PARAMETERS, kv_layout=KvLayout.PER_SLOT, threads=1
    )
    model = llama.load_model(path, n_gpu_layers=0, on_progress=lambda _: True, log=log)
    shape = llama.shape_of(model, llama.describe(model).metadata)
    plan = plan_context(settings, shape, host_memory_bytes=host_memory_bytes())
    context = Context(model, plan, settings, log=log)
    context.warm_up()
    return Turns(
        context,
        slots=slots,
        parameters=PARAMETERS,
        pieces=model.pieces,
        end_tokens=model.end_tokens,
        prompts=InlinePrompts(model),
        budget=TurnBudget(n_batch=plan.n_batch, seconds_per_token=0.001),
    )


def seconds_for(turns: Turns, *, streams: int, tokens: int) -> float:
    """Run `streams` generations of `tokens` tokens to their end."""
    began = time.perf_counter()
    for stream in range(streams):
        turns.submit(Generate(stream, prompt_of(stream), tokens))
    count = 0
    while not turns.idle:
        count += sum(len(advance.tokens) for advance in turns.run())
    seconds = time.perf_counter() - began
    assert count == streams * tokens, (count, streams, tokens)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, required=True)
    arguments = parser.parse_args()
    turns = open_turns(arguments.model, slots=arguments.slots)
    print("ready", flush=True)
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        print(seconds_for(turns, streams=streams, tokens=tokens), flush=True)


if __name__ == "__main__":
    main()
