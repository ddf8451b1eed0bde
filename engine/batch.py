"""From a step plan to the index tensors that the model reads.

Owns nothing. Invariant: row s of the plan owns rows [qo_indptr[s], qo_indptr[s+1]) of the step, in
plan order, and every token's slot lies in a block of its own sequence.
"""

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.engine.core.plan import StepPlan
from diptych.engine.core.types import blocks_for

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
    ids, blocks, num_blocks = array("i"), array("i"), array("i", [0])
    for row in plan.rows:
        end = row.start + row.length
        used = blocks_for(end, block_size)
        assert 0 <= row.start < end <= len(row.seq.tokens), "a row outside its sequence"
        assert used <= len(row.seq.block_table), "a row beyond its blocks"
        if row.length == 1:  # a decode: no slice of its long list
            ids.append(row.seq.tokens[row.start])
        else:
            ids.extend(row.seq.tokens[row.start : end])
        blocks.extend(row.seq.block_table[:used])
        num_blocks.append(used)
    starts = np.array([row.start for row in plan.rows], dtype=np.int32)  # [S]
    lengths = np.array([row.length for row in plan.rows], dtype=np.int32)  # [S]
    qo_indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=qo_indptr[1:])
    kv_indptr = np.cumsum(np.frombuffer(num_blocks, dtype=np.int32), dtype=np.int32)
    kv_indices = np.frombuffer(blocks, dtype=np.int32)
    if num_parts > 1:
        parts = np.arange(num_parts, dtype=np.int32)
        kv_indices = (kv_indices[:, None] * np.int32(num_parts) + parts).reshape(-1)
        kv_indptr, block_size = kv_indptr * np.int32(num_parts), block_size // num_parts
    first = np.repeat(starts - qo_indptr[:-1], lengths)  # [T] position of a row's token 0 - its row
    positions = np.arange(len(ids), dtype=np.int32) + first
    block, offset = np.divmod(positions, np.int32(block_size))
    slots = kv_indices[np.repeat(kv_indptr[:-1], lengths) + block] * np.int32(block_size) + offset
    assert plan.num_tokens == len(ids), "num_tokens disagrees with the rows"
    return ModelInput(
        ids=torch.frombuffer(ids, dtype=torch.int32),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        qo_indptr=torch.from_numpy(qo_indptr),
        kv_indptr=torch.from_numpy(kv_indptr),
        kv_indices=torch.from_numpy(kv_indices),
        kv_len=torch.from_numpy(starts + lengths),
    )
