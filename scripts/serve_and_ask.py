"""The second half of scripts/quickstart: run `paddler up`, ask one question, go on serving.

The server has a process group of its own, so that a Ctrl-C reaches it once, through this process; what ends
this process ends the server first.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until Ending handles it: no traceback out of the imports

import os
import re
import select
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO

START_SECONDS = 120
QUESTION = "What is a slot?"
ASK = Path(__file__).resolve().with_name("ask.py")
HOW_TO_STOP = re.compile(r"^Ctrl-C stops it\.\n", re.MULTILINE)
"""What `paddler up` says last; it is said here after the answer instead."""


class Ending:
    """What a signal ends: the processes that were started so far.

    The handler only remembers and passes on, so that no moment is a wrong one: a signal that comes while a
    process is being started reaches it right afterwards.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The first that came."""
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def start(self, *command: str | Path, **options: object) -> "subprocess.Popen[bytes]":
        """Start a process that a signal ends, also one that came already."""
        process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
        self._processes.append(process)
        if self.signal:
            process.terminate()
        return process  # type: ignore[no-any-return]

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number
        for process in self._processes:
            process.terminate()


def main() -> int:
    flags = [argument for argument in sys.argv[1:] if argument != "--once"]
    once = "--once" in sys.argv[1:]
    ending = Ending()
    paddler = Path(sys.executable).with_name("paddler")
    with ending.start(
        paddler, "up", *flags, stdout=subprocess.PIPE, process_group=0, env=quiet(os.environ)
    ) as server:
        answered = False
        try:
            url = wait_until_serving(server.stdout)
            answered = url is not None and not ending.signal and ask(url, ending)
            if url is not None and not answered and not ending.signal:
                print("No answer; stopping.", file=sys.stderr)
            elif answered and not once and not ending.signal:
                print(f"\nAsk more:  {shlex.quote(str(ASK))} 'What is 2 + 2?' --url {url}", flush=True)
                print("Ctrl-C stops Paddler.", flush=True)
                server.wait()
        finally:
            if server.poll() is None and not ending.signal:
                server.terminate()
        code = server.wait()
    if not code and answered:
        return 0
    if ending.signal or code < 0:  # as a shell reports it
        return 128 + (ending.signal or -code)
    return code or 1


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave only warnings among the words of the quickstart, unless the user chose another level."""
    chosen = environment.get("PADDLER_LOG") or environment.get("RUST_LOG")
    return {**environment, **({} if chosen else {"PADDLER_LOG": "warn"})}


def wait_until_serving(output: IO[bytes] | None) -> str | None:
    """Pass on what `paddler up` says once an agent serves; return the address of its inference service.

    None when it ended, or said nothing in time.
    """
    assert output is not None
    readable, _, _ = select.select([output], [], [], START_SECONDS)
    said = os.read(output.fileno(), 2**16).decode() if readable else ""
    if said:
        print(HOW_TO_STOP.sub("", said), flush=True)
    found = re.search(r"inference +(http://\S+)", said)
    return found[1] if found else None


def ask(url: str, ending: Ending) -> bool:
    """Stream one answer to the screen; return whether it arrived whole."""
    print(f"> {QUESTION}", flush=True)
    return ending.start(sys.executable, ASK, QUESTION, "--url", url).wait() == 0


if __name__ == "__main__":
    sys.exit(main())
