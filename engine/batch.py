"""From a step plan to the index tensors that the model reads.

Owns nothing. Invariant: row s of the plan owns rows [qo_indptr[s], qo_indptr[s+1]) of the step, in
plan order, and every token's slot lies in a block of its own sequence.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.engine.core.plan import StepPlan
from diptych.engine.core.types import BlockId, blocks_for

__all__ = ["ModelInput", "build_input"]


@dataclass(slots=True, frozen=True, eq=False)
class ModelInput:
    """T tokens of S rows. All int32."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] block * block_size + offset
    qo_indptr: Tensor  # [S+1]
    kv_indptr: Tensor  # [S+1] into kv_indices
    kv_indices: Tensor  # [nnz] blocks of each sequence in order
    kv_len: Tensor  # [S] tokens in the pool, this step's included


def build_input(plan: StepPlan, block_size: int, num_parts: int = 1) -> ModelInput:
    """The plan's blocks must cover its tokens. Cost: O(tokens + blocks of the sequences).

    num_parts: blocks of the kernels in one block of the plan.
    """
    ids, positions, slots = array("i"), array("i"), array("i")
    blocks, kv_len = array("i"), array("i")
    qo_indptr, kv_indptr = array("i", [0]), array("i", [0])
    for row in plan.rows:
        start, end, table = row.start, row.start + row.length, row.seq.block_table
        used = blocks_for(end, block_size)
        assert 0 <= start < end <= len(row.seq.tokens), "a row outside its sequence"
        assert used <= len(table), "a row beyond its blocks"
        if row.length == 1:  # a decode: no slice of its long list
            ids.append(row.seq.tokens[start])
            positions.append(start)
            slots.append(table[used - 1] * block_size + start % block_size)
        else:
            ids.extend(row.seq.tokens[start:end])
            positions.extend(range(start, end))
            slots.extend(_slots(table, start, end, block_size))
        blocks.extend(table[:used])
        kv_len.append(end)
        qo_indptr.append(len(ids))
        kv_indptr.append(len(blocks))
    assert plan.num_tokens == len(ids), "num_tokens disagrees with the rows"
    if num_parts > 1:
        blocks, kv_indptr = (
            _split(blocks, num_parts),
            array("i", [n * num_parts for n in kv_indptr]),
        )
    return ModelInput(
        ids=_tensor(ids),
        positions=_tensor(positions),
        slot_mapping=_tensor(slots),  # of the plan's blocks: equal to those of their parts
        qo_indptr=_tensor(qo_indptr),
        kv_indptr=_tensor(kv_indptr),
        kv_indices=_tensor(blocks),
        kv_len=_tensor(kv_len),
    )


def _slots(table: list[BlockId], start: int, end: int, block_size: int) -> Iterator[int]:
    """Of tokens [start, end) of a sequence."""
    for index in range(start // block_size, blocks_for(end, block_size)):
        first = index * block_size  # token
        low, high = max(start, first) - first, min(end - first, block_size)
        yield from range(table[index] * block_size + low, table[index] * block_size + high)


def _split(blocks: "array[int]", num_parts: int) -> "array[int]":
    """The blocks of the kernels, in order."""
    return array("i", [block * num_parts + part for block in blocks for part in range(num_parts)])


def _tensor(numbers: "array[int]") -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int32)
