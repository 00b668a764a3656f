"""Tell subscribers that something changed, never what: they look at the thing itself."""

import trio


class Changes:
    """Tell any number of subscribers that something changed; changes before a subscriber runs are merged."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def notify(self) -> None:
        """Wake every subscriber that waits, and let those that do not wait return at once next time."""
        self._count += 1
        self._waiting.unpark_all()

    def subscribe(self) -> "Subscription":
        """Return a subscription to the changes from now on; there is nothing to close."""
        return Subscription(self)


class Subscription:
    """One subscriber's view: what it has seen of the changes."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._seen = changes._count

    async def wait(self) -> None:
        """Return once something changed since the last return, or since the subscription.

        Cancellation loses no change: the next wait returns at once.
        """
        if self._seen == self._changes._count:
            await self._changes._waiting.park()
        else:
            await trio.lowlevel.checkpoint()
        self._seen = self._changes._count
