"""What a worker's machines say to each other about KV that moves between memory domains.

Never on a wire: the batcher orders, the pull and publish machines answer, one process carries all
of it. Invariant: after `PullEnded` of a sequence no read writes into any of its blocks.
"""

import msgspec

from diptych.engine.core.messages import Refused
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import BlockId, Epoch, Generation, PoolId, WorkerId


class StartPull(msgspec.Struct, frozen=True):
    """Batcher -> puller: fetch these blocks as the peer publishes them.

    Entry i of the three lists is about block `first + i` of the sequence's table.
    """

    scheduler_epoch: Epoch
    ref: SeqRef
    peer: tuple[WorkerId, Epoch]
    pool: PoolId  # of the peer
    first: int
    source: list[BlockId]  # in the peer's pool
    generations: list[Generation]  # of the source blocks
    blocks: list[BlockId]  # in the own pool; this sequence alone owns them


class CancelPull(msgspec.Struct, frozen=True):
    """Batcher -> puller: the blocks are to be given back; answered by `PullEnded`."""

    ref: SeqRef


class PublishBlocks(msgspec.Struct, frozen=True):
    """Batcher -> publisher: blocks [first, first + len(blocks)) of the table are final now."""

    scheduler_epoch: Epoch
    ref: SeqRef
    peer: tuple[WorkerId, Epoch]
    first: int
    blocks: list[BlockId]


class ForgetPublished(msgspec.Struct, frozen=True):
    """Batcher -> publisher: nobody will read the blocks of this sequence any more."""

    ref: SeqRef


class Pulled(msgspec.Struct, frozen=True):
    """Puller -> batcher: all blocks of the table before index `upto` are here and verified."""

    ref: SeqRef
    upto: int


class PullEnded(msgspec.Struct, frozen=True):
    """Puller -> batcher: no read of this sequence is under way or will begin.

    `complete`: every block is here; else it was cancelled, or the source cannot give them.
    """

    ref: SeqRef
    complete: bool
    num_blocks: int  # that were read and verified
    read_s: float  # during which at least one read was under way
    refused: list[Refused] = []  # why this source never can, if so


TransferOrder = StartPull | CancelPull | PublishBlocks | ForgetPublished
TransferNews = Pulled | PullEnded
