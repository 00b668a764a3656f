"""Messages are what wsproto makes of the same bytes, however they are cut."""

from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping, Pong, TextMessage

from paddler.http.text_frames import TextFrames

TEXTS = st.text(max_size=20) | st.sampled_from(["x" * 125, "x" * 126, "ü" * 500])
EVENTS = st.one_of(
    TEXTS.map(lambda text: TextMessage(data=text)),
    TEXTS.map(lambda text: TextMessage(data=text, message_finished=False)),
    st.binary(max_size=9).map(lambda data: BytesMessage(data=data)),
    st.binary(max_size=9).map(lambda data: Ping(payload=data)),
    st.binary(max_size=9).map(lambda data: Pong(payload=data)),
    st.sampled_from([b"\x81", b"\x81\xff", b"\x81\x82abcd\xff\xff", b"\x81\x01x", b"\xf1\x80abcd"]),
)


def bytes_of(events: list[Event | bytes]) -> bytes:
    client = Connection(ConnectionType.CLIENT)
    sent = b""
    kind: type[Message[Any]] | None = None  # of the message that is sent in fragments
    for event in events:
        if isinstance(event, bytes):
            return sent + event
        if isinstance(event, Message):
            if kind not in (None, type(event)):
                continue
            kind = None if event.message_finished else type(event)
        sent += client.send(event)
    return sent


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


class Reading:
    """What a server heard: texts, messages of bytes, pings, and the end."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self._server = Connection(ConnectionType.SERVER)
        self._text = ""
        self._bytes = b""
        self._is_closed = False

    def message(self, text: str) -> None:
        if not self._is_closed:
            self.heard.append(text)

    def receive(self, data: bytes) -> None:
        if self._is_closed:
            return
        self._server.receive_data(data)
        for event in self._server.events():
            match event:
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        self.heard.append(self._text)
                        self._text = ""
                case CloseConnection():
                    self.heard.append(event.code)
                    self._is_closed = True
                    return
                case BytesMessage():
                    self._bytes += event.data
                    if event.message_finished:
                        self.heard.append(self._bytes)
                        self._bytes = b""
                case _:
                    self.heard.append(type(event))


@example([TextMessage(data="x" * 70_000), TextMessage(data="y")], [100, 69_000])
@example([TextMessage(data=""), TextMessage(data="0"), BytesMessage(data=b"ab")], [15])
@given(st.lists(EVENTS, max_size=6), st.lists(st.integers(0, 10**6), max_size=6))
def test_the_same_is_heard_as_through_the_library_alone(events: list[Event | bytes], cuts: list[int]) -> None:
    data = bytes_of(events)
    library, ours = Reading(), Reading()
    library.receive(data)
    frames = TextFrames()
    for piece in pieces_of(data, cuts):
        for part in frames.feed(piece):
            ours.message(part) if isinstance(part, str) else ours.receive(part)
    assert ours.heard == library.heard


def test_a_short_message_does_not_go_through_the_library() -> None:
    data = bytes_of([TextMessage(data='S\n1 C "x"')])
    assert list(TextFrames().feed(data)) == ['S\n1 C "x"']
    assert list(TextFrames().feed(data * 3)) == ['S\n1 C "x"'] * 3
