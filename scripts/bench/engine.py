"""Tokens per second of a whole cluster, next to llama-server of the same llama.cpp, in one run.

Balancer, agent, engine, llama-server and this client are processes of their own, as in real use. Both
sides get the same model, threads, cells per slot, F16 caches and prompts, greedy, with nothing cached,
and stream every token to the same client. Rounds alternate between the two, so that whatever else the
machine does meets both: compare the ratios, absolute numbers are those of one machine at one moment.

    .venv/bin/python scripts/bench/engine.py --llama-server FILE [--rounds 5] [--tokens 256]

Without llama-server it says so and measures only what Python costs per decode step.
"""

import argparse
import contextlib
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
from make_model import write_model
from system import START_WAIT, free_port, running, running_system
from workload import CONTEXT_SIZE, PARAMETERS, prompt_of

from paddler.messages.state import KvCacheDtype

HERE = Path(__file__).parent
PARAMETERS_OF_BOTH = attrs.evolve(PARAMETERS, k_cache_dtype=KvCacheDtype.F16, v_cache_dtype=KvCacheDtype.F16)
MODELS = {
    "32k": {"vocabulary": 32_000},
    "150k": {"vocabulary": 150_000, "width": 256, "layers": 8, "feed_forward": 704},
}
ROUND_WAIT = 600.0
READ_BYTES = 1 << 18


@contextlib.contextmanager
def running_llama_server(program: Path, model: Path, *, slots: int, threads: int) -> Iterator[int]:
    """Run llama-server with own cells for each slot; yield its port."""
    port = free_port()
    command = (
        str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--parallel", str(slots), "--ctx-size", str(slots * CONTEXT_SIZE), "--no-kv-unified",
        "--threads", str(threads), "--threads-batch", str(threads), "--cache-ram", "0", "--log-disable",
    )  # fmt: skip
    with running(*command, environment=dict(os.environ)):
        deadline = time.monotonic() + START_WAIT
        while not _is_healthy(port):
            if time.monotonic() > deadline:
                raise SystemExit("gave up waiting for llama-server")
            time.sleep(0.1)
        yield port


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def paddler_request(stream: int, tokens: int) -> bytes:
    body = {"raw_prompt": prompt_of(stream), "max_tokens": tokens, "sampling": {"ignore_eos": True}}
    return _post("/api/v1/continue_from_raw_prompt", body)


def llama_server_request(stream: int, tokens: int) -> bytes:
    body = {
        "prompt": prompt_of(stream), "n_predict": tokens, "stream": True, "temperature": 0, "top_k": 1,
        "ignore_eos": True, "cache_prompt": False, "samplers": ["top_k", "temperature"],
    }  # fmt: skip
    return _post("/completion", body)


def _post(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST %b HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (path.encode(), len(data), data)
    )


def seconds_of(port: int, request_of: Callable[[int, int], bytes], *, streams: int, tokens: int) -> float:
    """Post `streams` requests at once and read them to their end with as little work as possible."""
    began = time.perf_counter()
    selector = selectors.DefaultSelector()
    messages: dict[socket.socket, int] = {}
    tails: dict[socket.socket, bytes] = {}
    for stream in range(streams):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(request_of(stream, tokens))
        selector.register(client, selectors.EVENT_READ)
        messages[client], tails[client] = 0, b""
    with selector:
        while selector.get_map():
            for key, _ in selector.select(ROUND_WAIT):
                client = key.fileobj  # type: ignore[assignment]  # only sockets are registered
                data = client.recv(READ_BYTES)
                if not data:
                    raise SystemExit("a stream ended without its last chunk")
                messages[client] += data.count(b'Token":"') + data.count(b'"content":"')
                tails[client] = (tails[client] + data)[-600:]
                if tails[client].endswith(b"\r\n0\r\n\r\n"):
                    selector.unregister(client)
                    client.close()
    seconds = time.perf_counter() - began
    least = min(messages.values())
    if least < 0.9 * tokens:  # a message cut between two reads, or a token without text, is not counted
        raise SystemExit(f"a stream had {least} messages of {tokens}: {tails!r}")
    return seconds


def compare(ours: int, theirs: int, *, streams: int, tokens: int, rounds: int) -> str:
    """Run rounds of the two in turn and return the columns of the table."""
    our_rates, their_rates = [], []
    for round_number in range(-1, rounds):
        their_seconds = seconds_of(theirs, llama_server_request, streams=streams, tokens=tokens)
        our_seconds = seconds_of(ours, paddler_request, streams=streams, tokens=tokens)
        if round_number >= 0:  # the first is a warm-up
            our_rates.append(streams * tokens / our_seconds)
            their_rates.append(streams * tokens / their_seconds)
    ratios = [own / other for own, other in zip(our_rates, their_rates, strict=True)]
    return (
        f"{statistics.median(their_rates):,.0f} | {statistics.median(our_rates):,.0f}"
        f" | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
    )


def print_overhead(model: Path, name: str, *, streams: list[int]) -> None:
    """Print what a decode step costs outside llama.cpp, measured in a process of its own."""
    command = [sys.executable, str(HERE / "step_overhead.py"), str(model), *map(str, streams)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in result.stdout.splitlines():
        print(f"| {name} | {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", type=Path, help="the program, built from the binding's sources")
    parser.add_argument("--vocabularies", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    slots = max(arguments.streams)
    with tempfile.TemporaryDirectory() as folder:
        models = {name: Path(folder) / f"{name}.gguf" for name in arguments.vocabularies}
        for name, model in models.items():
            parameters = write_model(model, **MODELS[name])
            print(f"model {name}: {parameters / 1e6:.1f} million random parameters, Q8_0")
        print("\n| vocabulary | slots | µs per step outside llama.cpp | µs per slot | of the step |")
        print("|---|---|---|---|---|")
        for name, model in models.items():
            print_overhead(model, name, streams=arguments.streams)
        if arguments.llama_server is None:
            print("\nSKIPPED: the comparison with llama-server; give its path with --llama-server")
            return
        print(f"\n{arguments.rounds} rounds of {arguments.tokens} tokens, {slots} slots\n")
        print("| vocabulary | threads | streams | llama-server | Paddler | ratio | lowest to highest |")
        print("|---|---|---|---|---|---|---|")
        for name, model in models.items():
            for threads in arguments.threads:
                with (
                    running_system(
                        model,
                        slots=slots,
                        threads=threads,
                        parameters=PARAMETERS_OF_BOTH,
                        flags=("--prefix-cache=off",),
                    ) as ours,
                    running_llama_server(
                        arguments.llama_server, model, slots=slots, threads=threads
                    ) as theirs,
                ):
                    for streams in arguments.streams:
                        line = compare(
                            ours, theirs, streams=streams, tokens=arguments.tokens, rounds=arguments.rounds
                        )
                        print(f"| {name} | {threads} | {streams} | {line}", flush=True)


if __name__ == "__main__":
    main()
