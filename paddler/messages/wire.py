"""JSON text to messages and back, strictly: the only place that knows cattrs.

Bad input raises RemoteProtocolError with a sentence a client can act on. Closed families are
externally tagged (`{"Variant": …}`), except message parts, grammars and tools, which carry a `type`.
"""

import enum
import json
import math
import re
import types
from typing import Annotated, Any, NoReturn, TypeVar, Union, cast, get_args, get_origin

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from paddler.errors import RemoteProtocolError
from paddler.messages import agent_socket, inference, inference_socket, state, tokens
from paddler.messages.numbers import FloatRange, IntRange

T = TypeVar("T")

MAX_NESTING = 100
"""Deepest nesting where the shape is the client's own: schemas of tool arguments."""

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

_converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)


def decode(text: str | bytes, form: type[T]) -> T:
    """Parse JSON text and structure it as `form` (a message class or one of the unions).

    Raises RemoteProtocolError for malformed JSON, wrong types, missing or unknown keys.
    """
    return structure(parse_json(text), form)


def encode(message: object, form: Any = None) -> str:
    """Write a message as compact JSON; `form` names the union when the message is one of its variants."""
    return json.dumps(unstructure(message, form), separators=(",", ":"))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text; NaN, Infinity and lone surrogates are refused. Raises RemoteProtocolError."""
    try:
        if isinstance(text, bytes):
            text = text.decode()  # json.loads would guess the encoding and let encoded surrogates pass
        value = json.loads(text, parse_constant=_refuse_constant)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be tokenised or sent on
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(str(error)) from None
    return value


def structure(value: Any, form: type[T]) -> T:
    """Structure a parsed JSON value as `form`. Raises RemoteProtocolError."""
    try:
        return _converter.structure(value, form)
    except RecursionError:
        raise RemoteProtocolError("nested too deeply") from None
    except Exception as error:  # cattrs raises groups of whatever its hooks raise, and nothing else runs here
        raise RemoteProtocolError(_explain(error)) from None


def unstructure(message: object, form: Any = None) -> Any:
    """Return the JSON value of a message."""
    return _converter.unstructure(message, form)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _explain(error: BaseException) -> str:
    """Name the first thing that is wrong, with its path."""
    return cattrs.transform_error(error, format_exception=_format_one)[0].removesuffix(" @ $")


def _format_one(error: BaseException, _form: type | None) -> str:
    match error:
        case cattrs.ForbiddenExtraKeysError():
            return f"unknown field {', '.join(sorted(f'`{name}`' for name in error.extra_fields))}"
        case KeyError():
            return f"missing field `{error.args[0]}`"
        case _:
            return str(error) or type(error).__name__


# Primitives: JSON has types, and none is converted into another.


def _kind(value: Any) -> str:
    names = {bool: "a boolean", str: "a string", int: "an integer", float: "a number", type(None): "null"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def _exactly(kind: type[T], name: str) -> Any:
    def structure_exactly(value: Any, _: Any) -> T:
        if type(value) is not kind:
            raise TypeError(f"expected {name}, got {_kind(value)}")
        return value

    return structure_exactly


_converter.register_structure_hook(str, _exactly(str, "a string"))
_converter.register_structure_hook(bool, _exactly(bool, "a boolean"))
_converter.register_structure_hook(int, _exactly(int, "an integer"))


def _structure_any_json(value: Any, form: Any) -> Any:
    """Accept JSON of any shape, but none so deep that writing it again could run out of stack."""
    if form is not Any:
        _require_object(value)
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_NESTING} levels")


_converter.register_structure_hook_func(lambda form: form in (Any, dict[str, Any]), _structure_any_json)


def _structure_enum(value: Any, form: Any) -> enum.Enum:
    if type(value) is not str:
        raise TypeError(f"expected a string, got {_kind(value)}")
    try:
        return cast("enum.Enum", form(value))
    except ValueError:
        known = ", ".join(f"`{member.value}`" for member in form)
        raise ValueError(f"unknown variant `{value[:100]}`, expected one of {known}") from None


for _enum in (state.KvCacheDtype, state.PoolingType, state.StateApplicationStatus):
    _converter.register_structure_hook(
        _enum, _structure_enum
    )  # each: as strings they would match the hook of str


def _range_of(form: Any) -> IntRange | FloatRange | None:
    if get_origin(form) is not Annotated:
        return None
    return next((mark for mark in form.__metadata__ if isinstance(mark, (IntRange, FloatRange))), None)


def _structure_number(value: Any, form: Any) -> int | float:
    match _range_of(form):
        case IntRange(lowest, highest):
            if type(value) is not int:
                raise TypeError(f"expected an integer, got {_kind(value)}")
            if not lowest <= value <= highest:
                raise ValueError(
                    f"integer {value if abs(value) < 10**40 else 'of that size'} is out of range"
                )
            return value
        case FloatRange(largest):
            if type(value) not in (int, float):
                raise TypeError(f"expected a number, got {_kind(value)}")
            if abs(value) > largest or not math.isfinite(value):
                raise ValueError("number is out of range")
            return float(value)
        case _:
            raise AssertionError(form)


_converter.register_structure_hook_func(lambda form: _range_of(form) is not None, _structure_number)
_converter.register_unstructure_hook_func(lambda form: _range_of(form) is not None, lambda value: value)


def _is_tuple_of(form: Any) -> bool:
    return get_origin(form) is tuple and get_args(form)[-1] is Ellipsis


_converter.register_unstructure_hook_factory(
    lambda form: _is_tuple_of(form),
    lambda form: lambda values: [_converter.unstructure(value, get_args(form)[0]) for value in values],
)


@_converter.register_structure_hook_factory(_is_tuple_of)
def _structure_tuple_factory(form: Any) -> Any:
    item = get_args(form)[0]
    items: Any = list[item]  # type: ignore[valid-type]  # built at run time
    list_hook = _converter.get_structure_hook(items)

    def structure_tuple(value: Any, _: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise TypeError(f"expected an array, got {_kind(value)}")
        return tuple(list_hook(value, items))

    return structure_tuple


def _require_object(value: Any) -> None:
    if type(value) is not dict:
        raise TypeError(f"expected an object, got {_kind(value)}")


@_converter.register_structure_hook_factory(attrs.has)
def _structure_class_factory(form: Any) -> Any:
    hook = make_dict_structure_fn(form, _converter)

    def structure_class(value: Any, _: Any) -> Any:
        _require_object(value)
        return hook(value, form)

    return structure_class


# Families tagged by their variant's name.


def _register_externally_tagged(family: Any) -> None:
    """Write each variant as its bare name (no fields), `{name: payload}` or `{name: {fields}}`.

    `Literal` members of the family are bare strings. Variant names are the class names unless
    _WIRE_NAMES says otherwise.
    """
    variants: dict[str, Any] = {}
    literals: set[str] = set()
    for member in get_args(family):
        if attrs.has(member):
            variants[_WIRE_NAMES.get(member, member.__name__)] = member
        else:
            literals.update(get_args(member))
    known = ", ".join(f"`{name}`" for name in sorted({*variants, *literals}))

    def structure_family(value: Any, _: Any) -> Any:
        if isinstance(value, str):
            if value in literals:
                return value
            variant = variants.get(value)
            if variant is None or attrs.fields(variant):
                raise ValueError(f"unknown variant `{value[:100]}`, expected one of {known}")
            return variant()
        _require_object(value)
        if len(value) != 1:
            raise ValueError(f"expected an object with exactly one key, one of {known}")
        [(name, payload)] = value.items()
        variant = variants.get(name)
        if variant is None:
            raise ValueError(f"unknown variant `{name[:100]}`, expected one of {known}")
        field = _payload_field(variant)
        if field is not None:
            return variant(_converter.structure(payload, field.type))
        return _converter.structure(payload, variant)

    def unstructure_family(message: Any) -> Any:
        if isinstance(message, str):
            return message
        variant = type(message)
        name = _WIRE_NAMES.get(variant, variant.__name__)
        field = _payload_field(variant)
        if field is not None:
            return {name: _converter.unstructure(getattr(message, field.name), field.type)}
        return {name: _converter.unstructure(message, variant)} if attrs.fields(variant) else name

    _converter.register_structure_hook_func(lambda form: form == family, structure_family)
    _converter.register_unstructure_hook_func(lambda form: form == family, unstructure_family)


def _payload_field(variant: Any) -> Any:
    """Return the field that is written in place of its object, if this variant has one."""
    fields = attrs.fields(variant)
    return fields[0] if len(fields) == 1 and fields[0].name in ("payload", "path") else None


_WIRE_NAMES: dict[Any, str] = {
    state.HuggingFaceModel: "HuggingFace",
    state.LocalModel: "LocalToAgent",
    state.UrlModel: "Url",
}


# Families tagged by a `type` key.


def _register_internally_tagged(family: Any, names: dict[str, Any]) -> None:
    known = ", ".join(f"`{name}`" for name in sorted(names))

    def structure_family(value: Any, _: Any) -> Any:
        _require_object(value)
        name = value.get("type")
        if "type" not in value:
            raise ValueError("missing field `type`")
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"unknown `type`, expected one of {known}")
        return _converter.structure({key: item for key, item in value.items() if key != "type"}, names[name])

    def unstructure_family(message: Any) -> Any:
        tag = next(name for name, variant in names.items() if type(message) is variant)
        return {"type": tag, **_converter.unstructure(message, type(message))}

    _converter.register_structure_hook_func(lambda form: form == family, structure_family)
    _converter.register_unstructure_hook_func(lambda form: form == family, unstructure_family)


def _structure_content(value: Any, _: Any) -> str | tuple[inference.ContentPart, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TypeError(f"expected a string or an array of parts, got {_kind(value)}")
    return _converter.structure(value, _Parts)


def _unstructure_content(value: str | tuple[inference.ContentPart, ...]) -> Any:
    return value if isinstance(value, str) else _converter.unstructure(value, _Parts)


def _structure_stop(value: Any, _: Any) -> inference_socket.StopRespondingTo:
    _require_object(value)
    if set(value) != {"StopRespondingTo"}:
        raise ValueError("unknown notification, expected `StopRespondingTo`")
    return inference_socket.StopRespondingTo(_converter.structure(value["StopRespondingTo"], str))


# The families. Optional ones (`… | None`) are unwrapped first, whatever is inside.

_Parts = tuple[inference.ContentPart, ...]
_Content = str | _Parts


def _is_optional(form: Any) -> bool:
    return get_origin(form) in (Union, types.UnionType) and type(None) in get_args(form)


def _without_none(form: Any) -> Any:
    return Union[tuple(member for member in get_args(form) if member is not type(None))]  # noqa: UP007 built at run time


def _structure_optional_factory(form: Any) -> Any:
    inner = _without_none(form)
    return lambda value, _: None if value is None else _converter.structure(value, inner)


def _unstructure_optional_factory(form: Any) -> Any:
    inner = _without_none(form)
    return lambda value: None if value is None else _converter.unstructure(value, inner)


_converter.register_structure_hook_factory(_is_optional, _structure_optional_factory)
_converter.register_unstructure_hook_factory(_is_optional, _unstructure_optional_factory)
_converter.register_structure_hook_func(lambda form: form == _Content, _structure_content)
_converter.register_unstructure_hook_func(lambda form: form == _Content, _unstructure_content)

_register_internally_tagged(
    inference.ContentPart, {"text": inference.TextPart, "image_url": inference.ImagePart}
)
_register_internally_tagged(
    inference.Grammar, {"gbnf": inference.GbnfGrammar, "json_schema": inference.JsonSchemaGrammar}
)
for _family in (
    inference.TokenRequest,
    inference.NormalizationMethod,
    inference_socket.ClientFrame,
    tokens.Terminal,
    state.ModelSource,
    state.AgentIssue,
    agent_socket.BalancerFrame,
    agent_socket.AgentFrame,
):
    _register_externally_tagged(_family)
# The one client notification: {"StopRespondingTo": id} itself.
_converter.register_structure_hook(inference_socket.StopRespondingTo, _structure_stop)
_converter.register_unstructure_hook(
    inference_socket.StopRespondingTo, lambda stop: {"StopRespondingTo": stop.payload}
)

for _class in (inference.ToolParameters, inference.ToolFunction):
    _converter.register_unstructure_hook(
        _class, make_dict_unstructure_fn(_class, _converter, _cattrs_omit_if_default=True)
    )
