"""JSON values to attrs classes, strictly: JSON has types, and none is converted into another.

Knows no message of ours; wire.py adds the families. What a refusal quotes is bounded, because it goes
into answers and logs and the input may be 50 MiB of keys.
"""

import enum
import heapq
import math
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn

from paddler.messages.numbers import FloatRange, IntRange

T = TypeVar("T")

MAX_NESTING = 100
"""Deepest nesting where the shape is the client's own: schemas of tool arguments."""

MAX_NAMES = 3
MAX_NAME_CHARACTERS = 100
MAX_QUOTED_NUMBER = 10**40
"""How much a refusal quotes."""

INVALID = (cattrs.BaseValidationError, TypeError, ValueError)
"""What hooks raise, and the groups of it that cattrs makes of that."""

converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)


def explain(error: BaseException) -> str:
    """Name the first thing that is wrong, with its path."""
    return cattrs.transform_error(error, format_exception=_format_one)[0].removesuffix(" @ $")


def _format_one(error: BaseException, _form: type | None) -> str:
    match error:
        case cattrs.ForbiddenExtraKeysError():
            first = heapq.nsmallest(MAX_NAMES, error.extra_fields)
            names = ", ".join(f"`{name[:MAX_NAME_CHARACTERS]}`" for name in first)
            rest = len(error.extra_fields) - len(first)
            return f"unknown field {names}" + (f" and {rest} more" if rest else "")
        case KeyError():
            return f"missing field `{error.args[0]}`"
        case _:
            return str(error) or type(error).__name__


def kind_of(value: Any) -> str:
    names = {bool: "a boolean", str: "a string", int: "an integer", float: "a number", type(None): "null"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def _exactly(kind: type[T], name: str) -> Any:
    def structure_exactly(value: Any, _: Any) -> T:
        if type(value) is not kind:
            raise TypeError(f"expected {name}, got {kind_of(value)}")
        return value

    return structure_exactly


converter.register_structure_hook(str, _exactly(str, "a string"))
converter.register_structure_hook(bool, _exactly(bool, "a boolean"))
converter.register_structure_hook(int, _exactly(int, "an integer"))


def _structure_any_json(value: Any, form: Any) -> Any:
    """Accept JSON of any shape, but none so deep that writing it again could run out of stack."""
    if form is not Any:
        require_object(value)
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


converter.register_structure_hook_func(lambda form: form in (Any, dict[str, Any]), _structure_any_json)


def _structure_literal(value: Any, form: Any) -> Any:
    choices = get_args(form)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"expected {' or '.join(f'`{choice}`' for choice in choices)}")
    return value


converter.register_structure_hook_func(
    lambda form: cast("Any", get_origin(form)) is Literal, _structure_literal
)


def structure_enum(value: Any, form: Any) -> enum.Enum:
    if type(value) is not str:
        raise TypeError(f"expected a string, got {kind_of(value)}")
    try:
        return cast("enum.Enum", form(value))
    except ValueError:
        known = ", ".join(f"`{member.value}`" for member in form)
        raise ValueError(
            f"unknown variant `{value[:MAX_NAME_CHARACTERS]}`, expected one of {known}"
        ) from None


def _range_of(form: Any) -> IntRange | FloatRange | None:
    if get_origin(form) is not Annotated:
        return None
    return next((mark for mark in form.__metadata__ if isinstance(mark, (IntRange, FloatRange))), None)


def _structure_number(value: Any, form: Any) -> int | float:
    match _range_of(form):
        case IntRange(lowest, highest):
            if type(value) is not int:
                raise TypeError(f"expected an integer, got {kind_of(value)}")
            if not lowest <= value <= highest:
                raise _out_of_range(value, lowest, highest)
            return value
        case FloatRange(largest):
            if type(value) not in (int, float):
                raise TypeError(f"expected a number, got {kind_of(value)}")
            if abs(value) > largest or not math.isfinite(value):
                raise _out_of_range(value, -largest, largest)
            return float(value)
        case _:
            raise AssertionError(form)


def _out_of_range(value: float, lowest: float, highest: float) -> ValueError:
    found = _number(value) if abs(value) < MAX_QUOTED_NUMBER else "a number of that size"
    return ValueError(f"must be between {_number(lowest)} and {_number(highest)}: {found} is out of range")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"


converter.register_structure_hook_func(lambda form: _range_of(form) is not None, _structure_number)
converter.register_unstructure_hook_func(lambda form: _range_of(form) is not None, lambda value: value)


def _is_tuple_of(form: Any) -> bool:
    return get_origin(form) is tuple and get_args(form)[-1] is Ellipsis


converter.register_unstructure_hook_factory(
    _is_tuple_of,
    lambda form: lambda values: [converter.unstructure(value, get_args(form)[0]) for value in values],
)


@converter.register_structure_hook_factory(_is_tuple_of)
def _structure_tuple_factory(form: Any) -> Any:
    item = get_args(form)[0]
    hook = converter.get_structure_hook(item)

    def structure_tuple(value: Any, _: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise TypeError(f"expected an array, got {kind_of(value)}")
        items: list[Any] = []
        try:
            for element in value:
                items.append(hook(element, item))  # noqa: PERF401 the length tells where it failed
        except INVALID as error:
            # cattrs' own hook would go on and collect: 2 MiB of wrong items took four seconds to refuse.
            error.add_note(cattrs.IterableValidationNote("", len(items), item))
            raise cattrs.IterableValidationError("", [error], form) from None
        return tuple(items)

    return structure_tuple


def _is_object_of(form: Any) -> bool:
    return get_origin(form) is dict and form != dict[str, Any]


@converter.register_structure_hook_factory(_is_object_of)
def _structure_object_factory(form: Any) -> Any:
    """Make the hook of objects with keys of the client's choice; cattrs' own takes whatever has items()."""
    item = get_args(form)[1]
    hook = converter.get_structure_hook(item)

    def structure_object(value: Any, _: Any) -> dict[str, Any]:
        require_object(value)
        items: dict[str, Any] = {}
        for key, element in value.items():
            try:
                items[key] = hook(element, item)
            except INVALID as error:
                error.add_note(cattrs.IterableValidationNote("", key[:MAX_NAME_CHARACTERS], item))
                raise cattrs.IterableValidationError("", [error], form) from None
        return items

    return structure_object


def require_object(value: Any) -> None:
    if type(value) is not dict:
        raise TypeError(f"expected an object, got {kind_of(value)}")


@converter.register_structure_hook_factory(attrs.has)
def _structure_class_factory(form: Any) -> Any:
    hook = make_dict_structure_fn(form, converter)

    def structure_class(value: Any, _: Any) -> Any:
        require_object(value)
        return hook(value, form)

    return structure_class
