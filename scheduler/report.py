"""What a batcher has to tell the scheduler since its last `Progress`.

Owns the sums and lists of one report. Invariant: a report is due as soon as something changed, else
after `QUIET_STEPS_MAX` steps; sums are never lost between reports of one scheduler epoch.
"""

from typing import Final

from diptych.engine.core.messages import (
    Address,
    CommittedBlock,
    Landed,
    Message,
    Progress,
    Refused,
    Send,
)
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import STEP_SIZES, Epoch, WorkerId, step_size

QUIET_STEPS_MAX: Final = 64
"""Uneventful steps between two reports."""


def to_scheduler(epoch: Epoch, message: Message) -> Send:
    return Send(Address("scheduler", 0, epoch), message)


class Report:
    """The next `Progress` while it grows."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.committed: list[CommittedBlock] = []
        self.sealed: list[SeqRef] = []
        self.finished: list[SeqRef] = []
        self.released: list[SeqRef] = []
        self.starved: list[SeqRef] = []
        self.landed: list[Landed] = []
        self.refused: list[Refused] = []
        self._steps = 0
        self._compute_s = 0.0
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._sizes = [0] * STEP_SIZES

    def add_step(self, compute_s: float, prefill_tokens: int, decode_tokens: int) -> None:
        self._steps += 1
        self._compute_s += compute_s
        self._prefill_tokens += prefill_tokens
        self._decode_tokens += decode_tokens
        self._sizes[step_size(prefill_tokens + decode_tokens)] += 1

    @property
    def due(self) -> bool:
        return self._steps >= QUIET_STEPS_MAX or bool(
            self.committed
            or self.finished
            or self.sealed
            or self.released
            or self.starved
            or self.landed
            or self.refused
        )

    def take(self, scheduler: Epoch, worker: WorkerId, worker_epoch: Epoch) -> Send:
        """The report, on its way; the next one starts empty."""
        progress = Progress(
            scheduler_epoch=scheduler,
            worker=worker,
            worker_epoch=worker_epoch,
            steps=self._steps,
            compute_s=self._compute_s,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            committed=self.committed,
            sealed=self.sealed,
            finished=self.finished,
            released=self.released,
            starved=self.starved,
            landed=self.landed,
            refused=self.refused,
            step_sizes=self._sizes,
        )
        self._clear()
        return to_scheduler(scheduler, progress)
