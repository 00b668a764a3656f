"""Compiles and runs chat templates as `transformers` does: the same sandbox, tags, filters and functions.

Knows nothing of conversations. Time and memory are bounded by the caller (agent/preparation.py), the
length of the output here.
"""

import json
from types import GeneratorType
from typing import Any, NoReturn, cast

import attrs
import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from paddler.errors import PaddlerError

MAX_PROMPT_CHARACTERS = 4 * 1024 * 1024
"""Longer than any context; escaped as JSON, at most twelve bytes each, it still fits an engine frame."""

MAX_INDENT = 64

MUTATORS = frozenset({"append", "extend", "insert"})
"""Methods of lists that some templates call (Kimi K2's), although `transformers` forbids them."""


@attrs.define(eq=False)
class TemplateFailed(PaddlerError):
    """A template does not compile, or does not render this conversation."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@attrs.define(eq=False)
class TemplateRefused(TemplateFailed):
    """A template called `raise_exception`: it does not want this conversation, and `message` says why."""

    message: str


class CompiledTemplate:
    """A template that compiles. Raises TemplateFailed when it does not.

    MemoryError passes, here as in `render`: the limit is the caller's.
    """

    def __init__(self, source: str) -> None:
        try:
            tree = _ENVIRONMENT.parse(source)
            self.attribute_names = _attribute_names(tree)
            """What the template looks up in objects: `x.name` and `x["name"]`."""
            self.variable_names = frozenset(node.name for node in tree.find_all(jinja2.nodes.Name))
            self._is_mutating = not MUTATORS.isdisjoint(self.attribute_names)
            environment = _MUTABLE_ENVIRONMENT if self._is_mutating else _ENVIRONMENT
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed(f"syntax error in line {error.lineno}: {error.message}") from None
        except MemoryError:
            raise
        except Exception as error:  # Python's own compiler meets what jinja2 made of the template
            raise TemplateFailed(f"{type(error).__name__}: {error}") from None

    def render(self, scope: dict[str, Any]) -> str:
        """Return the output, at most MAX_PROMPT_CHARACTERS of valid Unicode. Raises TemplateFailed."""
        pieces: list[str] = []
        room = MAX_PROMPT_CHARACTERS
        try:
            if self._is_mutating:
                scope = {name: _copy(value) for name, value in scope.items()}
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


def _attribute_names(tree: jinja2.nodes.Template) -> frozenset[str]:
    names = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    for node in tree.find_all(jinja2.nodes.Getitem):
        if isinstance(node.arg, jinja2.nodes.Const) and isinstance(node.arg.value, str):
            names.add(node.arg.value)
    return frozenset(names)


def _copy(value: Any) -> Any:
    """Copy JSON values: what a template does to its variables must not show in the next rendering."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


# What templates can call, beyond jinja2's own.


def _raise_exception(message: object) -> NoReturn:
    text = str(message)
    raise TemplateRefused(f"the model's chat template raised an exception: {text}", text)


def tojson(
    value: Any,
    indent: int | None = None,
    *,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON the way models were trained on it: unescaped, a blank after `,` and `:`.

    jinja2's own filter sorts keys and escapes for HTML.
    """
    if indent is True:
        indent = 2
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise ValueError(f"tojson needs an indent of 0 to {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent or None,
        separators=separators,
        sort_keys=sort_keys,
        default=_listed,
    )


def _listed(value: object) -> list[object]:
    """Write what `map` and `select` return as a list."""
    if isinstance(value, GeneratorType):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


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


def _furnished(environment: SandboxedEnvironment) -> SandboxedEnvironment:
    environment.filters["tojson"] = tojson
    environment.filters = cast("Any", _Lenient(environment.filters))  # jinja2 declares exactly a dict
    environment.tests = cast("Any", _Lenient(environment.tests))
    environment.globals["raise_exception"] = _raise_exception
    return environment


_OPTIONS: dict[str, Any] = {
    "trim_blocks": True,
    "lstrip_blocks": True,
    "extensions": ["jinja2.ext.loopcontrols", _Generation],
}
_ENVIRONMENT = _furnished(ImmutableSandboxedEnvironment(**_OPTIONS))
_MUTABLE_ENVIRONMENT = _furnished(SandboxedEnvironment(**_OPTIONS))
