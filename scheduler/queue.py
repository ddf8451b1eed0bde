"""Rows that wait for a place: bounded, ordered by (priority, rank), with an honest Retry-After.

Owns the order of waiting rows, the caps, and the measured rate at which rows find places.
Invariants: a row counts as waiting from `enter` to `leave`, whichever heap it is in meanwhile; only
new requests are measured against the caps, what was accepted once is never turned away.
"""

from heapq import heapify, heappop, heappush
from math import ceil
from typing import Final

from diptych.engine.core.types import BlockHash
from diptych.scheduler.rows import Order, Row, RowKey

_RATE_PERIOD_S: Final = 0.25
_RATE_WEIGHT: Final = 0.2  # of the newest period


class RankHeap:
    """Rows in order, lowest first. Leaving is O(1): the entry stays behind and is skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[Order, int, Row]] = []
        self._tickets: dict[RowKey, int] = {}  # row -> the ticket of its living entry
        self._ticket = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, row: Row) -> bool:
        return row.key in self._tickets

    def push(self, row: Row, order: Order) -> None:
        assert row.key not in self._tickets, f"{row.key} is in the heap already"
        self._ticket += 1
        self._tickets[row.key] = self._ticket
        heappush(self._heap, (order, self._ticket, row))
        if len(self._heap) > 2 * len(self._tickets) + 64:
            alive = self._tickets.get
            self._heap = [item for item in self._heap if alive(item[2].key) == item[1]]
            heapify(self._heap)

    def peek(self) -> Row | None:
        while self._heap:
            _, ticket, row = self._heap[0]
            if self._tickets.get(row.key) == ticket:
                return row
            heappop(self._heap)
        return None

    def discard(self, row: Row) -> bool:
        """False: it was not here."""
        return bool(self._tickets) and self._tickets.pop(row.key, None) is not None


class DrainRate:
    """Rows placed per second, measured only while rows wait."""

    def __init__(self) -> None:
        self.rows_per_s = 0.0
        self._since: float | None = None  # start of the period; None: nothing waited
        self._placed = 0

    def placed(self) -> None:
        self._placed += 1

    def tick(self, now: float, num_waiting: int) -> None:
        if self._since is not None and now - self._since >= _RATE_PERIOD_S:
            rate = self._placed / (now - self._since)
            weight = _RATE_WEIGHT if self.rows_per_s else 1.0
            self.rows_per_s += (rate - self.rows_per_s) * weight
            self._since = None
        if self._since is None:
            self._placed = 0
            self._since = now if num_waiting else None


class WaitingRoom:
    """The bounded queue. `ready` rows are tried in order, `suspects` are tried one at a time;
    rows that wait for a block to be computed are in neither heap but count."""

    def __init__(self, sequences_max: int, tokens_max: int, retry_after_max_s: float) -> None:
        self.ready = RankHeap()
        self.suspects = RankHeap()
        self.rate = DrainRate()
        self.num_rows = 0
        self.num_tokens = 0
        self.num_backlog = 0  # rows of an older scheduler that have not found a place yet
        self._sequences_max = sequences_max
        self._tokens_max = tokens_max
        self._retry_after_max_s = retry_after_max_s

    def could_hold(self, num_rows: int, num_tokens: int) -> bool:
        """If nobody waited."""
        return num_rows <= self._sequences_max and num_tokens <= self._tokens_max

    def has_room(self, num_rows: int, num_tokens: int) -> bool:
        return (
            self.num_rows + num_rows <= self._sequences_max
            and self.num_tokens + num_tokens <= self._tokens_max
        )

    def retry_after_s(self) -> float:
        """When the rows that wait now are expected to have found places, in whole seconds."""
        rate = self.rate.rows_per_s
        if rate <= 0.0:
            return self._retry_after_max_s
        return min(max(1.0, float(ceil((self.num_rows + 1) / rate))), self._retry_after_max_s)

    def enter(self, row: Row) -> None:
        self.num_rows += 1
        self.num_tokens += row.tokens_wanted()
        self.num_backlog += row.backlog
        self.line_up(row)

    def line_up(self, row: Row) -> None:
        """Puts a waiting row in the heap it belongs to."""
        row.held_on = None
        heap = self.suspects if row.faults else self.ready
        heap.push(row, row.order)

    def hold(self, row: Row, name: BlockHash) -> None:
        """Takes a row out of its heap until `name` is committed; it still waits."""
        held = self.ready.discard(row)
        assert held, f"{row.key} is not ready"
        row.held_on = name

    def wake(self, rows: list[Row], name: BlockHash) -> None:
        """The block is there, or will never be: these rows are ready, if they still wait."""
        for row in rows:
            if row.held_on == name:
                self.line_up(row)

    def leave(self, row: Row) -> None:
        (self.suspects if row.faults else self.ready).discard(row)
        row.held_on = None
        self.num_rows -= 1
        self.num_tokens -= row.tokens_wanted()
        self.num_backlog -= row.backlog
        row.backlog = False

    def check_integrity(self) -> None:
        assert self.num_rows >= len(self.ready) + len(self.suspects)
        assert self.num_tokens >= self.num_rows >= self.num_backlog >= 0
