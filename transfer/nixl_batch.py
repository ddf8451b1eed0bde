"""Reads of one peer that a NIXL process carries out together.

Owns their transfers: the data in pieces, so that the worker can digest what is here while the rest
moves, then the generations of all blocks. Invariants: the generations are asked for when all data
is here; a batch is over only when nothing of it is under way, whatever became of it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from diptych.transfer.nixl_agent import (
    ENTRIES,
    SCRATCH_PAGES,
    Agent,
    Indices,
    PeerGone,
    RemotePool,
    Transfer,
)
from diptych.transfer.nixl_wire import NixlMoved, NixlRead

PIECE_BYTES_MAX: Final = 8 << 20
PIECE_BYTES_MIN: Final = 1 << 20


def cut(count: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Pieces [first, end) of so many blocks: none is more than half of what is left, so that
    little is left to digest when the last one is here; few, since each costs a call."""
    most, least = (max(1, size // block_bytes) for size in (PIECE_BYTES_MAX, PIECE_BYTES_MIN))
    first = 0
    while first < count:
        left = count - first
        size = min(left, max(least, min(most, left // 2)))
        yield first, first + size
        first += size


class Batch:
    """`reads` in order, as one row of blocks."""

    def __init__(self, agent: Agent, pool: RemotePool, reads: Sequence[NixlRead]) -> None:
        self.reads = reads
        self.since_s = time.monotonic()
        self.num_cancelled = 0
        self.failure: Exception | None = None  # nothing new begins; what is under way is awaited
        self._agent = agent
        self._pool = pool
        self._source = np.frombuffer(b"".join(read.source for read in reads), np.int32)
        self._moving: deque[tuple[Transfer, int, int]] = deque()  # of blocks [first, end)
        self._pages: list[int] = []  # of the scratch, for those of the column of generations
        self._places: Indices = np.empty(0, np.int32)  # by block: its page of the scratch
        self._generations: Transfer | None = None

    # ---- data

    def post(self, tell: Callable[[NixlMoved], None]) -> None:
        """All data, piece by piece; `tell` hears of what is here when a post returns."""
        own = np.frombuffer(b"".join(read.own for read in self.reads), np.int32)
        agent, pool, source = self._agent, self._pool, self._source
        for first, end in cut(len(own), agent.peer_block_bytes):
            try:
                transfer = agent.make(agent.blocks, own[first:end], pool.blocks, source[first:end])
            except Exception as error:  # whatever NIXL raises: nothing of this piece has begun
                self.failure = error
                return
            try:
                transfer.post()
            except PeerGone as error:
                self.failure = error
                return
            self._moving.append((transfer, first, end))
            self.look(tell)

    def look(self, tell: Callable[[NixlMoved], None]) -> bool:
        """Whether data is under way still."""
        while self._moving:
            transfer, first, end = self._moving[0]
            try:
                if not transfer.over():
                    break
                if self.failure is None:
                    tell(self._moved(first, end))
            except PeerGone as error:
                self.failure = error
            self._moving.popleft()
        return bool(self._moving)

    def _moved(self, first: int, end: int) -> NixlMoved:
        upto, start = [], 0
        for read in self.reads:
            count = len(read.own) // 4
            if first < start + count and start < end:
                upto.append((read.handle, min(count, end - start)))
            start += count
        return NixlMoved(upto)

    # ---- generations

    def ask_generations(self, free_pages: list[int]) -> bool:
        """Once all data is here. False: other batches have the pages that it would need."""
        columns = self._source // ENTRIES
        wanted = np.flatnonzero(np.bincount(columns)).astype(np.int32)
        assert len(wanted) <= SCRATCH_PAGES
        if len(wanted) > len(free_pages):
            return False
        self._pages = free_pages[: len(wanted)]
        del free_pages[: len(wanted)]
        mine = np.array(self._pages, np.int32)
        page_of = np.empty(int(wanted[-1]) + 1, np.int32)
        page_of[wanted] = mine
        self._places = page_of[columns]
        pool = self._pool
        try:
            self._generations = self._agent.make(pool.scratch, mine, pool.pages, wanted)
            self._generations.post()
        except Exception as error:
            self.failure = error
        return True

    @property
    def asked(self) -> bool:
        return bool(self._pages)

    def generations(self) -> bytes | None:
        """u64 each, by block of the row; None: not here yet, or not to be had (`failure`)."""
        assert self._generations is not None
        try:
            if not self._generations.over():
                return None
        except PeerGone as error:
            self.failure = error
            return None
        return self._agent.scratch[self._places, self._source % ENTRIES].tobytes()

    def free(self, free_pages: list[int]) -> None:
        """Nothing is under way any more."""
        free_pages[:0] = self._pages
        self._pages = []
