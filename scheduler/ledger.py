"""Who holds each block of one pool: the only place where a block changes hands.

Owns every block's state, use count and generation, and the pool's prefix cache. Invariants: a block
is in exactly one of free, private (one sequence writes it), shared (committed, immutable, used by
one or more), cached (committed, used by none, found by hash); its generation is raised when it is
taken from the free blocks, so before it can be written again.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum

from diptych.engine.core.types import BlockHash, BlockId, Generation
from diptych.scheduler.commands import PageEntry
from diptych.scheduler.prefix_cache import PrefixCache


class BlockState(IntEnum):
    FREE = 0
    PRIVATE = 1
    SHARED = 2
    CACHED = 3


_FREE, _PRIVATE, _SHARED, _CACHED = BlockState


class PoolLedger:
    """All blocks of one pool. `allocate` and `share` are undone by `release`, block by block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache = PrefixCache()
        self.generations: list[Generation] = [0] * num_blocks
        self._states: list[BlockState] = [_FREE] * num_blocks
        self._uses: list[int] = [0] * num_blocks
        self._free: deque[BlockId] = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return self.cache.num_parked

    @property
    def num_used(self) -> int:
        """Private or shared."""
        return self.num_blocks - len(self._free) - self.cache.num_parked

    @property
    def num_available(self) -> int:
        """What `allocate` can give: free blocks, and cached ones by eviction."""
        return len(self._free) + self.cache.num_parked

    def up_to(self, count: int) -> int:
        """How many of `count` blocks `allocate` can give."""
        return count if len(self._free) >= count else min(count, self.num_available)

    def state(self, block: BlockId) -> BlockState:
        return self._states[block]

    def states(self) -> list[BlockState]:
        return list(self._states)

    def uses(self, block: BlockId) -> int:
        return self._uses[block]

    def adopt(self, generations: Sequence[Generation], entries: Iterable[PageEntry]) -> None:
        """Continues what a control page says: its generations, and its valid entries as cached."""
        assert self.num_free == self.num_blocks, "a pool is adopted before it is used"
        assert len(generations) == self.num_blocks
        self.generations = list(generations)
        named = [e.block for e in entries if self.cache.insert(e.block, e.hash, e.parent)]
        for block in named:
            self._states[block] = _CACHED
            self.cache.park(block)
        self._free = deque(b for b in range(self.num_blocks) if self._states[b] is _FREE)

    def num_available_beside(self, found: Iterable[BlockId]) -> int:
        """What `allocate` can give after `share(found)`."""
        is_parked = self.cache.is_parked
        return self.num_available - sum(is_parked(block) for block in found)

    def allocate(self, count: int) -> list[BlockId]:
        """`count` private blocks with new generations; evicts cached ones as needed."""
        if len(self._free) < count:
            assert count <= self.num_available, f"{count} of {self.num_available} blocks"
        taken: list[BlockId] = []
        for _ in range(count):
            if not self._free:
                self.evict()
            block = self._free.popleft()
            self.generations[block] += 1
            self._states[block] = _PRIVATE
            self._uses[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[BlockId]) -> None:
        """One more user for each of these committed blocks."""
        for block in blocks:
            state = self._states[block]
            assert state is _SHARED or state is _CACHED, f"block {block} is {state.name}"
            if state is _CACHED:
                self.cache.unpark(block)
                self._states[block] = _SHARED
            self._uses[block] += 1

    def commit(
        self, block: BlockId, generation: Generation, name: BlockHash, parent: BlockHash
    ) -> bool:
        """A private block is full: immutable and shareable from now. False: it was no such block.

        A second block of the same hash gets no name; it becomes free when it is released.
        """
        if self._states[block] is not _PRIVATE or self.generations[block] != generation:
            return False
        self._states[block] = _SHARED
        self.cache.insert(block, name, parent)
        return True

    def release(self, table: Sequence[BlockId]) -> None:
        """One user less for each; the end of the table is given up first, so leaves are older."""
        for block in reversed(table):
            assert self._uses[block] > 0, f"block {block} has no user"
            self._uses[block] -= 1
            if self._uses[block]:
                continue
            if block in self.cache:
                self._states[block] = _CACHED
                self.cache.park(block)
            else:
                self._states[block] = _FREE
                self._free.append(block)

    def evict(self) -> BlockId:
        """Turns the cached block that is least worth keeping into a free one."""
        block = self.cache.evict()
        assert self._states[block] is _CACHED
        self._states[block] = _FREE
        self._free.append(block)
        return block

    def check_integrity(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block, state in enumerate(self._states):
            uses, named = self._uses[block], block in self.cache
            parked = self.cache.is_parked(block)
            assert (state is _FREE) == (block in free), f"block {block} is {state.name}"
            assert (state is _CACHED) == parked, f"block {block} is {state.name}"
            assert (uses > 0) == (state is _PRIVATE or state is _SHARED), f"block {block}: {uses}"
            assert state is not _PRIVATE or (uses == 1 and not named), f"block {block}: {uses}"
            assert state is not _FREE or not named, f"free block {block} has a hash"
        self.cache.check_integrity()
