"""Which grammars llama.cpp is given: it would crash, or compute without end, on the others."""

import pytest

from paddler.engine.gbnf import GrammarUnfit, read_gbnf


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "yes" | "no"',
        'root ::= [yY] [^a-z\\]] . "\\x41\\u00e9\\U0001F600\\"\\\\"  # a comment',
        'root ::= (\n  "a"\n  | "b" # here too\n)\n\n# and here\nother-1 ::= "c"',
        'root ::= "a"* "b"+ "c"? "d"{3} "e"{2,} "f"{1,4} "g"{ 0 , 2 }',
        "root ::= <[12]> !<[13]> <think> !<think>",
        'root ::= "" [] ("a" | )',
        'root ::= ("a"? "b"?)*',
        'root ::= "[" (root ("," root)*)? "]"',
        'root ::= "a" root | ""',
        'root ::= "a"\r\nb ::= "b"\r\n',
        "root ::= " + "(" * 64 + '"a"' + ")" * 64,
        'root ::= "é" "\n"',
    ],
)
def test_grammars_of_llama_are_taken(grammar: str) -> None:
    read_gbnf(grammar, "root")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("# only a comment", "no rule 'root'"),
        ('root ::= "a\0b"', "NUL"),
        ('root ::= "\ud800"', "no text"),
        ("root ::= " + '"a" ' * 20_000, "bytes, more than 65536"),
        ('root ::= "yes', "line 1: expected the end of a string"),
        ('root ::= "\\q"', "the end of a string"),
        ("root ::= [a-z", "the end of a character class"),
        ('\nroot = "a"', 'line 2: expected "::="'),
        ("root ::= * ", "something to repeat"),
        ('root ::= "a"{,3}', "a repetition"),
        ('root ::= "a"{3,2}', "at least 3 and at most 2"),
        ('root ::= "a"{3000}', "more than 2000 times"),
        ('root ::= ("a"', 'expected "\\)"'),
        ('root ::= "a")', "expected a new line or the end"),
        ("root ::= <", "a token"),
        ("root ::= other", "does not define rule 'other'"),
        ('other ::= "a"', "no rule 'root'"),
        ("root ::= " + "(" * 65 + '"a"' + ")" * 65, "deeper than 64"),
        ("root ::= " + "(" * 20_000, "deeper than 64"),
        ("root ::= root", "no end"),
        ('root ::= "a" root', "no end"),
        ('root ::= "a" | "b"\nx ::= ' + " ".join(["y{0,2000}"] * 30) + '\ny ::= "b"', "50000 places"),
        ('root ::= ((("a"{2000}){2000}){2000}){2000}', "50000 places"),
        ('root ::= "a"' + "?" * 60_000, "something to repeat"),
    ],
)
def test_others_are_refused_with_a_reason(grammar: str, reason: str) -> None:
    with pytest.raises(GrammarUnfit, match=f"^grammar .*{reason}"):
        read_gbnf(grammar, "root")


def test_the_root_may_have_any_name_that_exists() -> None:
    read_gbnf('start ::= "a"', "start")
    with pytest.raises(GrammarUnfit, match="no rule 'st'"):
        read_gbnf('start ::= "a"', "st")
