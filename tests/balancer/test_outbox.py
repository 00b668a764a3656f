import trio
from hypothesis import given
from hypothesis import strategies as st

from paddler.balancer.outbox import MAX_FRAME_BYTES, MAX_REQUEST_BYTES, Outbox, Sent
from paddler.messages.agent_socket import PART_CHARACTERS, Part
from tests.fakes.scripted_agent import decode_balancer_frame


def take_part(outbox: Outbox) -> Part:
    frame = outbox.take()
    assert frame is not None
    part = decode_balancer_frame(frame)
    assert isinstance(part, Part)
    return part


def test_short_requests_travel_whole_and_in_order() -> None:
    outbox = Outbox()
    outbox.put_request(1, "first")
    outbox.put_request(2, "second")
    assert [outbox.take(), outbox.take(), outbox.take()] == ["first", "second", None]


def test_long_requests_take_turns_and_give_way_to_other_frames() -> None:
    outbox = Outbox()
    long = "a" * (2 * PART_CHARACTERS)
    outbox.put_request(1, long)
    outbox.put_request(2, long)
    first = take_part(outbox)
    outbox.put("urgent")
    outbox.put_request(3, "short")
    assert outbox.take() == "urgent"
    second = take_part(outbox)
    third = take_part(outbox)
    assert [(part.request, part.last) for part in (first, second, third)] == [
        (1, False),
        (2, False),
        (1, True),
    ]
    assert outbox.take() == "short"
    assert take_part(outbox) == Part(2, "a" * PART_CHARACTERS, last=True)
    assert outbox.take() is None


@given(st.integers(1, 3 * PART_CHARACTERS + 2))
def test_parts_joined_give_the_frame(length: int) -> None:
    outbox = Outbox()
    text = ('\\"x' * length)[:length]
    outbox.put_request(7, text)
    if length <= PART_CHARACTERS:
        assert outbox.take() == text
        return
    parts = [take_part(outbox)]
    while not parts[-1].last:
        parts.append(take_part(outbox))
    assert "".join(part.text for part in parts) == text
    assert {part.request for part in parts} == {7}
    assert outbox.take() is None


def test_a_withdrawn_request_leaves_no_rest_behind() -> None:
    outbox = Outbox()
    outbox.put_request(1, "a" * (3 * PART_CHARACTERS))
    outbox.put_request(2, "unsent")
    take_part(outbox)
    assert outbox.withdraw(1) is Sent.PART
    assert outbox.withdraw(2) is Sent.NOTHING
    assert outbox.take() is None
    assert outbox.withdraw(1) is Sent.ALL


def test_both_kinds_are_bounded_apart_and_get_their_room_back() -> None:
    outbox = Outbox()
    assert outbox.put_request(1, "a" * MAX_REQUEST_BYTES)
    assert not outbox.put_request(2, "a")
    assert outbox.put("b" * MAX_FRAME_BYTES), "requests take no room from other frames"
    assert not outbox.put("b")
    outbox.take()
    take_part(outbox)
    assert outbox.put_request(2, "a" * PART_CHARACTERS)
    assert not outbox.put_request(3, "a")
    outbox.withdraw(1)
    outbox.withdraw(2)
    assert outbox.put_request(4, "a" * MAX_REQUEST_BYTES)
    assert not outbox.put_request(5, "a")


async def test_a_waiting_writer_is_woken(nursery: trio.Nursery) -> None:
    outbox = Outbox()
    nursery.start_soon(outbox.wait)
    await trio.testing.wait_all_tasks_blocked()
    assert nursery.child_tasks
    outbox.put("frame")
    await trio.testing.wait_all_tasks_blocked()
    assert not nursery.child_tasks
    await outbox.wait()
