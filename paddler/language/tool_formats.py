"""How families of models write tool calls: one table, and how a model's family is found.

A format says which marks bound a section of calls, which syntax stands between them, and how a call is
written when one must be forced. What a model really writes is read by tool_calls.py.
"""

import enum
from collections.abc import Iterable

import attrs


class Syntax(enum.Enum):
    """What stands in a section; one reader each in tool_syntaxes.py."""

    JSON = "json"
    """Objects with a name and `arguments` or `parameters`, alone, in an array, or one after another."""
    FUNCTION_TAGS = "function tags"
    """`<function=name><parameter=key>value</parameter></function>`, or JSON instead of the parameters."""
    ARGUMENT_TAGS = "argument tags"
    """`name<arg_key>key</arg_key><arg_value>value</arg_value>`."""
    NAME_ARGS = "name args"
    """`name[ARGS]{…}`, also with `[CALL_ID]id`."""
    BRACES = "braces"
    """`call:name{key:value}` with `<|"|>` for quotes."""
    INVOKE_TAGS = "invoke tags"
    """`<invoke name="name"><parameter name="key">value</parameter></invoke>`."""
    NESTED_TAGS = "nested tags"
    """`<invoke name="name"><key>value</key></invoke>`, objects and arrays are tags, too; marks before all."""
    DEEPSEEK = "deepseek"
    """`<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, and the older form with a fence."""
    KIMI = "kimi"
    """`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`."""
    HARMONY = "harmony"
    """A header with `to=functions.name`, `<|message|>`, then the arguments."""
    PYTHON = "python"
    """`[name(key=value), …]`, `name.call(key=value)`."""


TAG_MARK = "]<]minimax[>["
"""Stands before each tag of Syntax.NESTED_TAGS; what has it not is text."""


@attrs.frozen
class Bracket:
    """The marks around a section; without a closing one it ends with the next opening, or the answer."""

    opening: str
    closing: str | None = None
    shown: bool = False
    """The marks are part of the syntax: they count into the section instead of vanishing."""


@attrs.frozen
class WrittenJson:
    """One call as the model writes it: `before` name `between` arguments in JSON `after`."""

    before: str
    between: str
    after: str


@attrs.frozen
class WrittenTags:
    """One call whose arguments are tags: strings stand bare in them, everything else in JSON."""

    before: str
    between: str
    before_key: str
    after_key: str
    after_value: str
    after: str


@attrs.frozen(kw_only=True)
class ToolFormat:
    """How one family of models writes calls."""

    name: str
    signs: tuple[tuple[str, ...], ...] = ()
    """What a template or the control tokens contain: all texts of one of these alternatives."""
    syntax: Syntax | None
    """None: unknown, all are tried."""
    brackets: tuple[Bracket, ...] = ()
    inner: frozenset[str] = frozenset()
    """Control tokens that the syntax needs; others in a section mean nothing."""
    ends_reasoning: bool = False
    """The opening mark is a token that no thought contains: it ends reasoning that was not closed."""
    written: WrittenJson | WrittenTags | None = None
    separator: str = "\n"
    """What the model writes between two calls."""

    def recognised_in(self, texts: Iterable[str]) -> bool:
        """Tell whether all signs of one alternative occur, each in one of the texts."""
        known = tuple(texts)
        return any(
            all(any(sign in text for text in known) for sign in alternative) for alternative in self.signs
        )


_HERMES = Bracket("<tool_call>", "</tool_call>")
_FUNCTION = Bracket("<function=", "</function>", shown=True)
_HERMES_CALL = WrittenJson('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")

# The source of each entry is the family's published chat template, named behind it; for those whose template
# shows no call, its model card.
FORMATS = (
    ToolFormat(
        name="harmony",  # openai/gpt-oss-120b; its sections are found by the headers of reasoning_formats.py
        signs=(("<|channel|>", "<|message|>", "<|call|>"), ("<|channel|>", "<|message|>", "to=functions.")),
        syntax=Syntax.HARMONY,
        inner=frozenset({"<|message|>", "<|channel|>", "<|constrain|>"}),
        ends_reasoning=True,
        written=WrittenJson("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
    ),
    ToolFormat(
        name="gemma 4",  # google/gemma-4-31B-it
        signs=(("<|tool_call>", "<tool_call|>"),),
        syntax=Syntax.BRACES,
        brackets=(Bracket("<|tool_call>", "<tool_call|>"),),
        inner=frozenset({'<|"|>'}),
        ends_reasoning=True,
    ),
    ToolFormat(
        name="kimi k2",  # moonshotai/Kimi-K2-Instruct, Kimi-K2-Thinking
        signs=(("<|tool_calls_section_begin|>",),),
        syntax=Syntax.KIMI,
        brackets=(Bracket("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),),
        inner=frozenset({"<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"}),
        ends_reasoning=True,
        written=WrittenJson(
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.",
            ":0<|tool_call_argument_begin|>",
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
    ),
    ToolFormat(
        name="deepseek v3.2",  # deepseek-ai/DeepSeek-V3.2; V4 calls the section tool_calls
        signs=(("｜DSML｜",),),
        syntax=Syntax.INVOKE_TAGS,
        brackets=(
            Bracket("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
            Bracket("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
        ),
        inner=frozenset({"｜DSML｜"}),
        ends_reasoning=True,
    ),
    ToolFormat(
        name="deepseek v3.1",  # deepseek-ai/DeepSeek-V3.1
        signs=(("<｜tool▁calls▁begin｜>", "'<｜tool▁call▁begin｜>'+ tool['function']['name']"),),
        syntax=Syntax.DEEPSEEK,
        brackets=(Bracket("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),),
        inner=frozenset({"<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"}),
        ends_reasoning=True,
        written=WrittenJson(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
    ),
    ToolFormat(
        name="deepseek r1",  # deepseek-ai/DeepSeek-R1-Distill-Llama-8B; V3 writes the same
        signs=(("<｜tool▁calls▁begin｜>",),),
        syntax=Syntax.DEEPSEEK,
        brackets=(Bracket("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),),
        inner=frozenset({"<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"}),
        ends_reasoning=True,
        written=WrittenJson(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
    ),
    ToolFormat(
        name="minimax m3",  # MiniMaxAI/MiniMax-M3
        signs=((TAG_MARK,),),
        syntax=Syntax.NESTED_TAGS,
        brackets=(Bracket(f"{TAG_MARK}<tool_call>", f"{TAG_MARK}</tool_call>"),),
        inner=frozenset({TAG_MARK}),
    ),
    ToolFormat(
        name="minimax m2",  # MiniMaxAI/MiniMax-M2
        signs=(("<minimax:tool_call>",),),
        syntax=Syntax.INVOKE_TAGS,
        brackets=(Bracket("<minimax:tool_call>", "</minimax:tool_call>"),),
        written=WrittenTags(
            '<minimax:tool_call>\n<invoke name="',
            '">\n',
            '<parameter name="',
            '">',
            "</parameter>\n",
            "</invoke>\n</minimax:tool_call>",
        ),
    ),
    ToolFormat(
        name="glm 4.5",  # zai-org/GLM-4.6, GLM-4.7-Flash
        signs=(("<arg_key>", "<arg_value>"),),
        syntax=Syntax.ARGUMENT_TAGS,
        brackets=(_HERMES,),
        inner=frozenset({"<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"}),
        written=WrittenTags(
            "<tool_call>", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>"
        ),
    ),
    ToolFormat(
        name="seed",  # ByteDance-Seed/Seed-OSS-36B-Instruct
        signs=(("<seed:tool_call>",),),
        syntax=Syntax.FUNCTION_TAGS,
        brackets=(Bracket("<seed:tool_call>", "</seed:tool_call>"),),
        written=WrittenTags(
            "<seed:tool_call>\n<function=",
            ">\n",
            "<parameter=",
            ">",
            "</parameter>\n",
            "</function>\n</seed:tool_call>",
        ),
    ),
    ToolFormat(
        name="qwen3-coder",  # Qwen/Qwen3-Coder-30B-A3B-Instruct, Qwen3.5-4B; Nemotron 3, Step 3.5
        signs=(("<tool_call>", "<function=", "<parameter="),),
        syntax=Syntax.FUNCTION_TAGS,
        brackets=(_HERMES, _FUNCTION),  # the models leave <tool_call> out at times
        written=WrittenTags(
            "<tool_call>\n<function=",
            ">\n",
            "<parameter=",
            ">\n",
            "\n</parameter>\n",
            "</function>\n</tool_call>",
        ),
    ),
    ToolFormat(
        name="functionary v3.1",  # meetkai/functionary-medium-v3.1
        signs=(("<function=", "</function>", "<|python_tag|>"),),
        syntax=Syntax.FUNCTION_TAGS,
        brackets=(_FUNCTION, Bracket("<|python_tag|>")),
        written=WrittenJson("<function=", ">", "</function>"),
        separator="",
    ),
    ToolFormat(
        name="command r7b",  # CohereForAI/c4ai-command-r7b-12-2024, Command A
        signs=(("<|START_ACTION|>",),),
        syntax=Syntax.JSON,
        brackets=(Bracket("<|START_ACTION|>", "<|END_ACTION|>"),),
        ends_reasoning=True,
        written=WrittenJson(
            '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "',
            '", "parameters": ',
            "}\n]<|END_ACTION|>",
        ),
    ),
    ToolFormat(
        name="command r",  # CohereForAI/c4ai-command-r-plus, tool use
        signs=(("Action:", "```json", '"tool_name"'),),
        syntax=Syntax.JSON,
        brackets=(Bracket("Action:\n```json\n", "```"), Bracket("Action: ```json\n", "```")),
        written=WrittenJson(
            'Action:\n```json\n[\n    {\n        "tool_name": "',
            '",\n        "parameters": ',
            "\n    }\n]```",
        ),
    ),
    ToolFormat(
        name="mistral",  # mistralai/Mistral-Small-3.2-24B-Instruct-2506, Ministral-3, Devstral
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        syntax=Syntax.NAME_ARGS,
        brackets=(Bracket("[TOOL_CALLS]"),),
        inner=frozenset({"[ARGS]", "[CALL_ID]"}),
        ends_reasoning=True,
        written=WrittenJson("[TOOL_CALLS]", "[ARGS]", ""),
        separator="",
    ),
    ToolFormat(
        name="mistral nemo",  # mistralai/Mistral-Nemo-Instruct-2407
        signs=(("[TOOL_CALLS]",),),
        syntax=Syntax.JSON,
        brackets=(Bracket("[TOOL_CALLS]"),),
        written=WrittenJson('[TOOL_CALLS][{"name": "', '", "arguments": ', "}]"),
        separator="",
    ),
    ToolFormat(
        name="minimax m1",  # MiniMaxAI/MiniMax-M1: a call a line; ServiceNow-AI/Apriel: an array
        signs=(("<tool_calls>", "</tool_calls>"),),
        syntax=Syntax.JSON,
        brackets=(Bracket("<tool_calls>", "</tool_calls>"),),
        written=WrittenJson('<tool_calls>\n{"name": "', '", "arguments": ', "}\n</tool_calls>"),
    ),
    ToolFormat(
        name="nemotron nano v2",  # nvidia/NVIDIA-Nemotron-Nano-9B-v2
        signs=(("<TOOLCALL>", "</TOOLCALL>"),),
        syntax=Syntax.JSON,
        brackets=(Bracket("<TOOLCALL>", "</TOOLCALL>"),),
        written=WrittenJson('<TOOLCALL>[{"name": "', '", "arguments": ', "}]</TOOLCALL>"),
    ),
    ToolFormat(
        name="lfm2",  # LiquidAI/LFM2-8B-A1B
        signs=(("<|tool_call_start|>",), ("<|tool_list_start|>",)),
        syntax=Syntax.PYTHON,
        brackets=(Bracket("<|tool_call_start|>", "<|tool_call_end|>"),),
    ),
    ToolFormat(
        name="phi 4",  # microsoft/Phi-4-mini-instruct
        signs=(("<|tool|>", "<|/tool|>"), ("<|tool_call|>", "<|/tool_call|>")),
        syntax=Syntax.JSON,
        brackets=(Bracket("<|tool_call|>", "<|/tool_call|>"), Bracket("functools[", None, shown=True)),
        written=WrittenJson('<|tool_call|>[{"name": "', '", "arguments": ', "}]<|/tool_call|>"),
    ),
    ToolFormat(
        name="granite 3",  # ibm-granite/granite-3.3-2b-instruct
        signs=(("<|tool_call|>",),),
        syntax=Syntax.JSON,
        brackets=(Bracket("<|tool_call|>"),),
        written=WrittenJson('<|tool_call|>[{"name": "', '", "arguments": ', "}]"),
        separator="",
    ),
    ToolFormat(
        name="hermes",  # NousResearch/Hermes-2-Pro, Qwen/Qwen2.5, Qwen3, QwQ; Granite 4, MiMo
        signs=(("<tool_call>",),),
        syntax=Syntax.JSON,
        brackets=(_HERMES,),
        written=_HERMES_CALL,
    ),
    ToolFormat(
        name="llama 3",  # meta-llama/Llama-3.1-8B-Instruct, Llama-3.2-3B-Instruct, Llama-3.3-70B-Instruct
        signs=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters": ')),
        syntax=Syntax.JSON,
        brackets=(Bracket("<|python_tag|>"),),
        written=WrittenJson('{"name": "', '", "parameters": ', "}"),
    ),
    ToolFormat(
        name="gemma 3",  # google/gemma-3-4b-it: its template knows no tools; bare JSON, or Python in a fence
        signs=(("<start_of_turn>",),),
        syntax=Syntax.PYTHON,
        brackets=(Bracket("```tool_code\n", "```"),),
        written=WrittenJson('{"name": "', '", "parameters": ', "}"),
    ),
)
"""Formats in the order in which they are looked for: what contains the signs of another stands before it."""

FALLBACK = ToolFormat(
    name="unknown",
    syntax=None,
    brackets=(
        _HERMES,
        _FUNCTION,
        Bracket("[TOOL_CALLS]"),
        Bracket("<|tool_call>", "<tool_call|>"),
        Bracket("<|python_tag|>"),
    ),
    inner=frozenset(
        {
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "[ARGS]",
            "[CALL_ID]",
            '<|"|>',
        }
    ),
    written=_HERMES_CALL,
)
"""For a model of no known family: it was told of the tools and writes what it has seen elsewhere."""


def find_format(template: str | None, control_texts: Iterable[str]) -> ToolFormat | None:
    """Return the format of a model, judged by its own template, else by its control tokens."""
    for texts in ((template or "",), tuple(control_texts)):
        for tool_format in FORMATS:
            if tool_format.recognised_in(texts):
                return tool_format
    return None
