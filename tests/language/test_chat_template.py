"""What templates see, what they may call, and what becomes of those that fail."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from paddler.language import chat_template
from paddler.language.chat_template import PromptTemplate, TemplateFailed, template_variables
from paddler.messages.inference import (
    ContentPart,
    ContinueFromConversationHistory,
    ConversationMessage,
    ImagePart,
    ImageUrl,
    TextPart,
    Tool,
    ToolFunction,
    ToolParameters,
)

BUNDLED = (Path(__file__).parent / "paddler-tiny-chat.jinja").read_text()
NOW = datetime(2024, 5, 17)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "nl_token": "\n"}

PARTS = (TextPart("Hello"), TextPart("there"))
WEATHER = Tool(
    ToolFunction(
        "get_weather",
        "Weather in Köln & elsewhere",
        ToolParameters("object", properties={"city": {"type": "string"}}, required=("city",)),
    ),
    type="function",
)
CLOCK = Tool(ToolFunction("clock", "The time"), type="function")


def conversation(
    *messages: tuple[str, str | tuple[ContentPart, ...]],
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    tools: tuple[Tool, ...] = (),
) -> ContinueFromConversationHistory:
    return ContinueFromConversationHistory(
        add_generation_prompt=add_generation_prompt,
        conversation_history=tuple(ConversationMessage(role, content) for role, content in messages),
        enable_thinking=enable_thinking,
        max_tokens=10,
        tools=tools,
    )


def render(source: str, request: ContinueFromConversationHistory | None = None) -> chat_template.Prompt:
    variables = template_variables(request or conversation(("user", "Hello"))) | SPECIAL_TOKENS
    return PromptTemplate(source).render(variables, now=NOW)


def test_the_bundled_template_renders_a_conversation() -> None:
    request = conversation(
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "2+2?"),
        enable_thinking=True,
    )
    assert render(BUNDLED, request).text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_thinking_is_switched_off_in_the_generation_prompt_which_is_the_suffix() -> None:
    prompt = render(BUNDLED, conversation(("user", "Hi"), enable_thinking=False))
    assert prompt.suffix == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt.text.endswith(f"Hi<|im_end|>\n{prompt.suffix}")


def test_without_generation_prompt_there_is_no_suffix() -> None:
    prompt = render(BUNDLED, conversation(("user", "Hi"), add_generation_prompt=False))
    assert prompt == chat_template.Prompt("<|im_start|>user\nHi<|im_end|>\n", "")


def test_a_template_that_needs_a_generation_prompt_has_no_suffix() -> None:
    source = "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}a"
    assert render(source) == chat_template.Prompt("a", "")


def test_the_bundled_template_lists_tools_as_models_were_trained_on_them() -> None:
    text = render(BUNDLED, conversation(("user", "Hi"), tools=(WEATHER, CLOCK))).text
    assert (
        '<tools>\n{"name": "get_weather", "description": "Weather in Köln & elsewhere", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}\n'
        '{"name": "clock", "description": "The time"}\n</tools>'
    ) in text


def test_tools_have_the_shape_of_openai_and_leave_out_what_is_absent() -> None:
    variables = template_variables(conversation(tools=(CLOCK,)))
    assert variables["tools"] == [
        {"type": "function", "function": {"name": "clock", "description": "The time"}}
    ]
    assert template_variables(conversation())["tools"] == []


def test_images_become_text_parts_with_the_media_marker() -> None:
    parts = (TextPart("Look:"), ImagePart(ImageUrl("data:image/png;base64,AAAA")))
    [message] = template_variables(conversation(("user", parts)))["messages"]
    assert message == {
        "role": "user",
        "content": [{"type": "text", "text": "Look:"}, {"type": "text", "text": "<__media__>"}],
    }


@pytest.mark.scenario("SW-4")
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}", "Hello\nthere"),
        ("{{ '[' + messages[0].content + ']' }}", "[Hello\nthere]"),
        ("{{ '[' ~ messages[0].content ~ ']' }}", "[Hello\nthere]"),
        ("{{ messages[0].content | trim }}", "Hello\nthere"),
        ("{{ messages[0].content.strip() }}", "Hello\nthere"),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}", "Hello\nthere"),
        ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "Hellothere"),
        ("{% for part in messages[0].content %}{{ part['type'] }}{% endfor %}", "texttext"),
        ("nothing", "nothing"),
        (BUNDLED, "<|im_start|>user\nHellothere<|im_end|>\n"),
    ],
)
def test_part_content_reaches_templates_that_expect_strings_and_those_that_expect_lists(
    source: str, expected: str
) -> None:
    assert render(source, conversation(("user", PARTS), add_generation_prompt=False)).text == expected


def test_string_content_stays_a_string_beside_part_content() -> None:
    source = "{% for m in messages %}{{ m.role + ': ' + m.content }};{% endfor %}"
    request = conversation(("system", "Brief."), ("user", PARTS), add_generation_prompt=False)
    assert render(source, request).text == "system: Brief.;user: Hello\nthere;"


def test_blocks_leave_no_white_space_behind() -> None:
    assert render("  {% if true %}\n  a\n  {% endif %}\nb\n").text == "  a\nb"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ nl_token }}", "<s></s>\n"),
        ("{{ strftime_now('%d %b %Y') }}", "17 May 2024"),
        ("{% if strftime_now is defined %}yes{% endif %}", "yes"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ messages[0].content.startswith('He') }}", "True"),
        ("{% for key, value in messages[0].items() %}{{ key }} {% endfor %}", "role content "),
        ("{{ {'a': [1, 'é<&>\\''], 'b': none} | tojson }}", """{"a": [1, "é<&>'"], "b": null}"""),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ [] | tojson(ensure_ascii=False, sort_keys=False) }}", "[]"),
        ("{% if false %}{{ 1 | unknown }}{{ 1 is unknown }}{{ unknown() }}{% endif %}a", "a"),
    ],
)
def test_what_templates_can_use(source: str, expected: str) -> None:
    assert render(source).text == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "raised an exception: roles must alternate"),
        ("{{ 1 | unknown }}", "No filter named 'unknown'"),
        ("{{ 1 is unknown }}", "No test named 'unknown'"),
        ("{{ unknown() }}", "'unknown' is undefined"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ {} | tojson(sort_keys=True) }}", "sort_keys"),
        ("{{ {} | tojson(ensure_ascii=True) }}", "ensure_ascii"),
        ("{{ {} | tojson(separators=(',', ':')) }}", "separators"),
        ("{{ {} | tojson(nope=1) }}", "nope"),
        ("{{ {} | tojson(indent=100000) }}", "indent"),
        ("{{ nope | tojson }}", "Undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '\\ud800' }}", "not valid Unicode"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_says_why(source: str, reason: str) -> None:
    with pytest.raises(TemplateFailed, match=reason.replace("(", r"\(")):
        render(source)


def test_a_prompt_of_any_length_is_refused() -> None:
    length = chat_template.MAX_PROMPT_CHARACTERS
    assert len(render(f"{{{{ 'x' * {length} }}}}").text) == length
    with pytest.raises(TemplateFailed, match="longer than"):
        render(f"{{{{ 'x' * {length} }}}}y")


def test_with_part_content_the_error_is_that_of_the_template_not_of_the_list() -> None:
    with pytest.raises(TemplateFailed, match="only one message"):
        render(
            "{{ messages[0].content + 'x' }}{{ raise_exception('only one message') }}",
            conversation(("user", PARTS)),
        )


@pytest.mark.scenario("IS-12")
@pytest.mark.parametrize("source", ["{{invalid jinja template", "{% if %}", "{% endfor %}", "{{ 'a }}"])
def test_a_template_that_does_not_compile_says_where(source: str) -> None:
    with pytest.raises(TemplateFailed, match="syntax error in line 1"):
        PromptTemplate(source)


def test_a_template_nested_too_deeply_does_not_compile() -> None:
    with pytest.raises(TemplateFailed):
        PromptTemplate("{{" + "(" * 5000 + ")" * 5000 + "}}")


def test_variables_are_json() -> None:
    variables: dict[str, Any] = template_variables(conversation(("user", PARTS), tools=(WEATHER,)))
    assert json.loads(json.dumps(variables))["messages"] == variables["messages"]


def test_memory_that_runs_out_while_compiling_is_not_the_template_s_fault() -> None:
    class TooBig(str):
        __slots__ = ()

        def __str__(self) -> str:
            raise MemoryError

    with pytest.raises(MemoryError):
        PromptTemplate(TooBig("fine"))
