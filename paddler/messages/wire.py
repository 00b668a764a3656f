"""JSON text to messages and back, strictly: the only place that knows how messages are written.

Bad input raises RemoteProtocolError with a sentence a client can act on. Closed families are
externally tagged (`{"Variant": …}`), except message parts, grammars and tools, which carry a `type`.
"""

import json
import math
import re
import types
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import attrs
from cattrs.gen import make_dict_unstructure_fn, override

from paddler.errors import RemoteProtocolError
from paddler.messages import agent_socket, embeddings, inference, inference_socket, state, tokens
from paddler.messages.sampling import Sampling
from paddler.messages.strict_json import (
    INVALID,
    MAX_NAME_CHARACTERS,
    converter,
    explain,
    kind_of,
    require_object,
    structure_enum,
)

T = TypeVar("T")

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

LONG_TEXT_CHARACTERS = 2 * 1024 * 1024
MAX_BRANCHES = 262_144
"""Objects, arrays and items that a longer text than that may have: it is long for its images, and one of tiny
values would hold the loop for seconds."""


def decode(text: str | bytes, form: type[T]) -> T:
    """Parse JSON text and structure it as `form` (a message class or one of the unions).

    Raises RemoteProtocolError for malformed JSON, wrong types, missing or unknown keys.
    """
    return structure(parse_json(text), form)


def encode(message: object, form: Any = None) -> str:
    """Write a message as compact JSON; `form` names the union when the message is one of its variants."""
    return json.dumps(unstructure(message, form), separators=(",", ":"), allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text; no NaN, no infinite number (1e400), no lone surrogate. Raises RemoteProtocolError.

    What is wrong is said in our words or the JSON parser's; Python's own would mean nothing to a client.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()  # json.loads would guess the encoding and let encoded surrogates pass
        if len(text) > LONG_TEXT_CHARACTERS and sum(map(text.count, "[{,")) > MAX_BRANCHES:
            raise RemoteProtocolError("too many values for one message")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be tokenised or sent on
    except json.JSONDecodeError as error:
        raise RemoteProtocolError(str(error)) from None
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise RemoteProtocolError("a lone surrogate cannot be written in UTF-8") from None
    except RecursionError:
        raise RemoteProtocolError("nested too deeply") from None
    except ValueError:
        raise RemoteProtocolError("an integer has too many digits") from None
    return value


def structure(value: Any, form: type[T]) -> T:
    """Structure a parsed JSON value as `form`. Raises RemoteProtocolError."""
    try:
        return converter.structure(value, form)
    except RecursionError:
        raise RemoteProtocolError("nested too deeply") from None
    except INVALID as error:
        raise RemoteProtocolError(explain(error)) from None


def unstructure(message: object, form: Any = None) -> Any:
    """Return the JSON value of a message."""
    return converter.unstructure(message, form)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RemoteProtocolError(f"number {digits[:MAX_NAME_CHARACTERS]} is out of range: beyond 1.8e+308")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise RemoteProtocolError(f"{name} is not JSON")


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
                raise ValueError(f"unknown variant `{value[:MAX_NAME_CHARACTERS]}`, expected one of {known}")
            return variant()
        require_object(value)
        if len(value) != 1:
            raise ValueError(f"expected an object with exactly one key, one of {known}")
        [(name, payload)] = value.items()
        variant = variants.get(name)
        if variant is None:
            raise ValueError(f"unknown variant `{name[:MAX_NAME_CHARACTERS]}`, expected one of {known}")
        field = _payload_field(variant)
        if field is not None:
            return variant(converter.structure(payload, field.type))
        return converter.structure(payload, variant)

    def unstructure_family(message: Any) -> Any:
        if isinstance(message, str):
            return message
        variant = type(message)
        name = _WIRE_NAMES.get(variant, variant.__name__)
        field = _payload_field(variant)
        if field is not None:
            return {name: converter.unstructure(getattr(message, field.name), field.type)}
        return {name: converter.unstructure(message, variant)} if attrs.fields(variant) else name

    converter.register_structure_hook_func(lambda form: form == family, structure_family)
    converter.register_unstructure_hook_func(lambda form: form == family, unstructure_family)


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
        require_object(value)
        name = value.get("type")
        if "type" not in value:
            raise ValueError("missing field `type`")
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"unknown `type`, expected one of {known}")
        return converter.structure({key: item for key, item in value.items() if key != "type"}, names[name])

    def unstructure_family(message: Any) -> Any:
        tag = next(name for name, variant in names.items() if type(message) is variant)
        return {"type": tag, **converter.unstructure(message, type(message))}

    converter.register_structure_hook_func(lambda form: form == family, structure_family)
    converter.register_unstructure_hook_func(lambda form: form == family, unstructure_family)


def _structure_content(value: Any, _: Any) -> str | tuple[inference.ContentPart, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TypeError(f"expected a string or an array of parts, got {kind_of(value)}")
    return converter.structure(value, _Parts)


def _unstructure_content(value: str | tuple[inference.ContentPart, ...]) -> Any:
    return value if isinstance(value, str) else converter.unstructure(value, _Parts)


def _structure_stop(value: Any, _: Any) -> inference_socket.StopRespondingTo:
    require_object(value)
    if set(value) != {"StopRespondingTo"}:
        raise ValueError("unknown notification, expected `StopRespondingTo`")
    return inference_socket.StopRespondingTo(converter.structure(value["StopRespondingTo"], str))


# The families. Optional ones (`… | None`) are unwrapped first, whatever is inside.

_Parts = tuple[inference.ContentPart, ...]
_Content = str | _Parts


def _is_optional(form: Any) -> bool:
    return get_origin(form) in (Union, types.UnionType) and type(None) in get_args(form)


def _without_none(form: Any) -> Any:
    return Union[tuple(member for member in get_args(form) if member is not type(None))]  # noqa: UP007 built at run time


def _structure_optional_factory(form: Any) -> Any:
    inner = _without_none(form)
    return lambda value, _: None if value is None else converter.structure(value, inner)


def _unstructure_optional_factory(form: Any) -> Any:
    inner = _without_none(form)
    return lambda value: None if value is None else converter.unstructure(value, inner)


converter.register_structure_hook_factory(_is_optional, _structure_optional_factory)
converter.register_unstructure_hook_factory(_is_optional, _unstructure_optional_factory)
converter.register_structure_hook_func(lambda form: form == _Content, _structure_content)
converter.register_unstructure_hook_func(lambda form: form == _Content, _unstructure_content)

_register_internally_tagged(
    inference.ContentPart, {"text": inference.TextPart, "image_url": inference.ImagePart}
)
_register_internally_tagged(
    inference.Grammar, {"gbnf": inference.GbnfGrammar, "json_schema": inference.JsonSchemaGrammar}
)
for _family in (
    inference.TokenRequest,
    inference.NormalizationMethod,
    inference.ToolChoice,
    inference_socket.ClientFrame,
    tokens.ToolCallArguments,
    tokens.Event,
    tokens.Terminal,
    embeddings.EmbeddingTerminal,
    embeddings.EmbeddingResult,
    state.ModelSource,
    state.LoraSource,
    state.AgentIssue,
    agent_socket.BalancerFrame,
    agent_socket.AgentFrame,
):
    _register_externally_tagged(_family)
# The one client notification: {"StopRespondingTo": id} itself.
converter.register_structure_hook(inference_socket.StopRespondingTo, _structure_stop)
converter.register_unstructure_hook(
    inference_socket.StopRespondingTo, lambda stop: {"StopRespondingTo": stop.payload}
)

# Each by itself: as strings they would match the hook of str.
for _enum in (state.KvCacheDtype, state.PoolingType, state.StateApplicationStatus):
    converter.register_structure_hook(_enum, structure_enum)

for _class in (
    inference.ToolParameters,
    inference.ToolFunction,
    inference.ConversationMessage,
    inference.CalledTool,
    Sampling,
    inference.ContinueFromRawPrompt,
    inference.ContinueFromConversationHistory,
):
    converter.register_unstructure_hook(
        _class, make_dict_unstructure_fn(_class, converter, _cattrs_omit_if_default=True)
    )
for _state in (state.DesiredState, state.ApplicableState):
    converter.register_unstructure_hook(
        _state,
        make_dict_unstructure_fn(_state, converter, lora_adapters=override(omit_if_default=True)),
    )
