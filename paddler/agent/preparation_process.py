"""The preparation process: renders chat templates, one after the other, until its socket closes.

Started by preparation.py as a module, with a socket's descriptor and a memory limit. It may be
killed at any time. Frames are a 4-byte little-endian length and that much JSON.
"""

import ctypes
import functools
import io
import json
import os
import signal
import socket
import sys
from datetime import datetime
from typing import Any

from paddler.language.chat_template import PromptTemplate, TemplateFailed

if sys.platform == "linux":
    import resource

LENGTH_BYTES = 4
KEPT_TEMPLATES = 4
"""Compiled templates that are kept: that of the model, and of the states before and after it."""

MAX_ERROR_CHARACTERS = 4096
"""A template can raise a text of any length."""

_PR_SET_PDEATHSIG = 1


def pack(message: dict[str, Any]) -> bytes:
    """Return the frame of a job or of its answer."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def serve(pipe: io.BufferedRWPair) -> None:
    """Answer jobs until the pipe ends.

    A job has a `template` and `variables`, or null to have the template compiled only; the answer has
    `text` and `suffix`, or an `error`.
    """
    while len(header := pipe.read(LENGTH_BYTES)) == LENGTH_BYTES:
        length = int.from_bytes(header, "little")
        pipe.write(_answer(pipe.read(length)))
        pipe.flush()


def _answer(job_text: bytes) -> bytes:
    try:
        job = json.loads(job_text)
        template = _compiled(job["template"])
        if job["variables"] is None:
            return pack({"text": "", "suffix": ""})
        prompt = template.render(job["variables"], now=datetime.now().astimezone())
        return pack({"text": prompt.text, "suffix": prompt.suffix})
    except TemplateFailed as error:
        return pack({"error": str(error)[:MAX_ERROR_CHARACTERS]})
    except MemoryError:
        return pack({"error": "the template needs more memory than it may have"})
    except RecursionError:
        return pack({"error": "the conversation is nested too deeply"})


@functools.lru_cache(maxsize=KEPT_TEMPLATES)
def _compiled(source: str) -> PromptTemplate:
    return PromptTemplate(source)


def _limit(memory_limit_bytes: int, parent: int) -> None:
    """Never outlive the agent, leave Ctrl-C to it, and keep within the memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getppid() != parent:
        sys.exit("the agent is gone")


def main() -> None:
    descriptor, memory_limit_bytes, parent = map(int, sys.argv[1:])
    _limit(memory_limit_bytes, parent)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as pipe:
        try:
            serve(pipe)
        except ConnectionError:
            pass  # the agent closed its end while an answer was on its way


if __name__ == "__main__":
    main()
