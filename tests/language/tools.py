"""Tools that the tests of tool calls offer, and answers that call them, as families of models write them."""

from typing import Any

import attrs

from paddler.messages.inference import Tool, ToolFunction, ToolParameters

WEATHER = Tool(
    ToolFunction(
        "get_weather",
        "Say what the weather is like",
        ToolParameters(
            type="object",
            properties={
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            required=("city",),
        ),
    ),
    type="function",
)
PING = Tool(ToolFunction("ping", "Answer", None), type="function")
TOOLS = (WEATHER, PING)

Arguments = dict[str, Any]


@attrs.frozen
class Answer:
    """One answer of a family: what the model writes, and what it means."""

    tool_format: str
    text: str
    calls: tuple[tuple[str, Arguments], ...]
    content: str = ""
    sections: int = 1


def _one(tool_format: str, text: str, arguments: Arguments | None = None, content: str = "") -> Answer:
    return Answer(tool_format, text, (("get_weather", arguments or {"city": "Oslo"}),), content)


ANSWERS = (
    _one("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'),
    Answer(
        "hermes",
        'Sure. <tool_call>\n{"name": "get_weather", "arguments": {"city": "</x>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
        (("get_weather", {"city": "</x>"}), ("ping", {})),
        "Sure. \n",
        2,
    ),
    _one("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>'),
    _one(
        "qwen3-coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n42\n</parameter>\n<parameter=days>\n3\n"
        '</parameter>\n<parameter=tags>\n["a"]\n</parameter>\n</function>\n</tool_call>',
        {"city": "42", "days": 3, "tags": ["a"]},
    ),
    _one(
        "qwen3-coder",
        "<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n</function>",
        {"city": "New\nYork"},
    ),
    _one(
        "seed",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n"
        "</seed:tool_call>",
    ),
    _one("functionary v3.1", '<function=get_weather>{"city": "Oslo"}</function>'),
    _one("llama 3", '{"name": "get_weather", "parameters": {"city": "Oslo"}}'),
    _one(
        "llama 3", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}'
    ),
    _one("llama 3", '<|python_tag|>get_weather.call(city="Oslo")'),
    Answer(
        "llama 3",
        '{"name": "ping", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Oslo"}}',
        (("ping", {}), ("get_weather", {"city": "Oslo"})),
        "; ",
        2,
    ),
    _one("mistral nemo", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "a"}]'),
    Answer(
        "mistral",
        '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Oslo"}[TOOL_CALLS]ping[ARGS]{}',
        (("get_weather", {"city": "Oslo"}), ("ping", {})),
        sections=2,
    ),
    _one("mistral", '[TOOL_CALLS]get_weather{"city": "Oslo"}'),
    Answer(
        "deepseek r1",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (("get_weather", {"city": "Oslo"}), ("ping", {})),
    ),
    _one(
        "deepseek v3.1",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    _one(
        "deepseek v3.2",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">7</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        {"city": "7", "days": 2},
    ),
    _one(
        "glm 4.5",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        {"city": "Oslo", "days": 3},
    ),
    Answer("glm 4.5", "<tool_call>ping\n</tool_call>", (("ping", {}),)),
    _one("gemma 3", '```json\n{"name": "get_weather", "parameters": {"city": "Oslo"}}\n```'),
    _one(
        "gemma 3", "```tool_code\nprint(get_weather(city='Oslo', days=2))\n```", {"city": "Oslo", "days": 2}
    ),
    _one(
        "gemma 4",
        '<|tool_call>call:get_weather{city:<|"|>Os{lo,<|"|>,days:3,tags:[<|"|>a<|"|>]}<tool_call|>',
        {"city": "Os{lo,", "days": 3, "tags": ["a"]},
    ),
    _one(
        "harmony",
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
    ),
    _one(
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.get_weather"
        '<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        content="I look.",
    ),
    _one("harmony", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'),
    _one(
        "command r7b",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        '{"city": "Oslo"}}\n]<|END_ACTION|>',
    ),
    _one(
        "command r",
        'Action:\n```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": '
        '{"city": "Oslo"}\n    }\n]```',
    ),
    _one("granite 3", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'),
    _one("phi 4", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>'),
    _one("phi 4", 'functools[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'),
    Answer(
        "kimi k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Oslo"}<|tool_call_end|><|tool_call_begin|>functions.ping:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        (("get_weather", {"city": "Oslo"}), ("ping", {})),
    ),
    _one("minimax m1", '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_calls>'),
    _one(
        "minimax m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
        {"city": "Oslo", "days": 3},
    ),
    Answer(
        "minimax m3",
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city><b>Oslo</b>'
        "]<]minimax[>[</city>]<]minimax[>[<days>3]<]minimax[>[</days>]<]minimax[>[<tags>]<]minimax[>[<item>7"
        "]<]minimax[>[</item>]<]minimax[>[<item>b]<]minimax[>[</item>]<]minimax[>[</tags>]<]minimax[>[</invoke>\n"
        ']<]minimax[>[<invoke name="ping">]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>',
        (("get_weather", {"city": "<b>Oslo</b>", "days": 3, "tags": ["7", "b"]}), ("ping", {})),
    ),
    _one("nemotron nano v2", '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]</TOOLCALL>'),
    _one("lfm2", '<|tool_call_start|>[get_weather(city="Oslo")]<|tool_call_end|>'),
)
