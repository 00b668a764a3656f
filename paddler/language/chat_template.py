"""A conversation and a model's chat template become a prompt.

Templates differ in what they expect of a conversation; which form one understands is found out by
rendering. They come from model files and operators: see template_environment.py for what bounds them.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from itertools import product
from typing import Any, NoReturn

import attrs

from paddler.language.template_environment import CompiledTemplate, TemplateFailed
from paddler.messages.inference import (
    CalledTool,
    ContinueFromConversationHistory,
    ConversationMessage,
    ImagePart,
    TextPart,
    Tool,
)

# Theory of operation
#
# `template_variables` writes a request as JSON, in OpenAI's form. What cannot please every template
# is settled while rendering, each by looking at what the template makes of it:
#
# 1. Tool calls of earlier messages (`_CallForm`): arguments as objects, else as JSON texts; empty
#    content as "", else none. A probe with arguments of a name nobody uses decides, once per template.
# 2. Content parts: as lists, else as their joined texts.
# 3. No tools: none, as `transformers` has it (templates test `tools is not none`); [] for templates
#    that fail with none.
# 4. Reasoning of earlier messages: under the name that the template reads.

MEDIA_MARKER = "<__media__>"
"""Stands for an image in a prompt, as libmtmd expects it."""

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""What templates call an earlier message's reasoning; the first that a template reads is used."""

FIREFUNCTION_NAMES = frozenset({"functions", "datetime"})
"""Firefunction's template needs its tools and the time as texts, under names of its own."""


@attrs.frozen
class Prompt:
    """What the model is to continue; `suffix` is the part that the generation prompt added."""

    text: str
    suffix: str


def template_variables(request: ContinueFromConversationHistory) -> dict[str, Any]:
    """Return what a template sees of a request, as JSON values; images are replaced by their marker."""
    return {
        "messages": [_message_variable(message) for message in request.conversation_history],
        "tools": [_tool_variable(tool) for tool in request.tools],
        "documents": None if request.documents is None else [*request.documents],
        "add_generation_prompt": request.add_generation_prompt,
        "enable_thinking": request.enable_thinking,
        "thinking": request.enable_thinking,  # as DeepSeek and Granite call it
        "thinking_mode": "enabled" if request.enable_thinking else "disabled",  # as MiniMax M3 does
    }


@attrs.frozen
class _CallForm:
    """How a template wants the tool calls of earlier messages."""

    arguments_are_text: bool
    empty_content: str | None


_CALL_FORMS = tuple(_CallForm(*choice) for choice in ((False, ""), (True, ""), (False, None), (True, None)))
"""Preferred first: those that fewest templates mistake."""


class PromptTemplate:
    """A compiled chat template. Raises TemplateFailed when it does not compile.

    MemoryError passes, here as in `render`: the limit is the caller's.
    """

    def __init__(self, source: str) -> None:
        self._template = CompiledTemplate(source)
        names = self._template.attribute_names
        self._reasoning_name = next((name for name in REASONING_NAMES if name in names), REASONING_NAMES[0])
        self._call_form: _CallForm | None = None

    def render(self, variables: dict[str, Any], *, now: datetime) -> Prompt:
        """Render a conversation; `now` is what `strftime_now` shows. Raises TemplateFailed.

        The suffix is found by rendering again without generation prompt. Templates that refuse that
        have none.
        """
        scope = variables | {"strftime_now": now.strftime}
        if self._template.variable_names >= FIREFUNCTION_NAMES:
            functions = json.dumps(scope["tools"], ensure_ascii=False, indent=4)
            scope |= {"functions": functions, "datetime": now.strftime("%Y-%m-%d %H:%M:%S")}
        scope = _with_call_form(scope, self._call_form_for(scope))
        text = self._render_content(scope)
        if not scope["add_generation_prompt"]:
            return Prompt(text, "")
        try:
            without = self._render_content(scope | {"add_generation_prompt": False})
        except TemplateFailed:
            return Prompt(text, "")
        return Prompt(text, text[_common_start(text, without) :])

    def _call_form_for(self, scope: dict[str, Any]) -> _CallForm:
        """Return how the calls of this conversation are to be written.

        The best form is that in which the template shows most of the probed arguments, unharmed.
        """
        calls = sum(len(message.get("tool_calls", ())) for message in scope["messages"])
        if self._call_form is not None or not calls:
            return self._call_form or _CALL_FORMS[0]
        best, best_shown = _CALL_FORMS[0], 0
        for form in _CALL_FORMS:
            try:
                text = self._render_content(_with_call_form(scope, form, _PROBE))
            except TemplateFailed:
                continue
            shown = len(_UNHARMED_PROBE.findall(text))
            if shown > best_shown:
                best, best_shown = form, shown
            if shown >= calls:
                break
        if best_shown:
            self._call_form = best
        return best

    def _render_content(self, scope: dict[str, Any]) -> str:
        """Render with part lists; for a template that expects strings, with their joined texts instead.

        A template expects strings if it fails with lists, prints one as Python would, or shows none
        of their texts.
        """
        part_lists = [message["content"] for message in scope["messages"] if type(message["content"]) is list]
        if not part_lists:
            return self._render_once(scope)
        try:
            text = self._render_once(scope)
        except TemplateFailed:
            text = None
        if text is not None and _shows_parts(text, part_lists):
            return text
        as_strings = self._render_once(_with_messages(scope, _with_string))
        if text is not None and not _shows_parts(as_strings, part_lists):
            return text  # it shows them in neither form: the list is what the template asked for
        return as_strings

    def _render_once(self, scope: dict[str, Any]) -> str:
        """Render with tools and reasoning as most templates want them; if that fails, as others do."""
        renamed = _with_messages(scope, self._with_reasoning_renamed)
        scopes = [renamed, scope] if renamed["messages"] != scope["messages"] else [scope]
        tools = [scope["tools"]] if scope.get("tools") else [None, []]
        failure: TemplateFailed | None = None
        for form, offered in product(scopes, tools):
            try:
                return self._template.render(form | {"tools": offered})
            except TemplateFailed as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _with_reasoning_renamed(self, message: dict[str, Any]) -> dict[str, Any]:
        if "reasoning_content" not in message:
            return message
        return {self._reasoning_name if key == "reasoning_content" else key: message[key] for key in message}


# A request as JSON values.


def _message_variable(message: ConversationMessage) -> dict[str, Any]:
    content = message.content
    variable: dict[str, Any] = {
        "role": message.role,
        "content": content if isinstance(content, str) else [_part_variable(part) for part in content],
    }
    for key in ("name", "reasoning_content", "tool_call_id"):
        value = getattr(message, key)
        if value is not None:
            variable[key] = value
    if message.tool_calls:
        variable["tool_calls"] = [_call_variable(call) for call in message.tool_calls]
    return variable


def _part_variable(part: TextPart | ImagePart) -> dict[str, str]:
    return {"type": "text", "text": part.text if isinstance(part, TextPart) else MEDIA_MARKER}


def _call_variable(call: CalledTool) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    variable = {"type": call.type, "function": function}
    return variable if call.id is None else {"id": call.id, **variable}


def _tool_variable(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name, "description": tool.function.description}
    if tool.function.parameters is not None:
        schema = attrs.asdict(tool.function.parameters, recurse=False)
        if schema["required"] is not None:
            schema["required"] = [*schema["required"]]
        function["parameters"] = {key: value for key, value in schema.items() if value is not None}
    return {"type": tool.type, "function": function}


# Other forms of the same messages.


def _with_messages(
    scope: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    return scope | {"messages": [change(message) for message in scope["messages"]]}


def _with_call_form(
    scope: dict[str, Any], form: _CallForm, probe: dict[str, str] | None = None
) -> dict[str, Any]:
    return _with_messages(scope, lambda message: _with_calls(message, form, probe))


def _with_string(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if type(content) is str or content is None:
        return message
    return message | {"content": "\n".join([part["text"] for part in content])}


def _with_calls(
    message: dict[str, Any], form: _CallForm, probe: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write the calls of a message in a form, with the probe for arguments if there is one."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = _arguments(function["arguments"] if probe is None else probe, form)
        calls.append(call | {"function": function | {"arguments": arguments}})
    content = message["content"] or form.empty_content
    return message | {"content": content, "tool_calls": calls}


def _arguments(arguments: Any, form: _CallForm) -> Any:
    if form.arguments_are_text:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return arguments  # what the model wrote is no JSON, and stays as it is
    return value if isinstance(value, dict) else arguments


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_PROBE = {"paddler_probe": "probed"}

_UNHARMED_PROBE = re.compile(r"""(?<!')(?<!\\")\bpaddler_probe\b""")
"""The name neither in Python's quotes, as a printed dict has it, nor in escaped ones, as JSON in JSON."""


def _common_start(text: str, other: str) -> int:
    """Return how many characters two texts have in common from the beginning, by bisection."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shows_parts(text: str, part_lists: list[list[dict[str, str]]]) -> bool:
    if any(str(parts) in text for parts in part_lists if parts):
        return False
    texts = [part["text"].strip() for parts in part_lists for part in parts]
    return not any(texts) or any(shown in text for shown in texts if shown)
