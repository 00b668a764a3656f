"""The preparation process: does the jobs of preparation.py, one after the other, until its socket closes.

Started by preparation_pool.py as a module, with a socket's descriptor and a memory limit. It may be
killed at any time. What only some jobs need is imported by them: most processes stay small.
"""

import functools
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from paddler.language.chat_template import PromptTemplate
from paddler.language.template_environment import TemplateFailed
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
    """Answer jobs until the agent closes its end."""
    frames = FrameCutter(max_frame_bytes=2**32 - 1)  # the agent is trusted
    while data := connection.recv(_READ_BYTES):
        for job in frames.feed(data):
            connection.sendall(_reply(job))


def _reply(job: dict[str, Any]) -> bytes:
    try:
        return pack_frame(answer(job))
    except MemoryError:
        pass
    # What filled the memory may still be held by cycles: this process is not fit for another job.
    return pack_frame({"error": f"{JOBS[job['kind']][1]} needs more memory than it may have", "worn": True})


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job of a `kind`; the answer of one that failed has an `error`, and nothing else.

    Raises MemoryError.
    """
    do, subject = JOBS[job["kind"]]
    try:
        return do(job)
    except RecursionError:
        return {"error": f"{subject} is nested too deeply"}


def _render(job: dict[str, Any]) -> dict[str, Any]:
    try:
        prompt = _compiled(job["template"]).render(job["variables"], now=datetime.now().astimezone())
    except TemplateFailed as error:
        return _failed(error)
    return {"text": prompt.text, "suffix": prompt.suffix}


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    try:
        _compiled(job["template"])
    except TemplateFailed as error:
        return _failed(error)
    return {}


@functools.lru_cache(maxsize=KEPT_TEMPLATES)
def _compiled(source: str) -> PromptTemplate:
    return PromptTemplate(source)


def _convert_schema(job: dict[str, Any]) -> dict[str, Any]:
    from paddler.engine.json_schema_grammar import SchemaNotConvertible, gbnf_of_schema

    try:
        return {"gbnf": gbnf_of_schema(job["schema"])}
    except SchemaNotConvertible as error:
        return _failed(error)


def _check_tools(job: dict[str, Any]) -> dict[str, Any]:
    from paddler.language.tool_schemas import check_schemas

    error = check_schemas(job["tools"])
    return {} if error is None else {"error": error[:MAX_ERROR_CHARACTERS]}


def _check_calls(job: dict[str, Any]) -> dict[str, Any]:
    from paddler.language.tool_schemas import violations

    return {"violations": [text[:MAX_ERROR_CHARACTERS] for text in violations(job["calls"], job["tools"])]}


def _decode_picture(job: dict[str, Any]) -> dict[str, Any]:
    from paddler.agent.pictures import PictureRefused, decode_picture

    try:
        return decode_picture(job["url"], resize_to_fit=job["resize_to_fit"])
    except PictureRefused as error:
        return _failed(error)


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": str(error)[:MAX_ERROR_CHARACTERS]}


JOBS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "render": (_render, "the template"),
    "compile": (_compile, "the template"),
    "schema": (_convert_schema, "the JSON schema"),
    "tools": (_check_tools, "a tool's schema"),
    "calls": (_check_calls, "a tool call"),
    "picture": (_decode_picture, "the image"),
}
"""What does a job of each kind, and what is to blame if it needs too much."""


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
