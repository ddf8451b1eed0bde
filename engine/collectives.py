"""What the ranks of one worker say to each other in a step: the contract, and the rank alone.

A worker's rank 0 plans, samples and talks to the world; the others follow its steps. Each rank
computes some of the model's shards. Invariants: all ranks make the same calls in the same order
with the same sizes; `gather` gives the shards' parts in the order of the shards, so that a sum of
them is the same bits whatever the number of ranks, the batch or the kind of collectives.
"""

from typing import Protocol

import torch
from torch import Tensor

from diptych.engine.core.sharding import shards_of_rank

__all__ = ["Collectives", "Solo"]


class Collectives(Protocol):
    """No call has a time limit: a rank that dies takes the others with it (server/ranks.py)."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def shards(self) -> range:
        """The shards that this rank computes."""
        ...

    def parts(self, size: int) -> list[Tensor]:
        """Where this rank puts its part of each of its shards, [size] fp32 each; until `gather`."""
        ...

    def gather(self) -> Tensor:
        """The parts of all shards, [num_shards, size] fp32; valid until the next `parts`."""
        ...

    def collect(self) -> Tensor | None:
        """As `gather`, for rank 0 only; the others get None."""
        ...

    def share(self, numbers: Tensor) -> None:
        """Rank 0 gives [n] int32 to the others."""
        ...

    def receive(self) -> Tensor:
        """What rank 0 shared next, [n] int32; the caller's own. Waits without using the CPU."""
        ...


class Solo:
    """One rank that computes all shards, one after another."""

    def __init__(self, num_shards: int) -> None:
        self.rank = 0
        self.num_ranks = 1
        self.shards = shards_of_rank(num_shards, 0, 1)
        self._floats = torch.empty(0, dtype=torch.float32)
        self._parts = self._floats.view(1, 0)  # [num_shards, size]

    def parts(self, size: int) -> list[Tensor]:
        count = len(self.shards)
        if count * size > self._floats.numel():
            self._floats = torch.empty(count * size, dtype=torch.float32)
        self._parts = self._floats[: count * size].view(count, size)
        return list(self._parts)

    def gather(self) -> Tensor:
        return self._parts

    def collect(self) -> Tensor | None:
        return self._parts

    def share(self, numbers: Tensor) -> None:
        """Nobody listens."""

    def receive(self) -> Tensor:
        raise AssertionError("a rank alone follows nobody")
