"""Attention over the paged pool: equal to the reference, and the same bits in any batch."""

import dataclasses
import random

import pytest
import torch

from diptych.kernels.cpp import CppKernels
from diptych.kernels.reference import ReferenceKernels
from tests.support.paged import Heads, Sequence, build_pool, int32, random_sequences, run_attention

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

CASES = [
    Heads(4, 4, 64),
    Heads(3, 1, 32, BF16),
    Heads(8, 2, 64, BF16),
    Heads(8, 1, 128, F16),
    Heads(6, 2, 40, BF16, window=37),
    Heads(2, 2, 8, F16, block_size=16, window=1),
    Heads(5, 1, 256, F32, block_size=48),
    Heads(2, 1, 6, BF16, block_size=32, window=64),
    Heads(8, 2, 64, I8),
    Heads(3, 3, 40, I8, window=37, block_size=48),
    Heads(8, 1, 128, I8, block_size=32),
    Heads(2, 1, 6, I8, window=1),
    Heads(7, 1, 128, BF16, window=70),
    Heads(5, 5, 80, BF16, window=33),
    Heads(4, 4, 96, BF16, block_size=48),
    Heads(16, 2, 160, BF16, window=75),
    Heads(9, 3, 64, BF16, window=1),
]


def _sizes(seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    sizes = []
    for _ in range(5):
        kv_len = rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 100, 130])
        tokens = rng.choice([1, kv_len, rng.randint(1, kv_len)])
        sizes.append((tokens, kv_len))
    return [*sizes, (0, 20)]


def _expected(
    cpp: CppKernels, reference: ReferenceKernels, heads: Heads, sequences: list[Sequence]
) -> tuple[list[torch.Tensor], float]:
    """The reference's rows and how far others may be. With bf16 dot products queries are rounded
    to bf16 (here too, before the reference sees them), and so are the softmax's weights; with byte
    products both are integers of 16 bits.
    """
    dot = cpp.level in ("avx512_bf16", "amx") and heads.dtype == BF16
    if dot:
        scale = heads.dim**-0.5 * 1.4426950408889634  # as the kernels do: powers of two
        rounded = [((s.q * scale).bfloat16().float() / scale) for s in sequences]
        sequences = [dataclasses.replace(s, q=q) for s, q in zip(sequences, rounded, strict=True)]
    rows = run_attention(reference, heads, sequences, torch.Generator().manual_seed(2))
    bytes_ = cpp.level in ("avx512_bf16", "amx") and heads.dtype == I8
    return rows, 2**-8 if dot else 5e-4 if bytes_ else 5e-6


@pytest.mark.parametrize("heads", CASES, ids=str)
def test_equals_the_reference(cpp: CppKernels, reference: ReferenceKernels, heads: Heads) -> None:
    seed = CASES.index(heads)
    sequences = random_sequences(heads, _sizes(seed), torch.Generator().manual_seed(seed))
    results = run_attention(cpp, heads, sequences, torch.Generator().manual_seed(1))
    expected, error = _expected(cpp, reference, heads, sequences)
    for out, right in zip(results, expected, strict=True):
        torch.testing.assert_close(out, right, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [BF16, I8])
def test_long_contexts_equal_the_reference(
    cpp: CppKernels, reference: ReferenceKernels, dtype: torch.dtype
) -> None:
    heads = Heads(4, 2, 32, dtype)
    sequences = random_sequences(heads, [(3, 1500), (1, 513)], torch.Generator().manual_seed(3))
    expected, error = _expected(cpp, reference, heads, sequences)
    for threads in (1, 3):
        cpp.set_num_threads(threads)
        results = run_attention(cpp, heads, sequences, torch.Generator().manual_seed(0))
        for out, right in zip(results, expected, strict=True):
            torch.testing.assert_close(out, right, rtol=error, atol=error)


def _in_chunks(
    cpp: CppKernels, heads: Heads, sequence: Sequence, size: int, others: list[Sequence]
) -> torch.Tensor:
    """All rows of `sequence`, `size` at a time, each call with `others` before and after it."""
    generator = torch.Generator().manual_seed(size)  # other blocks for every size
    rows, total = [], sequence.q.shape[0]
    for start in range(0, total, size):
        chunk = sequence.rows(start, min(start + size, total))
        batch = [*others, chunk, *others]
        rows.append(run_attention(cpp, heads, batch, generator)[len(others)])
    return torch.cat(rows)


@pytest.mark.parametrize(
    "heads",
    [
        Heads(4, 4, 64, BF16),
        Heads(15, 5, 64, BF16, window=70),
        Heads(6, 2, 40, BF16, window=51),
        Heads(7, 1, 80, BF16),
        Heads(8, 1, 128, BF16),
        Heads(3, 3, 32, BF16, window=64),
        Heads(4, 2, 96, BF16),
        Heads(6, 2, 40, F32, window=50),
        Heads(8, 1, 64, F16),
        Heads(8, 2, 64, I8),
        Heads(3, 1, 40, I8, window=50),
    ],
    ids=str,
)
def test_chunks_neighbours_and_blocks_change_no_bit(cpp: CppKernels, heads: Heads) -> None:
    generator = torch.Generator().manual_seed(11)
    [sequence, *others] = random_sequences(heads, [(150, 150), (1, 70), (9, 33)], generator)
    whole = _in_chunks(cpp, heads, sequence, 150, [])
    for size in (1, 16, 64, 77):
        assert torch.equal(_in_chunks(cpp, heads, sequence, size, []), whole), size
    assert torch.equal(_in_chunks(cpp, heads, sequence, 64, others), whole)
    wide_blocks = dataclasses.replace(heads, block_size=48)
    assert torch.equal(_in_chunks(cpp, wide_blocks, sequence, 50, others), whole)


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("falling", [False, True])
def test_scores_that_grow_along_the_keys(
    cpp: CppKernels, reference: ReferenceKernels, falling: bool, window: int
) -> None:
    """Each key scores a little higher than the last, so a row's largest score rises again and
    again, by little and by much; or the first keys have all the weight."""
    heads = Heads(6, 2, 64, BF16, window=window)
    [sequence] = random_sequences(heads, [(300, 300)], torch.Generator().manual_seed(9))
    steps = torch.arange(300.0).square() / (300 if window else 900)  # past what a weight can hold
    direction = torch.ones(64) / 8
    sequence.q[:] = 8 * direction + 0.1 * sequence.q
    sequence.k[:] = direction * (steps.flip(0) if falling else steps)[:, None, None]
    results = run_attention(cpp, heads, [sequence], torch.Generator().manual_seed(1))
    expected, error = _expected(cpp, reference, heads, [sequence])
    error = max(error, 2e-4)  # fp32 scores of some hundreds are no finer
    torch.testing.assert_close(results[0], expected[0], rtol=error, atol=error)
    for size in (1, 7, 64):
        assert torch.equal(_in_chunks(cpp, heads, sequence, size, []), results[0]), size


@pytest.mark.parametrize("dtype", [BF16, I8])
@pytest.mark.parametrize("window", [0, 600])
def test_threads_and_splits_change_no_bit(cpp: CppKernels, window: int, dtype: torch.dtype) -> None:
    """With several threads a few long rows are cut along their keys, with one they are not."""
    heads = Heads(4, 2, 64, dtype, window=window)
    generator = torch.Generator().manual_seed(5)
    [sequence] = random_sequences(heads, [(70, 1700)], generator)
    whole = run_attention(cpp, heads, [sequence], generator)[0]
    for threads in (2, 3):
        cpp.set_num_threads(threads)
        again = run_attention(cpp, heads, [sequence], generator)[0]
        decode = run_attention(cpp, heads, [sequence.rows(40, 41)], generator)[0]
        last = run_attention(cpp, heads, [sequence.rows(69, 70)], generator)[0]
        assert torch.equal(again, whole)
        assert torch.equal(decode, whole[40:41])
        assert torch.equal(last, whole[69:])


@pytest.mark.parametrize("dtype", [F32, BF16, I8])
@pytest.mark.parametrize("at", [30, 31])
def test_a_later_nan_does_not_reach_an_earlier_row(
    cpp: CppKernels, at: int, dtype: torch.dtype
) -> None:
    heads = Heads(2, 1, 32, dtype)
    [clean] = random_sequences(heads, [(40, 40)], torch.Generator().manual_seed(6))
    spoiled = dataclasses.replace(clean, k=clean.k.clone(), v=clean.v.clone())
    spoiled.k[at] = float("nan")
    spoiled.v[at] = float("inf")
    before, after = (
        run_attention(cpp, heads, [s], torch.Generator().manual_seed(0))[0]
        for s in (clean, spoiled)
    )
    assert torch.equal(after[:at], before[:at])
    assert after[at:].isnan().all()


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_value_that_is_not_finite_stays_where_it_is_seen(
    cpp: CppKernels, dtype: torch.dtype, window: int
) -> None:
    """In its column, and in the rows that see it, however many rows are computed together."""
    heads, at, column = Heads(6, 2, 64, dtype, window=window), 100, 37
    [clean] = random_sequences(heads, [(200, 200)], torch.Generator().manual_seed(12))
    spoiled = dataclasses.replace(clean, v=clean.v.clone())
    spoiled.v[at, :, column] = float("inf")
    whole = _in_chunks(cpp, heads, clean, 200, [])
    end = at + window if window else 200
    for size in (1, 33, 200):
        rows = _in_chunks(cpp, heads, spoiled, size, [])
        assert not rows[at:end, :, column].isfinite().any(), size
        rows[at:end, :, column] = whole[at:end, :, column]
        assert torch.equal(rows, whole), size


@pytest.mark.parametrize("dtype", [BF16, I8])
def test_what_left_the_window_does_not_matter(cpp: CppKernels, dtype: torch.dtype) -> None:
    heads = Heads(4, 2, 32, dtype, window=75)
    [clean] = random_sequences(heads, [(150, 200)], torch.Generator().manual_seed(8))
    spoiled = dataclasses.replace(clean, k=clean.k.clone(), v=clean.v.clone())
    spoiled.k[:77] = spoiled.v[:77] = float("nan")
    before, after = (
        run_attention(cpp, heads, [s], torch.Generator().manual_seed(0))[0]
        for s in (clean, spoiled)
    )
    first_clean_row = 76 + 75 - 50  # its position is the row's plus 50
    assert torch.equal(after[first_clean_row:], before[first_clean_row:])
    assert after[:first_clean_row].isnan().all()


def test_rows_of_q_may_be_strided(cpp: CppKernels) -> None:
    heads = Heads(4, 2, 16)
    generator = torch.Generator().manual_seed(7)
    [sequence] = random_sequences(heads, [(20, 20)], generator)
    pool = build_pool(cpp, heads, [sequence], generator)
    qkv = torch.randn(20, 8 * 16, generator=generator)
    q = qkv[:, : 4 * 16].view(20, 4, 16)
    results = []
    for rows in (q, q.contiguous()):
        out = torch.empty(20, 4, 16)
        table = pool.tables[0]
        cpp.attention(
            out, rows, pool.k_cache, pool.v_cache, int32([0, 20]), int32([0, len(table)]),
            int32(table), int32([20]), 0.25, 0,
        )  # fmt: skip
        results.append(out)
    assert torch.equal(results[0], results[1])


def test_indices_outside_the_pool_are_refused(cpp: CppKernels) -> None:
    cache = torch.zeros(2, 1, 16, 8)
    q, out = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    one, table = int32([0, 1]), int32([2])
    with pytest.raises(AssertionError, match="inside"):
        cpp.attention(out, q, cache, cache, one, one, table, int32([1]), 1.0, 0)
    with pytest.raises(AssertionError, match="kv_len"):
        cpp.attention(out, q, cache, cache, one, one, int32([0]), int32([17]), 1.0, 0)
    with pytest.raises(AssertionError, match="inside"):
        cpp.write_kv(cache, cache.clone(), q, q, int32([32]))
