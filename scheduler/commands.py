"""What the pure machines ask of their shells besides sending, and what the shells tell back.

Never on a wire: these rows stay in one process. Invariant: a shell carries out the commands of one
call in their order, page writes before any send that follows them.
"""

import msgspec

from diptych.engine.core.errors import DiptychError
from diptych.engine.core.handoff import TransferNews, TransferOrder
from diptych.engine.core.messages import (
    Abort,
    Accepted,
    ApiDown,
    ApiUp,
    Assign,
    Closed,
    Failed,
    Grants,
    Join,
    Joined,
    Lost,
    Placed,
    PoolDown,
    PoolUp,
    Progress,
    Rejected,
    Revoke,
    SchedulerDown,
    SchedulerUp,
    Seal,
    Send,
    SetDial,
    Stats,
    Submit,
    TokenBatch,
    Tokens,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import BlockHash, BlockId, Generation, PoolId, RequestId


class ReadPool(msgspec.Struct, frozen=True):
    """Scheduler -> shell: every worker of the pool is quiet; read its control page."""

    pool: PoolId


class PageEntry(msgspec.Struct, frozen=True):
    """A valid (committed) entry of the control page."""

    block: BlockId
    hash: BlockHash
    parent: BlockHash


class PoolRead(msgspec.Struct, frozen=True):
    """Shell -> scheduler: the generation of every block, and the entries that are valid."""

    pool: PoolId
    generations: list[Generation]
    entries: list[PageEntry]


class ClearBlock(msgspec.Struct, frozen=True):
    """Batcher -> shell: this worker is about to write the block; its entry is void from now."""

    block: BlockId
    generation: Generation


class CommitBlock(msgspec.Struct, frozen=True):
    """Batcher -> shell: the block is full and its step is over."""

    block: BlockId
    generation: Generation
    hash: BlockHash
    parent: BlockHash


class Delivered(msgspec.Struct, frozen=True):
    """Journal -> shell: new tokens for the client, each index once and in order.

    `tokens.first_index` and `tokens.ids` are already trimmed to what is new. `queued_s` is the
    time until the request was first placed (None while that is not known), `preemptions` how often
    the scheduler took a choice of it back so far.
    """

    request: RequestId
    tokens: Tokens
    queued_s: float | None = None
    preemptions: int = 0


class Refused(msgspec.Struct, frozen=True):
    """Journal -> shell: the request ends with this error (before or after its first token)."""

    request: RequestId
    error: DiptychError


class Ended(msgspec.Struct, frozen=True):
    """Journal -> shell: every choice of the request finished; the row is gone."""

    request: RequestId


SchedulerInput = (
    Submit
    | Abort
    | Closed
    | Joined
    | Progress
    | WorkerUp
    | WorkerDown
    | PoolUp
    | PoolDown
    | ApiUp
    | ApiDown
    | PoolRead
)
SchedulerCommand = Send | ReadPool
JournalInput = (
    Accepted | Rejected | Placed | Lost | Failed | TokenBatch | Stats | SchedulerUp | SchedulerDown
)
JournalCommand = Send | Delivered | Refused | Ended
BatcherInput = Join | Assign | Grants | Revoke | SetDial | Seal | TransferNews
BatcherCommand = Send | ClearBlock | CommitBlock | TransferOrder
