"""To and from the supervisor: who is up, who is down, who is wanted.

Owns nothing. Part of messages.py, where the invariants stand.
"""

import msgspec

from diptych.engine.core.envelope import Address, Message
from diptych.engine.core.types import (
    ApiId,
    BlockHash,
    BlockId,
    DownCause,
    Epoch,
    Generation,
    PoolId,
    WorkerId,
)

# ---- scheduler -> supervisor -------------------------------------------------------------------


class AskPage(Message, frozen=True):
    """The control page of a pool on another host, please: all of the pool's workers are quiet."""

    scheduler_epoch: Epoch
    pool: PoolId


class Grow(Message, frozen=True):
    """Run so many workers, if the limits allow. Said again until they are there, and once when
    fewer are wanted than were asked for; who is there stays until `Retire`."""

    scheduler_epoch: Epoch
    workers: int


class Retire(Message, frozen=True):
    """This worker holds nothing and is given nothing: one worker less, and it is to exit."""

    scheduler_epoch: Epoch
    worker: WorkerId
    worker_epoch: Epoch
    wanted: int  # so many are left


# ---- supervisor -> scheduler -------------------------------------------------------------------


class PageRows(Message, frozen=True):
    """The answer to `AskPage`: the generation of every block, and the entries that are valid."""

    scheduler_epoch: Epoch
    pool: PoolId
    generations: list[Generation]
    entries: list[tuple[BlockId, BlockHash, BlockHash]]  # block, hash, parent


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
    apart: bool = False  # there were others, which are lost: who decoded there never comes back


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
