"""Tokens of short turns travel together; what begins or ends does not wait."""

import attrs

from paddler.engine.pipe import Advance, Finish, Turn
from paddler.engine.turn_sender import HOLD, TurnSender


@attrs.define
class Told:
    now: float = 0.0
    frames: list[list[int]] = attrs.Factory(list)

    def send(self, turn: Turn) -> None:
        self.frames.append([advance.tokens[0] for advance in turn.advances])


def token(number: int, finish: Finish | None = None, *, generation: int = 1) -> Advance:
    return Advance(generation, (number,), "a", finish, "", 1, 0)


def sender_of(told: Told) -> TurnSender:
    return TurnSender(told.send, longest_hold=HOLD, clock=lambda: told.now)


def test_the_first_token_goes_at_once_and_later_ones_together() -> None:
    told = Told()
    sender = sender_of(told)
    for number in range(10):
        told.now += HOLD / 4.5
        sender.take([token(number)], only_decodes=True)
    assert told.frames == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_an_end_takes_what_was_kept_with_it() -> None:
    told = Told()
    sender = sender_of(told)
    for number in range(3):
        sender.take([token(number)], only_decodes=True)
    sender.take([token(3, Finish.END)], only_decodes=False)
    assert told.frames == [[0], [1, 2, 3]]


def test_tokens_of_one_generation_stand_together_in_order() -> None:
    told = Told()
    sender = sender_of(told)
    sender.take([], only_decodes=True)
    for number in range(3):
        sender.take([token(number), token(10 + number, generation=2)], only_decodes=True)
    sender.flush()
    assert told.frames == [[], [0, 1, 2, 10, 11, 12]]


def test_the_first_token_of_a_request_that_comes_later_goes_at_once() -> None:
    told = Told()
    sender = sender_of(told)
    for number in range(2):
        sender.take([token(number)], only_decodes=True)
    sender.flush()  # a command came; its prompt is short, so that after the turn all generate
    sender.take([token(2), token(10, generation=2)], only_decodes=True)
    sender.take([token(3), token(11, generation=2)], only_decodes=True)
    assert told.frames == [[0], [1], [2, 10]]


def test_nothing_waits_for_a_prompt() -> None:
    told = Told()
    sender = sender_of(told)
    sender.take([token(0)], only_decodes=True)
    sender.take([token(1)], only_decodes=True)
    sender.flush()
    sender.take([token(2)], only_decodes=False)
    sender.take([token(3)], only_decodes=True)
    assert told.frames == [[0], [1], [2], [3]]


def test_turns_of_which_only_one_fits_are_told_one_by_one() -> None:
    told = Told()
    sender = sender_of(told)
    for number in range(3):
        told.now += 0.6 * HOLD
        sender.take([token(number)], only_decodes=True)
    assert told.frames == [[0], [1], [2]]


def test_a_turn_without_tokens_is_a_sign_of_life() -> None:
    told = Told()
    sender = sender_of(told)
    sender.take([], only_decodes=False)
    sender.flush()
    assert told.frames == [[]]
