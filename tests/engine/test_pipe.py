"""Frames of the engine's pipe."""

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddler.config import KvLayout
from paddler.engine.pipe import (
    COMMANDS,
    REPORTS,
    Advance,
    Cancel,
    Capacity,
    Command,
    ContextRefused,
    Embed,
    Embedded,
    EngineSettings,
    Finish,
    FrameReader,
    Generate,
    Log,
    ModelDescription,
    ModelRefused,
    OpenContext,
    Progress,
    Report,
    Turn,
    pack,
)
from paddler.errors import RemoteProtocolError
from paddler.messages.inference import RmsNorm
from paddler.messages.state import DEFAULT_PARAMETERS, KvCacheDtype
from paddler.processes.frames import pack_frame

SENT: list[Command] = [
    EngineSettings(
        model_path="/models/ä.gguf",
        slots=4,
        parameters=attrs.evolve(DEFAULT_PARAMETERS, v_cache_dtype=KvCacheDtype.IQ4_NL, n_batch=2**64 - 1),
        kv_layout=KvLayout.PER_SLOT,
        threads=2,
        exact=True,
    ),
    OpenContext(),
    Generate(7, 'a\0b "é" \U0001f980', -(2**31)),
    Embed(8, ("a", "é\0"), "L2"),
    Embed(9, (), RmsNorm(0.5)),
    Cancel(7),
]
TOLD: list[Report] = [
    Progress(3, 9),
    ModelRefused("no"),
    ModelDescription(
        metadata={"general.name": "Ünïcode"},
        chat_template=None,
        bos_text="<s>",
        eos_text="</s>",
        nl_text="\n",
        control_tokens={1: "<s>", 2: "</s>"},
        size_bytes=10,
        n_params=11,
        n_vocab=12,
        n_ctx_train=13,
    ),
    ContextRefused("no"),
    Capacity(
        layout=KvLayout.SHARED,
        reason="because",
        slots=4,
        cells_per_slot=256,
        context_bytes=1,
        warm_up_seconds=0.5,
    ),
    Turn((Advance(1, (5, 6), "hé", None, "", 3, 0), Advance(2, (), "", Finish.FAILED, "why", 0, 0))),
    Turn(()),
    Embedded(8, ((0, "[0.5,-1e-05]"), (1, "[1]")), ((2, 401, 64),), ((3, "is empty"),), None),
    Embedded(9, (), (), (), Finish.STOPPED),
    Log(3, "careful"),
]


@given(st.lists(st.integers(1, 50), max_size=200))
def test_messages_survive_any_chunking(sizes: list[int]) -> None:
    assert _in_chunks(FrameReader(COMMANDS), SENT, sizes) == SENT
    assert _in_chunks(FrameReader(REPORTS), TOLD, sizes) == TOLD


def _in_chunks(reader: FrameReader[Any], messages: Sequence[Any], sizes: list[int]) -> list[Any]:
    data = b"".join(pack(message) for message in messages)
    received = []
    for size in [*sizes, len(data)]:
        received += reader.feed(data[:size])
        data = data[size:]
    return received


def test_a_lone_surrogate_becomes_a_question_mark() -> None:
    [message] = FrameReader(COMMANDS).feed(pack(Generate(1, "a\ud800b", 1)))
    assert message == Generate(1, "a?b", 1)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"[1,2]", b'["Turn",[1]]', b'["Turn",[[1,[2],"",true,"",1,0]]]', b"\xff\xfe",
     b'"ab"', b'[["Turn"],[]]', b'["Turn",{}]', b'["Turn","abcdefg"]', b'["Turn",["abcdefg"]]',
     b'["Turn",null]', b'["Turn",[[1,[2],"",null,"",1]]]', b'["Turn",[[[],[2],"",null,"",1,0]]]',
     b'["Turn",[[1,[2.5],"",null,"",1,0]]]', b'["Turn",[[1,2,"",null,"",1,0]]]',
     b'["Turn",[[1,[2],null,null,"",1,0]]]', b'["Turn",[[1,[2],"",null,"",true,0]]]',
     b'["Turn",[[1,[2],"","no end","",1,0]]]', b'["Turn",[[1,[2],"\\ud800",null,"",1,0]]]',
     b'["Progress",{"done":1,"total":"9"}]', b'["Log",{"level":1,"text":[]}]',
     b'["ModelRefused",{"reason":0}]', b'["Progress",{"done":1}]', b'["Generate",{}]', b"[" * 100_000,
     b'["Capacity",{}]', b'["Nothing",{}]', b'["Embedded",[]]',
     b'["Embedded",{"generation":1,"vectors":[],"oversized":[],"failed":[[0,"\\ud800"]],"finish":null}]'],
)  # fmt: skip
def test_rubbish_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        FrameReader(REPORTS).feed(len(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", "8"),
        ("vectors", [[0, "[1]\n9 D {}"]]),
        ("vectors", [[0, '"text"']]),
        ("vectors", [["0", "[1]"]]),
        ("vectors", [0]),
        ("oversized", [[1, 2]]),
        ("oversized", None),
        ("failed", [[0, None]]),
        ("finish", "no end"),
        ("more", 1),
    ],
)
def test_rubbish_for_vectors_is_a_protocol_error(field: str, value: object) -> None:
    content = {"generation": 8, "vectors": [], "oversized": [], "failed": [], "finish": None, field: value}
    with pytest.raises(RemoteProtocolError):
        FrameReader(REPORTS).feed(pack_frame(["Embedded", content]))


def test_a_frame_above_the_limit_is_a_protocol_error_before_it_is_read() -> None:
    reader = FrameReader(REPORTS, max_frame_bytes=1000)
    with pytest.raises(RemoteProtocolError, match="1001 bytes"):
        reader.feed((1001).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("report", "field", "value"),
    [
        (TOLD[2], "metadata", {"general.name": 1}),
        (TOLD[2], "metadata", []),
        (TOLD[2], "chat_template", 5),
        (TOLD[2], "control_tokens", {"1": None}),
        (TOLD[2], "n_ctx_train", "13"),
        (TOLD[4], "slots", 4.0),
        (TOLD[4], "warm_up_seconds", None),
        (TOLD[4], "offloaded", 0),
    ],
)
def test_a_description_with_a_field_of_another_type_is_a_protocol_error(
    report: Report, field: str, value: object
) -> None:
    content = attrs.asdict(report) | {field: value}
    with pytest.raises(RemoteProtocolError, match=field):
        FrameReader(REPORTS).feed(pack_frame([type(report).__name__, content]))


def test_what_a_refusal_quotes_is_bounded() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        FrameReader(REPORTS).feed(pack_frame(["x" * 10_000, {}]))
    assert len(str(caught.value)) < 400
