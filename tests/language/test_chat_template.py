"""What templates see, what they may call, and what becomes of those that fail."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from paddler.language.chat_template import Prompt, PromptTemplate, template_variables
from paddler.language.template_environment import (
    MAX_PROMPT_CHARACTERS,
    TemplateFailed,
    TemplateRefused,
)
from paddler.messages.inference import (
    CalledFunction,
    CalledTool,
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
    *messages: tuple[str, str | tuple[ContentPart, ...]] | ConversationMessage,
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    tools: tuple[Tool, ...] = (),
    documents: tuple[dict[str, Any], ...] | None = None,
) -> ContinueFromConversationHistory:
    return ContinueFromConversationHistory(
        add_generation_prompt=add_generation_prompt,
        conversation_history=tuple(
            message if isinstance(message, ConversationMessage) else ConversationMessage(*message)
            for message in messages
        ),
        enable_thinking=enable_thinking,
        max_tokens=10,
        tools=tools,
        documents=documents,
    )


def render(source: str, request: ContinueFromConversationHistory | None = None) -> Prompt:
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
    assert prompt == Prompt("<|im_start|>user\nHi<|im_end|>\n", "")


def test_a_template_that_needs_a_generation_prompt_has_no_suffix() -> None:
    source = "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}a"
    assert render(source) == Prompt("a", "")


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


@pytest.mark.parametrize(
    ("source", "without", "with_tools"),
    [
        ("{% if tools is not none %}tools{% endif %}", "", "tools"),
        ("{% if tools %}tools{% endif %}", "", "tools"),
        ("{% if tools is defined and tools %}tools{% endif %}", "", "tools"),
        ("{% if tools | length > 0 %}tools{% endif %}", "", "tools"),
        ("{% for tool in tools %}tools{% endfor %}", "", "tools"),
    ],
)
def test_no_tools_are_none_for_templates_that_take_it_and_else_a_list(
    source: str, without: str, with_tools: str
) -> None:
    assert render(source).text == without
    assert render(source, conversation(("user", "Hi"), tools=(CLOCK,))).text == with_tools


def test_documents_reach_the_template() -> None:
    source = "{% if documents %}{% for d in documents %}{{ d.title }}: {{ d.text }};{% endfor %}{% endif %}"
    documents: tuple[dict[str, Any], ...] = ({"title": "A", "text": "b"}, {"title": "C", "text": "d"})
    assert render(source, conversation(("user", "Hi"), documents=documents)).text == "A: b;C: d;"
    assert render(source).text == ""


ARGUMENTS = {"city": "Köln's", "days": 2}
AS_TEXT = '{"city": "Köln\'s", "days": 2}'
CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}[%s]{% endfor %}{% endfor %}"


def history(arguments: Any, content: str | tuple[ContentPart, ...] = "") -> ContinueFromConversationHistory:
    call = CalledTool(CalledFunction("get_weather", arguments), id="call_0")
    return conversation(
        ("user", "Hi"),
        ConversationMessage("assistant", content, tool_calls=(call,)),
        ConversationMessage("tool", "clear", tool_call_id="call_0"),
        tools=(WEATHER,),
        add_generation_prompt=False,
    )


@pytest.mark.parametrize("arguments", [ARGUMENTS, AS_TEXT], ids=["object", "text"])
@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", f"[{AS_TEXT}]"),
        ("{{ c.function.arguments }}", f"[{AS_TEXT}]"),
        ("{{ c.function.name + c.function.arguments }}", f"[get_weather{AS_TEXT}]"),
        ("{{ c['function']['arguments'] ~ '' }}", f"[{AS_TEXT}]"),
        (
            "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
            f"[{AS_TEXT}]",
        ),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}",
            f"[{AS_TEXT}]",
        ),
        (
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
            "[city=Köln's;days=2;]",
        ),
        ("{% for k, v in c.function.arguments | items %}'{{ k }}'{% endfor %}", "['city''days']"),
        ("{% if m.content is none %}{{ c.function.arguments }}{% endif %}", f"[{AS_TEXT}]"),
        ("{% if m.content is none %}{{ c.function.arguments | tojson }}{% endif %}", f"[{AS_TEXT}]"),
        ("{{ m.content + c.id }}", "[call_0]"),
    ],
)
def test_arguments_of_earlier_calls_have_the_form_that_the_template_wants(
    shown: str, expected: str, arguments: Any
) -> None:
    assert render(CALLS.replace("%s", shown), history(arguments)).text == expected


@pytest.mark.parametrize(
    "arguments", ["", "{", "[1]", "1", '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_arguments_that_hold_no_object_stay_the_text_that_they_are(arguments: str) -> None:
    source = CALLS.replace("%s", "{{ c.function.arguments }}")
    assert render(source, history(arguments)).text == f"[{arguments}]"
    source = CALLS.replace("%s", "{{ c.function.arguments | tojson }}")
    assert render(source, history(arguments)).text == f"[{json.dumps(arguments)}]"


def test_the_form_of_calls_is_found_once_also_when_other_conversations_come_first() -> None:
    template = PromptTemplate(CALLS.replace("%s", "{{ c.function.name + c.function.arguments }}"))
    for request in (conversation(("user", "Hi")), history(ARGUMENTS), history({}), history({"a": []})):
        prompt = template.render(template_variables(request), now=NOW)
        wanted = [m.tool_calls[0].function for m in request.conversation_history if m.tool_calls]
        assert prompt.text == "".join(
            f"[get_weather{json.dumps(f.arguments, ensure_ascii=False)}]" for f in wanted
        )


def test_a_conversation_cannot_mislead_about_the_form_of_calls() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + CALLS.replace(
        "%s", "{{ c.function.arguments | tojson }}"
    )
    request = history(ARGUMENTS, content=str(ARGUMENTS) + json.dumps(AS_TEXT))
    assert render(source, request).text.endswith(f"[{AS_TEXT}]")


def test_calls_beside_parts_reach_templates_that_expect_strings() -> None:
    source = "{% for m in messages %}{{ m.role + m.content }};{% endfor %}" + CALLS.replace(
        "%s", "{{ c.function.name + c.function.arguments }}"
    )
    text = render(source, history(ARGUMENTS, content=PARTS)).text
    assert text == f"userHi;assistantHello\nthere;toolclear;[get_weather{AS_TEXT}]"


def test_messages_have_the_keys_that_they_were_given() -> None:
    message = ConversationMessage("tool", "clear", name="get_weather", tool_call_id="call_0")
    [_, call, result] = template_variables(history(ARGUMENTS))["messages"]
    assert call["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    ]
    assert result == {"role": "tool", "content": "clear", "tool_call_id": "call_0"}
    [variable] = template_variables(conversation(message))["messages"]
    assert [*variable] == ["role", "content", "name", "tool_call_id"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].reasoning_content }}", "hm"),
        ("{{ messages[0]['reasoning_content'] or messages[0].reasoning }}", "hm"),
        ("{{ messages[0].reasoning }}", "hm"),
        ("{{ messages[0].thinking }}", "hm"),
        ("{{ messages[0]['thinking'] }}", "hm"),
        ("{% if messages[0].thinking %}{{ raise_exception('no') }}{% endif %}ok", "ok"),
        ("{{ messages[0].content }}", "yes"),
    ],
)
def test_earlier_reasoning_has_the_name_that_the_template_reads(source: str, expected: str) -> None:
    message = ConversationMessage("assistant", "yes", reasoning_content="hm")
    assert render(source, conversation(message)).text == expected


def test_whether_to_think_has_all_usual_names() -> None:
    source = "{{ enable_thinking }} {{ thinking }} {{ thinking_mode }}"
    assert render(source, conversation(("user", "Hi"), enable_thinking=True)).text == "True True enabled"
    assert render(source).text == "False False disabled"


def test_a_template_that_refuses_is_told_from_one_that_fails() -> None:
    with pytest.raises(TemplateRefused) as refusal:
        render("{{ raise_exception('roles must alternate') }}")
    assert refusal.value.message == "roles must alternate"
    with pytest.raises(TemplateFailed) as failure:
        render("{{ messages[9].content }}")
    assert not isinstance(failure.value, TemplateRefused)


def test_what_a_template_changes_is_as_it_was_in_the_next_rendering() -> None:
    template = PromptTemplate("{% set _ = messages.append(messages[0]) %}{{ messages | length }}")
    variables = template_variables(conversation(("user", "Hi")))
    assert [template.render(variables, now=NOW).text for _ in range(3)] == ["2", "2", "2"]


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
        ("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=True, ensure_ascii=True) }}", '{"a": "\\u00e9", "b": 1}'),
        ("{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}", '{"b":[1,2]}'),
        ("{{ messages | map(attribute='role') | tojson }}", '["user"]'),
        ("{{ messages.append(1) or '' }}{{ messages | length }}", "2"),
        ("{% set l = [] %}{% set _ = l.append('a') %}{{ l | join }}", "a"),
        ("{% for i in range(5) %}{% if i is odd %}{% continue %}{% endif %}{{ i }}{% endfor %}", "024"),
        ("{{ functions }} {{ datetime }}", "[] 2024-05-17 00:00:00"),
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
        ("{{ {} | tojson(nope=1) }}", "nope"),
        ("{{ {} | tojson(indent=100000) }}", "indent"),
        ("{{ nope | tojson }}", "Undefined"),
        ("{{ messages.clear() }}", "unsafe"),
        ("{{ {'a': namespace(b=1)} | tojson }}", "Namespace is not JSON"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '\\ud800' }}", "not valid Unicode"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_says_why(source: str, reason: str) -> None:
    with pytest.raises(TemplateFailed, match=reason.replace("(", r"\(")):
        render(source)


def test_a_prompt_of_any_length_is_refused() -> None:
    length = MAX_PROMPT_CHARACTERS
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
    with pytest.raises(TemplateFailed, match=r"Recursion|nested"):
        PromptTemplate("{{" + "(" * 5000 + ")" * 5000 + "}}")


def test_variables_are_json() -> None:
    variables: dict[str, Any] = template_variables(conversation(("user", PARTS), tools=(WEATHER,)))
    assert json.loads(json.dumps(variables)) == variables


def test_memory_that_runs_out_while_compiling_is_not_the_template_s_fault() -> None:
    class TooBig(str):
        __slots__ = ()

        def __str__(self) -> str:
            raise MemoryError

    with pytest.raises(MemoryError):
        PromptTemplate(TooBig("fine"))
