"""Between API servers and the rest: requests, what became of them, their tokens, the figures.

Owns nothing. Part of messages.py, where the invariants stand.
"""

import msgspec

from diptych.engine.core.envelope import Message
from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import (
    ApiId,
    BlockHash,
    Epoch,
    LossCause,
    PoolId,
    RequestId,
    WorkerId,
)

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
    refused: str | None = None  # why none can move between the two, either way


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
    pools: list[PoolStats] = msgspec.field(default_factory=list)
    pairs: list[PairStats] = msgspec.field(default_factory=list)
    dial_moves: int = 0  # since start
    pressure: tuple[float, float] | None = None  # prefill, decode: 1 is on target
    workers_wanted: int | None = None  # with autoscaling
    cold_start: ColdStart | None = None
    workers_asked: int = 0  # since start: how often more were wanted
    workers_retired: int = 0  # since start
    step_sizes: list[int] = msgspec.field(default_factory=list)  # of all steps, see `step_size`
    step_tokens: int = 0  # computed in them


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
