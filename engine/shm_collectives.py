"""Collectives of ranks on one host: each writes its parts where all of them read.

Owns memory that is mapped before the ranks are forked and belongs to nobody else. Invariant: a
piece of it is written again only after every rank has left the meeting that followed its reading:
two areas take turns, so one meeting per exchange is enough.
"""

import mmap
from typing import Final

import torch
from torch import Tensor

from diptych.engine.core.sharding import shards_of_rank
from diptych.kernels import library

__all__ = ["RankMemory", "ShmCollectives"]

_PAGE_BYTES: Final = 4096


class RankMemory:
    """Zeros, shared by all that are forked after it was made; untouched pages cost nothing.

    floats_max: of one exchange, all shards together; numbers_max: of one `share`.
    """

    def __init__(self, floats_max: int, numbers_max: int) -> None:
        sizes = [_PAGE_BYTES, *[_pages(4 + 4 * numbers_max)] * 2, *[_pages(4 * floats_max)] * 2]
        self._map = mmap.mmap(-1, sum(sizes))
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.meeting = self._view(torch.int32, 0, library.load().meeting_words())
        self.numbers = [  # [1 + numbers_max] each: how many, then they
            self._view(torch.int32, start, 1 + numbers_max) for start in starts[1:3]
        ]
        self.floats = [  # [floats_max] each
            self._view(torch.float32, start, floats_max) for start in starts[3:5]
        ]

    def _view(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        return torch.frombuffer(self._map, dtype=dtype, offset=offset, count=count)


class ShmCollectives:
    """`Collectives` of one rank over the memory that it inherited."""

    def __init__(self, memory: RankMemory, rank: int, num_ranks: int, num_shards: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.shards = shards_of_rank(num_shards, rank, num_ranks)
        self._memory = memory
        self._num_shards = num_shards
        self._turn = 0  # exchanges of parts so far
        self._shared = 0  # calls of share or receive so far
        self._parts = memory.floats[0][:0].view(num_shards, 0)  # of this turn, of all ranks
        self._meet_ranks = library.load().meet

    def parts(self, size: int) -> list[Tensor]:
        floats = self._memory.floats[self._turn % 2]
        count = self._num_shards * size
        assert count <= floats.numel(), f"an exchange of {count} floats is beyond the memory"
        self._turn += 1
        self._parts = floats[:count].view(self._num_shards, size)
        return [self._parts[shard] for shard in self.shards]

    def gather(self) -> Tensor:
        self._meet()
        return self._parts

    def collect(self) -> Tensor | None:
        self._meet()
        return self._parts if self.rank == 0 else None

    def share(self, numbers: Tensor) -> None:
        assert self.rank == 0
        count, area = numbers.numel(), self._area()
        assert count < area.numel(), f"a step of {count} numbers is beyond the memory"
        area[0] = count
        area[1 : 1 + count] = numbers
        self._meet()

    def receive(self) -> Tensor:
        area = self._area()
        self._meet()
        return area[1 : 1 + int(area[0])].clone()

    def _area(self) -> Tensor:
        area = self._memory.numbers[self._shared % 2]
        self._shared += 1
        return area

    def _meet(self) -> None:
        self._meet_ranks(self._memory.meeting, self.num_ranks)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
