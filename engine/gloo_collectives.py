"""Collectives over torch's gloo: for ranks that share no memory, such as those on several hosts.

Owns one process group. Invariant: only whole parts travel (all-gather, never all-reduce, whose
order of additions depends on where an element lies), so the bits are those of shared memory.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore, GatherOptions, Store
from torch.distributed import ProcessGroupGloo

from diptych.engine.core.sharding import shards_of_rank

__all__ = ["GlooCollectives", "store_on_host"]

_FOR_EVER: Final = timedelta(days=3650)
"""An idle rank waits for its next step in a broadcast; who dies ends the others by other means."""
_MEET_MAX: Final = timedelta(seconds=60)  # until all ranks have found each other


class _Work(Protocol):
    def wait(self) -> bool: ...


class _Group(Protocol):
    """What torch's stubs do not say of a process group."""

    def allgather(self, out: list[list[Tensor]], own: list[Tensor]) -> _Work: ...
    def gather(
        self, out: Sequence[list[Tensor]], own: list[Tensor], how: GatherOptions
    ) -> _Work: ...
    def broadcast(self, tensor: Tensor, root: int) -> _Work: ...


def store_on_host(path: Path, num_ranks: int) -> Store:
    """Where ranks of one host find each other; a file that does not exist yet."""
    store = FileStore(str(path), num_ranks)
    store.set_timeout(_MEET_MAX)
    return store


class GlooCollectives:
    """`Collectives` of one rank. Made by all ranks at the same time; returns when all have met."""

    def __init__(self, store: Store, rank: int, num_ranks: int, num_shards: int, host: str) -> None:
        """store: where the ranks find each other. host: this rank's address to the others."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in the stubs
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _FOR_EVER
        self._group = cast(_Group, ProcessGroupGloo(store, rank, num_ranks, options))
        self.rank = rank
        self.num_ranks = num_ranks
        self.shards = shards_of_rank(num_shards, rank, num_ranks)
        self._own = torch.empty(0, dtype=torch.float32)  # [own shards * size]
        self._all = torch.empty(0, dtype=torch.float32)  # [num_shards * size]
        self._size = 0  # of this exchange

    def parts(self, size: int) -> list[Tensor]:
        own = len(self.shards)
        if own * size > self._own.numel():
            self._own = torch.empty(own * size, dtype=torch.float32)
            self._all = torch.empty(self.num_ranks * own * size, dtype=torch.float32)
        self._size = size
        return list(self._own[: own * size].view(own, size))

    def gather(self) -> Tensor:
        each = len(self.shards) * self._size
        everything = self._all[: self.num_ranks * each]
        self._group.allgather([list(everything.view(-1, each))], [self._own[:each]]).wait()
        return everything.view(-1, self._size)

    def collect(self) -> Tensor | None:
        each = len(self.shards) * self._size
        everything = self._all[: self.num_ranks * each]
        into = [list(everything.view(-1, each))] if self.rank == 0 else []
        how = GatherOptions()
        how.rootRank = 0
        self._group.gather(into, [self._own[:each]], how).wait()
        return everything.view(-1, self._size) if self.rank == 0 else None

    def share(self, numbers: Tensor) -> None:
        assert self.rank == 0
        self._broadcast(torch.tensor([numbers.numel()], dtype=torch.int32))
        self._broadcast(numbers)

    def receive(self) -> Tensor:
        count = torch.empty(1, dtype=torch.int32)
        self._broadcast(count)
        numbers = torch.empty(int(count[0]), dtype=torch.int32)
        self._broadcast(numbers)
        return numbers

    def _broadcast(self, numbers: Tensor) -> None:
        self._group.broadcast(numbers, 0).wait()
