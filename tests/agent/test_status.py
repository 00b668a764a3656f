"""The status board: versions grow with real changes only, and the latest one is always seen."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.agent.status import Latest, StatusBoard
from paddler.messages.state import StateApplicationStatus


def test_a_fresh_agent_has_slots_it_wants_and_none_it_serves() -> None:
    status = StatusBoard(slots=4).status
    assert (status.desired_slots_total, status.slots_total, status.version) == (4, 0, 0)
    assert status.state_application_status is StateApplicationStatus.FRESH
    assert status.download_indeterminate


def test_the_version_grows_when_something_changed() -> None:
    board = StatusBoard(slots=4)
    board.update(slots_total=4, model_path="/a")
    assert board.status.version == 1
    board.update(slots_total=4)
    assert board.status.version == 1
    board.update(slots_total=0)
    assert board.status.version == 2


@pytest.mark.scenario("MA-7")
def test_progress_is_shown_and_cleared() -> None:
    board = StatusBoard(slots=1)
    idle = board.status
    board.show_progress(10, 100, "a.gguf")
    shown = board.status
    assert (shown.download_current, shown.download_total, shown.download_filename) == (10, 100, "a.gguf")
    assert not shown.download_indeterminate
    board.show_progress(10, 0, "a.gguf")
    assert board.status.download_indeterminate
    board.clear_progress()
    assert (board.status.download_current, board.status.download_total) == (0, 0)
    assert board.status.download_filename is None
    assert board.status.download_indeterminate == idle.download_indeterminate


async def test_changes_before_a_waiter_runs_are_merged(autojump_clock: MockClock) -> None:
    board = StatusBoard(slots=2)
    seen = [board.status]

    async def watch() -> None:
        while True:
            seen.append(await board.newer_than(seen[-1]))

    async with trio.open_nursery() as watchers:
        watchers.start_soon(watch)
        await wait_all_tasks_blocked()
        for slots_total in (1, 0, 2):
            board.update(slots_total=slots_total)
        await wait_all_tasks_blocked()
        assert [status.version for status in seen] == [0, 3]
        board.update(slots_total=0)
        await wait_all_tasks_blocked()
        assert seen[-1] == board.status
        watchers.cancel_scope.cancel()


async def test_a_value_that_differs_already_needs_no_waiting() -> None:
    latest = Latest(1)
    latest.set(2)
    assert await latest.other_than(1) == 2
