"""Every message survives being written and read, and what is written is plain JSON."""

from typing import Any, get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddler.messages import (
    agent_socket,
    embeddings,
    inference,
    inference_socket,
    sampling,
    snapshots,
    state,
    tokens,
)
from paddler.messages.agent_socket import AgentFrame, AgentStatus, BalancerFrame
from paddler.messages.embeddings import EmbeddingResult, EmbeddingTerminal
from paddler.messages.inference import (
    ContentPart,
    GenerateEmbeddingBatch,
    Grammar,
    NormalizationMethod,
    TokenRequest,
)
from paddler.messages.inference_socket import ClientFrame
from paddler.messages.snapshots import AgentsSnapshot, BufferedRequestsSnapshot, ModelMetadata
from paddler.messages.state import AgentIssue, ApplicableState, DesiredState, InferenceParameters, ModelSource
from paddler.messages.tokens import Event, StreamError, Terminal, Usage
from paddler.messages.wire import decode, encode
from tests.messages.strategies import messages_of

FORMS = {
    "AgentFrame": AgentFrame,
    "AgentIssue": AgentIssue,
    "AgentStatus": AgentStatus,
    "AgentsSnapshot": AgentsSnapshot,
    "ApplicableState": ApplicableState,
    "BalancerFrame": BalancerFrame,
    "BufferedRequestsSnapshot": BufferedRequestsSnapshot,
    "ClientFrame": ClientFrame,
    "ContentPart": ContentPart,
    "DesiredState": DesiredState,
    "EmbeddingResult": EmbeddingResult,
    "EmbeddingTerminal": EmbeddingTerminal,
    "Event": Event,
    "GenerateEmbeddingBatch": GenerateEmbeddingBatch,
    "Grammar": Grammar,
    "InferenceParameters": InferenceParameters,
    "ModelMetadata": ModelMetadata,
    "ModelSource": ModelSource,
    "NormalizationMethod": NormalizationMethod,
    "StreamError": StreamError,
    "Terminal": Terminal,
    "TokenRequest": TokenRequest,
    "Usage": Usage,
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@given(data=st.data())
@settings(max_examples=30)
def test_a_message_survives_the_wire(form: Any, data: st.DataObject) -> None:
    message = data.draw(messages_of(form))
    text = encode(message, form)
    assert decode(text, form) == message
    assert text.isascii()
    assert "\n" not in text


def test_the_list_above_reaches_every_message_class() -> None:
    modules = (agent_socket, embeddings, inference, inference_socket, sampling, snapshots, state, tokens)
    written = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and attrs.has(value) and value.__module__ == module.__name__
    }
    assert written - set().union(*(classes_in(form) for form in FORMS.values())) == set()


def classes_in(form: Any) -> set[type]:
    """Return the message classes that a form can hold, at any depth."""
    if attrs.has(form):
        return {form}.union(*(classes_in(field.type) for field in attrs.fields(form)))
    return set().union(*(classes_in(argument) for argument in get_args(form)))
