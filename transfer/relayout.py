"""Reads from a pool with another block layout: as they are into a staging memory, then converted.

Wraps any backend. Owns the staging blocks. The digests are those of the source's bytes, taken in
the staging memory, so a block is known to be right before anybody believes its conversion.
Invariant: own blocks are written inside `poll` only, so a cancelled read writes nothing.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from diptych.engine.core.types import BlockId
from diptych.transfer.backend import Backend
from diptych.transfer.spans import Read, ReadDone, ReadFailed, coalesce, own_blocks, source_blocks

STAGING_BLOCKS: Final = 512
"""Enough for the reads of two pulls; what finds no room waits."""


class RelayoutBackend:
    """`inner` reads into a staging memory of `num_staging` blocks; `convert(staging, own)`."""

    def __init__(
        self,
        inner: Backend,
        convert: Callable[[Sequence[BlockId], Sequence[BlockId]], None],
        num_staging: int = STAGING_BLOCKS,
    ) -> None:
        self.name = f"{inner.name}, converted"
        self._inner = inner
        self._convert = convert
        self._free = list(range(num_staging))
        self._waiting: deque[Read] = deque()
        self._running: dict[int, tuple[list[BlockId], list[BlockId]]] = {}  # staging, own
        self._cancelled: set[int] = set()  # of those
        self._answers: list[ReadDone | ReadFailed] = []

    @property
    def eager(self) -> bool:
        return bool(self._answers) or self._inner.eager

    def read(self, read: Read) -> None:
        self._waiting.append(read)
        self._begin()

    def poll(self) -> list[ReadDone | ReadFailed]:
        answers, self._answers = self._answers, []
        for answer in self._inner.poll():
            staging, own = self._running.pop(answer.handle)
            if answer.handle in self._cancelled:
                self._cancelled.remove(answer.handle)
                answer = ReadFailed(answer.handle, "cancelled")
            if isinstance(answer, ReadDone):
                self._convert(staging, own)
            self._free = sorted(self._free + staging)
            answers.append(answer)
        self._begin()
        return answers

    def cancel(self, handle: int) -> None:
        if handle in self._running:
            self._cancelled.add(handle)
            self._inner.cancel(handle)
            return
        for read in list(self._waiting):
            if read.handle == handle:
                self._waiting.remove(read)
                self._answers.append(ReadFailed(handle, "cancelled"))

    def fds(self) -> dict[int, bool]:
        return self._inner.fds()

    def close(self) -> None:
        self._waiting.clear()
        self._inner.close()

    def _begin(self) -> None:
        while self._waiting:
            read = self._waiting[0]
            source = source_blocks(read.spans)
            own = own_blocks(read.spans)
            if len(source) > len(self._free):
                return
            self._waiting.popleft()
            staging, self._free = self._free[: len(source)], self._free[len(source) :]
            self._running[read.handle] = staging, own
            self._inner.read(msgspec.structs.replace(read, spans=coalesce(source, staging)))
