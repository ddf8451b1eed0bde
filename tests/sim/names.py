"""What the prefix cache should know, followed from outside: which block has which name.

Owns a mirror of one pool's cache, built from what workers report and what a page says. Invariant
that it checks: eviction takes a block that others follow only when no unused leaf exists.
"""

from diptych.engine.core.messages import CommittedBlock
from diptych.engine.core.types import BlockHash, BlockId
from diptych.scheduler.commands import PageEntry
from tests.sim.world import check


class Names:
    """One pool's names: the first committed block of a hash has it until it is given away."""

    def __init__(self) -> None:
        self._blocks: dict[BlockHash, BlockId] = {}
        self._names: dict[BlockId, tuple[BlockHash, BlockHash]] = {}  # (hash, parent)
        self._new: set[BlockId] = set()  # named in the scheduler's present step
        self._refused: set[BlockHash] = set()  # committed in it, but named already
        self._exact = True  # False: commits and evictions of one step could not be ordered

    def begin_step(self) -> None:
        self._new.clear()
        self._refused.clear()

    def adopt(self, entries: list[PageEntry]) -> None:
        self._blocks.clear()
        self._names.clear()
        self._exact = True
        for entry in entries:
            self._insert(entry.block, entry.hash, entry.parent)

    def commit(self, row: CommittedBlock) -> None:
        if row.hash in self._blocks:
            self._refused.add(row.hash)
        self._insert(row.block, row.hash, row.parent)
        self._new.add(row.block)

    def _insert(self, block: BlockId, name: BlockHash, parent: BlockHash) -> None:
        if name not in self._blocks:
            self._blocks[name] = block
            self._names[block] = (name, parent)

    def give_away(self, block: BlockId, unused: set[BlockId]) -> None:
        """`block` goes to somebody; `unused` blocks were used by nobody all through this step."""
        if block not in self._names:
            return
        name, above = self._names.pop(block)
        del self._blocks[name]
        old = [entry for other, entry in self._names.items() if other not in self._new]
        self._exact = self._exact and name not in self._refused
        if not self._exact or all(parent != name for _, parent in old):
            return
        parents = {above, *(parent for _, parent in self._names.values())}  # as it was before
        for other in unused & self._names.keys():
            leaf = self._names[other][0] not in parents
            check(not leaf, "block {} is evicted before the leaf {}", block, other)
