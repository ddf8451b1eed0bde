"""The prefix cache of one pool: chain hash -> block, and which unused block to give up first.

Owns the map from hash to block, the tree of parents and the order of eviction; who uses a block is
the ledger's business (`park` when nobody does, `unpark` when somebody does again). Invariants: a
hash has one block and a block one hash; only parked blocks are evicted, leaves first, the one that
was parked longest ago first; lookups cost one dict access per block found.
"""

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from diptych.engine.core.types import BlockHash, BlockId


class PrefixCache:
    """Entries are inserted once their block is committed, and live until evicted."""

    def __init__(self) -> None:
        self._blocks: dict[BlockHash, BlockId] = {}
        self._names: dict[BlockId, tuple[BlockHash, BlockHash]] = {}  # block -> (hash, parent)
        self._children: dict[BlockHash, int] = {}  # hash -> entries whose parent it is
        self._parked: OrderedDict[BlockId, int] = OrderedDict()  # block -> stamp, oldest first
        self._leaves: list[tuple[int, BlockId]] = []  # heap of (stamp, block); may hold stale pairs
        self._stamp = 0

    def __contains__(self, block: BlockId) -> bool:
        return block in self._names

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    @property
    def num_entries(self) -> int:
        return len(self._names)

    def find(self, name: BlockHash) -> BlockId | None:
        return self._blocks.get(name)

    def is_parked(self, block: BlockId) -> bool:
        return block in self._parked

    def longest(self, hashes: Sequence[BlockHash], limit: int) -> list[BlockId]:
        """Blocks of the longest known prefix of `hashes`, at most `limit` of them."""
        found: list[BlockId] = []
        get = self._blocks.get
        for name in hashes[:limit]:
            block = get(name)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, block: BlockId, name: BlockHash, parent: BlockHash) -> bool:
        """Names a block in use. False: the hash has a block already, which stays the one."""
        assert block not in self._names, f"block {block} has a name"
        if name in self._blocks:
            return False
        self._blocks[name] = block
        self._names[block] = (name, parent)
        self._children[parent] = self._children.get(parent, 0) + 1
        return True

    def park(self, block: BlockId) -> None:
        """Nobody uses the block any more; it may be evicted from now on."""
        self._stamp += 1
        self._parked[block] = self._stamp
        if self._names[block][0] not in self._children:
            heappush(self._leaves, (self._stamp, block))
            if len(self._leaves) > 2 * len(self._parked) + 64:
                self._drop_stale()

    def unpark(self, block: BlockId) -> None:
        del self._parked[block]

    def evict(self) -> BlockId:
        """Forgets the leaf parked longest ago and returns its block; needs a parked block.

        An entry below a parked one may be in use (two sequences computed the same block, the second
        went on): then there may be no parked leaf, and the oldest parked block goes.
        """
        block = self._oldest_leaf()
        if block is None:
            block = next(iter(self._parked))
        name, parent = self._names.pop(block)
        del self._blocks[name]
        del self._parked[block]
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]
            above = self._blocks.get(parent)
            if above is not None and above in self._parked:
                heappush(self._leaves, (self._parked[above], above))
        return block

    def check_integrity(self) -> None:
        assert len(self._blocks) == len(self._names)
        children: dict[BlockHash, int] = {}
        for block, (name, parent) in self._names.items():
            assert self._blocks[name] == block
            children[parent] = children.get(parent, 0) + 1
        assert children == self._children
        stamps = list(self._parked.values())
        assert stamps == sorted(stamps)
        leaves = set(self._leaves)
        for block, stamp in self._parked.items():
            leaf = self._names[block][0] not in children
            assert not leaf or (stamp, block) in leaves, f"parked leaf {block} cannot be evicted"

    def _oldest_leaf(self) -> BlockId | None:
        while self._leaves:
            stamp, block = heappop(self._leaves)
            if self._is_leaf(stamp, block):
                return block
        return None

    def _is_leaf(self, stamp: int, block: BlockId) -> bool:
        return self._parked.get(block) == stamp and self._names[block][0] not in self._children

    def _drop_stale(self) -> None:
        self._leaves = [
            (stamp, block) for block, stamp in self._parked.items() if self._is_leaf(stamp, block)
        ]
        heapify(self._leaves)
