import trio
from trio.testing import wait_all_tasks_blocked

from paddler.balancer.changes import Changes


async def test_changes_before_a_subscriber_runs_are_merged(autojump_clock: trio.testing.MockClock) -> None:
    changes = Changes()
    subscription = changes.subscribe()
    changes.notify()
    changes.notify()
    with trio.fail_after(1):
        await subscription.wait()
    with trio.move_on_after(1) as wait:
        await subscription.wait()
    assert wait.cancelled_caught


async def test_changes_before_the_subscription_do_not_count(autojump_clock: trio.testing.MockClock) -> None:
    changes = Changes()
    changes.notify()
    with trio.move_on_after(1) as wait:
        await changes.subscribe().wait()
    assert wait.cancelled_caught


async def test_a_cancelled_wait_loses_no_change(autojump_clock: trio.testing.MockClock) -> None:
    changes = Changes()
    subscription = changes.subscribe()
    with trio.CancelScope() as scope:
        changes.notify()
        scope.cancel()
        await subscription.wait()
    assert scope.cancelled_caught
    with trio.fail_after(1):
        await subscription.wait()


async def test_every_subscriber_is_woken(nursery: trio.Nursery) -> None:
    changes = Changes()
    woken: list[int] = []

    async def wait(number: int) -> None:
        await changes.subscribe().wait()
        woken.append(number)

    for number in range(3):
        nursery.start_soon(wait, number)
    await wait_all_tasks_blocked()
    changes.notify()
    await wait_all_tasks_blocked()
    assert sorted(woken) == [0, 1, 2]
