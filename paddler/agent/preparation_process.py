"""The preparation process: renders chat templates, one after the other, until its socket closes.

Started by preparation.py as a module, with a socket's descriptor and a memory limit. It may be
killed at any time.
"""

import functools
import socket
import sys
from datetime import datetime
from typing import Any

from paddler.language.chat_template import PromptTemplate, TemplateFailed
from paddler.processes.frames import FrameCutter, pack_frame
from paddler.processes.parent import bind_to_parent

if sys.platform == "linux":
    import resource

KEPT_TEMPLATES = 4
"""Compiled templates that are kept: that of the model, and of the states before and after it."""

MAX_ERROR_CHARACTERS = 4096
"""A template can raise a text of any length."""

_READ_BYTES = 1 << 20


def serve(connection: socket.socket) -> None:
    """Answer jobs until the agent closes its end.

    A job has a `template` and `variables`, or null to have the template compiled only; the answer has
    `text` and `suffix`, or an `error`.
    """
    frames = FrameCutter(max_frame_bytes=2**32 - 1)  # the agent is trusted
    while data := connection.recv(_READ_BYTES):
        for job in frames.feed(data):
            connection.sendall(_answer(job))


def _answer(job: dict[str, Any]) -> bytes:
    try:
        template = _compiled(job["template"])
        if job["variables"] is None:
            return pack_frame({"text": "", "suffix": ""})
        prompt = template.render(job["variables"], now=datetime.now().astimezone())
        return pack_frame({"text": prompt.text, "suffix": prompt.suffix})
    except TemplateFailed as error:
        return pack_frame({"error": str(error)[:MAX_ERROR_CHARACTERS]})
    except MemoryError:
        return pack_frame({"error": "the template needs more memory than it may have"})
    except RecursionError:
        return pack_frame({"error": "the conversation is nested too deeply"})


@functools.lru_cache(maxsize=KEPT_TEMPLATES)
def _compiled(source: str) -> PromptTemplate:
    return PromptTemplate(source)


def main() -> None:
    descriptor, memory_limit_bytes = map(int, sys.argv[1:])
    with socket.socket(fileno=descriptor) as connection:
        bind_to_parent(connection)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            serve(connection)
        except ConnectionError:
            pass  # the agent closed its end while an answer was on its way


if __name__ == "__main__":
    main()
