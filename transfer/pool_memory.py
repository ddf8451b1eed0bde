"""One pool as bytes: its blocks and its control page, own or a peer's.

Owns the views, not the memory. Invariant: block b begins at byte b * block_bytes.
"""

from dataclasses import dataclass

from diptych.engine.core.types import BlockId
from diptych.transfer.control_page import ControlPage
from diptych.transfer.digest import block_digest


@dataclass(slots=True, frozen=True, eq=False)
class PoolMemory:
    data: memoryview  # [num_blocks * block_bytes] bytes
    page: ControlPage
    block_bytes: int

    @property
    def num_blocks(self) -> int:
        return self.page.num_blocks

    def blocks(self, first: BlockId, count: int) -> memoryview:
        """Neighbouring blocks as one piece."""
        return self.data[first * self.block_bytes : (first + count) * self.block_bytes]

    def digest(self, block: BlockId) -> int:
        return block_digest(self.blocks(block, 1))
