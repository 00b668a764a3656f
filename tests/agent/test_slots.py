"""Requests in slots: whatever happens, each ends with exactly one terminal piece."""

import json
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.agent.serving import Serving
from paddler.agent.slots import Slots
from paddler.engine.pipe import Advance, Finish, Generate, GrammarRule, Picture, SamplerSettings
from paddler.errors import RemoteProtocolError
from paddler.language.reasoning_formats import FAMILIES, Markers
from paddler.language.template_environment import MAX_PROMPT_CHARACTERS
from paddler.language.tool_formats import FALLBACK, FORMATS, ToolFormat
from paddler.messages.agent_socket import TERMINAL_LETTERS, Piece
from paddler.messages.inference import (
    ContentPart,
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    ConversationMessage,
    GbnfGrammar,
    ImagePart,
    ImageUrl,
    JsonSchemaGrammar,
    NormalizationMethod,
    Request,
    TextPart,
    Tool,
    ToolFunction,
    ToolParameters,
)
from paddler.messages.sampling import Sampling
from paddler.messages.state import DEFAULT_PARAMETERS
from paddler.messages.tokens import StreamError
from tests.agent.local_renderer import LocalRenderer
from tests.fakes.scripted_engine import CONTROL_TOKENS, END_TOKEN, SIMPLE_TEMPLATE

RAW = ContinueFromRawPrompt(max_tokens=5, raw_prompt="Once upon")
GRAMMAR = GbnfGrammar(grammar='root ::= "yes"', root="root")
PNG_BASE64 = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PNG = f"data:image/png;base64,{PNG_BASE64}"
"""One pixel."""
NO_USAGE = {
    "prompt_tokens": 0,
    "cached_prompt_tokens": 0,
    "input_image_tokens": 0,
    "input_audio_tokens": 0,
    "content_tokens": 0,
    "reasoning_tokens": 0,
    "tool_call_tokens": 0,
    "undeterminable_tokens": 0,
}


def chat(
    content: str = "Hello", *, images: Iterable[str] = (), enable_thinking: bool = False
) -> ContinueFromConversationHistory:
    parts: tuple[ContentPart, ...] = (TextPart(content), *(ImagePart(ImageUrl(url)) for url in images))
    return ContinueFromConversationHistory(
        add_generation_prompt=True,
        conversation_history=(ConversationMessage("user", parts if images else content),),
        enable_thinking=enable_thinking,
        max_tokens=5,
    )


class RecordingEngine:
    def __init__(self) -> None:
        self.prompts: dict[int, tuple[str, int]] = {}
        self.commands: dict[int, Generate] = {}
        self.embedded: dict[int, tuple[tuple[str, ...], NormalizationMethod]] = {}
        self.cancelled: list[int] = []

    def generate(
        self,
        generation: int,
        *,
        prompt: str,
        max_tokens: int,
        sampler: SamplerSettings | None,
        grammar: GrammarRule | None,
        pictures: tuple[Picture, ...],
    ) -> None:
        self.prompts[generation] = (prompt, max_tokens)
        self.commands[generation] = Generate(generation, prompt, max_tokens, sampler, grammar, pictures)

    def embed(
        self, generation: int, *, documents: tuple[str, ...], normalization_method: NormalizationMethod
    ) -> None:
        self.embedded[generation] = (documents, normalization_method)

    def cancel(self, generation: int) -> None:
        self.cancelled.append(generation)


class House:
    """Slots with a link on one side and an engine played by the test on the other."""

    def __init__(self, *, requests: trio.Nursery, renderer: LocalRenderer) -> None:
        self.renderer = renderer
        self.slots = Slots(preparer=renderer)
        self.engine = RecordingEngine()
        self.steps: list[list[Piece]] = []
        self._requests = requests

    def serving(
        self,
        *,
        template: str | None = SIMPLE_TEMPLATE,
        markers: Markers | None = None,
        enable_embeddings: bool = False,
        supports_images: bool = False,
        tool_format: ToolFormat = FALLBACK,
    ) -> Serving:
        return Serving(
            engine=self.engine,
            parameters=attrs.evolve(DEFAULT_PARAMETERS, enable_embeddings=enable_embeddings),
            chat_template=template,
            special_tokens={"bos_token": "<s>", "eos_token": "</s>", "nl_token": "\n"},
            markers=markers,
            tool_format=tool_format,
            control_tokens=CONTROL_TOKENS,
            supports_images=supports_images,
            most_image_tokens=2048,
        )

    def accept(self, number: int, body: Request) -> None:
        self._requests.start_soon(self.slots.run, self.slots.accept(number, body))

    async def start(self, number: int, body: Request = RAW) -> None:
        self.accept(number, body)
        await wait_all_tasks_blocked()

    @property
    def pieces(self) -> list[Piece]:
        return [piece for step in self.steps for piece in step]

    def terminal(self, number: int) -> tuple[str, Any]:
        """Return letter and content of the one terminal piece of a request."""
        [(letter, text)] = [
            (letter, text)
            for request, letter, text in self.pieces
            if request == number and letter in TERMINAL_LETTERS
        ]
        return letter, json.loads(text)


@asynccontextmanager
async def open_house(*, delay: float = 0.0, **serving: Any) -> AsyncIterator[House]:
    async with trio.open_nursery() as requests:
        house = House(requests=requests, renderer=LocalRenderer(delay=delay))
        house.slots.open_door(house.serving(**serving))
        with house.slots.connected(house.steps.append):
            yield house
            requests.cancel_scope.cancel()
            await trio.lowlevel.checkpoint_if_cancelled()


def advance(generation: int, text: str = "", finish: Finish | None = None, **changes: Any) -> Advance:
    tokens = (100,) if text else ()
    made = Advance(generation, tokens, text, finish, "", prompt_tokens=3, cached_prompt_tokens=1)
    return attrs.evolve(made, **changes)


async def test_a_raw_prompt_goes_to_the_engine_as_it_is() -> None:
    async with open_house() as house:
        await house.start(7)
        assert house.engine.prompts == {1: ("Once upon", 5)}
        house.slots.on_turn([advance(1, " a")])
        house.slots.on_turn([advance(1, " time\n", Finish.LENGTH)])
        letter, done = house.terminal(7)
        assert house.pieces[:2] == [(7, "U", '" a"'), (7, "U", '" time\\n"')]
        assert letter == "D"
        usage = NO_USAGE | {"prompt_tokens": 3, "cached_prompt_tokens": 1, "undeterminable_tokens": 2}
        assert done == {"Done": {"usage": usage}}


async def test_a_conversation_is_rendered_with_the_special_tokens() -> None:
    async with open_house(template="{{ bos_token }}{{ messages[0].content }}") as house:
        await house.start(1, chat("Hi"))
        assert house.engine.prompts == {1: ("<s>Hi", 5)}


async def test_all_slots_of_a_turn_travel_in_one_step() -> None:
    async with open_house() as house:
        await house.start(1)
        await house.start(2)
        house.slots.on_turn([advance(1, "a"), advance(2, "b")])
        house.slots.on_turn([advance(1), advance(2)])  # nothing visible: no frame
        assert house.steps == [[(1, "U", '"a"'), (2, "U", '"b"')]]


@pytest.mark.scenario("TH-2", "TH-4")
async def test_sections_follow_the_markers_from_where_the_prompt_ends() -> None:
    async with open_house(markers=FAMILIES[0], template="{{ messages[0].content }}") as house:
        await house.start(1, chat("plain"))
        await house.start(2, ContinueFromRawPrompt(5, "<think>\n"))
        house.slots.on_turn([advance(1, "a"), advance(2, "b")])
        house.slots.on_turn([advance(2, "</think>"), advance(1, "x", tokens=(END_TOKEN,), finish=Finish.END)])
        house.slots.on_turn([advance(2, "c", Finish.LENGTH)])
        assert [piece[:2] for piece in house.pieces] == [
            (1, "C"),
            (2, "R"),
            (1, "C"),
            (1, "D"),
            (2, "C"),
            (2, "D"),
        ]


async def test_what_the_classifier_held_back_is_sent_with_the_end() -> None:
    async with open_house(markers=FAMILIES[0]) as house:
        await house.start(1)
        house.slots.on_turn([advance(1, "a<thi")])
        assert house.pieces == []
        house.slots.on_turn([advance(1, "", Finish.STOPPED)])
        assert house.pieces[0] == (1, "C", '"a<thi"')
        assert house.terminal(1)[0] == "D"


async def test_a_failed_generation_is_a_sampler_error() -> None:
    async with open_house() as house:
        await house.start(1)
        house.slots.on_turn([advance(1, finish=Finish.FAILED, failure="Request evicted due to pressure")])
        assert house.terminal(1) == ("D", {"SamplerError": "Request evicted due to pressure"})


async def test_a_stop_while_generating_ends_with_the_usage_so_far() -> None:
    async with open_house() as house:
        await house.start(1)
        house.slots.on_turn([advance(1, "a")])
        house.slots.stop(1)
        house.slots.stop(1)
        house.slots.stop(99)
        assert house.engine.cancelled == [1]
        house.slots.on_turn([advance(1, finish=Finish.STOPPED)])
        _, done = house.terminal(1)
        assert done["Done"]["usage"]["undeterminable_tokens"] == 1


@pytest.mark.parametrize("body", [RAW, chat()])
async def test_a_stop_right_behind_the_request_finds_it(body: Request) -> None:
    async with open_house() as house:
        house.accept(1, body)
        house.slots.stop(1)
        await wait_all_tasks_blocked()
        assert house.terminal(1) == ("D", {"Done": {"usage": NO_USAGE}})
        assert house.engine.prompts == {}


async def test_a_stop_cancels_preparation(autojump_clock: MockClock) -> None:
    async with open_house(delay=100) as house:
        await house.start(1, chat())
        house.slots.stop(1)
        await wait_all_tasks_blocked()
        assert house.terminal(1) == ("D", {"Done": {"usage": NO_USAGE}})
        assert house.renderer.rendered == []


@pytest.mark.parametrize(
    ("body", "variant", "words"),
    [
        (attrs.evolve(RAW, grammar=JsonSchemaGrammar("{")), "GrammarSyntaxError", "JSON"),
        (
            attrs.evolve(chat(enable_thinking=True), grammar=GRAMMAR),
            "GrammarIncompatibleWithThinking",
            "enable_thinking",
        ),
        pytest.param(
            chat(images=["https://example.org/a.png"]),
            "ImageDecodingFailed",
            "remote",
            marks=pytest.mark.scenario("IM-8"),
        ),
        pytest.param(
            chat(images=["data:image/png;base64"]),
            "ImageDecodingFailed",
            "comma",
            marks=pytest.mark.scenario("IM-7"),
        ),
        pytest.param(
            chat(images=["data:image/png;base64,!!!!"]),
            "ImageDecodingFailed",
            "broken",
            marks=pytest.mark.scenario("IM-6"),
        ),
        (chat(images=["data:image/png;base64,AAAAA"]), "ImageDecodingFailed", "broken"),
        (chat(images=["data:image/png;base64,"]), "ImageDecodingFailed", "empty"),
        (chat(images=["data:image/png,AAAA"]), "ImageDecodingFailed", "base64"),
        (chat(images=[PNG, "ftp://a"]), "ImageDecodingFailed", "remote"),
        pytest.param(
            chat(images=[PNG]),
            "MultimodalNotSupported",
            "no multimodal projection is loaded",
            marks=pytest.mark.scenario("IM-9", "IM-10"),
        ),
        (ContinueFromRawPrompt(5, "x" * (MAX_PROMPT_CHARACTERS + 1)), "SamplerError", "evicted"),
        (chat("x" * (MAX_PROMPT_CHARACTERS + 1)), "SamplerError", "evicted"),
        (chat("x" * (MAX_PROMPT_CHARACTERS + 1), images=[PNG]), "SamplerError", "evicted"),
    ],
)
async def test_refusals(body: Request, variant: str, words: str) -> None:
    async with open_house() as house:
        await house.start(1, body)
        letter, refusal = house.terminal(1)
        assert letter == "D"
        assert words in refusal[variant]
        assert house.engine.prompts == {}


async def test_a_conversation_longer_than_any_prompt_never_reaches_the_renderer() -> None:
    async with open_house() as house:
        await house.start(1, chat("x" * (MAX_PROMPT_CHARACTERS + 1)))
        words = f"prompt has {MAX_PROMPT_CHARACTERS + 1} characters, room for {MAX_PROMPT_CHARACTERS}"
        assert words in house.terminal(1)[1]["SamplerError"]
        assert house.renderer.rendered == []


@pytest.mark.parametrize(
    ("payload", "words"),
    [(" \n" * 5000 + PNG_BASE64 + "\n " * 5000, "no multimodal projection"), (" " * 9000, "empty")],
)
async def test_blanks_around_the_base64_of_an_image_are_no_part_of_it(payload: str, words: str) -> None:
    async with open_house() as house:
        await house.start(1, chat(images=["data:image/png;base64," + payload]))
        assert words in str(house.terminal(1)[1])


@pytest.mark.parametrize("body", [RAW, chat()])
async def test_in_embeddings_mode_tokens_are_disabled(body: Request) -> None:
    async with open_house(template=None, enable_embeddings=True) as house:
        await house.start(1, body)
        assert list(house.terminal(1)[1]) == ["TokenGenerationDisabled"]


async def test_a_template_that_refuses_the_conversation_is_a_chat_template_error() -> None:
    async with open_house(template="{{ raise_exception('no') }}") as house:
        await house.start(1, chat(images=[PNG]))
        assert "raised an exception: no" in house.terminal(1)[1]["ChatTemplateError"]


async def test_behind_a_closed_door_arrivals_are_bounced_and_accepted_ones_finish(
    autojump_clock: MockClock,
) -> None:
    async with open_house(delay=1) as house:
        await house.start(1, chat())
        house.slots.close_door()
        await house.start(2, chat())
        assert house.terminal(2) == ("B", None)
        await trio.sleep(2)
        assert list(house.engine.prompts) == [1]
        with trio.move_on_after(5) as emptied:
            await house.slots.emptied()
        assert emptied.cancelled_caught
        house.slots.on_turn([advance(1, "a", Finish.END)])
        with trio.fail_after(5):
            await house.slots.emptied()


async def test_a_failed_engine_ends_its_requests_and_bounces_those_in_preparation(
    autojump_clock: MockClock,
) -> None:
    async with open_house(delay=1) as house:
        await house.start(1)
        await house.start(2)
        await house.start(3, chat())
        house.slots.fail(StreamError(502, "Engine stopped: SIGKILL"))
        assert house.steps == [
            [(number, "X", '{"code":502,"description":"Engine stopped: SIGKILL"}') for number in (1, 2)]
        ]
        await house.start(4)
        await trio.sleep(2)
        assert house.terminal(3) == house.terminal(4) == ("B", None)
        with trio.fail_after(1):
            await house.slots.emptied()
        house.slots.on_turn([advance(1, "late")])
        assert len(house.pieces) == 4


async def test_a_prompt_that_is_ready_for_a_restarted_engine_is_bounced(autojump_clock: MockClock) -> None:
    async with open_house(delay=1) as house:
        await house.start(1, chat())
        house.slots.fail(StreamError(502, "Engine stopped: hang"))
        house.slots.open_door(house.serving())
        await trio.sleep(2)
        assert house.terminal(1) == ("B", None)


async def test_a_number_in_use_breaks_the_protocol() -> None:
    async with open_house() as house:
        await house.start(1)
        with pytest.raises(RemoteProtocolError):
            house.slots.accept(1, RAW)
        house.slots.on_turn([advance(1, "a", Finish.END)])
        await wait_all_tasks_blocked()
        await house.start(1)
        assert list(house.engine.prompts) == [1, 2]


async def test_requests_end_with_their_link_and_the_engine_is_told() -> None:
    async with open_house() as house:
        slots, engine, steps = house.slots, house.engine, house.steps
        await house.start(1)
        await house.start(2, chat())
    assert sorted(engine.cancelled) == [1, 2]
    assert steps == []
    with trio.fail_after(1):
        await slots.emptied()
    slots.on_turn([advance(1, "late", Finish.STOPPED)])


async def test_an_unexpected_error_ends_one_request(logged_errors: list[logging.LogRecord]) -> None:
    async with open_house() as house:
        await house.start(1)
        await house.start(2)
        broken = advance(1, "a", tokens=None, finish=Finish.END)  # what no engine sends
        house.slots.on_turn([broken, advance(2, "b")])
        assert house.terminal(1) == ("X", {"code": 500, "description": "Internal server error"})
        assert house.pieces[-1] == (2, "U", '"b"')
    assert [record.getMessage() for record in logged_errors] == ["request 1 failed"]


async def test_an_engine_that_fails_over_a_request_is_told_to_forget_it(
    logged_errors: list[logging.LogRecord],
) -> None:
    class HalfDeaf(RecordingEngine):
        def generate(self, generation: int, **command: Any) -> None:
            super().generate(generation, **command)
            raise LookupError("a bug behind the hand-over")

    async with open_house() as house:
        house.engine = HalfDeaf()
        house.slots.open_door(house.serving())
        await house.start(1)
        assert house.terminal(1) == ("X", {"code": 500, "description": "Internal server error"})
        assert house.engine.cancelled == [1]
    assert [record.getMessage() for record in logged_errors] == ["request 1 failed"]


ADD = Tool(
    type="function",
    function=ToolFunction(
        name="add",
        description="Add two numbers",
        parameters=ToolParameters(type="object", properties={"a": {"type": "integer"}}, required=("a",)),
    ),
)
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
BROKEN_CALL = '<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>'


def with_tools(**changes: Any) -> ContinueFromConversationHistory:
    return attrs.evolve(chat(), tools=(ADD,), parse_tool_calls=True, **changes)


def letters(house: House) -> str:
    return "".join(letter for _, letter, _ in house.pieces)


def events(house: House) -> list[Any]:
    return [json.loads(text) for _, letter, text in house.pieces if letter == "E"]


async def test_a_call_is_checked_and_what_follows_it_waits(autojump_clock: MockClock) -> None:
    async with open_house(delay=1) as house:
        await house.start(1, with_tools())
        await trio.sleep(3)
        house.slots.on_turn([advance(1, f"Well. {CALL} Done.", Finish.END)])
        assert letters(house) == "UT", "the end waits for the check"
        await trio.sleep(2)
        assert letters(house) == "UTEUD"
        assert events(house) == [
            {"ToolCallParsed": [{"id": "call_0", "name": "add", "arguments": {"ValidJson": {"a": 1}}}]}
        ]


async def test_a_call_that_breaks_its_schema_is_reported_and_the_next_one_parsed() -> None:
    async with open_house() as house:
        await house.start(1, with_tools())
        house.slots.on_turn([advance(1, BROKEN_CALL)])
        await wait_all_tasks_blocked()
        house.slots.on_turn([advance(1, f" Again: {CALL}", Finish.END)])
        await wait_all_tasks_blocked()
        [failed, parsed] = events(house)
        assert failed["ToolCallValidationFailed"][0].startswith("add: ")
        assert [call["name"] for call in parsed["ToolCallParsed"]] == ["add"]
        assert letters(house)[-1] == "D"


async def test_a_stop_while_a_call_is_checked_ends_with_the_engines_word(autojump_clock: MockClock) -> None:
    async with open_house(delay=1) as house:
        await house.start(1, with_tools())
        await trio.sleep(3)
        house.slots.on_turn([advance(1, CALL)])
        await wait_all_tasks_blocked()
        house.slots.stop(1)
        house.slots.on_turn([advance(1, finish=Finish.STOPPED)])
        await trio.sleep(2)
        assert letters(house) == "TED"


@pytest.mark.parametrize(
    ("finish", "event"),
    [
        (Finish.LENGTH, "ToolCallParseFailed"),
        (Finish.STOPPED, "ToolCallParseFailed"),
        (Finish.END, "UnrecognizedToolCallFormat"),
    ],
)
async def test_an_answer_cut_just_behind_the_mark_of_a_call_is_a_call_that_failed(
    finish: Finish, event: str
) -> None:
    async with open_house() as house:
        await house.start(1, with_tools())
        house.slots.on_turn([advance(1, "<tool_call>", finish)])
        assert [*events(house)[0]] == [event]
        assert letters(house)[-1] == "D"


async def test_a_section_that_ended_before_the_cut_was_not_cut() -> None:
    async with open_house() as house:
        await house.start(1, with_tools())
        house.slots.on_turn([advance(1, "<tool_call>?</tool_call> So", Finish.LENGTH)])
        assert [*events(house)[0]] == ["UnrecognizedToolCallFormat"]


async def test_a_stop_does_not_wait_for_checks(autojump_clock: MockClock) -> None:
    async with open_house(delay=10) as house:
        await house.start(1, with_tools())
        await trio.sleep(30)
        house.slots.on_turn([advance(1, CALL), advance(1, CALL)])
        await wait_all_tasks_blocked()
        house.slots.stop(1)
        house.slots.on_turn([advance(1, finish=Finish.STOPPED)])
        await trio.sleep(1)
        assert letters(house).replace("T", "") == "EED"
        assert "ToolCallValidationFailed" in str(house.steps[-1])


async def test_an_engine_that_fails_while_a_call_is_checked_ends_the_request_once(
    autojump_clock: MockClock,
) -> None:
    async with open_house(delay=1) as house:
        await house.start(1, with_tools())
        await trio.sleep(3)
        house.slots.on_turn([advance(1, CALL)])
        await wait_all_tasks_blocked()
        house.slots.fail(StreamError(502, "Engine stopped: SIGKILL"))
        await trio.sleep(2)
        assert letters(house) == "TX"


async def test_without_the_flag_calls_are_only_shown() -> None:
    async with open_house() as house:
        await house.start(1, attrs.evolve(with_tools(), parse_tool_calls=False))
        house.slots.on_turn([advance(1, CALL, Finish.END)])
        assert letters(house) == "TD"


async def test_tools_that_are_not_to_be_used_are_not_shown_to_the_template() -> None:
    async with open_house() as house:
        await house.start(1, with_tools(tool_choice="none"))
        assert house.renderer.rendered[0]["tools"] == []


@pytest.mark.scenario("TC-5")
async def test_a_tool_whose_parameters_are_no_schema_is_refused_by_name() -> None:
    parameters = ToolParameters(type="object", properties={"a": {"type": 123}})
    broken = attrs.evolve(ADD, function=attrs.evolve(ADD.function, parameters=parameters))
    async with open_house() as house:
        await house.start(1, attrs.evolve(with_tools(), tools=(broken,)))
        assert "add" in house.terminal(1)[1]["ToolSchemaInvalid"]


async def test_a_required_call_binds_the_answer() -> None:
    async with open_house() as house:
        await house.start(1, with_tools(tool_choice="required"))
        grammar = house.engine.commands[1].grammar
        assert grammar is not None
        assert "add" in grammar.gbnf
        assert grammar.begins_after == ()


async def test_a_required_call_that_no_grammar_can_say_names_the_tool() -> None:
    parameters = ToolParameters(type="object", properties={"a": {"type": "array", "uniqueItems": True}})
    odd = attrs.evolve(ADD, function=attrs.evolve(ADD.function, name="odd", parameters=parameters))
    async with open_house() as house:
        await house.start(1, attrs.evolve(with_tools(tool_choice="required"), tools=(ADD, odd)))
        assert house.terminal(1)[1] == {
            "GrammarSyntaxError": "`tool_choice` requires a call, and no grammar can be made of the "
            "parameters of tool 'odd': `uniqueItems` is not supported in a grammar"
        }


async def test_a_required_call_that_tags_cannot_carry_names_the_tool() -> None:
    parameters = ToolParameters(type="object", properties={"a": {"type": "string", "pattern": "^z$"}})
    odd = attrs.evolve(ADD, function=attrs.evolve(ADD.function, name="odd", parameters=parameters))
    coder = next(tool_format for tool_format in FORMATS if tool_format.name == "qwen3-coder")
    async with open_house(tool_format=coder) as house:
        await house.start(1, attrs.evolve(with_tools(tool_choice="required"), tools=(odd,)))
        assert house.terminal(1)[1] == {
            "GrammarSyntaxError": "`tool_choice` requires a call, and no grammar can be made of the "
            "parameters of tool 'odd': `pattern` of a string in a tag is not supported in a grammar"
        }


async def test_a_required_call_may_follow_thinking_that_the_prompt_began() -> None:
    template = "{{ messages[-1].content }}{% if add_generation_prompt %}<think>{% endif %}"
    async with open_house(template=template, markers=FAMILIES[0]) as house:
        await house.start(1, with_tools(tool_choice="required"))
        grammar = house.engine.commands[1].grammar
        assert grammar is not None
        assert grammar.begins_after == ("</think>",)


async def test_grammars_reach_the_engine_as_gbnf() -> None:
    async with open_house() as house:
        await house.start(1, attrs.evolve(RAW, grammar=GRAMMAR))
        await house.start(2, attrs.evolve(chat(), grammar=JsonSchemaGrammar('{"type": "object"}')))
        assert house.engine.commands[1].grammar == GrammarRule('root ::= "yes"', "root")
        converted = house.engine.commands[2].grammar
        assert converted is not None
        assert "root ::=" in converted.gbnf


async def test_sampling_changes_only_what_it_names() -> None:
    sampling = Sampling(temperature=0.0, seed=7, stop=("x",), logit_bias={"5": 1.0}, logprobs=True)
    async with open_house() as house:
        await house.start(1, attrs.evolve(RAW, sampling=sampling))
        await house.start(2)
        sampler = house.engine.commands[1].sampler
        assert sampler is not None
        assert (sampler.temperature, sampler.top_k) == (0.0, DEFAULT_PARAMETERS.top_k)
        assert (sampler.seed, sampler.stop, sampler.logit_bias) == (7, ("x",), {5: 1.0})
        assert sampler.top_logprobs == 0
        assert house.engine.commands[2].sampler is None


async def test_logprobs_follow_their_token() -> None:
    async with open_house() as house:
        await house.start(1)
        logprobs = ((" a", -0.5, ((" a", -0.5), (" b", -1.5))),)
        house.slots.on_turn([advance(1, " a", logprobs=logprobs)])
        assert letters(house) == "UE"
        top = [{"token": " a", "logprob": -0.5}, {"token": " b", "logprob": -1.5}]
        assert events(house) == [{"TokenLogprobs": [{"token": " a", "logprob": -0.5, "top": top}]}]


async def test_images_reach_the_engine_as_pixels_and_are_counted_apart() -> None:
    async with open_house(supports_images=True) as house:
        await house.start(1, chat(images=[PNG]))
        [picture] = house.engine.commands[1].pictures
        assert (picture.width, picture.height) == (1, 1)
        house.slots.on_turn([advance(1, finish=Finish.END, image_tokens=36)])
        assert house.terminal(1)[1]["Done"]["usage"]["input_image_tokens"] == 36


@pytest.mark.parametrize(
    ("finish", "terminal"),
    [
        (Finish.FAILED, {"SamplerError": "why"}),
        (Finish.GRAMMAR_INVALID, {"GrammarInitializationFailed": "why"}),
        (Finish.GRAMMAR_REJECTED, {"GrammarRejectedModelOutput": "why"}),
        (Finish.IMAGE_INVALID, {"ImageDecodingFailed": "why"}),
        (Finish.IMAGE_TOO_LARGE, {"ImageExceedsBatchSize": {"image_tokens": 3000, "n_batch": 2048}}),
    ],
)
async def test_every_failure_of_the_engine_has_its_terminal(finish: Finish, terminal: Any) -> None:
    async with open_house() as house:
        await house.start(1)
        house.slots.on_turn([advance(1, finish=finish, failure="why", image_tokens=3000)])
        assert house.terminal(1) == ("D", terminal)
