"""Random paged attention problems: ragged sequences over permuted blocks of a pool full of NaN.

The pool holds real values only in the slots that the sequences own, so anything read elsewhere
shows.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diptych.engine.core.types import KV_SCALE_BYTES
from diptych.kernels import Kernels

__all__ = [
    "Heads",
    "Sequence",
    "build_pool",
    "int32",
    "random_sequences",
    "run_attention",
    "token_rows",
]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def token_rows(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The C++ backend's K and V ([blocks, heads, block_size, dim] by name) as a row per token."""
    blocks, heads, block_size, dim = k_cache.shape
    if k_cache.dtype == torch.int8:
        return _int8_rows(k_cache, keys=True), _int8_rows(v_cache, keys=False)
    unit = 2 if k_cache.dtype == torch.bfloat16 else 1
    panels = k_cache.reshape(blocks, heads, block_size // 16, dim // unit, 16, unit)
    pairs = v_cache.reshape(blocks, heads, block_size // unit, dim, unit)
    keys = panels.transpose(3, 4).reshape(k_cache.shape)
    return keys, pairs.transpose(3, 4).reshape(v_cache.shape)


def _int8_rows(cache: Tensor, *, keys: bool) -> Tensor:
    """cache: [blocks, heads, block_size, dim + 4] by name; each 16 tokens end with their scales."""
    blocks, heads, block_size, dim = cache.shape
    dim -= KV_SCALE_BYTES
    pieces = cache.reshape(blocks, heads, block_size // 16, -1)
    values, scales = pieces[..., : 16 * dim], pieces[..., 16 * dim :]
    shape = (dim // 2, 16, 2) if keys else (8, dim, 2)
    values = values.unflatten(-1, shape).transpose(-3, -2) if keys else values.unflatten(-1, shape)
    rows = values.reshape(*pieces.shape[:3], 16, dim) if keys else values.transpose(-2, -1)
    rows = rows.reshape(blocks, heads, block_size, dim)
    return torch.cat([rows, scales.reshape(blocks, heads, block_size, KV_SCALE_BYTES)], -1)


@dataclass(frozen=True)
class Heads:
    """The shape of one layer's attention."""

    num_q: int
    num_kv: int
    dim: int
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    window: int = 0


@dataclass(frozen=True)
class Sequence:
    """The last `q.shape[0]` positions of a sequence of `kv_len` tokens ask."""

    kv_len: int
    q: Tensor  # [tokens, num_q, dim] fp32
    k: Tensor = field(repr=False)  # [kv_len, num_kv, dim] fp32
    v: Tensor = field(repr=False)

    def rows(self, start: int, stop: int) -> "Sequence":
        """The sequence when it was `kv_len - tokens + stop` long, asking rows [start, stop)."""
        length = self.kv_len - self.q.shape[0] + stop
        return replace(
            self, kv_len=length, q=self.q[start:stop], k=self.k[:length], v=self.v[:length]
        )


def random_sequences(
    heads: Heads, sizes: list[tuple[int, int]], generator: torch.Generator
) -> list[Sequence]:
    """sizes: (tokens that ask, kv_len) per sequence."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Sequence(
            kv_len,
            normal(tokens, heads.num_q, heads.dim) * 2,
            normal(kv_len, heads.num_kv, heads.dim),
            normal(kv_len, heads.num_kv, heads.dim),
        )
        for tokens, kv_len in sizes
    ]


@dataclass(frozen=True)
class Pool:
    k_cache: Tensor  # [num_blocks, num_kv, block_size, dim], a strided view of a larger pool
    v_cache: Tensor
    tables: list[list[int]]  # per sequence: its blocks


def build_pool(
    kernels: Kernels, heads: Heads, sequences: list[Sequence], generator: torch.Generator
) -> Pool:
    """Writes every sequence's KV into blocks taken at random; all other slots hold NaN."""
    counts = [-(-s.kv_len // heads.block_size) for s in sequences]
    num_blocks = sum(counts) + 3
    shape = (num_blocks, 2, 2, heads.num_kv, heads.block_size, heads.dim)  # two layers
    if heads.dtype == torch.int8:  # a scale of ones alone is NaN
        pool = torch.full((*shape[:-1], heads.dim + KV_SCALE_BYTES), -1, dtype=torch.int8)
    else:
        pool = torch.full(shape, float("nan"), dtype=heads.dtype)
    k_cache, v_cache = pool[:, 1, 0], pool[:, 1, 1]
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = []
    for sequence, count in zip(sequences, counts, strict=True):
        table, free = free[:count], free[count:]
        slots = [
            table[t // heads.block_size] * heads.block_size + t % heads.block_size
            for t in range(sequence.kv_len)
        ]
        kernels.write_kv(k_cache, v_cache, sequence.k, sequence.v, int32(slots))
        tables.append(table)
    return Pool(k_cache, v_cache, tables)


def run_attention(
    kernels: Kernels, heads: Heads, sequences: list[Sequence], generator: torch.Generator
) -> list[Tensor]:
    """One attention call over all sequences in a fresh pool; the rows of each sequence."""
    pool = build_pool(kernels, heads, sequences, generator)
    tokens = [s.q.shape[0] for s in sequences]
    q = torch.cat([s.q for s in sequences])
    out = torch.full_like(q, float("nan"))

    def offsets(sizes: list[int]) -> Tensor:
        return int32([sum(sizes[:i]) for i in range(len(sizes) + 1)])

    kernels.attention(
        out,
        q,
        pool.k_cache,
        pool.v_cache,
        offsets(tokens),
        offsets([len(table) for table in pool.tables]),
        int32([block for table in pool.tables for block in table]),
        int32([s.kv_len for s in sequences]),
        heads.dim**-0.5,
        heads.window,
    )
    return list(torch.split(out, tokens))
