"""Embedding, norms, RoPE, SiLU and KV writes: equal to the reference, alone or in a batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diptych.kernels import Kernels
from diptych.kernels.cpp import CppKernels
from diptych.kernels.reference import ReferenceKernels
from tests.support.paged import int32, token_rows

DIMS = [1, 8, 15, 64, 100, 257]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _rms_norm(kernels: Kernels, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    kernels.rms_norm(out, x, _randn(x.shape[1]), 1e-6)
    return out


def _add_rms_norm(kernels: Kernels, x: Tensor) -> Tensor:
    residual, out = x.flip(1) * 3, torch.empty_like(x)
    kernels.add_rms_norm(out, residual, x, _randn(x.shape[1]), 1e-5)
    return torch.cat([out, residual], dim=1)


def _silu_mul(kernels: Kernels, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    kernels.silu_mul(out, torch.cat([x * 4, x.flip(1)], dim=1))
    return out


ROW_FUNCTIONS = [_rms_norm, _add_rms_norm, _silu_mul]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("function", ROW_FUNCTIONS)
def test_equals_the_reference(
    cpp: CppKernels,
    reference: ReferenceKernels,
    function: Callable[[Kernels, Tensor], Tensor],
    dim: int,
) -> None:
    x = _randn(9, dim)
    torch.testing.assert_close(function(cpp, x), function(reference, x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
def test_batch_and_threads_change_no_bit(
    cpp: CppKernels, function: Callable[[Kernels, Tensor], Tensor]
) -> None:
    x = _randn(64, 1001)
    whole = function(cpp, x)
    for t in (0, 5, 63):
        assert torch.equal(function(cpp, x[t : t + 1]), whole[t : t + 1])
    for threads in (2, 3):
        cpp.set_num_threads(threads)
        assert torch.equal(function(cpp, x), whole)


def test_silu_holds_over_the_whole_range(cpp: CppKernels) -> None:
    gate = torch.linspace(-110, 110, 100_003)[None]
    out = torch.empty_like(gate)
    cpp.silu_mul(out, torch.cat([gate, torch.ones_like(gate)], dim=1))
    right = gate.double() * torch.sigmoid(gate.double())
    torch.testing.assert_close(out.double(), right, rtol=1e-6, atol=1e-34)


@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(4, 2, 64), (3, 1, 20), (1, 1, 2)])
def test_rope_turns_slices_of_one_tensor(
    cpp: CppKernels, reference: ReferenceKernels, q_heads: int, k_heads: int, dim: int
) -> None:
    rows, width = 7, (q_heads + 2 * k_heads) * dim
    angles = torch.rand(50, dim // 2, generator=torch.Generator().manual_seed(1)) * 6.28
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = int32([0, 3, 49, 1, 1, 20, 7])
    results = []
    for kernels in (cpp, reference):
        qkv = _randn(rows, width)
        q = qkv[:, : q_heads * dim].view(rows, q_heads, dim)
        k = qkv[:, q_heads * dim : (q_heads + k_heads) * dim].view(rows, k_heads, dim)
        kernels.rope(q, k, positions, cos_sin)
        results.append(qkv)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    untouched = (q_heads + k_heads) * dim
    assert torch.equal(results[0][:, untouched:], _randn(rows, width)[:, untouched:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_widens_exactly(cpp: CppKernels, dtype: torch.dtype) -> None:
    bits = torch.arange(-32768, 32768, dtype=torch.int16)
    table = bits.view(dtype).view(-1, 4)
    out = torch.empty(table.shape)
    cpp.embedding(out, table, torch.arange(len(table), dtype=torch.int32))
    torch.testing.assert_close(out, table.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "dim"), [(40, 33), (16, 64), (1, 1)])
def test_a_packed_table_is_the_same_table(
    cpp: CppKernels, dtype: torch.dtype, vocab: int, dim: int
) -> None:
    table, ids = _randn(vocab, dim).to(dtype), torch.randperm(vocab).to(torch.int32)
    out = torch.empty(vocab, dim)
    cpp.embedding(out, cpp.pack_linear(table, None), ids)
    assert torch.equal(out, table[ids.long()].float())
    with pytest.raises(AssertionError):
        cpp.embedding(out, cpp.pack_linear(table, None), ids + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kv_is_rounded_to_nearest_even(cpp: CppKernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    bits = torch.randint(-(2**31), 2**31, (64, 2, 512), generator=generator).to(torch.int32)
    values = bits.view(torch.float32)  # every kind of number: NaN, infinite, subnormal
    halves = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.float16).view(64, 2, 512)
    ties = torch.where(halves.isfinite(), halves, 0).float() * (1 + 2**-11)  # half-way for fp16
    k_cache, v_cache = (torch.zeros(2, 2, 32, 512, dtype=dtype) for _ in range(2))
    slots = torch.randperm(64, generator=generator).to(torch.int32)
    cpp.write_kv(k_cache, v_cache, values, ties, slots)
    keys, stored_values = token_rows(k_cache, v_cache)
    for cache, written in ((keys, values), (stored_values, ties)):
        stored = cache.transpose(1, 2).reshape(64, 2, 512)[slots.long()]
        expected = written.to(dtype)
        torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dim", [6, 40, 128])
def test_int8_kv_is_the_reference_s(cpp: CppKernels, reference: ReferenceKernels, dim: int) -> None:
    """Every integer and every scale, whatever the size of the values; NaN and infinity too."""
    rows, generator = 61, torch.Generator().manual_seed(dim)
    k, v = (torch.randn(rows, 2, dim, generator=generator) for _ in range(2))
    k *= 10.0 ** torch.randint(-45, 38, (rows, 2, 1), generator=generator)
    v = (v * 40).round() / 2  # many ties
    v[3], v[4, 1, 2], k[5, 0, 1], v[6] = 0.0, torch.nan, torch.inf, 1e-35
    slots = torch.randperm(64, generator=generator)[:rows].to(torch.int32)
    slots[7] = -1
    mine, right = (torch.zeros(2, 2, 2, 32, dim + 4, dtype=torch.int8) for _ in range(2))
    cpp.write_kv(mine[0], mine[1], k, v, slots)
    reference.write_kv(right[0], right[1], k, v, slots)
    for cache, wanted in zip(token_rows(mine[0], mine[1]), right, strict=True):
        assert torch.equal(cache[..., :dim], wanted[..., :dim])
        scales, expected = (c[..., dim:].contiguous().view(torch.float32) for c in (cache, wanted))
        torch.testing.assert_close(scales, expected, rtol=0, atol=0, equal_nan=True)


def test_slot_minus_one_writes_nothing(cpp: CppKernels) -> None:
    k_cache, v_cache = torch.zeros(2, 1, 16, 8), torch.zeros(2, 1, 16, 8)
    rows = torch.ones(3, 1, 8)
    cpp.write_kv(k_cache, v_cache, rows, rows, int32([-1, 17, -1]))
    assert k_cache.sum() == v_cache.sum() == 8
    for cache in token_rows(k_cache, v_cache):
        assert torch.equal(cache[1, 0, 1], torch.ones(8))


def test_embedding_refuses_ids_outside_the_table(cpp: CppKernels) -> None:
    for wrong in (-1, 5):
        with pytest.raises(AssertionError, match="inside"):
            cpp.embedding(torch.empty(1, 8), torch.zeros(5, 8), int32([wrong]))


@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (37, 960)])
def test_parts_are_added_in_their_order(
    cpp: CppKernels, reference: ReferenceKernels, num_parts: int, shape: tuple[int, int]
) -> None:
    torch.manual_seed(num_parts)
    size = shape[0] * shape[1]
    parts = torch.randn(num_parts, size) * 10.0 ** torch.arange(num_parts)[:, None]
    wanted, got = torch.empty(shape), torch.empty(shape)
    reference.sum_parts(wanted, parts)
    for threads in (1, 3):
        cpp.set_num_threads(threads)
        cpp.sum_parts(got.zero_(), parts)
        assert torch.equal(got, wanted)
    cpp.set_num_threads(1)
