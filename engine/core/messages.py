"""Every message between processes: frozen, tagged, msgpack; no pickle on any wire.

Owns the wire format. Invariants: a message of an older scheduler epoch, worker epoch or attempt
changes nothing at its receiver; a sequence is named by (request, choice, attempt). Who sends what
to whom is in the section headings; docs/PROTOCOL.md prints the table generated from this file.
"""

from typing import Final, Literal

import msgspec

from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import (
    ApiId,
    BlockHash,
    BlockId,
    DownCause,
    Epoch,
    Generation,
    LossCause,
    PoolId,
    RequestId,
    Role,
    WorkerId,
)

PROTOCOL_VERSION: Final = 1


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """One incarnation of one process. A message to an old incarnation reaches nobody."""

    kind: Literal["api", "worker", "scheduler", "supervisor"]
    number: int
    epoch: Epoch


class Send(msgspec.Struct, frozen=True):
    """A decision to send: what the pure parts return and the shells carry out, in order."""

    to: Address
    message: Message


# ---- API server -> scheduler -------------------------------------------------------------------


class ChoiceState(msgspec.Struct, frozen=True, array_like=True):
    """What is to be computed for one choice: the API server's log is the only truth.

    `hashes` are those of the full blocks of prompt + emitted, in order.
    """

    choice: int
    attempt: int
    emitted: bytes  # packed int32; what the client has, or will, see
    hashes: list[BlockHash]
    want_prompt_logprobs: bool = False


class Submit(Message, frozen=True):
    """Compute these choices. `recovering`: was accepted before; it is never rejected."""

    api: ApiId
    api_epoch: Epoch
    scheduler_epoch: Epoch
    request: Request
    choices: list[ChoiceState]
    recovering: bool


class Abort(Message, frozen=True):
    """The client does not need more of this choice (a stop string matched). Idempotent."""

    api: ApiId
    scheduler_epoch: Epoch
    request: RequestId
    choice: int


class Closed(Message, frozen=True):
    """The request is over for the API server. Only this removes its rows; it aborts what runs."""

    api: ApiId
    scheduler_epoch: Epoch
    request: RequestId


# ---- scheduler -> API server -------------------------------------------------------------------


class Accepted(Message, frozen=True):
    scheduler_epoch: Epoch
    request: RequestId


class Rejected(Message, frozen=True):
    """A queue is full (`retry_after_s` set, 429), or the request can never fit (None, 400)."""

    scheduler_epoch: Epoch
    request: RequestId
    reason: str
    retry_after_s: float | None


class Placed(Message, frozen=True):
    """This attempt is on its worker(s): its waiting is over. Only for the API server's clocks."""

    scheduler_epoch: Epoch
    ref: SeqRef


class Lost(Message, frozen=True):
    """This attempt was taken away; submit the next one. Nothing of the attempt is used later."""

    scheduler_epoch: Epoch
    ref: SeqRef
    cause: LossCause


class Failed(Message, frozen=True):
    """This choice can never be computed (it alone crashed a worker); an error to the client."""

    scheduler_epoch: Epoch
    ref: SeqRef
    reason: str


class WorkerStats(msgspec.Struct, frozen=True, array_like=True):
    worker: WorkerId
    worker_epoch: Epoch
    dial: int
    running: int  # sequences assigned to it
    steps: int  # steps since it started
    step_s: float  # mean duration of the steps in its last report
    pool: PoolId = 0
    leaving: bool = False  # is given nothing new
    decode_tokens: int = 0  # since it started
    prefill_tokens: int = 0  # since it started


class PoolStats(msgspec.Struct, frozen=True, array_like=True):
    pool: PoolId
    blocks_total: int
    blocks_used: int
    blocks_cached: int


class PairStats(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that moved from one pool to another, since start."""

    source: PoolId
    pool: PoolId
    blocks: int
    block_s: float  # estimate: seconds per block


class ColdStart(msgspec.Struct, frozen=True, array_like=True):
    """The last worker that was started because the scheduler asked for it."""

    worker: WorkerId
    asked_s: float  # from the wish to the order, and waiting that no stage explains
    import_s: float
    weights_s: float
    fork_s: float
    ready_s: float
    join_s: float  # from its first word to its first row
    total_s: float


class Stats(Message, frozen=True):
    """The scheduler's sums, sent to every API server [4 times a second] and when asked."""

    scheduler_epoch: Epoch
    running: int  # sequences on workers
    waiting: int  # sequences waiting for a place
    blocks_total: int
    blocks_used: int  # neither free nor merely cached
    blocks_cached: int
    prefix_queries: int  # tokens asked for, since start
    prefix_hits: int  # tokens found, since start
    preemptions: int
    rejections: int
    losses: int
    prefill_tokens: int
    workers: list[WorkerStats]
    ready: bool  # every pool is read and at least one prefill and one decode place exist
    blocks_pulled: int = 0  # moved between pools, since start
    pools: list[PoolStats] = []  # msgspec copies the default
    pairs: list[PairStats] = []
    dial_moves: int = 0  # since start
    pressure: tuple[float, float] | None = None  # prefill, decode: 1 is on target
    workers_wanted: int | None = None  # with autoscaling
    cold_start: ColdStart | None = None


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
    landed: list[Landed] = []  # msgspec copies the default


# ---- scheduler -> supervisor -------------------------------------------------------------------


class AskPage(Message, frozen=True):
    """The control page of a pool on another host, please: all of the pool's workers are quiet."""

    scheduler_epoch: Epoch
    pool: PoolId


class Grow(Message, frozen=True):
    """Run at least so many workers, if the limits allow. Said again until they are there."""

    scheduler_epoch: Epoch
    workers: int


class Retire(Message, frozen=True):
    """This worker holds nothing and is given nothing: one worker less, and it is to exit."""

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch


# ---- supervisor -> scheduler -------------------------------------------------------------------


class PageRows(Message, frozen=True):
    """The answer to `AskPage`: the generation of every block, and the entries that are valid."""

    scheduler_epoch: Epoch
    pool: PoolId
    generations: list[Generation]
    entries: list[tuple[BlockId, BlockHash, BlockHash]]  # block, hash, parent


# ---- worker -> API server ----------------------------------------------------------------------


class Tokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one attempt. `first_index` counts emitted tokens over all attempts from 0.

    `num_cached`: prompt tokens found in the prefix cache (for usage).
    `prompt_logprobs`: set once, with the first token, when asked: entry i is about prompt token
    i + 1 (the first prompt token has none).
    """

    ref: SeqRef
    first_index: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: FinishInfo | None
    num_cached: int
    prompt_logprobs: list[TokenLogprobs] | None


class TokenBatch(Message, frozen=True):
    """One message per worker, step and API server."""

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch
    items: list[Tokens]


# ---- supervisor -> scheduler, API servers ------------------------------------------------------


class StartTimes(msgspec.Struct, frozen=True, array_like=True):
    """How long a worker took to start, by stage, in seconds; the first two are 0 where the weights
    were loaded already."""

    import_s: float  # a new interpreter and its imports
    weights_s: float  # loading and packing
    fork_s: float  # from the order to the process
    ready_s: float  # from the process to its first word


class WorkerUp(Message, frozen=True):
    """A worker answers at its address. Sent to the scheduler."""

    worker: WorkerId
    worker_epoch: Epoch
    pool: PoolId
    dial: int
    start: StartTimes | None = None


class WorkerDown(Message, frozen=True):
    """A worker was fenced: its processes are gone, none of its writes can still land."""

    worker: WorkerId
    worker_epoch: Epoch
    cause: DownCause


class PoolUp(Message, frozen=True):
    """A memory domain exists; its blocks may be read and assigned."""

    pool: PoolId
    num_blocks: int
    block_size: int


class PoolDown(Message, frozen=True):
    """The pool's host is lost, after its workers: this memory never comes back under this number.

    Its workers may still run somewhere, cut off; nothing that they say or read is believed.
    """

    pool: PoolId


class ApiUp(Message, frozen=True):
    api: ApiId
    api_epoch: Epoch


class ApiDown(Message, frozen=True):
    """An API server ended: all its requests are to be aborted."""

    api: ApiId
    api_epoch: Epoch


class SchedulerUp(Message, frozen=True):
    """Sent to API servers and by the supervisor only: submit all unfinished requests again."""

    scheduler_epoch: Epoch


class SchedulerDown(Message, frozen=True):
    """Sent to API servers: nothing can be submitted until the next SchedulerUp."""

    scheduler_epoch: Epoch


class Drain(Message, frozen=True):
    """Accept nothing new, finish what runs, then exit (API server), or exit now (others)."""

    grace_s: float


# ---- supervisor -> any process -----------------------------------------------------------------


class Peers(Message, frozen=True):
    """Where processes of other hosts listen, and which of them are gone."""

    up: list[tuple[Address, str]]  # "tcp://..."
    down: list[Address]


# ---- any process -> supervisor -----------------------------------------------------------------


class Ready(Message, frozen=True):
    """`name` ("worker0", "scheduler0", "api0") of this epoch listens at its address.

    `endpoint`: and there for other hosts, in a cluster.
    """

    name: str
    epoch: Epoch
    endpoint: str = ""


class Stuck(Message, frozen=True):
    """The sender's queue to this incarnation is full: it has stopped reading. Fence it."""

    peer: Address


class Cut(Message, frozen=True):
    """The sender's connection to this incarnation broke: messages to it may be lost for good."""

    sender: Address
    peer: Address


AnyMessage = (
    Submit
    | Abort
    | Closed
    | Accepted
    | Rejected
    | Placed
    | Lost
    | Failed
    | Stats
    | Join
    | Assign
    | Grants
    | Revoke
    | SetDial
    | Seal
    | Publish
    | AskPublish
    | PullOver
    | Joined
    | Progress
    | AskPage
    | PageRows
    | Grow
    | Retire
    | TokenBatch
    | WorkerUp
    | WorkerDown
    | PoolUp
    | PoolDown
    | ApiUp
    | ApiDown
    | SchedulerUp
    | SchedulerDown
    | Drain
    | Peers
    | Ready
    | Stuck
    | Cut
)
