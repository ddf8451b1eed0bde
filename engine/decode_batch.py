"""The sequences of a decode step and its index tensors, kept from one step to the next.

Owns the tensors, which C++ reads and fills in place, and a copy of each sequence's block table.
Invariant: the copies are beginnings of the tables, which only grow; where they are too short for a
step, `read_tables` makes them as long again.
"""

from array import array
from operator import is_
from typing import Final

import torch
from torch import Tensor

from diptych.engine.core.plan import StepRow
from diptych.engine.core.request import Sequence
from diptych.kernels import DecodeRows

__all__ = ["DecodeBatch"]

_ROWS_MIN: Final = 16  # of the smallest buffers


class DecodeBatch:
    def __init__(self, num_parts: int) -> None:
        """num_parts: blocks of the kernels in one block of a sequence."""
        self._num_parts = num_parts
        self.seqs: list[Sequence] = []
        self._tables: dict[int, array[int]] = {}  # id of a sequence in `seqs` -> kernels' blocks
        self._grow(_ROWS_MIN)

    def _grow(self, capacity: int) -> None:
        self._ids, self._positions, self._chosen = (_zeros(capacity) for _ in range(3))
        none = torch.zeros(0, dtype=torch.int32)
        self.rows = DecodeRows(
            num_rows=0,
            ids=_tensor(self._ids),
            positions=_tensor(self._positions),
            kv_indptr=none,
            kv_indices=none,
            chosen=_tensor(self._chosen),
            logprobs=torch.zeros(capacity, dtype=torch.float32),
        )

    def take(self, rows: list[StepRow]) -> None:
        """The next step: one token of each of these rows. `seqs` stays the same list where these
        are the sequences of the last step, in their order.
        """
        seqs = [row.seq for row in rows]
        if len(seqs) != len(self.seqs) or not all(map(is_, seqs, self.seqs)):
            if len(seqs) > len(self._ids):
                self._grow(max(len(seqs), 2 * len(self._ids)))
            self.seqs = seqs
            self.read_tables()
        starts = [row.start for row in rows]
        ids = [seq.tokens[start] for seq, start in zip(seqs, starts, strict=True)]
        self._positions[: len(seqs)] = array("i", starts)
        self._ids[: len(seqs)] = array("i", ids)

    def read_tables(self) -> None:
        """Takes over the sequences' block tables as they are now."""
        known, self._tables = self._tables, {}
        blocks, ends = array("i"), [0]
        for seq in self.seqs:
            table = known.get(id(seq))  # `seqs` kept it alive: the id is still its own
            if table is None or len(table) != len(seq.block_table) * self._num_parts:
                table = self._kernel_blocks(seq)
            self._tables[id(seq)] = table
            blocks += table
            ends.append(len(blocks))
        assert blocks, "rows without blocks"
        rows = self.rows
        rows.num_rows = len(self.seqs)
        rows.kv_indptr, rows.kv_indices = _tensor(array("i", ends)), _tensor(blocks)

    def _kernel_blocks(self, seq: Sequence) -> "array[int]":
        if self._num_parts == 1:
            return array("i", seq.block_table)
        parts = range(self._num_parts)
        return array("i", [b * self._num_parts + part for b in seq.block_table for part in parts])

    def chosen(self) -> list[int]:
        """`rows.chosen` as the last step filled it."""
        return self._chosen[: len(self.seqs)].tolist()


def _zeros(size: int) -> "array[int]":
    return array("i", bytes(4 * size))


def _tensor(numbers: "array[int]") -> Tensor:
    """A view; the array cannot change its length while it lives."""
    return torch.frombuffer(numbers, dtype=torch.int32)
