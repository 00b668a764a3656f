"""Hypothesis strategies for every message, derived from the classes themselves."""

import enum
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import attrs
from hypothesis import strategies as st

from paddler.messages.numbers import FloatRange, IntRange

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def messages_of(form: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values of a message class, a union of them, or a field's type."""
    if form is Any:
        return JSON_VALUES
    if attrs.has(form):
        fields = {field.alias: messages_of(field.type) for field in attrs.fields(form)}
        return st.builds(form, **fields)
    if isinstance(form, type) and issubclass(form, enum.Enum):
        return st.sampled_from(form)
    origin, arguments = get_origin(form), get_args(form)
    if origin is Annotated:
        return _numbers(form.__metadata__[0])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([messages_of(argument) for argument in arguments])
    if origin is tuple:
        return st.lists(messages_of(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), messages_of(arguments[1]), max_size=2)
    plain = {
        str: st.text(max_size=20),
        bool: st.booleans(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        type(None): st.none(),
    }
    return plain[form]


def _numbers(limits: IntRange | FloatRange) -> st.SearchStrategy[Any]:
    match limits:
        case IntRange(lowest, highest):
            return st.integers(lowest, highest)
        case FloatRange(largest):
            return st.floats(-largest, largest, allow_nan=False)
