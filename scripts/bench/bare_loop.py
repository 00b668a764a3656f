"""The engine's turns alone, in this process: no pipe, no agent, no network.

Reads lines `STREAMS TOKENS` from standard input; for each it runs that many generations at once and
prints the seconds they took. throughput.py compares the whole system with it.
"""

import argparse
import sys
import time
from functools import partial

import attrs
from workload import PARAMETERS, prompt_of

from paddler.config import KvLayout
from paddler.engine import llama
from paddler.engine.cells import Cells
from paddler.engine.context import Context
from paddler.engine.layout import plan_context
from paddler.engine.memory import host_memory_bytes
from paddler.engine.pipe import EngineSettings, Generate
from paddler.engine.prompts import Prompts
from paddler.engine.samplers import Samplers
from paddler.engine.sampling import settings_of
from paddler.engine.scheduler import TurnBudget
from paddler.engine.turns import Turns


def open_turns(path: str, *, slots: int, context_class: type[Context] = Context) -> tuple[Turns, Context]:
    """Load the model as the engine process does, without a prefix cache."""
    log = llama.LlamaLog(lambda *_: None)
    settings = EngineSettings(
        model_path=path, slots=slots, parameters=PARAMETERS, kv_layout=KvLayout.PER_SLOT, threads=1
    )
    model = llama.load_model(path, n_gpu_layers=0, on_progress=lambda _: True, log=log)
    description = llama.describe(model)
    shape = llama.shape_of(model, description.metadata)
    plan = plan_context(settings, shape, host_memory_bytes=host_memory_bytes())
    context = context_class(model, plan, settings, log=log)
    context.warm_up()
    turns = Turns(
        context,
        slots=slots,
        cells=Cells(context, slots=slots, keep=False, stored_bytes=0),
        make_sampler=Samplers(model, description, PARAMETERS).make,
        pieces=model.pieces,
        end_tokens=model.end_tokens,
        prompts=Prompts(partial(llama.tokenize, model), wake=lambda: None),
        budget=TurnBudget(n_batch=plan.n_batch, seconds_per_token=0.001),
    )
    return turns, context


def generation(stream: int, *, tokens: int) -> Generate:
    """Return the command for one stream: greedy, and to the last token whatever comes."""
    sampler = attrs.evolve(settings_of(PARAMETERS), ignore_eos=True)
    return Generate(stream, prompt_of(stream), tokens, sampler)


def seconds_for(turns: Turns, *, streams: int, tokens: int) -> float:
    """Run `streams` generations of `tokens` tokens to their end."""
    began = time.perf_counter()
    for stream in range(streams):
        turns.submit(generation(stream, tokens=tokens))
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
    turns, _ = open_turns(arguments.model, slots=arguments.slots)
    print("ready", flush=True)
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        print(seconds_for(turns, streams=streams, tokens=tokens), flush=True)


if __name__ == "__main__":
    main()
