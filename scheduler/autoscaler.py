"""How many workers there should be, from the load alone. Pure.

Owns the patience of growing and shrinking. Invariants: the wish stays within its limits; the last
worker goes only when there is nothing to do, and comes back with the first row.
"""

from typing import Final

from diptych.scheduler.dials import HALF
from diptych.scheduler.load import Load

GROW_AT: Final = 1.0
"""Pressure, after the best move of roles, at which one worker more is wanted ..."""
GROW_PERIODS: Final = 2
"""... once it has lasted so many looks."""
SHRINK_AT: Final = 0.5
"""Pressure that one worker less must leave for it to go."""


class Autoscaler:
    def __init__(self, limits: tuple[int, int], idle_s: float) -> None:
        self._fewest, self._most = limits
        self._idle_s = idle_s
        self._pressed = 0  # looks in a row
        self._idle_since: float | None = None

    def decide(self, load: Load, num_workers: int, num_coming: int, now: float) -> int:
        """Workers wanted, when `num_workers` serve or are on their way, `num_coming` of these."""
        pressed = not num_coming and self._best(load) >= GROW_AT
        self._pressed = self._pressed + 1 if pressed else 0
        if num_workers < self._fewest:
            return self._fewest
        if not num_workers and load.num_rows:
            return 1
        if self._pressed >= GROW_PERIODS and num_workers < self._most:
            self._pressed = 0
            return num_workers + 1
        if num_workers <= self._fewest or not self._enough(load, num_workers):
            self._idle_since = None
            return num_workers
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since < self._idle_s:
            return num_workers
        self._idle_since = now
        return num_workers - 1

    def _best(self, load: Load) -> float:
        """The worst pressure once the roles suit the load."""
        half = HALF / 100.0
        return min(load.worst, load.after(half, -half), load.after(-half, half))

    def _enough(self, load: Load, num_workers: int) -> bool:
        """One worker less would do."""
        if num_workers == 1:
            return not load.num_rows
        return load.worst * num_workers / (num_workers - 1) < SHRINK_AT
