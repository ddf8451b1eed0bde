"""What one batcher has under way between memory domains, and the orders for it.

Owns which sequences are being pulled and what their end must be answered with. Invariants: a
revoked sequence is released only after its pull ended; a worker joins a new scheduler only after
every pull of an older one ended.
"""

from diptych.engine.core.handoff import (
    CancelPull,
    ForgetPublished,
    PublishBlocks,
    StartPull,
    TransferOrder,
)
from diptych.engine.core.messages import Assign, Handoff
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Epoch
from diptych.scheduler.running import Running


class Exchange:
    def __init__(self) -> None:
        self.pulling: set[SeqRef] = set()  # all that did not end
        self.stale: set[SeqRef] = set()  # of these, what an older scheduler ordered
        self.revoked: set[SeqRef] = set()  # of these, what is to be answered with `released`
        self.join_due = False

    def revoke(self, ref: SeqRef) -> CancelPull | None:
        """None: there is nothing to wait for."""
        if ref not in self.pulling or ref in self.stale:
            return None
        self.revoked.add(ref)
        return CancelPull(ref)

    def drop_all(self) -> list[TransferOrder]:
        """A new scheduler: everything of the older one ends, unanswered."""
        self.stale |= self.pulling
        self.revoked.clear()
        return [CancelPull(ref) for ref in sorted(self.pulling, key=_key)]

    def ended(self, ref: SeqRef) -> bool:
        """Whether it is to be answered with `released`."""
        self.pulling.discard(ref)
        self.stale.discard(ref)
        answer = ref in self.revoked
        self.revoked.discard(ref)
        return answer


def pull_order(run: Running, handoff: Handoff, epoch: Epoch) -> StartPull:
    """The blocks that this worker's pool lacks, up to the end of the prompt."""
    assert run.peer is not None
    end = handoff.first + len(handoff.blocks)
    return StartPull(
        scheduler_epoch=epoch,
        ref=run.ref,
        peer=run.peer,
        pool=handoff.pool,
        first=handoff.first,
        source=handoff.blocks,
        generations=handoff.generations,
        blocks=run.seq.block_table[handoff.first : end],
    )


def publish_orders(run: Running, upto: int, epoch: Epoch) -> list[TransferOrder]:
    """Blocks of the table before `upto` that a peer elsewhere lacks and was not told of."""
    first = run.num_published
    if run.handoff is None or upto <= first:
        return []
    assert run.peer is not None
    run.num_published = upto
    return [PublishBlocks(epoch, run.ref, run.peer, first, run.seq.block_table[first:upto])]


def forget_orders(run: Running) -> list[TransferOrder]:
    """The sequence is over here."""
    return [] if run.handoff is None else [ForgetPublished(run.ref)]


def prefix_orders(run: Running, assign: Assign) -> list[TransferOrder]:
    """The decode side's cached blocks, where the prefill side asks for them."""
    if assign.prefix is None:
        return []
    assert run.peer is not None
    first, end = assign.prefix.first, run.num_published
    blocks = run.seq.block_table[first:end]
    return [PublishBlocks(assign.scheduler_epoch, run.ref, run.peer, first, blocks)]


def _key(ref: SeqRef) -> tuple[str, int, int]:
    return ref.request, ref.choice, ref.attempt
