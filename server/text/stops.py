"""Stop strings over the borders of tokens and chunks.

Owns the text of one choice that may still become part of a stop string. Invariants: what was
returned never has to be taken back; no more is held back than the longest end of the text that
begins a stop string; the result does not depend on how the text was cut into chunks.
"""

from collections.abc import Sequence


class StopMatcher:
    """The first stop string to be complete wins; of several that end together, the longest."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to show now, the stop string that matched). After a match nothing may follow."""
        if not self._stops:
            return text, None
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self._held = ""
            return text[: start + (len(stop) if self._include else 0)], stop
        keep = self._partial_len(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The held text: the choice ended, so it cannot become a stop string any more."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, start, stop)
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _partial_len(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string without completing it."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
