"""Where an answer may be in its grammar: what is kept of it, and what it costs."""

import gc
import time
import weakref

import pytest

from paddler.engine.gbnf import read_gbnf
from paddler.engine.readings import Reading, Readings
from paddler.engine.sampling import GenerationRefused


def follow(readings: Readings, reading: Reading, text: str) -> Reading:
    for character in text:
        after = readings.after(reading, character)
        assert after is not None
        reading = after
    return reading


def test_an_answer_that_comes_back_finds_its_reading() -> None:
    readings = Readings()
    in_string = follow(readings, readings.begin(read_gbnf('root ::= "<" [^>]* ">"', "root")), "<a")
    assert follow(readings, in_string, "bcd") is in_string
    assert follow(readings, in_string, ">").complete


def test_old_readings_of_a_wide_grammar_leave_memory() -> None:
    readings = Readings()
    first = readings.begin(read_gbnf("root ::= ([a-z]?){400}", "root"))
    gone = weakref.ref(first)
    last = follow(readings, first, "a" * 250)
    del first
    gc.collect()
    assert gone() is None
    assert last.complete


def test_characters_tried_in_vain_are_part_of_what_is_kept() -> None:
    readings = Readings()
    reading = readings.begin(read_gbnf('root ::= "a"{1000}', "root"))
    gone = weakref.ref(reading)
    for _ in range(40):
        for code in range(0x4E00, 0x4E00 + 10_000):
            assert readings.after(reading, chr(code)) is None
        reading = follow(readings, reading, "a")
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("grammar", ["root ::= (" + ".|" * 30_000 + ".)+", "root ::= ([a-z]?){2000}"])
def test_what_takes_too_many_steps_is_refused(grammar: str) -> None:
    start = read_gbnf(grammar, "root")
    with pytest.raises(GenerationRefused, match="too complex"):
        follow(Readings(), Readings().begin(start), "a" * 2000)


def test_many_calls_before_a_long_way_to_the_end_take_no_time() -> None:
    start = read_gbnf("a ::= [a-z]\nroot ::= (" + "a|" * 9000 + "a)" + '""' * 9000, "root")
    began = time.perf_counter()
    follow(Readings(), Readings().begin(start), "a")
    assert time.perf_counter() - began < 2
