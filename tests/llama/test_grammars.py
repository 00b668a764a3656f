"""Grammars on llama.cpp: what they let through, how they end, and what they must not end."""

import ctypes
import json
import re
from typing import Any

import jsonschema
import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt
import pytest
import trio

from paddler.config import bundled_model_path
from paddler.engine import llama
from paddler.engine.grammars import Grammars
from paddler.engine.json_schema_grammar import gbnf_of_schema
from paddler.engine.pipe import Finish, GrammarRule
from paddler.engine.sampling import Sampler, settings_of
from paddler.messages.state import DETERMINISTIC_PARAMETERS
from tests.llama.engines import chat, running

pytestmark = pytest.mark.slow

YES_OR_NO = GrammarRule('root ::= "yes" | "no"', "root")
ANSWER = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
THINKING = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
HELLO = "Hello! How can I help you today?"


DOUBLING = [f's{i} ::= "a" s{i + 1} "x" | "a" s{i + 1} "y"' for i in range(40)]


def schema_rule(schema: Any) -> GrammarRule:
    return GrammarRule(gbnf_of_schema(json.dumps(schema)), "root")


# In a process of their own, as they are served.


async def test_any_case_of_yes_or_no_and_nothing_else() -> None:
    any_case = GrammarRule("root ::= [yY] [eE] [sS] | [nN] [oO]", "root")
    async with running() as generations:
        free = await generations.ask(chat("Is Paris the capital of France?"), max_tokens=10, grammar=any_case)
        raw = await generations.ask("Is it raining? ", max_tokens=10, grammar=YES_OR_NO)
    assert free.text.lower() in ("yes", "no")
    assert raw.text in ("yes", "no")
    assert (free.finish, raw.finish) == (Finish.END, Finish.END)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}])
async def test_a_schema_gives_json_with_the_required_key(sampling: dict[str, Any]) -> None:
    async with running(**sampling) as generations:
        for prompt in (chat("Answer in JSON with name and age: Ada is 36 years old."), "Say it in JSON: "):
            answer = await generations.ask(prompt, max_tokens=200, grammar=schema_rule(ANSWER))
            if answer.finish is Finish.END:
                assert isinstance(json.loads(answer.text)["answer"], str)
            else:  # drawn at random, a string may go on and on
                assert answer.finish is Finish.LENGTH
                assert answer.text.startswith("{")


async def test_the_model_keeps_its_own_words_where_the_grammar_allows_them() -> None:
    own = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    question = chat("Answer in JSON with name and age: Ada is 36 years old.")
    async with running() as generations:
        answer = await generations.ask(question, grammar=schema_rule(own))
    assert answer.text == '{"name": "Ada", "age": 36}'


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (GrammarRule('root ::= "yes', "root"), "the end of a string"),
        (GrammarRule('root ::= "yes"', "start"), "no rule 'start'"),
        (GrammarRule("", "root"), "empty"),
        (GrammarRule("root ::= " + "(" * 20_000, "root"), "deeper than 64"),
        (GrammarRule('root ::= ((("a"{2000}){2000}){2000}){2000}', "root"), "50000 places"),
        (GrammarRule("root ::= (" + ".|" * 30_000 + ".){2000}", "root"), "200000 steps"),
        (GrammarRule("root ::= (" + ".|" * 30_000 + ".)+", "root"), "too complex"),
    ],
)
async def test_an_unfit_grammar_is_refused_and_others_are_not_disturbed(
    rule: GrammarRule, reason: str
) -> None:
    async with running() as generations:
        other = generations.start(chat("Hello"))
        refused = await generations.ask(chat("Hello"), grammar=rule)
        assert (refused.finish, refused.tokens) == (Finish.GRAMMAR_INVALID, ())
        assert re.match(f"grammar .*{reason}", refused.failure)
        assert (await generations.answer(other)).text == HELLO


@pytest.mark.parametrize(
    "rule",
    [
        GrammarRule("root ::= s0\n" + "\n".join(DOUBLING) + '\ns40 ::= "z"', "root"),
        GrammarRule('root ::= n root "x" | "y"\nn ::= m\nm ::= "a" |', "root"),
        GrammarRule("root ::= " + " | ".join(['"a"'] * 10_000), "root"),
        schema_rule({"type": "string", "pattern": "^(a?){500}a{500}$"}),
        schema_rule({"type": "string", "pattern": "^((a*)*)*(a|a)*b$"}),
    ],
)  # fmt: skip
async def test_grammars_that_can_be_read_in_many_ways_take_no_time(rule: GrammarRule) -> None:
    async with running() as generations:
        other = generations.start(chat("Count to 40."))
        with trio.fail_after(2):
            bound = await generations.ask(chat("Hello"), max_tokens=60, grammar=rule)
        assert bound.finish in (Finish.END, Finish.LENGTH)
        assert (await generations.answer(other)).finish is Finish.END


async def test_a_grammar_that_takes_too_much_work_ends_its_own_request() -> None:
    rule = GrammarRule('root ::= (([a-z ]?){2000} "#")+', "root")
    async with running() as generations:
        other = generations.start(chat("Count to 40."))
        answer = await generations.ask(chat("Hello"), max_tokens=900, grammar=rule)
        assert (answer.finish, answer.failure[:22]) == (Finish.GRAMMAR_INVALID, "grammar is too complex")
        assert (await generations.answer(other)).finish is Finish.END


async def test_a_grammar_of_tokens_that_do_not_exist_rejects_the_model() -> None:
    async with running() as generations:
        answer = await generations.ask(chat("Hello"), grammar=GrammarRule('root ::= "a" <[999999]>', "root"))
        assert (answer.text, answer.finish) == ("a", Finish.GRAMMAR_REJECTED)
        assert answer.failure.startswith("grammar")
        assert (await generations.ask(chat("Hello"))).text == HELLO


async def test_a_grammar_begins_behind_its_marker() -> None:
    rule = GrammarRule('root ::= "\\n"* ("Yes" | "No")', "root", begins_after=("[never]", "</think>"))
    async with running() as generations:
        free = await generations.ask(THINKING)
        bound = await generations.ask(THINKING, grammar=rule)
    thought, _, answer = bound.text.partition("</think>")
    assert free.text.startswith(thought)
    assert answer.strip("\n") in ("Yes", "No")
    assert bound.finish is Finish.END


async def test_text_behind_a_marker_in_the_same_token_is_bound_already() -> None:
    """The marker ends within the token " greets"; only what goes on as the grammar says may end it."""
    async with running() as generations:
        fits = await generations.ask(THINKING, grammar=GrammarRule('root ::= "ets us" "."', "root", ("gre",)))
        other = await generations.ask(THINKING, grammar=GrammarRule('root ::= "en" "."', "root", ("gre",)))
    assert fits.text.endswith("The user greets us.")
    assert "greets" not in other.text


async def test_control_tokens_fulfil_nothing_unless_the_grammar_names_them() -> None:
    anything = GrammarRule("root ::= [a-z<>_|]{12}", "root")
    named = GrammarRule('root ::= "<|im_start|>" "a"', "root")
    async with running() as generations:
        assert len((await generations.ask("<|im_end|>\n", grammar=anything)).text) == 12
        answer = await generations.ask("<|im_end|>\n", grammar=named)
    assert (answer.text, answer.tokens[0]) == ("a", 3638)


async def test_a_grammar_may_bring_its_length_and_be_cancelled() -> None:
    endless = GrammarRule("root ::= [a-z ]{400}", "root")
    async with running() as generations:
        answer = await generations.ask(chat("Hello"), max_tokens=5, grammar=endless)
        assert (len(answer.tokens), answer.finish) == (5, Finish.LENGTH)
        cancelled = generations.start(
            "a b a b a b", max_tokens=900, grammar=GrammarRule('root ::= "a b "*', "root")
        )
        await generations.tokens_of(cancelled, 3)
        generations.engine.cancel(cancelled)
        assert (await generations.answer(cancelled)).finish is Finish.STOPPED


# In this process, with logits of our own: any way through a grammar, not only the model's.


class Vocabulary:
    """The bundled model's tokens, and grammars of them."""

    def __init__(self) -> None:
        self.log = llama.LlamaLog(lambda _: None)
        model = llama.load_model(
            str(bundled_model_path()), n_gpu_layers=0, on_progress=lambda _: True, log=self.log
        )
        self.description = llama.describe(model)
        self.pieces = model.pieces
        self.closing = [
            token
            for token in range(self.description.n_vocab)
            if model.pieces[token] in (b'"', b"}", b"]", b'"}', b'"]')
        ]
        self.end_tokens = model.end_tokens
        self.handle = model.vocabulary
        self.grammars = Grammars(
            n_vocab=self.description.n_vocab,
            pieces=model.pieces,
            control_tokens=self.description.control_tokens,
            end_tokens=model.end_tokens,
        )

    def is_text(self, token: int) -> bool:
        piece = self.pieces[token]
        return token in self.end_tokens or (
            bool(piece.strip(b"\0")) and piece.decode(errors="ignore").encode() == piece
        )

    def walk(self, rule: GrammarRule, random: np.random.Generator, *, most: int = 150) -> str | None:
        """Return a text that the grammar lets through, or None if it has no end yet."""
        sampler = Sampler(
            settings_of(DETERMINISTIC_PARAMETERS),
            np.array([], np.int32),
            n_vocab=self.description.n_vocab,
            end_tokens=self.end_tokens,
            grammar=self.grammars.open(rule),
        )
        text = b""
        for _ in range(most):
            row = random.normal(scale=3, size=self.description.n_vocab).astype(np.float32)
            row[list(self.end_tokens)] += 12
            row[self.closing] += 8
            token = sampler.pick(row)
            if token in self.end_tokens:
                return text.decode()
            text += self.pieces[token]
        return None


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


SCHEMAS: list[dict[str, Any]] = [
    ANSWER,
    {"type": "object", "required": ["b"], "additionalProperties": False,
     "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"enum": [1, "x", None]}}},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "number"}}},
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 3}},
    {"type": "array", "minItems": 2, "maxItems": 4,
     "items": {"type": "integer", "minimum": -20, "maximum": 130}},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number", "minimum": 0}], "items": False},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[^a-f]\\w\\s.(\\d{3}|\"+x?)\\\\$"},
    {"type": "string", "pattern": "b.?c"},
    {"type": "string", "format": "date-time"},
    {"type": ["integer", "string"], "minLength": 3, "minimum": 10},
    {"anyOf": [{"type": "null"}, {"type": "string", "const": "ü\"\\\n"}]},
    {"type": "object", "properties": {"kind": {}}, "anyOf": [{"required": ["kind"]}, {"required": ["name"]}]},
    {"allOf": [{"$ref": "#/$defs/named"}, {"properties": {"age": {"type": "integer"}}, "required": ["age"]}],
     "$defs": {"named": {"properties": {"name": {"type": "string"}}, "required": ["name"]}}},
    {"$ref": "#/$defs/tree",
     "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}}}},
    {},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_whatever_a_schema_lets_through_fulfils_it(vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    validator = jsonschema.Draft202012Validator(schema)
    texts = [vocabulary.walk(schema_rule(schema), random) for _ in range(6)]
    ended = {text for text in texts if text is not None}
    assert ended
    for text in ended:
        validator.validate(json.loads(text))


LLAMAS = {
    "words": 'root ::= "yes" | "no" | "yesterday" ("s" | "\\x21")?',
    "lists": 'root ::= "[" item ("," item){0,3} "]"\nitem ::= [^\\]\\[,]{1,5} | root',
    "characters": 'root ::= ([é-ü] | "→" | [^a-zé] "b"){2,5} "\\n"',
    "right recursion": 'root ::= "a" root | [0-9]+ "."\n',
    "ambiguous": 'root ::= ("a" | "ab" | "b" | [a-c] " ")+ "."',
    "anything": "root ::= .{3,9}",
    "json": gbnf_of_schema("{}"),
}


@pytest.mark.parametrize("gbnf", LLAMAS.values(), ids=LLAMAS)
def test_the_tokens_allowed_are_those_that_llama_allows(vocabulary: Vocabulary, gbnf: str) -> None:
    """At every step of a random way through the grammar; llama.cpp takes bytes that are no text, too."""
    random = np.random.default_rng(2)
    texts = np.array([token for token in range(vocabulary.description.n_vocab) if vocabulary.is_text(token)])
    for _ in range(6):
        grammar = vocabulary.grammars.open(GrammarRule(gbnf, "root"))
        theirs = LlamaGrammar(vocabulary, gbnf)
        for _ in range(25):
            allowed = grammar.allowed(texts)
            assert allowed.tolist() == np.intersect1d(theirs.allowed(), texts).tolist()
            token = int(random.choice(allowed))
            if token in vocabulary.end_tokens:
                break
            assert grammar.allows(token)
            grammar.accept(token)
            theirs.accept(token)
        theirs.close()


def test_tokens_by_their_ids_and_their_texts(vocabulary: Vocabulary) -> None:
    rule = GrammarRule('root ::= "a" <[500]> !<[500]> <think> ("é" | "ab")', "root")
    grammar = vocabulary.grammars.open(rule)
    every = np.arange(vocabulary.description.n_vocab)
    token_of = {vocabulary.pieces[token]: token for token in every.tolist()}
    think = token_of[b"<think>"]
    for token, allowed in (
        (token_of[b"a"], [token_of[b"a"]]),
        (500, [500]),
        (501, [token for token in every.tolist() if token != 500 and token not in vocabulary.end_tokens]),
        (think, [think]),
        (token_of[b"\xc3"], [token_of[b"a"], token_of[b"\xc3"], token_of[b"ab"]]),
        (token_of[b"\xa9"], [token_of[b"\xa9"]]),
    ):
        assert sorted(grammar.allowed(every).tolist()) == sorted(allowed)
        grammar.accept(token)
    assert grammar.allowed(every).tolist() == sorted(vocabulary.end_tokens)


class LlamaGrammar:
    """llama.cpp's own."""

    def __init__(self, vocabulary: Vocabulary, gbnf: str) -> None:
        kinds = [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
        self._data = np.zeros(vocabulary.description.n_vocab, kinds)
        self._data["id"] = np.arange(len(self._data))
        self._sampler = c.llama_sampler_init_grammar(vocabulary.handle, gbnf.encode(), b"root")

    def allowed(self) -> npt.NDArray[np.intp]:
        self._data["logit"] = 0
        pointer = self._data.ctypes.data_as(ctypes.POINTER(c.llama_token_data))
        array = c.llama_token_data_array(pointer, len(self._data), -1, False)
        c.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return np.flatnonzero(np.isfinite(self._data["logit"]))

    def accept(self, token: int) -> None:
        c.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        c.llama_sampler_free(self._sampler)
