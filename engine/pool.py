"""The paged KV memory of one host, as tensors over one buffer.

Owns the view, not the memory: the buffer may be shared by several processes. Layout
[num_blocks, layers, 2, kv_heads, block_size, head_dim] in the model's dtype or another (int8: each
row of head_dim ends with its scale): one block is one contiguous piece over all layers. Where the
kernels' blocks are smaller than the scheduler's, each of the latter is `num_parts` neighbours.
Invariant: a view's block `b` is bytes [b * block_bytes, (b + 1) * block_bytes) of the buffer.
"""

import mmap
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from diptych.engine.core.model_config import KVDtype, ModelConfig
from diptych.engine.loader import TORCH_DTYPES

__all__ = ["KV_TORCH_DTYPES", "KVPool"]

KV_TORCH_DTYPES: Final[dict[str, torch.dtype]] = {**TORCH_DTYPES, "int8": torch.int8}


@dataclass(slots=True, frozen=True, eq=False)
class KVPool:
    data: Tensor  # [num_blocks * num_parts, layers, 2, kv_heads, kernel_block_size, kv_row]
    num_parts: int = 1  # blocks of the kernels in one block of the scheduler

    @staticmethod
    def over(
        buffer: memoryview | mmap.mmap | None,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        num_parts: int = 1,
        dtype: KVDtype | None = None,
    ) -> "KVPool":
        """A pool over `buffer` (writable, >= num_blocks * block_bytes); None maps fresh zeros.

        dtype: None is the model's. The buffer stays mapped as long as the pool lives. Fresh pages
        cost nothing until touched.
        """
        num_bytes = num_blocks * config.block_bytes(block_size, dtype)
        if buffer is None:
            buffer = mmap.mmap(-1, num_bytes)
        assert len(memoryview(buffer).cast("B")) >= num_bytes, "the buffer is too small"
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=num_bytes)
        shape = (
            num_blocks * num_parts,
            config.num_layers,
            2,
            config.num_kv_heads,
            block_size // num_parts,
            config.kv_row(dtype),
        )
        return KVPool(raw.view(KV_TORCH_DTYPES[dtype or config.dtype]).view(shape), num_parts)

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0] // self.num_parts

    @property
    def block_size(self) -> int:
        """Tokens of a block as the scheduler counts them."""
        return self.kernel_block_size * self.num_parts

    @property
    def kernel_block_size(self) -> int:
        return self.data.shape[4]

    def layer(self, layer: int, heads: range | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, kv_heads, block_size, kv_row]; only of
        the KV heads `heads` where they are given."""
        picked = slice(None) if heads is None else slice(heads.start, heads.stop)
        return self.data[:, layer, 0, picked], self.data[:, layer, 1, picked]
