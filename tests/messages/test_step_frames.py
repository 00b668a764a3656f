"""The fast form of the step frame carries any text, and refuses what is not of its form."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paddler.errors import RemoteProtocolError
from paddler.messages.agent_socket import LETTERS, decode_step, encode_step, escape_text

PIECES = st.lists(
    st.tuples(st.integers(0, 2**63), st.sampled_from(sorted(LETTERS)), st.text().map(escape_text)),
    min_size=1,
    max_size=8,
)


@given(PIECES)
def test_pieces_survive_in_order(pieces: list[tuple[int, str, str]]) -> None:
    assert decode_step(encode_step(pieces)) == pieces


@given(st.text())
@example('a\nb\r\n"quoted" \\ back \u2028 \x00 \x85')
@example("S\n1 C x")
@example("🦙 zero\u200dwidth")
def test_text_survives_and_stays_on_its_line(text: str) -> None:
    frame = encode_step([(7, "C", escape_text(text)), (8, "D", "{}")])
    assert frame.count("\n") == 2
    first, second = decode_step(frame)
    assert json.loads(first[2]) == text
    assert second == (8, "D", "{}")


def test_the_frame_is_as_documented() -> None:
    assert encode_step([(1, "C", '"Hi"'), (2, "B", "null")]) == 'S\n1 C "Hi"\n2 B null'


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        ('S\n1 Q "x"', "unknown letter 'Q' in a step frame"),
        ("S\n1 C", "malformed line in a step frame"),
        ('S\nfirst C "x"', "malformed line in a step frame"),
        ('S\n1 C "x"\n', "malformed line in a step frame"),
        ("S\n\n", "malformed line in a step frame"),
    ],
)
def test_what_is_not_of_the_form_is_refused(frame: str, sentence: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"^{sentence}$"):
        decode_step(frame)
