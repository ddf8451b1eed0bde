"""Reads from pools of the same host: the peer's memory is mapped here, read-only.

Owns the order of its reads, nothing else. A copy happens inside `poll`, so nothing is under way
between two calls: a cancel is over at once, and the source's process may be dead or stopped.
"""

from collections import deque

from diptych.engine.core.types import PoolId
from diptych.transfer.backend import POLL_BYTES_MAX
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.spans import Read, ReadDone, ReadFailed, own_blocks, source_blocks


class ShmBackend:
    name = "shm"

    def __init__(self, own: PoolMemory, peers: dict[PoolId, PoolMemory]) -> None:
        self._own = own
        self._peers = peers
        self._queue: deque[Read] = deque()
        self._answers: list[ReadDone | ReadFailed] = []

    @property
    def eager(self) -> bool:
        return bool(self._queue or self._answers)

    def read(self, read: Read) -> None:
        self._queue.append(read)

    def poll(self) -> list[ReadDone | ReadFailed]:
        answers, self._answers = self._answers, []
        left = POLL_BYTES_MAX
        while self._queue and left > 0:
            read = self._queue.popleft()
            digests = self._copy(read)
            left -= len(digests) * self._own.block_bytes
            generations = self._peers[read.pool].page.generations(source_blocks(read.spans))
            answers.append(ReadDone(read.handle, generations, digests))
        return answers

    def cancel(self, handle: int) -> None:
        for read in self._queue:
            if read.handle == handle:
                self._queue.remove(read)
                self._answers.append(ReadFailed(handle, "cancelled"))
                return

    def fds(self) -> dict[int, bool]:
        return {}

    def close(self) -> None:
        self._queue.clear()

    def _copy(self, read: Read) -> list[int]:
        """Digests of the own blocks, taken while they are written."""
        source, own = source_blocks(read.spans), own_blocks(read.spans)
        return self._own.copy_from(self._peers[read.pool], source, own)
