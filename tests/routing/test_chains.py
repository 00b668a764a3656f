from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.messages.inference import (
    CalledFunction,
    CalledTool,
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    ConversationMessage,
    EmbeddingDocument,
    GenerateEmbeddingBatch,
    ImagePart,
    ImageUrl,
    TextPart,
    Tool,
    ToolFunction,
    ToolParameters,
)
from paddler.routing.chains import BLOCK_CHARACTERS, MAX_CHARACTERS, MAX_LINKS, NO_CHAIN, chain_of

WEATHER = Tool(
    type="function",
    function=ToolFunction(
        "weather", "Tells it.", ToolParameters("object", {"place": {"type": "string"}}, ("place",), False)
    ),
)


def message(content: Any, role: str = "user", **changes: Any) -> ConversationMessage:
    return ConversationMessage(role=role, content=content, **changes)


def conversation(*messages: ConversationMessage, **changes: Any) -> ContinueFromConversationHistory:
    return ContinueFromConversationHistory(
        add_generation_prompt=True,
        conversation_history=messages,
        enable_thinking=False,
        max_tokens=16,
        **changes,
    )


def raw(text: str) -> ContinueFromRawPrompt:
    return ContinueFromRawPrompt(max_tokens=16, raw_prompt=text)


def shared(one: Any, other: Any) -> int:
    """Return how many links two requests have in common; they must be the first ones."""
    links = [a == b for a, b in zip(chain_of(one).links, chain_of(other).links, strict=False)]
    count = links.index(False) if False in links else len(links)
    assert not any(links[count:])
    return count


@given(
    st.lists(st.text(max_size=5), max_size=8), st.lists(st.text(max_size=5), max_size=8), st.integers(0, 8)
)
def test_conversations_share_as_many_links_as_messages(
    texts: list[str], others: list[str], common: int
) -> None:
    others = texts[:common] + others
    equal = [a == b for a, b in zip(texts, others, strict=False)]
    expected = equal.index(False) if False in equal else len(equal)
    assert shared(conversation(*map(message, texts)), conversation(*map(message, others))) == expected


@given(st.text(alphabet="ab", max_size=10), st.text(alphabet="ab", max_size=10))
def test_raw_prompts_share_whole_blocks(one: str, other: str) -> None:
    blocks = {letter: letter * BLOCK_CHARACTERS for letter in "ab"}
    equal = [a == b for a, b in zip(one, other, strict=False)]
    expected = equal.index(False) if False in equal else len(equal)
    texts = ["".join(blocks[letter] for letter in letters) + "tail" for letters in (one, other)]
    assert shared(raw(texts[0]), raw(texts[1])) == expected


def test_a_raw_prompt_that_goes_on_shares_all_links() -> None:
    text = "once upon a time " * 200
    assert shared(raw(text), raw(text + "there was")) == len(chain_of(raw(text)).links) == 3


def test_the_characters_are_counted_up_to_the_end_of_each_link() -> None:
    chain = chain_of(conversation(message("1234", "system"), message("12")))
    assert chain.ends == (10, 16)
    assert chain.characters == 16
    chain = chain_of(raw("x" * 2100))
    assert chain.ends == (1024, 2048)
    assert chain.characters == 2100


@pytest.mark.parametrize(
    "other",
    [
        message("Hi", "assistant"),
        message("Hi", name="Ada"),
        message("Hi", reasoning_content="Let me see."),
        message("Hi", tool_call_id="call-1"),
        message("Hi", tool_calls=(CalledTool(CalledFunction("weather", {"place": "Rome"})),)),
        message("Hi", tool_calls=(CalledTool(CalledFunction("weather", {"place": "Paris"})),)),
        message((TextPart("Hi"),)),
        message((TextPart("Hi"), ImagePart(ImageUrl("data:image/png;base64,AAAA")))),
        message((TextPart("Hi"), ImagePart(ImageUrl("data:image/png;base64,AAAB")))),
    ],
)
def test_messages_that_differ_in_any_way_are_different_links(other: ConversationMessage) -> None:
    plain = message("Hi")
    assert shared(conversation(plain), conversation(other)) == 0
    equal = attrs.evolve(other)
    assert shared(conversation(other, plain), conversation(equal, plain)) == 2


def test_tools_documents_and_thinking_come_before_all_messages() -> None:
    plain = conversation(message("Hi"))
    with_tools = attrs.evolve(plain, tools=(WEATHER,))
    assert len(chain_of(plain).links) == 1
    assert len(chain_of(with_tools).links) == 2
    for other in (
        with_tools,
        attrs.evolve(plain, documents=({"title": "News"},)),
        attrs.evolve(plain, enable_thinking=True),
    ):
        assert shared(plain, other) == 0
    changed = attrs.evolve(WEATHER, function=attrs.evolve(WEATHER.function, description="Guesses it."))
    assert shared(with_tools, attrs.evolve(plain, tools=(changed,))) == 0
    assert shared(with_tools, attrs.evolve(with_tools, max_tokens=3)) == 2


def test_equal_tools_are_equal_however_their_objects_came_about() -> None:
    """The bytes of a value must not tell whether two of its strings are one object."""
    place = "".join(["pla", "ce"])
    again = Tool(
        type="function",
        function=ToolFunction(
            "weather",
            "Tells it.",
            ToolParameters("object", {place: {"type": "".join(["str", "ing"])}}, (place,), False),
        ),
    )
    assert shared(conversation(message("Hi"), tools=(WEATHER,)), conversation(tools=(again,))) == 1


def test_large_images_are_told_apart_by_samples_and_count_as_little_as_small_ones() -> None:
    def picture(middle: str) -> ContinueFromConversationHistory:
        url = "data:image/png;base64," + "A" * 100_000 + middle + "A" * 100_000
        return conversation(message((ImagePart(ImageUrl(url)),)))

    assert shared(picture("A"), picture("B")) == 0
    assert shared(picture("B"), picture("B")) == 1
    assert chain_of(picture("A")).characters < 2000


def test_long_prompts_are_known_by_their_beginning() -> None:
    assert len(chain_of(raw("x" * (MAX_LINKS + 5) * BLOCK_CHARACTERS)).links) == MAX_LINKS
    assert len(chain_of(conversation(*[message("x")] * (MAX_LINKS + 5))).links) == MAX_LINKS
    huge = message("x" * MAX_CHARACTERS)
    assert len(chain_of(conversation(message("first"), huge, message("last"))).links) == 1


def test_what_has_no_prefix_to_share_has_no_chain() -> None:
    batch = GenerateEmbeddingBatch((EmbeddingDocument("1", "text"),), "None")
    assert chain_of(batch) is NO_CHAIN
    assert chain_of(raw("short")).links == ()
    assert chain_of(conversation()).links == ()


def test_tools_that_the_model_is_not_told_of_make_no_difference() -> None:
    plain = conversation(message("a"), message("b"))
    assert chain_of(conversation(message("a"), message("b"), tools=(WEATHER,), tool_choice="none")).links == (
        chain_of(plain).links
    )
    assert shared(conversation(message("a"), tools=(WEATHER,), tool_choice="required"), plain) == 0
