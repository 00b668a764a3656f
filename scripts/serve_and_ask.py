"""The second half of scripts/quickstart: run `paddler up`, ask one question, go on serving.

The server has a process group of its own, so that a Ctrl-C reaches it once, through this process.
"""

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import IO

START_SECONDS = 120
QUESTION = "What is a slot?"
OTHER_PORTS = (
    "Is a port in use? Choose others: "
    "scripts/quickstart --inference-addr 127.0.0.1:9061 --management-addr 127.0.0.1:9060"
)


def main() -> int:
    flags = [argument for argument in sys.argv[1:] if argument != "--once"]
    once = "--once" in sys.argv[1:]
    interrupted = False
    command = [str(Path(sys.executable).with_name("paddler")), "up", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as server:
        assert server.stdout is not None

        def forward(number: int, _: FrameType | None) -> None:
            nonlocal interrupted
            interrupted = True
            server.send_signal(number)

        signal.signal(signal.SIGINT, forward)
        signal.signal(signal.SIGTERM, forward)
        url = wait_until_serving(server.stdout)
        answered = url is not None and ask(url)
        if url is not None and not answered and not interrupted:
            print("No answer; stopping.", file=sys.stderr)
        if not interrupted and (once or not answered):
            server.terminate()
        elif answered:
            print(
                f"\nAsk more:  scripts/ask.py 'What is 2 + 2?' --url {url}\nCtrl-C stops Paddler.", flush=True
            )
        code = server.wait()
    if code < 0:  # ended by a signal: as a shell reports it
        code = 128 - code
    if url is None and code == 1:
        print(OTHER_PORTS, file=sys.stderr)
    return code or int(not answered and not interrupted)


def wait_until_serving(output: IO[bytes]) -> str | None:
    """Pass on what `paddler up` says once an agent serves; return the address of its inference service.

    None when it ended, or said nothing in time.
    """
    readable, _, _ = select.select([output], [], [], START_SECONDS)
    said = os.read(output.fileno(), 2**16).decode() if readable else ""
    if said:
        print(said, flush=True)
    found = re.search(r"inference +(http://\S+)", said)
    return found[1] if found else None


def ask(url: str) -> bool:
    """Stream one answer to the screen; return whether it arrived whole."""
    print(f"> {QUESTION}", flush=True)
    return (
        subprocess.run(
            [sys.executable, Path(__file__).with_name("ask.py"), QUESTION, "--url", url]
        ).returncode
        == 0
    )


if __name__ == "__main__":
    sys.exit(main())
