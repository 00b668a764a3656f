#!/usr/bin/env python3
"""Send one message to a running Paddler and print the answer as it arrives.

scripts/ask.py "What is a slot?" [--url http://127.0.0.1:8061] [--max-tokens 200] [--thinking]

Needs nothing but Python itself.
"""

import signal

if __name__ == "__main__":
    for number in (
        signal.SIGINT,
        signal.SIGPIPE,
    ):  # Ctrl-C, also among the imports, and `| head`: no traceback
        signal.signal(number, signal.SIG_DFL)

import argparse
import http.client
import json
import sys
from typing import Any
from urllib.parse import SplitResult, urlsplit

PATH = "/api/v1/continue_from_conversation_history"
SECONDS_OF_SILENCE = 60
THOUGHT = "| "


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Send one message to a running Paddler and print the answer."
    )
    parser.add_argument("message", help="what the user says")
    parser.add_argument(
        "--url",
        type=service,
        default="http://127.0.0.1:8061",
        help="the inference service, as http://host:port or host:port (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=200,
        help="longest answer, thoughts included; below 1 counts as 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--thinking",
        action="store_true",
        help=f"let the model think first; its thoughts are the lines that begin with {THOUGHT.strip()!r}",
    )
    options = parser.parse_args()
    request = {
        "add_generation_prompt": True,
        "conversation_history": [{"role": "user", "content": options.message}],
        "enable_thinking": options.thinking,
        "max_tokens": options.max_tokens,
    }
    try:
        return ask(options.url, request)
    except ConnectionRefusedError:
        return fail(
            f"nobody listens at {options.url.netloc}: scripts/quickstart starts Paddler, --url names another"
        )
    except (OSError, http.client.HTTPException) as error:
        return fail(f"no answer from {options.url.netloc}: {error}")


def service(text: str) -> SplitResult:
    """Read the address of a service; http:// may be left out."""
    url = urlsplit(text if "://" in text else f"http://{text}")
    if url.scheme == "https":
        raise argparse.ArgumentTypeError(f"Paddler speaks plain HTTP, not https: use http://{url.netloc}")
    try:
        is_usable = url.scheme == "http" and url.hostname and url.port != 0
    except ValueError:  # a port that is none
        is_usable = False
    if not is_usable:
        raise argparse.ArgumentTypeError(f"expected http://host:port or host:port, got {text!r}")
    return url


def ask(url: SplitResult, request: dict[str, Any]) -> int:
    """Stream the answer to standard output; return the exit code."""
    connection = http.client.HTTPConnection(url.netloc, timeout=SECONDS_OF_SILENCE)
    path = url.path.rstrip("/") + PATH
    connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status == http.client.NOT_FOUND:
        return fail(
            f"404 from {url.netloc}: is this the inference service? The management service is another port"
        )
    if response.status != http.client.OK:
        return fail(f"{response.status} from {url.netloc}: {response.read().decode(errors='replace')}")
    screen = Screen()
    for line in response:  # one JSON message per line, as soon as the balancer has it
        message = json.loads(line)
        if "Error" in message:
            screen.end()
            error = message["Error"]["error"]
            return fail(f"error {error['code']}: {error['description']}")
        [(kind, payload)] = message["Response"]["response"]["GeneratedToken"].items()
        if kind.endswith("Token"):
            screen.show(payload, prefix=THOUGHT if kind == "ReasoningToken" else "")
        else:
            screen.end()
            return 0 if kind == "Done" else fail(f"{kind}: {payload}")
    screen.end()
    return fail("the answer broke off")


class Screen:
    """Prints pieces of text as they come: thoughts apart from the answer, no empty lines around either."""

    def __init__(self) -> None:
        self._prefix: str | None = None
        self._held = ""
        """Line ends that are shown only before more text."""

    def show(self, text: str, *, prefix: str) -> None:
        if prefix != self._prefix:
            text = text.lstrip()
            if not text:
                return
            print(prefix if self._prefix is None else f"\n{prefix}", end="")
            self._prefix, self._held = prefix, ""
        text = self._held + text
        visible = text.rstrip("\n")
        self._held = text[len(visible) :]
        print(visible.replace("\n", f"\n{prefix}"), end="", flush=True)

    def end(self) -> None:
        if self._prefix is not None:
            print(flush=True)


def fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
