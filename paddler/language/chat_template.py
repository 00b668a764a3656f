"""A conversation and a model's chat template become a prompt.

Templates come from model files and operators: they run in jinja2's immutable sandbox, and the
caller bounds their time and memory (agent/preparation.py).
"""

import json
from datetime import datetime
from typing import Any, NoReturn, cast

import attrs
import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paddler.errors import PaddlerError
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ConversationMessage,
    ImagePart,
    TextPart,
    Tool,
)

MEDIA_MARKER = "<__media__>"
"""Stands for an image in a prompt, as libmtmd expects it."""

MAX_PROMPT_CHARACTERS = 4 * 1024 * 1024
"""Longer than any context; escaped as JSON, at most twelve bytes each, it still fits an engine frame."""

MAX_INDENT = 64


@attrs.define(eq=False)
class TemplateFailed(PaddlerError):
    """A template does not compile, or does not render this conversation."""

    reason: str

    def __str__(self) -> str:
        return self.reason


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
        "add_generation_prompt": request.add_generation_prompt,
        "enable_thinking": request.enable_thinking,
    }


class PromptTemplate:
    """A compiled chat template. Raises TemplateFailed when it does not compile.

    MemoryError passes, here as in `render`: the limit is the caller's.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed(f"syntax error in line {error.lineno}: {error.message}") from None
        except MemoryError:
            raise
        except Exception as error:  # Python's own compiler meets what jinja2 made of the template
            raise TemplateFailed(f"{type(error).__name__}: {error}") from None

    def render(self, variables: dict[str, Any], *, now: datetime) -> Prompt:
        """Render a conversation; `now` is what `strftime_now` shows. Raises TemplateFailed.

        The suffix is found by rendering again without generation prompt. Templates that refuse that
        have none.
        """
        scope = variables | {"strftime_now": now.strftime}
        text = self._render_content(scope)
        if not scope["add_generation_prompt"]:
            return Prompt(text, "")
        try:
            without = self._render_content(scope | {"add_generation_prompt": False})
        except TemplateFailed:
            return Prompt(text, "")
        return Prompt(text, text[_common_start(text, without) :])

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
        as_strings = self._render_once(scope | {"messages": [_with_string(m) for m in scope["messages"]]})
        if text is not None and not _shows_parts(as_strings, part_lists):
            return text  # it shows them in neither form: the list is what the template asked for
        return as_strings

    def _render_once(self, scope: dict[str, Any]) -> str:
        pieces: list[str] = []
        room = MAX_PROMPT_CHARACTERS
        try:
            for piece in self._template.generate(scope):
                room -= len(piece)
                if room < 0:
                    raise TemplateFailed(f"the prompt is longer than {MAX_PROMPT_CHARACTERS} characters")
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()
        except (TemplateFailed, MemoryError):
            raise
        except UnicodeEncodeError:
            raise TemplateFailed("the prompt is not valid Unicode") from None
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateFailed(f"{type(error).__name__}: {error}") from None
        return text


def _message_variable(message: ConversationMessage) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    return {"role": message.role, "content": [_part_variable(part) for part in message.content]}


def _part_variable(part: TextPart | ImagePart) -> dict[str, str]:
    return {"type": "text", "text": part.text if isinstance(part, TextPart) else MEDIA_MARKER}


def _tool_variable(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name, "description": tool.function.description}
    if tool.function.parameters is not None:
        schema = attrs.asdict(tool.function.parameters, recurse=False)
        function["parameters"] = {key: value for key, value in schema.items() if value is not None}
    return {"type": tool.type, "function": function}


def _with_string(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if type(content) is str:
        return message
    return message | {"content": "\n".join([part["text"] for part in content])}


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


# What templates can call, beyond jinja2's own.


def _raise_exception(message: object) -> NoReturn:
    raise TemplateFailed(f"the model's chat template raised an exception: {message}")


def tojson(
    value: Any, indent: int | None = None, *, ensure_ascii: bool = False, sort_keys: bool = False
) -> str:
    """Write JSON the way models were trained on it: unescaped, a blank after `,` and `:`."""
    if ensure_ascii or sort_keys:
        raise ValueError("tojson supports neither ensure_ascii=True nor sort_keys=True")
    if indent is True:
        indent = 2
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise ValueError(f"tojson needs an indent of 0 to {MAX_INDENT}")
    return json.dumps(value, ensure_ascii=False, indent=indent or None)


class _Generation(Extension):
    """`{% generation %}` marks what training counts as the answer; it means nothing when rendering."""

    tags = {"generation"}  # noqa: RUF012 jinja2 declares it this way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Lenient(dict[str, Any]):
    """A table of filters or tests in which unknown names fail when they are used, not at compile time.

    jinja2's compiler looks names up by `get`; what it generates looks again, by key, and raises then.
    """

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default or _unknown)


def _unknown(*_: object) -> NoReturn:
    raise AssertionError("generated code looks names up by key")


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.filters = cast("Any", _Lenient(environment.filters))  # jinja2 declares exactly a dict
    environment.tests = cast("Any", _Lenient(environment.tests))
    environment.globals["raise_exception"] = _raise_exception
    return environment


_ENVIRONMENT = _make_environment()
