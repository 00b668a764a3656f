"""Tokens per second through agent and balancer, next to the bare engine loop, in one run.

Balancer, agent, engine and this client are processes of their own, as in real use; the bare loop is
another one. Both have one engine thread and the same model, slots and prompts. Rounds alternate between
the two, so that whatever else the machine does meets both; the table shows medians, and the median of
the rounds' ratios. Compare the ratios: absolute numbers are those of one machine at one moment.

    .venv/bin/python scripts/bench/throughput.py [--model FILE] [--rounds 5] [--tokens 256]
"""

import argparse
import contextlib
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from make_model import write_model
from system import running, running_system
from workload import prompt_of

HERE = Path(__file__).parent
ROUND_WAIT = 600.0
READ_BYTES = 1 << 18


@contextlib.contextmanager
def running_bare_loop(model: Path, *, slots: int) -> Iterator[subprocess.Popen[str]]:
    """Run bare_loop.py, ready for its first round."""
    command = (sys.executable, str(HERE / "bare_loop.py"), str(model), f"--slots={slots}")
    with running(*command, environment=dict(os.environ)) as bare:
        assert bare.stdout is not None
        assert bare.stdout.readline() == "ready\n"
        yield bare


def seconds_in_the_bare_loop(bare: subprocess.Popen[str], *, streams: int, tokens: int) -> float:
    assert bare.stdin is not None
    assert bare.stdout is not None
    bare.stdin.write(f"{streams} {tokens}\n")
    bare.stdin.flush()
    return float(bare.stdout.readline())


def seconds_through_the_system(port: int, *, streams: int, tokens: int) -> float:
    """Post `streams` requests at once and read them to their end with as little work as possible."""
    began = time.perf_counter()
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for stream in range(streams):
        body = json.dumps({"raw_prompt": prompt_of(stream), "max_tokens": tokens}).encode()
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(
            b"POST /api/v1/continue_from_raw_prompt HTTP/1.1\r\nHost: bench\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        selector.register(client, selectors.EVENT_READ)
        tails[client] = b""
    with selector:
        while selector.get_map():
            for key, _ in selector.select(ROUND_WAIT):
                client = key.fileobj  # type: ignore[assignment]  # only sockets are registered
                data = client.recv(READ_BYTES)
                if not data:
                    raise SystemExit("a stream ended without its last chunk")
                tails[client] = (tails[client] + data)[-600:]
                if tails[client].endswith(b"0\r\n\r\n"):
                    selector.unregister(client)
                    client.close()
    seconds = time.perf_counter() - began
    for tail in tails.values():
        generated = sum(map(int, re.findall(rb'"(?:content|undeterminable)_tokens":(\d+)', tail)))
        assert generated == tokens, tail
    return seconds


def compare(bare: subprocess.Popen[str], port: int, *, streams: int, tokens: int, rounds: int) -> str:
    """Run rounds of the two in turn and return a line of the table."""
    bare_rates, system_rates = [], []
    for round_number in range(-1, rounds):
        alone = seconds_in_the_bare_loop(bare, streams=streams, tokens=tokens)
        whole = seconds_through_the_system(port, streams=streams, tokens=tokens)
        if round_number >= 0:  # the first is a warm-up
            bare_rates.append(streams * tokens / alone)
            system_rates.append(streams * tokens / whole)
    ratios = [system / alone for system, alone in zip(system_rates, bare_rates, strict=True)]
    return (
        f"| {streams} | {statistics.median(bare_rates):,.0f} | {statistics.median(system_rates):,.0f}"
        f" | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; made with random weights when not given")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    slots = max(arguments.streams)
    with contextlib.ExitStack() as stack:
        model = arguments.model
        if model is None:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bench.gguf"
            parameters = write_model(model)
            print(f"model: {parameters / 1e6:.1f} million random parameters, Q8_0")
        bare = stack.enter_context(running_bare_loop(model, slots=slots))
        port = stack.enter_context(running_system(model, slots=slots))
        print(f"{arguments.rounds} rounds of {arguments.tokens} tokens, one engine thread, {slots} slots\n")
        print("| streams | bare loop, tokens/s | whole system, tokens/s | ratio | lowest to highest |")
        print("|---|---|---|---|---|")
        for streams in arguments.streams:
            line = compare(bare, port, streams=streams, tokens=arguments.tokens, rounds=arguments.rounds)
            print(line, flush=True)


if __name__ == "__main__":
    main()
