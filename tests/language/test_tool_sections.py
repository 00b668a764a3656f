"""Tool calls within answers: their marks never show, their text is whole, whatever the cut into tokens."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paddler.language.bare_calls import MAX_HELD_CHARACTERS
from paddler.language.reasoning_formats import FAMILIES, Markers
from paddler.language.token_classifier import Item, SectionEnd, TokenClassifier
from paddler.language.tool_calls import MAX_SECTION_CHARACTERS, ToolCallParser
from paddler.language.tool_formats import FALLBACK, FORMATS, ToolFormat
from paddler.messages.tokens import ParsedToolCall, Section, ToolCallParsed, Usage, ValidJson
from tests.language.tools import ANSWERS, TOOLS, Answer

BY_NAME = {tool_format.name: tool_format for tool_format in FORMATS}
THINK = FAMILIES[0]
GPT_OSS = next(family for family in FAMILIES if family.headers is not None)
HERMES, KIMI, LLAMA = BY_NAME["hermes"], BY_NAME["kimi k2"], BY_NAME["llama 3"]
CALL = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
BARE = '{"name": "ping", "arguments": {}}'
PLAIN = 0

CONTROL = re.compile(
    r"<[|｜][^<>]*[|｜]>|<\|\"\|>|<\|tool_call>|<tool_call\|>|\[[A-Z_]+\]|｜DSML｜|\]<\]minimax\[>\["
)
"""What stands for a token of its own in the vocabularies of those models."""


def classify(
    pieces: list[str],
    *,
    tool_format: ToolFormat | None,
    markers: Markers | None = THINK,
    start: Section = Section.CONTENT,
    control: dict[str, int] | None = None,
) -> tuple[list[Item], Usage]:
    """Feed one piece per token; those among the control tokens are invisible."""
    control = control or {}
    classifier = TokenClassifier(
        markers=markers,
        start=start,
        control_tokens={number: text for text, number in control.items()},
        tool_format=tool_format,
    )
    items: list[Item] = []
    for piece in pieces:
        items += (
            classifier.feed((control[piece],), "") if piece in control else classifier.feed((PLAIN,), piece)
        )
    items += classifier.finish()
    usage = classifier.usage(prompt_tokens=0, cached_prompt_tokens=0)
    assert (
        usage.content_tokens + usage.reasoning_tokens + usage.tool_call_tokens + usage.undeterminable_tokens
    ) == len(pieces)
    return items, usage


def joined(items: list[Item]) -> list[Item]:
    """Put neighbours of one section together."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, tuple) and found and isinstance(last := found[-1], tuple) and last[0] is item[0]:
            found[-1] = (item[0], last[1] + item[1])
        else:
            found.append(item)
    return found


def shown(items: list[Item], section: Section) -> str:
    return "".join(item[1] for item in items if isinstance(item, tuple) and item[0] is section)


def markers_for(answer: Answer) -> Markers:
    return GPT_OSS if answer.tool_format == "harmony" else THINK


def marks_of(tool_format: ToolFormat) -> list[str]:
    return [
        mark
        for bracket in tool_format.brackets
        if not bracket.shown
        for mark in (bracket.opening, bracket.closing)
        if mark and "`" not in mark
    ]


def check(answer: Answer, items: list[Item]) -> None:
    tool_format = BY_NAME[answer.tool_format]
    assert shown(items, Section.CONTENT) == answer.content
    assert shown(items, Section.REASONING) == ""
    ends = [item.text for item in items if isinstance(item, SectionEnd)]
    assert len(ends) == answer.sections
    found: list[tuple[str, object]] = []
    for text in ends:
        parser = ToolCallParser(tool_format, TOOLS)
        parser.feed(text)
        outcome = parser.finish()
        assert isinstance(outcome, ToolCallParsed), outcome
        found += [(call.name, argument_of(call)) for call in outcome.payload]
    assert tuple(found) == answer.calls
    for mark in marks_of(tool_format):
        assert mark not in shown(items, Section.TOOL_CALL)


def argument_of(call: ParsedToolCall) -> object:
    assert isinstance(call.arguments, ValidJson)
    return call.arguments.payload


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.tool_format)
def test_every_familys_calls_are_found_read_and_unmarked(answer: Answer) -> None:
    items, usage = classify(
        [*answer.text], tool_format=BY_NAME[answer.tool_format], markers=markers_for(answer)
    )
    check(answer, items)
    assert usage.tool_call_tokens > 0


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.tool_format)
def test_the_same_where_marks_are_control_tokens(answer: Answer) -> None:
    pieces = [piece for piece in re.split(f"({CONTROL.pattern})", answer.text) if piece]
    control = {piece: number for number, piece in enumerate(CONTROL.findall(answer.text), 1)}
    control |= {"<|im_end|>": 1000}
    items, _ = classify(
        [*pieces, "<|im_end|>"],
        tool_format=BY_NAME[answer.tool_format],
        markers=markers_for(answer),
        control=control,
    )
    check(answer, items)
    visible = "".join(text for item in items if isinstance(item, tuple) for text in item[1:])
    assert not any(text in visible for text in control)


@settings(max_examples=200)
@given(
    answer=st.sampled_from(ANSWERS), cuts=st.lists(st.integers(0, 300), max_size=30), rest=st.text(max_size=3)
)
def test_the_cut_does_not_matter(answer: Answer, cuts: list[int], rest: str) -> None:
    text = "<think>why</think>" + answer.text + rest if answer.tool_format != "harmony" else answer.text
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    options = {"tool_format": BY_NAME[answer.tool_format], "markers": markers_for(answer)}
    items, _ = classify(pieces, **options)  # type: ignore[arg-type]
    whole, _ = classify([text], **options)  # type: ignore[arg-type]
    assert joined(items) == joined(whole)


fragments = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "_call>", "<function=", "</function>",
         "[TOOL_CALLS]", '{"name": "a", ', '"arguments": {}}', "{", "[", "```json\n", "```", '"x"', " ", ";",
         "<", "<|tool_call>", "<|python_tag|>", "a", "é\n"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@st.composite
def marked_texts(draw: st.DrawFn) -> tuple[ToolFormat | None, Markers | None, str]:
    """Draw a text of whole and broken marks, for any format beside any family."""
    tool_format = draw(st.sampled_from([*FORMATS, FALLBACK, None]))
    markers = draw(st.sampled_from([*FAMILIES, None]))
    marks = [*markers.opening, *markers.closing] if markers is not None else []
    if markers is not None and markers.headers is not None:
        headers = markers.headers
        marks += [*headers.opening, headers.closing, *headers.ends, *headers.continued]
    if tool_format is not None:
        marks += [mark for each in tool_format.brackets for mark in (each.opening, each.closing) if mark]
        marks += sorted(tool_format.inner)
    broken = [mark[: len(mark) // 2] for mark in marks]
    words = [BARE, "{", "[", "}", "]", "```json\n", "```", "x", " ", ";", "\n", "<", "é"]
    return tool_format, markers, "".join(draw(st.lists(st.sampled_from(marks + broken + words), max_size=10)))


@settings(max_examples=300)
@given(
    drawn=marked_texts(),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    start=st.sampled_from([Section.CONTENT, Section.REASONING]),
)
def test_all_formats_beside_all_families_are_classified_alike_however_cut(
    drawn: tuple[ToolFormat | None, Markers | None, str], cuts: list[int], start: Section
) -> None:
    tool_format, markers, text = drawn
    start = start if markers is not None else Section.UNDETERMINABLE
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    items, _ = classify(pieces, tool_format=tool_format, markers=markers, start=start)
    whole, _ = classify([text], tool_format=tool_format, markers=markers, start=start)
    assert joined(items) == joined(whole)


@pytest.mark.parametrize("tool_format", [*FORMATS, FALLBACK, None], ids=lambda each: each and each.name)
@pytest.mark.parametrize("are_control", [False, True])
def test_no_mark_of_any_format_or_family_shows(tool_format: ToolFormat | None, *, are_control: bool) -> None:
    for markers in FAMILIES:
        marks = [*markers.opening, *markers.closing, *(marks_of(tool_format) if tool_format else [])]
        control = {mark: number for number, mark in enumerate(marks, 1)} if are_control else {}
        for first, second in itertools.product(marks, repeat=2):
            pieces = ["a ", first, " b ", second, " c"]
            items, _ = classify(pieces, tool_format=tool_format, markers=markers, control=control)
            for section in (Section.CONTENT, Section.REASONING):
                assert not any(mark in shown(items, section) for mark in marks), (markers, pieces)


@settings(max_examples=300)
@given(
    text=fragments,
    cuts=st.lists(st.integers(0, 100)),
    start=st.sampled_from([Section.CONTENT, Section.REASONING, Section.UNDETERMINABLE]),
)
@example(text="<tool_call>a<tool_call>", cuts=[3, 12, 13], start=Section.CONTENT)
def test_any_text_is_classified_alike_however_it_is_cut(text: str, cuts: list[int], start: Section) -> None:
    markers = None if start is Section.UNDETERMINABLE else THINK
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    items, _ = classify(pieces, tool_format=FALLBACK, markers=markers, start=start)
    whole, _ = classify([text], tool_format=FALLBACK, markers=markers, start=start)
    assert joined(items) == joined(whole)
    for section in (Section.CONTENT, Section.REASONING, Section.UNDETERMINABLE):
        for mark in ("<tool_call>", "</tool_call>", "<|tool_call>", "[TOOL_CALLS]", "<|python_tag|>"):
            # Where one vanishes, what stood around it may look like another.
            assert mark not in shown(items, section) or text.count("<tool") > 1


harmony_fragments = st.lists(
    st.sampled_from(
        ["<|start|>", "assistant", "<|channel|>", "analysis", "final", "commentary", " to=functions.ping",
         "<|message|>", "<|end|>", "<|call|>", "<|return|>", "{}", "x", " to=", "<|"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=200)
@given(text=harmony_fragments, cuts=st.lists(st.integers(0, 150)), with_tools=st.booleans())
def test_headers_are_followed_alike_however_they_are_cut(
    text: str, cuts: list[int], with_tools: bool
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    tool_format = BY_NAME["harmony"] if with_tools else None
    items, _ = classify(pieces, tool_format=tool_format, markers=GPT_OSS)
    whole, _ = classify([text], tool_format=tool_format, markers=GPT_OSS)
    assert joined(items) == joined(whole)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>yes<|return|>", [(Section.CONTENT, "yes")]),
        ("<|channel|>commentary<|message|>I look.<|end|>", [(Section.CONTENT, "I look.")]),
        (
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>yes",
            [(Section.REASONING, "why"), (Section.CONTENT, "yes")],
        ),
        ("plain", [(Section.CONTENT, "plain")]),
        (" to the point", [(Section.CONTENT, " to the point")]),
        ("<|channel|>" + "x" * 600, [(Section.CONTENT, "x" * 98)]),
    ],
)
def test_headers_of_gpt_oss_never_show(text: str, expected: list[Item]) -> None:
    items, usage = classify([*text], tool_format=None, markers=GPT_OSS)
    assert joined(items) == expected
    assert (usage.reasoning_tokens == 0) is ("analysis" not in text)


def test_without_tools_nothing_is_a_tool_call() -> None:
    items, usage = classify([*CALL], tool_format=None)
    assert joined(items) == [(Section.CONTENT, CALL)]
    assert usage.tool_call_tokens == 0


def test_marks_count_for_the_call_they_bound() -> None:
    pieces = ["Hi", "<tool_call>", BARE, "</tool_call>", "."]
    items, usage = classify(pieces, tool_format=HERMES)
    assert items == [
        (Section.CONTENT, "Hi"),
        (Section.TOOL_CALL, BARE),
        SectionEnd(BARE),
        (Section.CONTENT, "."),
    ]
    assert (usage.content_tokens, usage.tool_call_tokens) == (2, 3)


def test_a_section_that_the_answer_leaves_open_ends_with_it() -> None:
    items, _ = classify(["<tool_call>", '{"name', "<"], tool_format=HERMES)
    assert joined(items) == [(Section.TOOL_CALL, '{"name<'), SectionEnd('{"name<', is_open=True)]


def test_a_call_that_is_never_closed_ends_where_the_next_begins() -> None:
    items, _ = classify(["<tool_call>a<tool_call>b</tool_call>"], tool_format=HERMES)
    assert items == [
        (Section.TOOL_CALL, "a"),
        SectionEnd("a"),
        (Section.TOOL_CALL, "b"),
        SectionEnd("b"),
    ]


def test_a_thought_about_calls_is_no_call_and_shows_no_mark() -> None:
    items, usage = classify([*f"<think>I write {CALL} now</think>Hi"], tool_format=HERMES)
    assert joined(items) == [
        (Section.REASONING, f"I write {BARE} now"),
        (Section.CONTENT, "Hi"),
    ]
    assert usage.tool_call_tokens == 0


def test_a_call_token_ends_reasoning_that_was_not_closed() -> None:
    answer = next(answer for answer in ANSWERS if answer.tool_format == "kimi k2")
    items, _ = classify([*("why" + answer.text)], tool_format=KIMI, start=Section.REASONING)
    assert shown(items, Section.REASONING) == "why"
    assert sum(isinstance(item, SectionEnd) for item in items) == 1


def test_arguments_may_contain_marks_of_reasoning() -> None:
    items, _ = classify([*"<tool_call><think></think></tool_call>"], tool_format=HERMES)
    assert items[-1] == SectionEnd("<think></think>")


@pytest.mark.parametrize(
    "text",
    [
        BARE,
        " \n" + BARE,
        f"[{BARE}, {BARE}]",
        f"```json\n{BARE}\n```",
        '{"type": "function", "function": {"name": "ping", "arguments": {"a": "}"}}}',
        '{"parameters": {"name": [1, {"x": "\\""}]}, "name": "ping"}',
    ],
)
@pytest.mark.parametrize("tool_format", [HERMES, LLAMA, FALLBACK], ids=lambda tool_format: tool_format.name)
def test_a_bare_call_is_one(text: str, tool_format: ToolFormat) -> None:
    items, usage = classify([*text, "<|eot|>"], tool_format=tool_format, control={"<|eot|>": 5})
    assert shown(items, Section.CONTENT) == text[: len(text) - len(text.lstrip())]
    assert [item.text for item in items if isinstance(item, SectionEnd)] == [text.lstrip()]
    assert usage.tool_call_tokens == len(text.lstrip())


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '{"name": "Ada"}',
        '{"answer": "{"}',
        "{}",
        "{ not JSON",
        "[1, 2]",
        "[text](https://example.org)",
        "[]",
        "[{}]",
        '{"name": "ping", "arguments": {}',
        '{"name": 5, "arguments": {}}',
        '{"name": "ping", "arguments": {]}',
        "```python\nprint()\n```",
        "```json\n[1]\n```",
        "text " + BARE,
        '{"name": "' + "x" * MAX_HELD_CHARACTERS,
    ],
    ids=lambda text: text[:30],
)
def test_other_json_is_text(text: str) -> None:
    items, usage = classify([text[:1], *re.findall(r".{1,50}", text[1:], re.DOTALL)], tool_format=LLAMA)
    assert joined(items) == [(Section.CONTENT, text)]
    assert usage.tool_call_tokens == 0


def test_an_answer_in_json_is_released_at_its_first_foreign_key() -> None:
    classifier = TokenClassifier(markers=THINK, start=Section.CONTENT, control_tokens={}, tool_format=LLAMA)
    assert classifier.feed((1,), '{"') == []
    assert classifier.feed((1,), "answer") == []
    assert classifier.feed((1,), '":') == [
        (Section.CONTENT, '{"'),
        (Section.CONTENT, "answer"),
        (Section.CONTENT, '":'),
    ]
    assert classifier.feed((1,), " {") == [(Section.CONTENT, " {")]


def test_what_is_kept_of_a_section_is_bounded() -> None:
    piece = "x" * 4096
    pieces = ["<tool_call>", *[piece] * (2 * MAX_SECTION_CHARACTERS // len(piece))]
    items, _ = classify(pieces, tool_format=HERMES)
    end = items[-1]
    assert isinstance(end, SectionEnd)
    assert MAX_SECTION_CHARACTERS < len(end.text) <= MAX_SECTION_CHARACTERS + len(piece)
