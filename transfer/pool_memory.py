"""One pool as bytes: its blocks and its control page, own or a peer's.

Owns the views, not the memory. Invariant: block b begins at byte b * block_bytes.
"""

from collections.abc import Sequence

from diptych.engine.core.types import BlockId
from diptych.kernels.blocks import copy_blocks, digest_blocks
from diptych.transfer.control_page import ControlPage


class PoolMemory:
    def __init__(self, data: memoryview, page: ControlPage, block_bytes: int) -> None:
        assert len(data) >= page.num_blocks * block_bytes
        self.data = data  # [num_blocks * block_bytes] bytes
        self.page = page
        self.block_bytes = block_bytes

    @property
    def num_blocks(self) -> int:
        return self.page.num_blocks

    def blocks(self, first: BlockId, count: int) -> memoryview:
        """Neighbouring blocks as one piece."""
        return self.data[first * self.block_bytes : (first + count) * self.block_bytes]

    def digests(self, blocks: Sequence[BlockId]) -> list[int]:
        return digest_blocks(self.data, blocks, self.block_bytes)

    def copy_from(
        self, peer: "PoolMemory", source: Sequence[BlockId], own: Sequence[BlockId]
    ) -> list[int]:
        """The peer's blocks `source` over the own ones; the digests of the copies."""
        return copy_blocks(self.data, own, peer.data, source, self.block_bytes)
