"""Seals whose assignment has not come yet, and assignments whose seal must not count any more.

Owns both bounded tables. A seal takes one hop and its assignment another, so either may be first.
Invariant: a seal is handed out at most once, and never for a sequence that was revoked.
"""

from collections import OrderedDict
from typing import Final

from diptych.engine.core.messages import Address, Seal, Send
from diptych.engine.core.plan import Sample
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Epoch, WorkerId
from diptych.scheduler.running import Running

HELD_MAX: Final = 4096
"""Entries of each table; the oldest goes first. Far more than the sequences of one worker."""


class Seals:
    """Where a seal waits for its assignment."""

    def __init__(self) -> None:
        self._early: OrderedDict[SeqRef, Seal] = OrderedDict()
        self._void: OrderedDict[SeqRef, None] = OrderedDict()

    def hold(self, seal: Seal) -> None:
        """Keep a seal that nobody here waits for, unless its sequence was given back before."""
        if seal.ref in self._void:
            del self._void[seal.ref]
            return
        self._early[seal.ref] = seal
        if len(self._early) > HELD_MAX:
            self._early.popitem(last=False)

    def claim(self, ref: SeqRef) -> Seal | None:
        """The seal of a sequence that was just assigned, if it came first."""
        return self._early.pop(ref, None)

    def void(self, ref: SeqRef) -> None:
        """The sequence was given back while it waited: its seal, if it ever comes, is dropped."""
        self._void[ref] = None
        if len(self._void) > HELD_MAX:
            self._void.popitem(last=False)

    def forget_before(self, epoch: Epoch) -> None:
        """Drop what belongs to older scheduler epochs."""
        self._void.clear()
        for ref in [ref for ref, seal in self._early.items() if seal.scheduler_epoch < epoch]:
            del self._early[ref]


def seal_of(
    run: Running, sample: Sample, epoch: Epoch, worker: WorkerId, worker_epoch: Epoch
) -> Send:
    """What hands a sequence, whose prompt is computed, to its peer."""
    assert run.peer is not None
    peer, peer_epoch = run.peer
    seal = Seal(
        scheduler_epoch=epoch,
        worker=worker,
        worker_epoch=worker_epoch,
        peer_epoch=peer_epoch,
        ref=run.ref,
        num_computed=run.seq.num_computed,
        token=sample.token,
        logprobs=sample.logprobs,
        prompt_logprobs=run.prompt_logprobs(),
    )
    return Send(Address("worker", peer, peer_epoch), seal)
