"""Show that temperature 0 says the same tokens however the cells came about.

50 prompts are continued by 48 tokens each: cold and one at a time, then warm, continued, forked, restored
from the host's memory, and all at once on 4 slots. With --llama-server its answers are compared, too, one
at a time. Prints a table: how many of the 50 equal the cold answers, and how many prompt tokens were in
cells already.
"""

import argparse
import json
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio

from paddler.config import EngineTimeouts, KvLayout, bundled_model_path
from paddler.engine.handle import Engine, open_engine
from paddler.engine.pipe import Advance, EngineSettings, Finish, ModelDescription, SamplerSettings
from paddler.messages.state import DETERMINISTIC_PARAMETERS, InferenceParameters, KvCacheDtype

PROMPTS = 50
TOKENS = 48
SLOTS = 4
CONTEXT = 2048
TIMEOUTS = EngineTimeouts(start=30, load_silence=60, step=60, standstill=10, stop=5)

ENDLESS = SamplerSettings(
    temperature=0.0,
    top_k=1,
    top_p=1.0,
    min_p=0.0,
    penalty_repeat=1.0,
    penalty_frequency=0.0,
    penalty_presence=0.0,
    penalty_last_n=0,
    ignore_eos=True,
)

NAMES = ["Ada", "Ben", "Carla", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jonas"]
PLACES = ["Paris", "Rome", "Berlin", "Madrid", "Oslo", "Vienna", "Athens", "Dublin", "Lisbon", "Prague"]
THINGS = ["llama", "slot", "agent", "balancer", "request", "river", "harbour", "letter", "garden", "bridge"]
VERBS = ["sees", "finds", "likes", "carries", "repeats", "draws", "counts", "sends", "keeps", "moves"]


def make_prompts(*, seed: int = 4) -> list[str]:
    """Return texts of about 82 to 751 tokens, of whole sentences."""
    generator = random.Random(seed)

    def sentence() -> str:
        name, place, thing, verb = map(generator.choice, (NAMES, PLACES, THINGS, VERBS))
        return f"{name} {verb} the {thing} number {generator.randrange(100)} in {place}."

    sizes = [6 + 51 * index // (PROMPTS - 1) for index in range(PROMPTS)]
    return [" ".join(sentence() for _ in range(size)) + " " + generator.choice(NAMES) for size in sizes]


@attrs.define
class Answer:
    tokens: tuple[int, ...] = ()
    text: str = ""
    prompt_tokens: int = 0
    cached: int = 0
    over: trio.Event = attrs.Factory(trio.Event)


class Asker:
    """Asks one engine."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._answers: list[Answer] = []

    def take(self, advances: list[Advance]) -> None:
        for advance in advances:
            answer = self._answers[advance.generation]
            answer.tokens += advance.tokens
            answer.text += advance.text
            answer.prompt_tokens, answer.cached = advance.prompt_tokens, advance.cached_prompt_tokens
            if advance.finish is not None:
                assert advance.finish in (Finish.END, Finish.LENGTH), advance.failure
                answer.over.set()

    def start(self, prompt: str, *, max_tokens: int = TOKENS) -> Answer:
        assert self.engine is not None
        self._answers.append(Answer())
        self.engine.generate(len(self._answers) - 1, prompt=prompt, max_tokens=max_tokens, sampler=ENDLESS)
        return self._answers[-1]

    async def ask(self, prompt: str, *, max_tokens: int = TOKENS) -> Answer:
        answer = self.start(prompt, max_tokens=max_tokens)
        await answer.over.wait()
        return answer


@asynccontextmanager
async def engine(settings: EngineSettings) -> AsyncIterator[Asker]:
    async def accept(_: ModelDescription) -> None:
        pass

    asker = Asker()
    async with open_engine(
        settings, timeouts=TIMEOUTS, on_model=accept, on_progress=lambda *_: None, on_turn=asker.take
    ) as asker.engine:
        yield asker


async def run_case(name: str, settings: EngineSettings, prompts: list[str], server: Path | None) -> bool:
    """Print one part of the table; say whether all was equal."""
    print(f"\n{name}")
    reference = await ask_cold(settings, prompts)
    sizes = [answer.prompt_tokens for answer in reference]
    answered = sum(len(answer.tokens) for answer in reference)
    print(f"  {min(sizes)} to {max(sizes)} tokens, {answered} answered")
    continued = [
        prompt + answer.text + " And then" for prompt, answer in zip(prompts, reference, strict=True)
    ]
    equal = True

    def compare(row: str, answers: list[Answer], expected: list[Answer]) -> None:
        nonlocal equal
        same = sum(a.tokens == b.tokens for a, b in zip(answers, expected, strict=True))
        equal &= same == len(expected)
        cached = sum(answer.cached for answer in answers)
        total = sum(answer.prompt_tokens for answer in answers)
        print(f"  {row:<34}{same:>3} of {len(expected)}   {cached:>6} of {total} tokens cached", flush=True)

    async with engine(attrs.evolve(settings, slots=2)) as asker:
        pairs = [(await asker.ask(prompt), await asker.ask(prompt)) for prompt in prompts]
    compare("first time, cache on", [first for first, _ in pairs], reference)
    compare("second time", [second for _, second in pairs], reference)
    compare("forked from a busy slot", await ask_forked(settings, prompts), reference)
    compare("restored from memory", await ask_restored(settings, prompts), reference)
    async with engine(settings) as asker:
        for row in ("all at once on 4 slots", "all at once again"):
            answers = [asker.start(prompt) for prompt in prompts]
            for answer in answers:
                await answer.over.wait()
            compare(row, answers, reference)
    async with engine(attrs.evolve(settings, slots=1)) as asker:
        answers = []
        for prompt, more in zip(prompts, continued, strict=True):
            await asker.ask(prompt)
            answers.append(await asker.ask(more))
    compare("continued, as a conversation is", answers, await ask_cold(settings, continued))
    if server is not None:
        compare("llama-server, one at a time", ask_server(server, settings, prompts), reference)
    return equal


async def ask_cold(settings: EngineSettings, prompts: list[str]) -> list[Answer]:
    async with engine(attrs.evolve(settings, prefix_cache=False)) as asker:
        return [await asker.ask(prompt) for prompt in prompts]


async def ask_forked(settings: EngineSettings, prompts: list[str]) -> list[Answer]:
    """Ask while another slot still generates from the same prompt."""
    async with engine(attrs.evolve(settings, slots=2)) as asker:
        answers = []
        for prompt in prompts:
            first = asker.start(prompt, max_tokens=2 * TOKENS)
            answers.append(await asker.ask(prompt))
            await first.over.wait()
    return answers


async def ask_restored(settings: EngineSettings, prompts: list[str]) -> list[Answer]:
    """Ask all with one slot, then all again: the others have taken the slot meanwhile."""
    one_slot = attrs.evolve(settings, slots=1, prefix_cache_bytes=10**9)
    async with engine(one_slot) as asker:
        for prompt in prompts:
            await asker.ask(prompt, max_tokens=1)
        return [await asker.ask(prompt) for prompt in prompts]


def ask_server(path: Path, settings: EngineSettings, prompts: list[str]) -> list[Answer]:
    answers = []
    with llama_server(path, settings) as url:
        for prompt in prompts:
            body = {
                "prompt": prompt,
                "n_predict": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
            }
            request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            answers.append(Answer(tokens=tuple(answer["tokens"]), prompt_tokens=answer["tokens_evaluated"]))
    return answers


@contextmanager
def llama_server(path: Path, settings: EngineSettings) -> Iterator[str]:
    """Run llama-server with the same cells, where only the options of the comparison differ from its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    parameters = settings.parameters
    v_dtype = KvCacheDtype.F16 if settings.exact else parameters.v_cache_dtype
    options = {
        "--model": settings.model_path, "--port": port, "--parallel": SLOTS, "--ctx-size": SLOTS * CONTEXT,
        "--threads": settings.threads, "--ubatch-size": 64,
        "--flash-attn": "off" if settings.exact else "auto",
        "--cache-type-k": dtype_option(parameters.k_cache_dtype), "--cache-type-v": dtype_option(v_dtype),
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    process = subprocess.Popen(
        [path, "--no-kv-unified", "--no-webui", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def dtype_option(dtype: KvCacheDtype) -> str:
    return str(dtype.value).lower()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"llama-server ended with {process.returncode}") from None
            time.sleep(0.1)
    raise SystemExit("llama-server does not serve")


def cases(model: Path) -> list[tuple[str, EngineSettings]]:
    greedy = attrs.evolve(DETERMINISTIC_PARAMETERS, context_size=CONTEXT)

    def settings(parameters: InferenceParameters, *, threads: int, exact: bool) -> EngineSettings:
        return EngineSettings(
            model_path=str(model),
            slots=SLOTS,
            parameters=parameters,
            kv_layout=KvLayout.PER_SLOT,
            threads=threads,
            exact=exact,
        )

    half = attrs.evolve(greedy, k_cache_dtype=KvCacheDtype.F16, v_cache_dtype=KvCacheDtype.F16)
    return [
        ("1 thread, default cache types", settings(greedy, threads=1, exact=False)),
        ("2 threads, exact, default cache types", settings(greedy, threads=2, exact=True)),
        ("1 thread, F16", settings(half, threads=1, exact=False)),
        ("2 threads, exact, F16", settings(half, threads=2, exact=True)),
    ]


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=bundled_model_path())
    parser.add_argument("--llama-server", type=Path, help="compare with this program, too")
    parser.add_argument("--case", type=int, help="only one of the four cases, from 0")
    arguments = parser.parse_args()
    prompts = make_prompts()
    chosen = cases(arguments.model)
    if arguments.case is not None:
        chosen = [chosen[arguments.case]]
    if arguments.llama_server is None:
        print("without llama-server, whose path is not given")
    equal = [await run_case(name, settings, prompts, arguments.llama_server) for name, settings in chosen]
    raise SystemExit(0 if all(equal) else 1)


if __name__ == "__main__":
    trio.run(main)
