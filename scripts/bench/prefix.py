"""Time to the first token in long conversations, with the prefix cache on and off, in one run.

Two clusters of two agents run side by side, one with the cache and one without; rounds alternate between
them, so that whatever else the machine does meets both. In a round every conversation begins anew: a
system prompt, then turn after turn with the whole history, each conversation in a thread of its own; its
user thinks for a while before each turn. Compare the ratio: absolute times are those of one machine at
one moment. With `--at-once 1` no conversation waits for the prompts of others; the gain that is left is
that of the cache alone.

    .venv/bin/python scripts/bench/prefix.py [--turns 10] [--rounds 1] [--at-once 8] [--pause 1]
"""

import argparse
import contextlib
import http.client
import json
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from make_model import write_model
from system import running_system
from workload import PARAMETERS, WORDS, prompt_of

from paddler.messages.state import KvCacheDtype

AGENTS = 2
SLOTS = 4
CONVERSATIONS = AGENTS * SLOTS
ANSWER_TOKENS = 32
TURN_WAIT = 600.0
LONG_PARAMETERS = attrs.evolve(
    PARAMETERS, context_size=4096, k_cache_dtype=KvCacheDtype.F16, v_cache_dtype=KvCacheDtype.F16
)
"""A quantised cache would make long prompts slower, and the gain look larger."""
SYSTEM_WORDS = 1050
"""About 1,500 tokens of the bench's vocabulary; the table shows how many they were."""


@attrs.frozen
class Turn:
    """What was seen of one turn."""

    first_token: float
    agent: str
    prompt_tokens: int
    cached_tokens: int


@attrs.define
class Conversation:
    system: str
    seed: int
    turns: list[Turn] = attrs.Factory(list)
    history: list[dict[str, str]] = attrs.Factory(list)

    def run(self, port: int, turns: int, pause: float) -> None:
        """Hold the conversation; before each turn its user thinks for twice `pause` seconds at most."""
        thinking = random.Random(self.seed)
        self.history.append({"role": "system", "content": self.system})
        for number in range(turns):
            time.sleep(thinking.uniform(0, 2 * pause))
            question = f"{self.seed} {number} {prompt_of(self.seed + number)}"
            self.history.append({"role": "user", "content": question})
            turn, answer = ask_for_turn(port, self.history)
            self.turns.append(turn)
            self.history.append({"role": "assistant", "content": answer})

    @property
    def later(self) -> list[Turn]:
        return self.turns[1:]

    @property
    def warm_landings(self) -> int:
        """How many turns came to the agent of the turn before."""
        return sum(before.agent == turn.agent for before, turn in zip(self.turns, self.later, strict=False))


def ask_for_turn(port: int, history: list[dict[str, str]]) -> tuple[Turn, str]:
    """Stream one answer; return what was measured, and the answer's text."""
    body = {
        "add_generation_prompt": True,
        "conversation_history": history,
        "enable_thinking": False,
        "max_tokens": ANSWER_TOKENS,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TURN_WAIT)
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/api/v1/continue_from_conversation_history", json.dumps(body), headers)
    response = connection.getresponse()
    first_token = 0.0
    texts: list[str] = []
    for line in response:
        message: dict[str, Any] = json.loads(line)
        if "Response" not in message:
            raise SystemExit(f"the balancer answered {line.decode()}")
        piece = message["Response"]["response"]["GeneratedToken"]
        if "Done" in piece:
            usage = piece["Done"]["usage"]
            cached = usage["cached_prompt_tokens"]
            agent = message["Response"]["generated_by"]
            connection.close()
            return Turn(first_token, agent, usage["prompt_tokens"], cached), "".join(texts)
        first_token = first_token or time.perf_counter() - began
        texts += piece.values()
    raise SystemExit("an answer ended without its last message")


def conversations_of(round_number: int, *, own_system: bool) -> list[Conversation]:
    """Return fresh conversations: nothing of an earlier round helps them."""
    made = []
    for number in range(CONVERSATIONS):
        seed = 100 * round_number + number
        shuffled = random.Random(seed if own_system else 100 * round_number)
        system = " ".join(shuffled.choice(WORDS.split()) for _ in range(SYSTEM_WORDS))
        made.append(Conversation(system, seed))
    return made


def run_round(
    port: int, conversations: list[Conversation], *, turns: int, at_once: int, pause: float
) -> None:
    with ThreadPoolExecutor(at_once) as clients:
        for done in [clients.submit(talk.run, port, turns, pause) for talk in conversations]:
            done.result()


def median_ms(conversations: list[Conversation]) -> float:
    return 1000 * statistics.median(turn.first_token for talk in conversations for turn in talk.later)


def compare(
    ports: dict[str, int], *, system: str, turns: int, rounds: int, at_once: int, pause: float
) -> str:
    """Run rounds on the clusters in turn and return a line of the table."""
    talks: dict[str, list[Conversation]] = {name: [] for name in ports}
    for round_number in range(rounds):
        for name, port in ports.items():
            conversations = conversations_of(round_number, own_system=system == "own")
            run_round(port, conversations, turns=turns, at_once=at_once, pause=pause)
            talks[name] += conversations
    later = [turn for talk in talks["on"] for turn in talk.later]
    landed = sum(talk.warm_landings for talk in talks["on"]) / len(later)
    cached = sum(turn.cached_tokens for turn in later) / sum(turn.prompt_tokens for turn in later)
    off, on = median_ms(talks["off"]), median_ms(talks["on"])
    prompts = [turn.prompt_tokens for turn in later]
    return (
        f"| {system} | {min(prompts)} to {max(prompts)} | {off:,.0f} ms | {on:,.0f} ms | {off / on:.1f}"
        f" | {landed:.1%} | {cached:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; made with random weights when not given")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=CONVERSATIONS, help="conversations that run at once")
    parser.add_argument("--pause", type=float, default=1.0, help="mean time that users think, in seconds")
    parser.add_argument("--system", nargs="+", choices=["own", "shared"], default=["own", "shared"])
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        model = arguments.model
        if model is None:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bench.gguf"
            parameters = write_model(model)
            print(f"model: {parameters / 1e6:.1f} million random parameters, Q8_0")
        ports = {
            switch: stack.enter_context(
                running_system(
                    model,
                    slots=SLOTS,
                    agents=AGENTS,
                    parameters=LONG_PARAMETERS,
                    flags=(f"--prefix-cache={switch}",),
                )
            )
            for switch in ("off", "on")
        }
        print(
            f"{CONVERSATIONS} conversations, {arguments.at_once} at once, {AGENTS} agents of {SLOTS} slots, "
            f"one thread each; medians of turns 2 to {arguments.turns} in {arguments.rounds} rounds\n"
        )
        print("| system prompt | prompt tokens | cache off | cache on | ratio | same agent | tokens cached |")
        print("|---|---|---|---|---|---|---|")
        for system in arguments.system:
            line = compare(
                ports,
                system=system,
                turns=arguments.turns,
                rounds=arguments.rounds,
                at_once=arguments.at_once,
                pause=arguments.pause,
            )
            print(line, flush=True)


if __name__ == "__main__":
    main()
