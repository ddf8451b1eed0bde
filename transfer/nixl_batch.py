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
PIECE_BYTES_MIN: Final = 2 << 20


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


def upto(reads: Sequence[NixlRead], first: int, end: int) -> list[tuple[int, int]]:
    """Which of the reads have blocks in [first, end) of the row, and how many of theirs are before
    its end: (handle, blocks)."""
    found, start = [], 0
    for read in reads:
        count = len(read.own) // 4
        if first < start + count and start < end:
            found.append((read.handle, min(count, end - start)))
        start += count
    return found


class Batch:
    """Reads in the order in which they were added, as one row of blocks."""

    def __init__(self, agent: Agent, pool: RemotePool) -> None:
        self.reads: list[NixlRead] = []
        self.since_s = time.monotonic()
        self.num_cancelled = 0
        self.failure: Exception | None = None  # nothing new begins; what is under way is awaited
        self._agent = agent
        self._pool = pool
        self._moving: deque[tuple[Transfer, list[tuple[int, int]]]] = deque()  # and `upto`
        self._places: list[
            tuple[Indices, Indices]
        ] = []  # page of the column, entry in it; by block
        self._columns: set[int] = set()  # pages of the column that hold generations of these blocks
        self._page_of: Indices = np.empty(0, np.int32)  # of the scratch, by page of the column
        self._pages: list[int] = []  # those
        self._generations: Transfer | None = None

    @property
    def num_bytes(self) -> int:
        return sum(len(read.own) for read in self.reads) // 4 * self._agent.peer_block_bytes

    # ---- data

    def move(self, reads: Sequence[NixlRead], tell: Callable[[NixlMoved], None]) -> None:
        """Adds them and moves their data, piece by piece; `tell` hears of what is here when a post
        returns."""
        self.reads += reads
        agent, pool = self._agent, self._pool
        source = np.frombuffer(b"".join(read.source for read in reads), np.int32)
        own = np.frombuffer(b"".join(read.own for read in reads), np.int32)
        columns = source // ENTRIES  # here: once the data is moved, all else has left the caches
        self._places.append((columns, source % ENTRIES))
        self._columns.update(np.flatnonzero(np.bincount(columns)).tolist())
        for first, end in cut(len(own), agent.peer_block_bytes):
            if self.failure is not None:
                return
            try:
                transfer = agent.make(agent.blocks, own[first:end], pool.blocks, source[first:end])
                transfer.post()
            except Exception as error:  # whatever NIXL raises: nothing of this piece is under way
                self.failure = error
                return
            self._moving.append((transfer, upto(reads, first, end)))
            self.look(tell)

    def look(self, tell: Callable[[NixlMoved], None]) -> bool:
        """Whether data is under way still."""
        while self._moving:
            transfer, here = self._moving[0]
            try:
                if not transfer.over():
                    break
                if self.failure is None:
                    tell(NixlMoved(here))
            except PeerGone as error:
                self.failure = error
            self._moving.popleft()
        return bool(self._moving)

    # ---- generations

    def ask_generations(self, free_pages: list[int]) -> bool:
        """Once all data is here. False: other batches have the pages that it would need."""
        assert len(self._columns) <= SCRATCH_PAGES
        if len(self._columns) > len(free_pages):
            return False
        wanted = np.array(sorted(self._columns), np.int32)
        self._pages = free_pages[: len(wanted)]
        del free_pages[: len(wanted)]
        mine = np.array(self._pages, np.int32)
        self._page_of = np.zeros(int(wanted[-1]) + 1, np.int32)
        self._page_of[wanted] = mine
        pool = self._pool
        try:
            self._generations = self._agent.make(pool.scratch, mine, pool.pages, wanted)
            self._generations.post()
        except Exception as error:  # as above
            self.failure = error
        return True

    @property
    def asked(self) -> bool:
        return bool(self._pages)

    def generations(self) -> bytes | None:
        """u64 each, by block of the row; None: not here yet, or not to be had (`failure`)."""
        if self._generations is None:
            return None
        try:
            if not self._generations.over():
                return None
        except PeerGone as error:
            self.failure = error
            return None
        scratch, page_of = self._agent.scratch, self._page_of
        return b"".join(scratch[page_of[column], entry].tobytes() for column, entry in self._places)

    def free(self, free_pages: list[int]) -> None:
        """Nothing is under way any more."""
        free_pages[:0] = self._pages
        self._pages = []
