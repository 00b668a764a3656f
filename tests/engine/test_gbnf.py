"""Which grammars are taken: those of llama.cpp, but none that it would crash, or compute without end, on."""

import pytest

from paddler.engine.gbnf import GrammarUnfit, State, holds_any, read_gbnf


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
        ("root ::= (" + ".|" * 30_000 + ".){2000}", "200000 steps"),
        ("root ::= (" + "x|" * 30_000 + 'x){2000}\nx ::= "x"', "200000 steps"),
        ("root ::= [^\\x00-\\U0010FFFF] x", "does not define"),
        ('root ::= "\\uD800"', "surrogate pair"),
        ('root ::= "a\\U00110000"', "U00110000, which is no character"),
        ("root ::= [a-\\UFFFFFFFF]", "UFFFFFFFF, which is no character"),
        ("root ::= [xz-a]", "empty range 'z-a'"),
    ],
)
def test_others_are_refused_with_a_reason(grammar: str, reason: str) -> None:
    with pytest.raises(GrammarUnfit, match=f"^grammar .*{reason}"):
        read_gbnf(grammar, "root")


def test_the_root_may_have_any_name_that_exists() -> None:
    read_gbnf('start ::= "a"', "start")
    with pytest.raises(GrammarUnfit, match="no rule 'st'"):
        read_gbnf('start ::= "a"', "st")


@pytest.mark.parametrize(
    ("written", "inside", "outside"),
    [
        ("[a-cx]", "abcx", "d-"),
        ("[^a-cx]", "d-é\U0010ffff", "abcx"),
        ("[c-da-c]", "abcd", "e"),
        ("[^\\x00-\\U0010FFFF]", "", "a"),
    ],
)
def test_character_classes_hold_what_they_say(written: str, inside: str, outside: str) -> None:
    [(ranges, _)] = read_gbnf(f'root ::= {written} | ""', "root").characters
    assert all(holds_any(ranges, ord(letter), ord(letter)) for letter in inside)
    assert not any(holds_any(ranges, ord(letter), ord(letter)) for letter in outside)


def test_a_range_is_held_where_any_of_it_is() -> None:
    ranges = ((10, 20), (40, 50))
    assert [holds_any(ranges, low, low + 9) for low in (0, 5, 12, 21, 31, 41, 51)] == [
        False, True, True, False, True, True, False,
    ]  # fmt: skip


def test_only_the_end_may_follow_where_nothing_else_does() -> None:
    start = read_gbnf('root ::= "a" "" ("" "") "" | "b" ("")*', "root")
    [(_, behind_a), (_, behind_b)] = start.characters
    assert (start.only_ends, behind_a.only_ends, behind_b.only_ends) == (False, True, False)
    assert State(is_end=True).only_ends
