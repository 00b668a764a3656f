"""What may stand in `sampling`, and which words refuse the rest."""

from typing import Any

import pytest

from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    NamedTool,
    tool_choice_objection,
)
from paddler.messages.sampling import Sampling, sampling_objection
from paddler.messages.wire import structure, unstructure


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"penalty_repeat": 1.1, "penalty_last_n": -1, "penalty_frequency": -2.0, "penalty_presence": 2.0},
        {"seed": 2**64 - 1, "stop": ("a", "b" * 1024), "ignore_eos": True},
        {"logit_bias": {"0": -100.0, "151935": 100.0}, "logprobs": True, "top_logprobs": 20},
    ],
)
def test_values_within_their_ranges_are_taken(values: dict[str, Any]) -> None:
    assert sampling_objection(Sampling(**values)) is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -0.1}, "`sampling.temperature` must be between 0 and 100"),
        ({"temperature": 1e30}, "`sampling.temperature` must be between 0 and 100"),
        ({"top_k": -1}, "`sampling.top_k` must be between 0 and 2147483647"),
        ({"top_p": 1.1}, "`sampling.top_p` must be between 0 and 1"),
        ({"min_p": -1.0}, "`sampling.min_p` must be between 0 and 1"),
        ({"penalty_repeat": 0.0}, "`sampling.penalty_repeat` must be between 0.01 and 100"),
        ({"penalty_last_n": -2}, "`sampling.penalty_last_n` must be between -1 and 2147483647"),
        ({"top_logprobs": 21, "logprobs": True}, "`sampling.top_logprobs` must be between 0 and 20"),
        ({"top_logprobs": 2}, "`sampling.top_logprobs` needs `sampling.logprobs`"),
        ({"stop": ("x",) * 17}, "`sampling.stop` has more than 16 strings"),
        ({"stop": ("",)}, "a string of `sampling.stop` is empty or longer than 1024 characters"),
        ({"logit_bias": {"-1": 1.0}}, "a key of `sampling.logit_bias` is no token id"),
        ({"logit_bias": {"1" * 10: 1.0}}, "a key of `sampling.logit_bias` is no token id"),
        ({"logit_bias": {"1": 101.0}}, "a value of `sampling.logit_bias` is beyond 100"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    assert sampling_objection(Sampling(**values)) == sentence


def conversation(**changes: Any) -> ContinueFromConversationHistory:
    tool = {"type": "function", "function": {"name": "add", "description": ""}}
    plain = {
        "add_generation_prompt": True,
        "conversation_history": [],
        "enable_thinking": False,
        "max_tokens": 1,
        "tools": [tool],
    }
    return structure(plain | changes, ContinueFromConversationHistory)


@pytest.mark.parametrize("choice", ["auto", "none", "required", {"NamedTool": {"name": "add"}}])
def test_a_tool_choice_that_can_be_honoured_is_taken(choice: Any) -> None:
    assert tool_choice_objection(conversation(tool_choice=choice)) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tool_choice": "required", "tools": []}, "requires a call, but there are no tools"),
        ({"tool_choice": {"NamedTool": {"name": "sub"}}}, "names 'sub', which is not among the tools"),
        (
            {"tool_choice": "required", "grammar": {"type": "gbnf", "grammar": "", "root": "root"}},
            "requires a call, which a grammar would not allow",
        ),
    ],
)
def test_a_tool_choice_that_cannot_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert tool_choice_objection(conversation(**changes)) == f"`tool_choice` {sentence}"


def test_what_is_not_asked_for_is_not_written() -> None:
    assert unstructure(ContinueFromRawPrompt(max_tokens=1, raw_prompt="a")) == {
        "max_tokens": 1,
        "raw_prompt": "a",
    }
    assert unstructure(conversation(tool_choice={"NamedTool": {"name": "add"}}))["tool_choice"] == {
        "NamedTool": {"name": "add"}
    }
    assert conversation(tool_choice={"NamedTool": {"name": "add"}}).tool_choice == NamedTool("add")
