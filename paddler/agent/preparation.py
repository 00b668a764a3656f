"""What requests need done before the engine sees them, in processes of their own, with a deadline.

Templates are programs, schemas have regular expressions, images are bombs: what loops or grows costs
its request a typed error and nobody else anything (preparation_pool.py).
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from paddler.agent.preparation_pool import PreparationFailed, PreparationTimeout, WorkerPool
from paddler.engine.pipe import Picture
from paddler.language.chat_template import Prompt
from paddler.language.template_environment import MAX_PROMPT_CHARACTERS
from paddler.messages.tokens import (
    ChatTemplateError,
    GrammarSyntaxError,
    ImageDecodingFailed,
    ToolSchemaInvalid,
)

MAX_WORKERS = 4
"""So many jobs can be stuck at once before others wait for a deadline; each worker costs some 30 MB."""

MEMORY_LIMIT_BYTES = 512 * 1024 * 1024
"""Address space of a worker: ten times what it needs."""

MAX_PICTURE_WORKERS = 2
PICTURE_MEMORY_LIMIT_BYTES = 2 * 1024 * 1024 * 1024
"""Of a process of its own for images: the largest that may be decoded is held twice, in 16 bytes a pixel."""

MAX_PICTURES_BYTES = 128 * 1024 * 1024
"""Of all images of a request, decoded, in base64: it must fit a frame to the engine."""

_MAX_ANSWER_BYTES = 6 * MAX_PROMPT_CHARACTERS + 1024 * 1024


class Preparer(Protocol):
    """What slots and reconciliation need of preparation."""

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError: ...

    async def compile_error(self, template: str) -> str | None: ...

    async def gbnf_of_schema(self, schema: str) -> str | GrammarSyntaxError: ...

    async def tool_schema_error(self, tools: Sequence[dict[str, Any]]) -> ToolSchemaInvalid | None: ...

    async def call_violations(
        self, calls: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[str]: ...

    async def pictures(
        self, urls: Sequence[str], *, resize_to_fit: int
    ) -> list[Picture] | ImageDecodingFailed: ...


@asynccontextmanager
async def open_preparation(*, timeout: float) -> AsyncIterator["Preparation"]:
    """Provide preparation for the duration of the block; its processes are gone afterwards."""
    preparation = Preparation(timeout=timeout)
    try:
        yield preparation
    finally:
        await preparation.aclose()


class Preparation:
    """The jobs of preparation_process.py, each with a deadline and a typed error.

    Cancelling any of them kills the worker that is at it.
    """

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._texts = WorkerPool(
            most=MAX_WORKERS, memory_limit_bytes=MEMORY_LIMIT_BYTES, max_answer_bytes=_MAX_ANSWER_BYTES
        )
        self._pictures = WorkerPool(
            most=MAX_PICTURE_WORKERS,
            memory_limit_bytes=PICTURE_MEMORY_LIMIT_BYTES,
            max_answer_bytes=MAX_PICTURES_BYTES,
        )

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError:
        """Render a conversation."""
        job = {"kind": "render", "template": template, "variables": variables}
        answer = await self._answer(job, too_late="the chat template was not rendered")
        return ChatTemplateError(answer["error"]) if "error" in answer else Prompt(**answer)

    async def compile_error(self, template: str) -> str | None:
        """Return why a template does not compile, or None. Raises PreparationFailed."""
        job = {"kind": "compile", "template": template}
        try:
            answer = await self._texts.run(job, timeout=self._timeout)
        except PreparationTimeout as error:
            return f"the chat template was {error}"
        return answer.get("error")

    async def gbnf_of_schema(self, schema: str) -> str | GrammarSyntaxError:
        """Return llama.cpp's grammar for a JSON Schema, which comes as text."""
        job = {"kind": "schema", "schema": schema}
        answer = await self._answer(job, too_late="the JSON schema was not converted")
        return GrammarSyntaxError(answer["error"]) if "error" in answer else str(answer["gbnf"])

    async def tool_schema_error(self, tools: Sequence[dict[str, Any]]) -> ToolSchemaInvalid | None:
        """Check that the parameters of all tools, as templates see them, are JSON Schemas."""
        job = {"kind": "tools", "tools": tools}
        answer = await self._answer(job, too_late="the schemas of the tools were not checked")
        return ToolSchemaInvalid(answer["error"]) if "error" in answer else None

    async def call_violations(
        self, calls: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[str]:
        """Return how calls break the schemas of their tools; what could not be checked counts as broken."""
        job = {"kind": "calls", "calls": calls, "tools": tools}
        answer = await self._answer(job, too_late="the arguments of the tool calls were not checked")
        return [answer["error"]] if "error" in answer else answer["violations"]

    async def pictures(
        self, urls: Sequence[str], *, resize_to_fit: int
    ) -> list[Picture] | ImageDecodingFailed:
        """Decode the images of a request, given as data URIs; the deadline is that of all of them."""
        deadline = trio.current_time() + self._timeout
        pictures: list[Picture] = []
        room = MAX_PICTURES_BYTES
        for number, url in enumerate(urls, start=1):
            job = {"kind": "picture", "url": url, "resize_to_fit": resize_to_fit}
            answer = await self._answer(
                job,
                too_late="the images were not decoded",
                pool=self._pictures,
                timeout=deadline - trio.current_time(),
            )
            if "error" in answer:
                return ImageDecodingFailed(answer["error"])
            pictures.append(Picture(**answer))
            room -= len(pictures[-1].rgb)
            if room < 0:
                reason = f"the first {number} of {len(urls)} images have more than"
                return ImageDecodingFailed(f"{reason} {MAX_PICTURES_BYTES // 4} pixels together")
        return pictures

    async def aclose(self) -> None:
        """Kill and reap all processes."""
        await self._texts.aclose()
        await self._pictures.aclose()

    async def _answer(
        self,
        job: dict[str, Any],
        *,
        too_late: str,
        pool: WorkerPool | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Return what a worker answers, or an `error` that says why none did."""
        try:
            return await (pool or self._texts).run(job, timeout=self._timeout if timeout is None else timeout)
        except PreparationTimeout:
            return {"error": f"{too_late} within {self._timeout:g} s"}
        except PreparationFailed as error:
            return {"error": str(error)}
