"""The requests known to the scheduler and their rows, one row per choice.

Owns what is known of each row and the count of rows per state. Invariants: a row is found by
(request, choice) and only `Closed`, or the end of its API server, removes it; every change of state
goes through `RowTable.move`, hence through the lifecycle table.
"""

from dataclasses import dataclass, field

from diptych.engine.core.messages import ChoiceState
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import (
    ApiId,
    BlockHash,
    BlockId,
    Epoch,
    LossCause,
    PoolId,
    RequestId,
    Role,
    WorkerId,
    blocks_for,
)
from diptych.scheduler.lifecycle import RowEvent, RowState, advance

RowKey = tuple[RequestId, int]  # (request, choice)
Order = tuple[int, int, int, int]  # (priority, rank, arrival, choice): lower is served first


@dataclass(slots=True, eq=False)
class Source:
    """The prefill side's blocks of a row that decodes in another pool."""

    pool: PoolId
    table: list[BlockId]  # of the prompt, and what was emitted before
    num_hit: int  # found in that pool's prefix cache
    num_start: int  # not to be computed: the hits, and what is pulled from the decode side's pool
    num_committed: int  # known to be full, the hits included
    landed: bool = False  # the decode side reads them no more
    is_head: bool = False  # of a prompt whose rest is computed where it decodes


@dataclass(slots=True, eq=False)
class Row:
    """One choice. The second half is about the attempt that runs, and is empty while none does."""

    key: RowKey
    entry: "Entry"
    order: Order
    wanted: ChoiceState  # the newest attempt submitted
    state: RowState = RowState.QUEUED
    preemptions: int = 0
    faults: int = 0  # workers that crashed by their own fault while this row was on them
    backlog: bool = False  # was accepted by an older scheduler and has not been placed since
    held_on: BlockHash | None = None  # waits until this block, being computed, is committed
    moves: int = 0  # attempts that ended because their worker prefills no more
    failed_pulls: int = 0  # attempts that ended because blocks could not be moved

    ref: SeqRef | None = None  # the attempt that runs, or ran last
    pool: PoolId = 0  # in which it decodes
    table: list[BlockId] = field(default_factory=list)
    num_tokens: int = 0  # prompt and what was emitted before this attempt
    num_hit: int = 0  # blocks found in the prefix cache
    num_committed: int = 0  # blocks known to be full, the hits included
    blocks_base: int = 0  # that hold num_tokens
    blocks_max: int = 0  # that it can ever need
    holds: dict[WorkerId, Role] = field(default_factory=dict)  # may still touch its blocks
    decoder: WorkerId = 0  # gets the grants
    computing: list[BlockHash] = field(default_factory=list)  # others may wait for these
    alone: bool = False  # nothing else runs on its worker
    poison: bool = False  # crashed a worker while alone
    cause: LossCause = LossCause.WORKER
    finished_on: WorkerId | None = None
    sealed_on: WorkerId | None = None  # prefilled there; the decode side has not reported yet
    prefill_pool: PoolId = 0
    source: Source | None = None  # blocks that it holds in `prefill_pool`, if that is another

    def tokens_wanted(self) -> int:
        """Tokens whose KV the next attempt starts from."""
        return self.entry.request.num_prompt + len(self.wanted.emitted) // 4

    def blocks_max_wanted(self, block_size: int) -> int:
        """Blocks that the next attempt can ever need: the last token's KV is never computed."""
        most = self.entry.request.num_prompt + (self.entry.request.params.max_tokens or 1) - 1
        return blocks_for(max(most, self.tokens_wanted()), block_size)


@dataclass(slots=True, eq=False)
class Entry:
    """One request: it holds its admission until its API server closes it."""

    request: Request
    api: ApiId
    api_epoch: Epoch
    arrival: int
    rows: dict[int, Row] = field(default_factory=dict)  # by choice
    closing: bool = False


class RowTable:
    """All requests, and how many rows are in each state."""

    def __init__(self) -> None:
        self.entries: dict[RequestId, Entry] = {}
        self.counts: dict[RowState, int] = dict.fromkeys(RowState, 0)
        self._arrivals = 0

    def open(self, request: Request, api: ApiId, api_epoch: Epoch) -> Entry:
        assert request.id not in self.entries
        self._arrivals += 1
        entry = Entry(request, api, api_epoch, self._arrivals)
        self.entries[request.id] = entry
        return entry

    def add(self, entry: Entry, wanted: ChoiceState) -> Row:
        request = entry.request
        order = (request.priority, request.rank, entry.arrival, wanted.choice)
        row = Row((request.id, wanted.choice), entry, order, wanted)
        entry.rows[wanted.choice] = row
        self.counts[row.state] += 1
        return row

    def find(self, ref: SeqRef) -> Row | None:
        """The row whose running (or last) attempt is exactly `ref`."""
        entry = self.entries.get(ref.request)
        row = entry.rows.get(ref.choice) if entry is not None else None
        if row is None or row.ref is None or row.ref.attempt != ref.attempt:
            return None
        return row

    def move(self, row: Row, event: RowEvent) -> RowState:
        before = row.state
        after = row.state = advance(before, event)
        self.counts[before] -= 1
        self.counts[after] += 1
        return after

    def remove(self, row: Row) -> None:
        """Forgets a row that is gone, and its request with the last one."""
        assert row.state is RowState.GONE
        self.counts[RowState.GONE] -= 1
        del row.entry.rows[row.key[1]]
        if not row.entry.rows:
            del self.entries[row.key[0]]

    def check_integrity(self) -> None:
        counts = dict.fromkeys(RowState, 0)
        for request, entry in self.entries.items():
            assert entry.rows, f"request {request} has no row"
            for row in entry.rows.values():
                counts[row.state] += 1
        assert counts == self.counts, f"{self.counts} should be {counts}"
