"""Between the scheduler and its workers, and between workers: sequences, blocks, seals, pulls.

Owns nothing. Part of messages.py, where the invariants stand.
"""

import msgspec

from diptych.engine.core.envelope import Message
from diptych.engine.core.plan import TokenLogprobs
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import (
    ApiId,
    BlockHash,
    BlockId,
    Epoch,
    Generation,
    PoolId,
    Role,
    WorkerId,
)

# ---- scheduler -> worker -----------------------------------------------------------------------


class Join(Message, frozen=True):
    """Serve this scheduler epoch: drop all sequences of older ones, then answer `Joined`."""

    scheduler_epoch: Epoch
    worker_epoch: Epoch
    dial: int


class Handoff(msgspec.Struct, frozen=True, array_like=True):
    """The two sides of an assignment are in different memory domains: blocks have to move.

    To the DECODE side: entry i is about block `first + i` of the table, to be pulled from the peer
    once it is published; the blocks before are here. To the PREFILL side only `first` matters: it
    publishes from there on.
    """

    pool: PoolId  # of the peer
    first: int
    blocks: list[BlockId]  # in the peer's pool
    generations: list[Generation]


class Assign(Message, frozen=True):
    """Run this sequence. [0, num_computed) is in the pool already (a prefix-cache hit).

    LOCAL, PREFILL: the blocks after num_computed are this worker's to write.
    DECODE: nothing may be touched before the seal of the same `ref` came from the peer. With a
    `handoff` the blocks after num_computed are this worker's from the start, to pull into.
    `prefix`: the decode side's pool knows more of the prompt. To the PREFILL side, the blocks to
    pull before it computes the rest; to the DECODE side, publish from `first` to num_computed; to
    a LOCAL side, the blocks to pull from a peer that computes the head of the prompt for it.
    `head`: to the PREFILL side, compute only so many tokens, publish them and let go: no seal; to
    the LOCAL side, so many tokens of the prefix were cached there.
    `api` is where tokens go, `peer` the other side of a handoff (worker, epoch).
    """

    scheduler_epoch: Epoch
    worker_epoch: Epoch
    ref: SeqRef
    request: Request
    role: Role
    emitted: bytes
    hashes: list[BlockHash]
    block_table: list[BlockId]
    generations: list[Generation]
    num_computed: int
    api: ApiId
    api_epoch: Epoch
    peer: tuple[WorkerId, Epoch] | None
    want_prompt_logprobs: bool
    handoff: Handoff | None = None
    prefix: Handoff | None = None
    head: int | None = None


class Grant(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """More blocks at the end of a sequence's table. `first` is the table index of blocks[0]."""

    ref: SeqRef
    first: int
    blocks: list[BlockId]
    generations: list[Generation]


class Grants(Message, frozen=True):
    """What the rows of one worker are granted in one step of the scheduler."""

    scheduler_epoch: Epoch
    worker_epoch: Epoch
    grants: list[Grant]


class Revoke(Message, frozen=True):
    """Give this sequence back: answered by `released` in the next Progress, known or not."""

    scheduler_epoch: Epoch
    worker_epoch: Epoch
    ref: SeqRef


class SetDial(Message, frozen=True):
    """The worker's share of step time for prefill, 0..100."""

    scheduler_epoch: Epoch
    worker_epoch: Epoch
    dial: int


# ---- worker -> worker --------------------------------------------------------------------------


class Seal(Message, frozen=True):
    """Prefill is over: [0, num_computed) is in the pool, `token` is what was sampled after it.

    The sender touches none of the blocks any more. In one memory domain no byte moves.
    `logprobs` and `prompt_logprobs` are what the sender also sends to the client: the receiver
    repeats them with the token, so whichever message arrives first is complete.
    """

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch
    peer_epoch: Epoch
    ref: SeqRef
    num_computed: int
    token: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Publish(Message, frozen=True):
    """Blocks [first, first + len(digests)) of the sequence's table are final in the sender's pool.

    Cumulative: a later one holds all of an earlier one, so that a lost one is harmless. `endpoint`
    is where the sender's pool can be read over the network ("" if only through memory).
    """

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch
    peer_epoch: Epoch
    ref: SeqRef
    first: int
    digests: list[int]  # xxh3-64 of each block's bytes
    endpoint: str


class AskPublish(Message, frozen=True):
    """Nothing was heard for a while: publish again what is final."""

    scheduler_epoch: Epoch
    worker: WorkerId  # that asks
    worker_epoch: Epoch
    peer_epoch: Epoch
    ref: SeqRef


class PullOver(Message, frozen=True):
    """The sender reads no block of this sequence any more: what was published may be forgotten."""

    scheduler_epoch: Epoch
    worker: WorkerId  # that read
    worker_epoch: Epoch
    peer_epoch: Epoch
    ref: SeqRef


# ---- worker -> scheduler -----------------------------------------------------------------------


class Joined(Message, frozen=True):
    """No sequence of an older scheduler epoch is held, no block of one will be touched."""

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch


class CommittedBlock(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Block `index` of the sequence's table is full and its step is over."""

    ref: SeqRef
    index: int
    block: BlockId
    generation: Generation
    hash: BlockHash
    parent: BlockHash  # hash of the block before it, or the request's root


class Landed(msgspec.Struct, frozen=True, array_like=True):
    """Every block of a handoff is here and verified: the worker reads the peer's no more."""

    ref: SeqRef
    num_blocks: int  # that moved
    read_s: float  # during which at least one read was under way


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of this pool can never come to the reporting worker's: the peer refused it."""

    pool: PoolId
    peer: tuple[WorkerId, Epoch]  # who serves it
    reason: str


class Progress(Message, frozen=True):
    """What changed since the last report. Running sequences' tokens are implied, never listed.

    finished: ended by itself; the worker touches its blocks no more
    sealed:   handed to its peer; the worker touches its blocks no more
    released: given back after `Revoke`, or because the peer's blocks cannot be had; likewise
    """

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch
    steps: int  # steps since the last report
    compute_s: float  # their total duration
    prefill_tokens: int  # computed in them
    decode_tokens: int
    committed: list[CommittedBlock]
    sealed: list[SeqRef]
    finished: list[SeqRef]
    released: list[SeqRef]
    starved: list[SeqRef]  # sat out a step for want of a block
    landed: list[Landed] = msgspec.field(default_factory=list)
    refused: list[Refused] = msgspec.field(default_factory=list)
    step_sizes: list[int] = msgspec.field(default_factory=list)  # the steps, see `step_size`
