"""Renders templates where it is called, on the Trio clock: a stand-in for the preparation processes."""

from collections import deque
from datetime import datetime
from typing import Any

import attrs
import trio

from paddler.language.chat_template import Prompt, PromptTemplate, TemplateFailed
from paddler.messages.tokens import ChatTemplateError


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
