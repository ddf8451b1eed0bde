"""The paged KV memory of one host, as tensors over one buffer.

Owns the view, not the memory: the buffer may be shared by several processes. Layout
[num_blocks, layers, 2, kv_heads, block_size, head_dim] in the model's dtype: one block is one
contiguous piece over all layers. Invariant: a view's block `b` is bytes
[b * block_bytes, (b + 1) * block_bytes) of the buffer.
"""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.engine.core.model_config import ModelConfig
from diptych.engine.loader import TORCH_DTYPES

__all__ = ["KVPool"]


@dataclass(slots=True, frozen=True, eq=False)
class KVPool:
    data: Tensor  # [num_blocks, layers, 2, kv_heads, block_size, head_dim] model dtype

    @staticmethod
    def over(
        buffer: memoryview | mmap.mmap | None, config: ModelConfig, num_blocks: int, block_size: int
    ) -> "KVPool":
        """A pool over `buffer` (writable, >= num_blocks * block_bytes); None maps fresh zeros.

        The buffer stays mapped as long as the pool lives. Fresh pages cost nothing until touched.
        """
        num_bytes = num_blocks * config.block_bytes(block_size)
        if buffer is None:
            buffer = mmap.mmap(-1, num_bytes)
        assert len(memoryview(buffer).cast("B")) >= num_bytes, "the buffer is too small"
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=num_bytes)
        shape = (
            num_blocks,
            config.num_layers,
            2,
            config.num_kv_heads,
            block_size,
            config.head_dim,
        )
        return KVPool(raw.view(TORCH_DTYPES[config.dtype]).view(shape))

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0]

    @property
    def block_size(self) -> int:
        return self.data.shape[4]

    def layer(self, layer: int, heads: range | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, kv_heads, block_size, head_dim]; only of
        the KV heads `heads` where they are given."""
        picked = slice(None) if heads is None else slice(heads.start, heads.stop)
        return self.data[:, layer, 0, picked], self.data[:, layer, 1, picked]
