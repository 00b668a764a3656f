#!/usr/bin/env python3
"""Send one message to a running Paddler and print the answer as it arrives.

scripts/ask.py "What is a slot?" [--url http://127.0.0.1:8061] [--max-tokens 200] [--thinking]

Needs nothing but Python itself.
"""

import argparse
import http.client
import json
import sys
from typing import Any
from urllib.parse import urlsplit

PATH = "/api/v1/continue_from_conversation_history"
SECONDS_OF_SILENCE = 60


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a running Paddler.")
    parser.add_argument("message")
    parser.add_argument("--url", default="http://127.0.0.1:8061", help="its inference service")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    options = parser.parse_args()
    request = {
        "add_generation_prompt": True,
        "conversation_history": [{"role": "user", "content": options.message}],
        "enable_thinking": options.thinking,
        "max_tokens": options.max_tokens,
    }
    try:
        return ask(options.url, request)
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer from {options.url}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130


def ask(url: str, request: dict[str, Any]) -> int:
    """Stream the answer to standard output; return the exit code."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS_OF_SILENCE)
    connection.request("POST", PATH, json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        print(f"{response.status}: {response.read().decode()}", file=sys.stderr)
        return 1
    for line in response:  # one JSON message per line, as soon as the balancer has it
        message = json.loads(line)
        if "Error" in message:
            print(f"error {message['Error']['error']['description']}", file=sys.stderr)
            return 1
        [(kind, payload)] = message["Response"]["response"]["GeneratedToken"].items()
        if kind.endswith("Token"):
            print(payload, end="", flush=True)
        elif kind == "Done":
            print()
            return 0
        else:
            print(f"\n{kind}: {payload}", file=sys.stderr)
            return 1
    print("\nthe answer broke off", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
