"""Sections and counts do not depend on how text was cut into tokens; markers are never shown."""

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paddler.language.reasoning_formats import FAMILIES, Markers, find_markers, section_after
from paddler.language.token_classifier import Item, TokenClassifier
from paddler.messages.tokens import Section, Usage

THINK = FAMILIES[0]
GEMMA = next(family for family in FAMILIES if "<channel|>" in family.closing)
GPT_OSS = next(family for family in FAMILIES if "<|channel|>analysis<|message|>" in family.opening)
PLAIN = 100


def classify(
    pieces: list[str | int],
    *,
    markers: Markers | None = THINK,
    start: Section = Section.CONTENT,
    control_tokens: dict[int, str] | None = None,
) -> tuple[list[tuple[Section, str]], Usage]:
    """Feed visible tokens (text) and control tokens (numbers), one per turn."""
    classifier = TokenClassifier(markers=markers, start=start, control_tokens=control_tokens or {})
    shown: list[tuple[Section, str]] = []
    for piece in pieces:
        given = ((PLAIN,), piece) if isinstance(piece, str) else ((piece,), "")
        shown += pieces_of(classifier.feed(*given))
    shown += pieces_of(classifier.finish())
    return shown, classifier.usage(prompt_tokens=0, cached_prompt_tokens=0)


def pieces_of(items: list[Item]) -> list[tuple[Section, str]]:
    """Return the items, which are all pieces without tools."""
    return [item for item in items if isinstance(item, tuple)]


def joined(shown: list[tuple[Section, str]]) -> list[tuple[Section, str]]:
    groups = itertools.groupby(shown, key=lambda entry: entry[0])
    return [(section, "".join(text for _, text in entries)) for section, entries in groups]


def completion(usage: Usage) -> int:
    return (
        usage.content_tokens + usage.reasoning_tokens + usage.tool_call_tokens + usage.undeterminable_tokens
    )


@pytest.mark.scenario("TH-1", "TH-2", "TH-3", "TH-12")
@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["Hel", "lo"], [(Section.CONTENT, "Hello")]),
        (["<think>", "a", "</think>", "b"], [(Section.REASONING, "a"), (Section.CONTENT, "b")]),
        (
            ["x<th", "ink>a</th", "ink>b"],
            [(Section.CONTENT, "x"), (Section.REASONING, "a"), (Section.CONTENT, "b")],
        ),
        (["a <", "b"], [(Section.CONTENT, "a <b")]),
        (["a </think", "ing>"], [(Section.CONTENT, "a </thinking>")]),
        (["<thi"], [(Section.CONTENT, "<thi")]),
        (["<<think>", "a"], [(Section.CONTENT, "<"), (Section.REASONING, "a")]),
        (["<think><think>", "a"], [(Section.REASONING, "a")]),
        (["a</think>b"], [(Section.CONTENT, "ab")]),
        (["", "é", ""], [(Section.CONTENT, "é")]),
        ([], []),
    ],
)
def test_markers_divide_the_answer_and_are_not_shown(
    pieces: list[str | int], expected: list[tuple[Section, str]]
) -> None:
    shown, usage = classify(pieces)
    assert joined(shown) == expected
    assert completion(usage) == len(pieces)


def test_marker_tokens_count_for_the_reasoning_they_bound() -> None:
    shown, usage = classify(["<think>", "a", "b", "</think>", "c"])
    assert len(shown) == 3
    assert (usage.reasoning_tokens, usage.content_tokens) == (4, 1)


def test_control_tokens_are_matched_but_never_shown() -> None:
    control = {7: "<think>", 8: "</think>", 9: "<|im_end|>"}
    shown, usage = classify([7, "a", 9, 8, "b", 9], control_tokens=control)
    assert shown == [(Section.REASONING, "a"), (Section.CONTENT, "b")]
    assert (usage.reasoning_tokens, usage.content_tokens) == (4, 2)


def test_a_marker_of_a_control_token_and_text_is_recognised() -> None:
    control = {7: "<|channel>", 8: "<channel|>"}
    shown, _ = classify([7, "thou", "ght", "\n", "a", 8, "b"], markers=GEMMA, control_tokens=control)
    assert shown == [(Section.REASONING, "a"), (Section.CONTENT, "b")]
    shown, _ = classify([7, "other"], markers=GEMMA, control_tokens=control)
    assert shown == [(Section.CONTENT, "other")]


def test_text_that_comes_with_a_control_token_stands_before_it() -> None:
    classifier = TokenClassifier(markers=THINK, start=Section.CONTENT, control_tokens={7: "<think>"})
    assert classifier.feed((7,), "\ufffd") == [(Section.CONTENT, "\ufffd")]
    assert classifier.feed((PLAIN,), "a") == [(Section.REASONING, "a")]


def test_text_without_a_token_is_shown_and_not_counted() -> None:
    classifier = TokenClassifier(markers=THINK, start=Section.CONTENT, control_tokens={})
    shown = classifier.feed((PLAIN,), "<") + classifier.feed((), "<\ufffd") + classifier.finish()
    assert "".join(text for _, text in pieces_of(shown)) == "<<\ufffd"
    assert classifier.usage(prompt_tokens=5, cached_prompt_tokens=1) == Usage(
        prompt_tokens=5, cached_prompt_tokens=1, content_tokens=1
    )


def test_several_channels_of_gpt_oss() -> None:
    text = "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>yes"
    shown, _ = classify([*text], markers=GPT_OSS)
    assert joined(shown) == [(Section.REASONING, "why"), (Section.CONTENT, "yes")]


def test_without_markers_everything_is_undeterminable() -> None:
    shown, usage = classify(["<think>", "a"], markers=None, start=section_after("", None))
    assert shown == [(Section.UNDETERMINABLE, "<think>"), (Section.UNDETERMINABLE, "a")]
    assert usage.undeterminable_tokens == 2


answers = st.lists(
    st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "<", ">", "a", "é", "\n", " b "]),
    max_size=12,
).map("".join)


@given(
    text=answers,
    cuts=st.lists(st.integers(0, 60)),
    start=st.sampled_from([Section.CONTENT, Section.REASONING]),
)
@example(text="<think>a</think>b", cuts=[3, 8, 12], start=Section.CONTENT)
def test_the_cut_does_not_matter(text: str, cuts: list[int], start: Section) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces: list[str | int] = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    shown, usage = classify(pieces, start=start)
    whole, _ = classify([text], start=start)
    assert joined(shown) == joined(whole)
    assert completion(usage) == len(pieces)
    assert "".join(shown_text for _, shown_text in shown) == re.sub("</?think>", "", text)


@pytest.mark.scenario("GE-12")
@given(
    pieces=st.lists(st.sampled_from(["a", "<", "</th", "think", "ink", " >", "</thin", "x<"]), max_size=20)
)
def test_plain_text_gives_one_entry_per_visible_token(pieces: list[str]) -> None:
    text = "".join(pieces)
    if "<think>" in text or "</think>" in text:
        return
    shown, usage = classify([*pieces])
    assert [shown_text for _, shown_text in shown] == pieces
    assert usage.content_tokens == len(pieces)


@pytest.mark.scenario("TH-10", "TH-11")
@pytest.mark.parametrize(
    ("template", "control_texts", "opening"),
    [
        ("{% if '</think>' in content %}{% endif %}<think>\n", [], "<think>"),
        ("[THINK]{{ x }}[/THINK]", [], "[THINK]"),
        ("plain", ["<s>", "[THINK]", "[/THINK]"], "[THINK]"),
        ("<|turn>model\n<|channel>thought\n<channel|>", [], "<|channel>thought\n"),
        ("<|start|>assistant<|channel|>final<|message|>", [], "<|channel|>analysis<|message|>"),
        (None, ["<|START_THINKING|>", "<|END_THINKING|>"], "<|START_THINKING|>"),
    ],
)
def test_markers_are_found_in_the_template_or_among_the_control_tokens(
    template: str | None, control_texts: list[str], opening: str
) -> None:
    markers = find_markers(template, control_texts)
    assert markers is not None
    assert markers.opening == (opening,)


def test_a_model_without_markers_has_none() -> None:
    assert find_markers("{{ messages[0].content }}", ["<s>", "</s>"]) is None
    assert find_markers(None, []) is None


@pytest.mark.scenario("TH-4")
@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("", Section.CONTENT),
        ("<|im_start|>assistant\n", Section.CONTENT),
        ("<|im_start|>assistant\n<think>\n", Section.REASONING),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Section.CONTENT),
    ],
)
def test_the_prompt_decides_in_which_section_an_answer_begins(text: str, section: Section) -> None:
    assert section_after(text, THINK) is section


def test_no_marker_of_a_family_begins_with_another() -> None:
    for family in FAMILIES:
        for one, other in itertools.permutations((*family.opening, *family.closing), 2):
            assert not one.startswith(other)
