"""Calls that are forced on the bundled model, whose marks of calls are single tokens."""

import pytest

from paddler.engine.json_schema_grammar import gbnf_of_schema
from paddler.engine.pipe import Finish, GrammarRule
from paddler.language.required_calls import required_call_grammar
from paddler.language.tool_calls import ToolCallParser
from paddler.language.tool_formats import FORMATS, ToolFormat
from paddler.language.tool_schemas import violations
from paddler.messages.inference import NamedTool, Tool, ToolChoice, ToolFunction, ToolParameters
from paddler.messages.tokens import ToolCallArguments, ToolCallParsed
from paddler.messages.wire import unstructure
from tests.llama.engines import chat, running

pytestmark = pytest.mark.slow

WEATHER = Tool(
    ToolFunction(
        "get_weather",
        "Get the weather",
        ToolParameters(
            type="object",
            properties={
                "location": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            required=("location",),
        ),
    ),
    type="function",
)
PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "integer"}}
ADD = Tool(
    ToolFunction(
        "add",
        "Add two numbers",
        ToolParameters(
            type="object",
            properties=PROPERTIES,
            required=("a", "b"),
        ),
    ),
    type="function",
)
TOOLS = (WEATHER, ADD)


def rule(tool_format: ToolFormat, choice: ToolChoice) -> GrammarRule:
    made = required_call_grammar(tool_format, TOOLS, choice, gbnf_of_schema)
    assert made is not None
    return GrammarRule(*made)


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("hermes", "<tool_call>\n{"),
        ("qwen3-coder", "<tool_call>\n<function="),
        ("llama 3", '{"name": "'),
        ("mistral", "[TOOL_CALLS]"),
        ("glm 4.5", "<tool_call>"),
    ],
)
async def test_a_named_tool_is_called_though_nobody_asked_for_it(name: str, marked: str) -> None:
    tool_format = next(tool_format for tool_format in FORMATS if tool_format.name == name)
    async with running() as generations:
        answer = await generations.ask(
            chat("Hello"), max_tokens=200, grammar=rule(tool_format, NamedTool("add"))
        )
    assert answer.text.startswith(marked), answer
    assert answer.finish is Finish.END, answer
    parser = ToolCallParser(tool_format, TOOLS)
    parser.feed(answer.text)
    outcome = parser.finish()
    assert isinstance(outcome, ToolCallParsed)
    (call,) = outcome.payload
    assert call.name == "add"
    calls = [{"name": call.name, "arguments": unstructure(call.arguments, ToolCallArguments)}]
    schema = {"type": "object", "properties": PROPERTIES, "required": ["a", "b"]}
    assert violations(calls, [{"function": {"name": "add", "parameters": schema}}]) == []


async def test_some_tool_is_called_where_one_is_required() -> None:
    hermes = next(tool_format for tool_format in FORMATS if tool_format.name == "hermes")
    async with running() as generations:
        answer = await generations.ask(
            chat("What is the weather in Paris?"), max_tokens=300, grammar=rule(hermes, "required")
        )
    assert answer.text.startswith("<tool_call>\n{")
    assert answer.tokens[0] == 3642  # the mark is one token, and the grammar let it through
