"""Blocks of KV from one layout into another: other block sizes, another dtype.

Both sides meet in units of 16 tokens, of which every layout is made whole: [unit, layers, 2,
kv_heads, 16 * head_dim], all heads whatever the tensor-parallel size. Inside a unit the elements
lie as the kernels want them, which depends on the dtype; so another dtype goes through tokens,
[16, head_dim]. int8 meets int8 only: a token's row there ends with its scale, which belongs to the
unit. Owns nothing. Invariant: a conversion to the same dtype changes no bit of any token; to a
narrower one it rounds to the nearest, ties to even.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.engine.core.types import HASH_UNIT_TOKENS, KV_SCALE_BYTES

__all__ = ["BlockLayout", "Converter"]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """What the bytes of one block mean: `num_parts` neighbouring blocks of the kernels, each
    [num_layers, 2, num_kv_heads, block_size * row]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    num_parts: int
    dtype: torch.dtype
    panels: bool  # as the C++ kernels lay keys and values out (csrc/cpu/kernels.h), else plain

    @property
    def num_tokens(self) -> int:
        return self.num_parts * self.block_size

    @property
    def num_bytes(self) -> int:
        rows = self.num_layers * 2 * self.num_kv_heads * self.num_tokens
        return rows * self.row * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Elements of one token of one head."""
        return self.head_dim + (KV_SCALE_BYTES if self.dtype == torch.int8 else 0)

    def units(self, memory: memoryview) -> Tensor:
        """[num_blocks, num_parts, layers, 2, heads, units of a part, 16 * row]."""
        count = len(memory) // self.num_bytes
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=count * self.num_bytes)
        units = self.block_size // HASH_UNIT_TOKENS
        rows = (self.num_layers, 2, self.num_kv_heads)
        shape = (count, self.num_parts, *rows, units, HASH_UNIT_TOKENS * self.row)
        return raw.view(self.dtype).view(shape)

    @property
    def _width(self) -> int:
        """Elements of one token, or tokens of one element, that lie side by side in a panel."""
        return 2 if self.dtype == torch.bfloat16 else 1

    def tokens(self, units: Tensor) -> Tensor:
        """units: [n, layers, 2, heads, 16 * head_dim]; the same as [..., 16, head_dim]."""
        dim, width, count = self.head_dim, self._width, HASH_UNIT_TOKENS
        if not self.panels:
            return _split(units, count, dim)
        keys = _split(units[:, :, 0], dim // width, count, width).transpose(-3, -2)
        values = _split(units[:, :, 1], count // width, dim, width).transpose(-2, -1)
        return torch.stack([keys.flatten(-2), values.flatten(-3, -2)], 2)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        dim, width, count = self.head_dim, self._width, HASH_UNIT_TOKENS
        if not self.panels:
            return tokens.flatten(-2)
        keys = _split(tokens[:, :, 0], dim // width, width).transpose(-3, -2)
        values = _split(tokens[:, :, 1].flatten(-2), count // width, width, dim).transpose(-2, -1)
        return torch.stack([keys.flatten(-3), values.flatten(-3)], 2)


class Converter:
    """Between two memories that stay where they are."""

    def __init__(
        self, source: BlockLayout, source_memory: memoryview, own: BlockLayout, memory: memoryview
    ) -> None:
        assert source.num_tokens == own.num_tokens, "blocks of another number of tokens"
        assert (source.num_layers, source.num_kv_heads) == (own.num_layers, own.num_kv_heads)
        assert (source.head_dim, source.panels) == (own.head_dim, own.panels)
        assert source.dtype == own.dtype or torch.int8 not in (source.dtype, own.dtype)
        self._source, self._own = source, own
        self._from, self._to = source.units(source_memory), own.units(memory)

    def __call__(self, source_blocks: Sequence[int], own_blocks: Sequence[int]) -> None:
        """Block i of `source_blocks` over block i of `own_blocks`."""
        source, own = self._source, self._own
        theirs, mine = torch.tensor(source_blocks), torch.tensor(own_blocks)
        for unit in range(own.num_tokens // HASH_UNIT_TOKENS):
            part, place = divmod(unit, source.block_size // HASH_UNIT_TOKENS)
            rows = self._from[:, part, :, :, :, place].index_select(0, theirs)
            if source.dtype != own.dtype:
                rows = own.from_tokens(source.tokens(rows).to(own.dtype))
            part, place = divmod(unit, own.block_size // HASH_UNIT_TOKENS)
            self._to[:, part, :, :, :, place].index_copy_(0, mine, rows)


def _split(rows: Tensor, *sizes: int) -> Tensor:
    """The last dimension in several."""
    return rows.reshape(*rows.shape[:-1], *sizes)
