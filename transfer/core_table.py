"""The core table of one host: which of its workers have work, in one byte each of shared memory.

Owns the layout, which csrc/cpu/cores.h reads: there a busy worker finds the cores that are its own
now. Invariant: a byte has one writer, its worker, and after the worker's end its supervisor.
"""

from typing import Final

from diptych.engine.core.config import WORKERS_MAX
from diptych.engine.core.types import WorkerId

BUSY: Final = 1
PREFILL: Final = 2  # of the prefill side of the host's share
DECODE_DIAL_MAX: Final = 50  # a worker with a larger dial is of the prefill side


class CoreTable:
    """A view of the table in `memory` (one byte per worker, zeroed when new)."""

    def __init__(self, memory: memoryview) -> None:
        assert len(memory) <= WORKERS_MAX
        self._states = memory

    def wake(self, slot: WorkerId, dial: int) -> None:
        """The worker has work from now: its cores are its own."""
        self._states[slot] = BUSY | (PREFILL if dial > DECODE_DIAL_MAX else 0)

    def rest(self, slot: WorkerId) -> None:
        """The worker has nothing to do, or is dead: others may use its cores."""
        self._states[slot] &= ~BUSY

    def introduce(self, slot: WorkerId, dial: int) -> None:
        """The worker exists and has no work yet."""
        self._states[slot] = PREFILL if dial > DECODE_DIAL_MAX else 0

    def busy(self, slot: WorkerId) -> bool:
        return bool(self._states[slot] & BUSY)
