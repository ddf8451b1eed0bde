"""How far a long start is: a bar on a terminal, now and then a line elsewhere.

Owns the terminal's last line while it shows. Invariant: what takes no time says nothing.
"""

from collections.abc import Callable
from typing import Final, TextIO

LINE_S: Final = 2.0  # between lines, and before the first one
_CELLS: Final = 30


class ProgressBar:
    """`show` as often as there is news, then `clear`."""

    def __init__(self, what: str, stream: TextIO, say: Callable[[str], None]) -> None:
        self._what = what
        self._stream = stream
        self._say = say
        self._drawn = False
        self._next_line_s: float | None = None

    def show(self, done: int, total: int, now: float) -> None:
        part = min(1.0, done / total) if total > 0 else 1.0
        if self._stream.isatty():
            self._draw(part, done, total)
        elif self._next_line_s is None:
            self._next_line_s = now + LINE_S
        elif now >= self._next_line_s:
            self._next_line_s = now + LINE_S
            self._say(f"{self._what}: {part:.0%}")

    def clear(self) -> None:
        """It is done: the line is free again."""
        if self._drawn:
            self._stream.write("\r\033[K")
            self._stream.flush()
        self._drawn = False
        self._next_line_s = None

    def _draw(self, part: float, done: int, total: int) -> None:
        cells = "#" * round(part * _CELLS)
        size = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
        self._stream.write(f"\r\033[K{self._what} [{cells:<{_CELLS}}] {part:4.0%} {size}")
        self._stream.flush()
        self._drawn = True
