"""The core table of one host: which of its workers have work, one byte of shared memory per rank.

Owns the layout, which csrc/cpu/cores.h reads: there a busy rank finds the cores that are its own
now. Invariant: a byte has one writer, its worker (for all its ranks), and after the worker's end
its supervisor.
"""

from collections.abc import Sequence
from typing import Final

from diptych.engine.core.config import WORKERS_MAX, WorkerSpec

BUSY: Final = 1
PREFILL: Final = 2  # of the prefill side of the host's share
DECODE_DIAL_MAX: Final = 50  # a worker with a larger dial is of the prefill side


def rank_slots(workers: Sequence[WorkerSpec]) -> list[range]:
    """The bytes of the ranks of each worker of the host."""
    slots: list[range] = []
    end = 0
    for spec in workers:
        slots.append(range(end, end + spec.num_ranks))
        end += spec.num_ranks
    return slots


class CoreTable:
    """A view of the table in `memory` (one byte per rank, zeroed when new). Workers are named by
    their place among those of the host."""

    def __init__(self, memory: memoryview, slots: Sequence[range]) -> None:
        assert len(memory) <= WORKERS_MAX
        self._states = memory
        self._slots = slots

    def wake(self, worker: int, dial: int) -> None:
        """The worker has work from now: its cores are its own."""
        for slot in self._slots[worker]:
            self._states[slot] = BUSY | (PREFILL if dial > DECODE_DIAL_MAX else 0)

    def rest(self, worker: int) -> None:
        """The worker has nothing to do, or is dead: others may use its cores."""
        for slot in self._slots[worker]:
            self._states[slot] &= ~BUSY

    def introduce(self, worker: int, dial: int) -> None:
        """The worker exists and has no work yet."""
        for slot in self._slots[worker]:
            self._states[slot] = PREFILL if dial > DECODE_DIAL_MAX else 0

    def busy(self, worker: int) -> bool:
        return any(self._states[slot] & BUSY for slot in self._slots[worker])
