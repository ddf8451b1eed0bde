"""The shared memory of one simulated host: a pool of cells and the real control page.

Survives every process but the supervisor. Invariant: an entry is valid only while
`committed == generation > 0`; a kill may fall between the stores that make it valid.
"""

from diptych.engine.core.types import BlockId, Generation, PoolId
from diptych.scheduler.commands import CommitBlock, PageEntry, PoolRead
from diptych.transfer.control_page import ControlPage, page_bytes


class Memory:
    """Pool and control page of one memory domain."""

    def __init__(self, pool: PoolId, num_blocks: int, block_size: int) -> None:
        self.pool = pool
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cells: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]
        self.page = ControlPage(memoryview(bytearray(page_bytes(num_blocks, 0))), num_blocks, 0)

    def generation(self, block: BlockId) -> Generation:
        return self.page._generation[block]

    def committed(self, block: BlockId) -> Generation:
        return self.page._committed[block]

    def is_valid(self, block: BlockId) -> bool:
        return 0 < self.generation(block) == self.committed(block)

    def tear(self, command: CommitBlock) -> None:
        """What a writer leaves that is killed before the last store of a commit."""
        before = self.committed(command.block)
        self.page.commit(command.block, command.generation, command.hash, command.parent)
        self.page._committed[command.block] = before

    def read(self) -> PoolRead:
        """What the scheduler's shell reads when every worker of the pool is quiet."""
        generations, entries = self.page.read_all()
        return PoolRead(
            self.pool,
            generations,
            [PageEntry(entry.block, entry.hash, entry.parent) for entry in entries],
        )
