"""Reads of one peer that a NIXL process carries out together.

Owns their transfers: the data in pieces, so that the worker can digest what is here while the rest
moves, then the generations of all blocks. Invariants: the generations are asked for when all data
is here; a batch is over only when nothing of it is under way, whatever became of it.
"""

import time
from collections.abc import Callable, Sequence

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
from diptych.transfer.spans import cut


class Batch:
    """`reads` in order, as one row of blocks; `move` begins it."""

    def __init__(self, agent: Agent, pool: RemotePool, reads: Sequence[NixlRead]) -> None:
        self.reads = reads
        self.since_s = time.monotonic()
        self.num_cancelled = 0
        self.failure: Exception | None = None  # nothing new begins; what is under way is awaited
        self._agent = agent
        self._pool = pool
        self._source = np.frombuffer(b"".join(read.source for read in reads), np.int32)
        self._moving: list[tuple[Transfer, Indices]] = []  # and the own blocks of its piece
        self._places: Indices = np.empty(0, np.int32)  # by block: its page of the scratch
        self._pages: list[int] = []  # of the scratch, for those of the column of generations
        self._generations: Transfer | None = None

    # ---- data

    def move(self) -> None:
        """Begins all pieces."""
        agent, pool = self._agent, self._pool
        own = np.frombuffer(b"".join(read.own for read in self.reads), np.int32)
        for first, end in cut(len(own), agent.peer_block_bytes):
            mine, theirs = own[first:end], self._source[first:end]
            try:
                transfer = agent.make(agent.blocks, mine, pool.blocks, theirs)
                transfer.post()
            except Exception as error:  # whatever NIXL raises: nothing of this piece is under way
                self.failure = error
                return
            self._moving.append((transfer, mine))

    def look(self, tell: Callable[[NixlMoved], None]) -> bool:
        """Whether data is under way still; `tell` hears what came."""
        for piece in self._moving.copy():
            transfer, mine = piece
            try:
                if not transfer.over():
                    continue
                tell(NixlMoved(mine.tobytes()))
            except PeerGone as error:
                self.failure = error
            self._moving.remove(piece)
        return bool(self._moving)

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
        page_of = np.zeros(int(wanted[-1]) + 1, np.int32)
        page_of[wanted] = mine
        self._places = page_of[columns]
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
        return self._agent.scratch[self._places, self._source % ENTRIES].tobytes()

    def free(self, free_pages: list[int]) -> None:
        """Nothing is under way any more."""
        free_pages[:0] = self._pages
        self._pages = []
