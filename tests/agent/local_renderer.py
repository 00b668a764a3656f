"""Does the jobs of preparation where it is called, on the Trio clock: a stand-in for its processes."""

from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import attrs
import trio

from paddler.agent import preparation_process
from paddler.engine.pipe import Picture
from paddler.language.chat_template import Prompt, PromptTemplate
from paddler.language.template_environment import TemplateFailed
from paddler.messages.tokens import (
    ChatTemplateError,
    GrammarSyntaxError,
    ImageDecodingFailed,
    ToolSchemaInvalid,
)


@attrs.define
class LocalRenderer:
    delay: float = 0.0
    rendered: list[dict[str, Any]] = attrs.Factory(list)
    failures: deque[Exception] = attrs.Factory(deque)
    """Raised, one each, by the next checks of a template."""

    async def render(self, template: str, variables: dict[str, Any]) -> Prompt | ChatTemplateError:
        await trio.sleep(self.delay)
        self.rendered.append(variables)
        try:
            return PromptTemplate(template).render(variables, now=datetime(2024, 5, 17))
        except TemplateFailed as error:
            return ChatTemplateError(str(error))

    async def compile_error(self, template: str) -> str | None:
        await trio.sleep(self.delay)
        if self.failures:
            raise self.failures.popleft()
        try:
            PromptTemplate(template)
        except TemplateFailed as error:
            return str(error)
        return None

    async def gbnf_of_schema(self, schema: str) -> str | GrammarSyntaxError:
        answer = await self._answer({"kind": "schema", "schema": schema})
        return GrammarSyntaxError(answer["error"]) if "error" in answer else str(answer["gbnf"])

    async def tool_schema_error(self, tools: Sequence[dict[str, Any]]) -> ToolSchemaInvalid | None:
        answer = await self._answer({"kind": "tools", "tools": tools})
        return ToolSchemaInvalid(answer["error"]) if "error" in answer else None

    async def call_violations(
        self, calls: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[str]:
        answer = await self._answer({"kind": "calls", "calls": calls, "tools": tools})
        return [answer["error"]] if "error" in answer else answer["violations"]

    async def pictures(
        self, urls: Sequence[str], *, resize_to_fit: int
    ) -> list[Picture] | ImageDecodingFailed:
        pictures = []
        for url in urls:
            answer = await self._answer({"kind": "picture", "url": url, "resize_to_fit": resize_to_fit})
            if "error" in answer:
                return ImageDecodingFailed(answer["error"])
            pictures.append(Picture(**answer))
        return pictures

    async def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        await trio.sleep(self.delay)
        return preparation_process.answer(job)
