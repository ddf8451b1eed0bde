"""How many hosts of one worker each there should be, and which may go: Ray's bundles. Pure.

Owns the scheduler's wish and who was dismissed. Invariant: a host is dismissed once, and only when
its worker was retired and is gone; until then its place counts.
"""

from collections.abc import Iterable

from diptych.server.fleet_members import Dismiss, Member, Places, State


class HostPlaces:
    def __init__(self, wish: int) -> None:
        self.wish = wish  # workers
        self._told: int | None = None
        self._dismissed: set[int] = set()  # hosts

    def orders(self, workers: Iterable[Member]) -> list[Places | Dismiss]:
        """What changed since the last call."""
        orders: list[Places | Dismiss] = []
        leaving = 0
        for member in workers:
            if member.wanted or member.host in self._dismissed:
                continue
            if member.state is State.DOWN:
                self._dismissed.add(member.host)
                orders.append(Dismiss(member.host))
            else:
                leaving += 1
        if self.wish + leaving != self._told:
            self._told = self.wish + leaving
            orders.append(Places(self._told))
        return orders

    def gone(self, host: int) -> None:
        self._dismissed.discard(host)
