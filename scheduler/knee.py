"""How many prompt tokens a step needs before another prompt in it only makes the first ones wait.

Owns one worker's line of what steps cost: a constant (reading the weights, one call) and a share
per row. Once the rows' share is several times the constant, two prompts in one step take about as
long as one after the other, and one after the other the first is done in half the time.
"""

from typing import Final

__all__ = ["Knee"]

ENOUGH: Final = 4.0  # times the constant: apart, two prompts cost a fifth more at most
GUESS_TOKENS: Final = 128  # until steps of different sizes were seen
TOKENS_MIN: Final = 64
_STEPS_MIN: Final = 8.0
_KEEP: Final = 1.0 - 1.0 / 64.0  # of older steps, with each new one
_SPREAD_MIN: Final = 0.1  # of the rows' mean: fewer say nothing about a slope


class Knee:
    """Cost: O(1) per step."""

    __slots__ = ("_count", "_cross", "_rows", "_seconds", "_squares")

    def __init__(self) -> None:
        self._count = self._rows = self._seconds = self._squares = self._cross = 0.0

    def observe(self, rows: int, compute_s: float) -> None:
        """A step of so many rows (prompt tokens and decodes) is over."""
        if not 0.0 < compute_s < 1e6:
            return
        self._count = self._count * _KEEP + 1.0
        self._rows = self._rows * _KEEP + rows
        self._seconds = self._seconds * _KEEP + compute_s
        self._squares = self._squares * _KEEP + rows * rows
        self._cross = self._cross * _KEEP + rows * compute_s

    def tokens(self) -> int:
        """Of prompts, at which a step takes no further one."""
        if self._count < _STEPS_MIN:
            return GUESS_TOKENS
        rows, seconds = self._rows / self._count, self._seconds / self._count
        variance = self._squares / self._count - rows * rows
        if variance <= (_SPREAD_MIN * rows) ** 2:
            return GUESS_TOKENS
        slope_s = (self._cross / self._count - rows * seconds) / variance
        base_s = seconds - slope_s * rows
        if slope_s <= 0.0:
            return GUESS_TOKENS
        return max(TOKENS_MIN, int(min(ENOUGH * base_s / slope_s, 1e6)))
