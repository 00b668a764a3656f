"""One reader per syntax of tool calls: the text of a section becomes names and arguments.

Each reader returns None when the text is not of its syntax, and raises BrokenCall when it begins like it
and goes on otherwise. All pass over the text once.
"""

import re
from collections.abc import Callable

import attrs

from paddler.language.json_calls import BrokenCall, Call, Tools, arguments_of, check_count, read_json
from paddler.language.loose_values import LooseReader, NotReadable
from paddler.language.tagged_calls import (
    read_argument_tags,
    read_function_tags,
    read_invoke_tags,
    read_nested_tags,
)
from paddler.language.tool_formats import Syntax
from paddler.messages.tokens import ValidJson

Reader = Callable[[str, Tools], list[Call] | None]


# Names with JSON behind them.

_NAME_ARGS = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w.\-]+)(?:\[CALL_ID\]([\w\-]+))?\s*(?:\[ARGS\]|(?=\{))")
_NEXT_CALL = re.compile(r"\[TOOL_CALLS\]|\Z")


def read_name_args(text: str, tools: Tools) -> list[Call] | None:
    """Read `name[ARGS]{…}`; what is not JSON goes up to the next call. An array of objects is read, too."""
    if text.removeprefix("[TOOL_CALLS]").lstrip().startswith("["):
        return read_json(text.removeprefix("[TOOL_CALLS]"), tools)
    calls: list[Call] = []
    at = 0
    while at < len(text):
        head = _NAME_ARGS.match(text, at)
        if head is None:
            break  # only at the beginning: behind a call stands the next mark, or nothing
        end = _NEXT_CALL.search(text, head.end())
        assert end is not None
        calls.append(Call(head[1], arguments_of(text[head.end() : end.start()].strip()), head[2]))
        check_count(calls)
        at = end.start()
    return calls or None


@attrs.frozen
class _Enclosed:
    """Marks around each call, and a head between the first one and the arguments."""

    begin: str
    head: re.Pattern[str]
    """Begins with the first mark; its groups are `name` and, where the model gives one, `id`."""
    end: str
    fence: str = ""
    """May stand behind the arguments."""


_KIMI = _Enclosed(
    begin="<|tool_call_begin|>",
    head=re.compile(
        r"\s*<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[\w.\-]+?)(?::\d+)?)\s*"
        r"<\|tool_call_argument_begin\|>"
    ),
    end="<|tool_call_end|>",
)
_DEEPSEEK = _Enclosed(
    begin="<｜tool▁call▁begin｜>",
    head=re.compile(
        r"\s*<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>)?(?P<id>)(?P<name>[\w.\-]+)\s*"
        r"(?:<｜tool▁sep｜>|(?=```))\s*(?:```json\s*)?"
    ),
    end="<｜tool▁call▁end｜>",
    fence="```",
)


def read_kimi(text: str, tools: Tools) -> list[Call] | None:
    """Read Kimi's calls; their ids name the function."""
    del tools
    return _read_enclosed(text, _KIMI)


def read_deepseek(text: str, tools: Tools) -> list[Call] | None:
    """Read both forms of DeepSeek: arguments in a fence, or bare behind the separator."""
    del tools
    return _read_enclosed(text, _DEEPSEEK)


def _read_enclosed(text: str, form: _Enclosed) -> list[Call] | None:
    if form.begin not in text:
        return None
    calls: list[Call] = []
    at = 0
    while (head := form.head.match(text, at)) is not None:
        end = text.find(form.end, head.end())
        if end < 0:
            raise BrokenCall(f"the call of {head['name'][:50]!r} has no end")
        arguments = text[head.end() : end].strip().removesuffix(form.fence)
        calls.append(Call(head["name"], arguments_of(arguments), head["id"] or None))
        check_count(calls)
        at = end + len(form.end)
    if text[at:].strip():
        raise BrokenCall(f"no call begins at character {at}")
    return calls


_RECIPIENT = re.compile(r"[^{]{0,200}?\bto=(?:functions\.)?([\w.\-]+)")


def read_harmony(text: str, tools: Tools) -> list[Call] | None:
    """Read a header that names a recipient, and the message behind it."""
    del tools
    header, message, arguments = text.partition("<|message|>")
    recipient = _RECIPIENT.match(header)
    if not message or recipient is None:
        return None
    return [Call(recipient[1], arguments_of(arguments))]


# Values that are no JSON.


def read_braces(text: str, tools: Tools) -> list[Call] | None:
    """Read `call:name{key:value, …}`."""
    del tools
    return _read_loosely(text, starts="call:", opening="{", assign=":", closing="}")


_PYTHON = re.compile(r"\s*\[?\s*(?:print\()?[A-Za-z_][\w.]*\(")


def read_python(text: str, tools: Tools) -> list[Call] | None:
    """Read calls with named arguments, alone or in a list; `print` around and `.call` are passed over."""
    if _PYTHON.match(text) is None:
        return read_json(text, tools)
    return _read_loosely(text, starts="", opening="(", assign="=", closing=")")


def _read_loosely(text: str, *, starts: str, opening: str, assign: str, closing: str) -> list[Call] | None:
    reader = LooseReader(text)
    reader.skip_space()
    if not text.startswith(starts, reader.at):
        return None
    calls: list[Call] = []
    try:
        listed = not starts and reader.take("[")
        while reader.at < len(text) and not (listed and reader.take("]")):
            printed = not starts and reader.take("print(")
            reader.expect(starts)
            name = reader.name()
            reader.expect(opening)
            calls.append(Call(name.removesuffix(".call"), ValidJson(reader.pairs(assign, closing))))
            if printed:
                reader.expect(")")
            check_count(calls)
            reader.take(",")
            reader.skip_space()
        reader.skip_space()
    except NotReadable as error:
        raise BrokenCall(str(error)) from None
    if reader.at < len(text):
        raise BrokenCall(f"no call begins at character {reader.at}")
    return calls


READERS: dict[Syntax, Reader] = {
    Syntax.JSON: read_json,
    Syntax.FUNCTION_TAGS: read_function_tags,
    Syntax.ARGUMENT_TAGS: read_argument_tags,
    Syntax.NAME_ARGS: read_name_args,
    Syntax.BRACES: read_braces,
    Syntax.INVOKE_TAGS: read_invoke_tags,
    Syntax.NESTED_TAGS: read_nested_tags,
    Syntax.DEEPSEEK: read_deepseek,
    Syntax.KIMI: read_kimi,
    Syntax.HARMONY: read_harmony,
    Syntax.PYTHON: read_python,
}
"""In the order in which they are tried where the model's own does not recognise a text."""
