"""Linear layers: equal to the reference, and a row the same bits whatever is computed beside it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diptych.kernels.base import PackedLinear
from diptych.kernels.cpp import CppKernels
from diptych.kernels.narrow import NARROW
from diptych.kernels.reference import ReferenceKernels

# Where narrow weights of 16-bit activations meet x rounded to bf16.
BF16_BITS = {"amx": (4,), "avx512_bf16": (4, 8)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (2, 17, 33),
    (3, 64, 7),
    (5, 130, 257),
    (13, 48, 96),
    (70, 33, 40),
]


def _problem(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    rows, num_out, num_in = shape
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    return torch.randn(rows, num_in, generator=generator), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(
    cpp: CppKernels,
    reference: ReferenceKernels,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    x, weight, bias = _problem(shape, dtype)
    for use_bias in (bias, None):
        out, expected = torch.empty(shape[:2]), torch.empty(shape[:2])
        cpp.linear(out, x, cpp.pack_linear(weight, use_bias))
        reference.linear(expected, x, reference.pack_linear(weight, use_bias))
        # Rounding grows with the sum of the products' sizes, not with the result.
        scale = x.abs() @ weight.float().abs().T + 1
        assert ((out - expected).abs() / scale).max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(cpp: CppKernels, dtype: torch.dtype) -> None:
    x, weight, bias = _problem((64, 200, 131), dtype)
    packed = cpp.pack_linear(weight, bias)
    alone = torch.empty(64, 200)
    for t in range(64):
        cpp.linear(alone[t : t + 1], x[t : t + 1], packed)
    for rows in range(2, 65):
        out = torch.full((rows, 200), float("nan"))
        cpp.linear(out, x[:rows].clone(), packed)
        assert torch.equal(out, alone[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(cpp: CppKernels, dtype: torch.dtype) -> None:
    x, weight, bias = _problem((130, 150, 300), dtype)
    packed = cpp.pack_linear(weight, bias)
    results = []
    for threads in (1, 2, 3):
        cpp.set_num_threads(threads)
        for rows in (1, 130):
            out = torch.full((rows, 150), float("nan"))
            cpp.linear(out, x[:rows], packed)
            results.append(out)
    for out in results:
        assert torch.equal(out, results[1][: out.shape[0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_do_not_depend_on_their_neighbours(cpp: CppKernels, dtype: torch.dtype) -> None:
    x, weight, bias = _problem((7, 160, 96), dtype)
    fused, part = torch.empty(7, 160), torch.empty(7, 50)
    cpp.linear(fused, x, cpp.pack_linear(weight, bias))
    cpp.linear(part, x, cpp.pack_linear(weight[100:150], bias[100:150]))
    assert torch.equal(part, fused[:, 100:150])


def _pack_expected(
    cpp: CppKernels, reference: ReferenceKernels, weight: Tensor, bias: Tensor | None, scheme: str
) -> PackedLinear:
    """For the reference, which then rounds x as the level does."""
    packed = reference.pack_linear(weight, bias, NARROW[scheme])
    if NARROW[scheme].act_bits == 16 and NARROW[scheme].bits in BF16_BITS.get(cpp.level, ()):
        assert packed.dtype == torch.bfloat16
        return replace(packed, narrow=None)
    return packed


@pytest.mark.parametrize("scheme", NARROW)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 300, 700), (6, 33, 1100), (40, 33, 2200)])
def test_narrow_equals_the_reference(
    cpp: CppKernels, reference: ReferenceKernels, shape: tuple[int, int, int], scheme: str
) -> None:
    x, weight, bias = _problem(shape, torch.bfloat16)
    for use_bias in (bias, None):
        out, expected = torch.empty(shape[:2]), torch.empty(shape[:2])
        cpp.linear(out, x, cpp.pack_linear(weight, use_bias, NARROW[scheme]))
        reference.linear(expected, x, _pack_expected(cpp, reference, weight, use_bias, scheme))
        scale = x.abs() @ weight.float().abs().T + 1
        assert ((out - expected).abs() / scale).max() < 2e-6


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_sums_of_integers_are_equal_on_all_levels(cpp: CppKernels, scheme: str) -> None:
    if cpp.level == "avx512_bf16" and scheme == "int8":
        pytest.skip("rounds x to bf16")
    plain_kernels = CppKernels("plain")
    for shape in ((9, 70, 700), (2, 33, 40), (70, 300, 1000), (41, 17, 1300)):
        x, weight, bias = _problem(shape, torch.bfloat16)
        packed = cpp.pack_linear(weight, bias, NARROW[scheme])
        for rows in (shape[0], 1):
            out, plain = torch.empty(rows, shape[1]), torch.empty(rows, shape[1])
            cpp.linear(out, x[:rows], packed)
            plain_kernels.linear(plain, x[:rows], packed)
            assert torch.equal(out, plain), (shape, rows)


@pytest.mark.parametrize("scheme", NARROW)
def test_narrow_extremes(cpp: CppKernels, reference: ReferenceKernels, scheme: str) -> None:
    """Zeros, values beside a far larger one, all signs equal, and what is not finite."""
    x, weight, bias = _problem((6, 40, 300), torch.bfloat16)
    x[0] = 0.0
    x[1, 7] = 1e4
    x[2] = 3.0
    x[3] = -1e-35
    x[4, 5], x[5, 5] = float("inf"), float("nan")
    out, expected = torch.empty(6, 40), torch.empty(6, 40)
    cpp.linear(out, x, cpp.pack_linear(weight, bias, NARROW[scheme]))
    reference.linear(expected, x, _pack_expected(cpp, reference, weight, bias, scheme))
    assert not out[4:].isfinite().any()
    scale = x[:4].abs() @ weight.float().abs().T + 1
    assert ((out[:4] - expected[:4]).abs() / scale).max() < 2e-6


@pytest.mark.parametrize("scheme", NARROW)
@pytest.mark.parametrize("num_in", [512, 1000, 8192])
def test_no_sum_is_too_large(cpp: CppKernels, scheme: str, num_in: int) -> None:
    """Every integer of the weights and of x is as large as they get, with either sign."""
    weight = torch.full((33, num_in), 0.5, dtype=torch.bfloat16)
    weight[1::2] = -0.5
    x = torch.full((7, num_in), 3.0)
    x[1::2] = -3.0
    out = torch.empty(7, 33)
    cpp.linear(out, x, cpp.pack_linear(weight, None, NARROW[scheme]))
    expected = x[:, :1] * weight[:, 0].float() * num_in
    assert ((out / expected - 1).abs() < 0.02).all()  # 4 bits round the weights by as much


@pytest.mark.parametrize("scheme", NARROW)
def test_a_narrow_row_does_not_depend_on_its_batch(cpp: CppKernels, scheme: str) -> None:
    x, weight, bias = _problem((64, 70, 160), torch.bfloat16)
    packed = cpp.pack_linear(weight, bias, NARROW[scheme])
    alone = torch.empty(64, 70)
    for t in range(64):
        cpp.linear(alone[t : t + 1], x[t : t + 1], packed)
    for rows in range(2, 65):
        out = torch.full((rows, 70), float("nan"))
        cpp.linear(out, x[:rows].clone(), packed)
        assert torch.equal(out, alone[:rows]), rows


@pytest.mark.parametrize("scheme", NARROW)
@pytest.mark.parametrize("shape", [(530, 90, 700), (40, 50, 2200)])
def test_narrow_rows_depend_on_nothing_beside_them(
    cpp: CppKernels, shape: tuple[int, int, int], scheme: str
) -> None:
    """Up to 6 rows, up to 32, 33 to 512, more, and many inputs are computed in different pieces."""
    most, num_out, _ = shape
    x, weight, bias = _problem(shape, torch.bfloat16)
    packed = cpp.pack_linear(weight, bias, NARROW[scheme])
    whole = torch.empty(most, num_out)
    cpp.linear(whole, x, packed)
    for threads in (1, 3):
        cpp.set_num_threads(threads)
        for rows in (1, 2, 6, 7, 16, 17, 32, 33, 100, 512, 513):
            if rows > most:
                break
            out = torch.full((rows, num_out), float("nan"))
            cpp.linear(out, x[-rows:].clone(), packed)
            assert torch.equal(out, whole[-rows:]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_and_inputs(cpp: CppKernels, dtype: torch.dtype) -> None:
    """More than one pass over K, more than one block of rows, columns that fill no panel."""
    x, weight, bias = _problem((530, 330, 700), dtype)
    packed = cpp.pack_linear(weight, bias)
    whole, out = torch.empty(530, 330), torch.empty(1, 330)
    for threads in (1, 2):
        cpp.set_num_threads(threads)
        cpp.linear(whole, x, packed)
        for row in (0, 15, 16, 17, 100, 511, 512, 529):
            cpp.linear(out, x[row : row + 1].clone(), packed)
            assert torch.equal(out[0], whole[row]), row
            cpp.linear(some := torch.empty(40, 330), x[:40].clone(), packed)
            assert torch.equal(some, whole[:40])


def test_nan_stays_in_its_row(cpp: CppKernels) -> None:
    x, weight, _ = _problem((3, 20, 31), torch.bfloat16)
    x[1, 5] = float("nan")
    out = torch.empty(3, 20)
    cpp.linear(out, x, cpp.pack_linear(weight, None))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_nothing_stays_from_an_earlier_call(cpp: CppKernels) -> None:
    """An odd K is padded inside; what the padding's memory held before must not show."""
    x, weight, _ = _problem((3, 20, 31), torch.bfloat16)
    spoiled, wide, _ = _problem((3, 20, 64), torch.bfloat16)
    out, again = torch.empty(3, 20), torch.empty(3, 20)
    cpp.linear(out, x, cpp.pack_linear(weight, None))
    cpp.linear(again, torch.full_like(spoiled, float("nan")), cpp.pack_linear(wide, None))
    cpp.linear(again, x, cpp.pack_linear(weight, None))
    assert torch.equal(again, out)


def test_levels_read_the_same_packed_weights(cpp: CppKernels) -> None:
    _, weight, bias = _problem((4, 40, 64), torch.bfloat16)
    packed_by_best = CppKernels().pack_linear(weight, bias)
    assert torch.equal(packed_by_best.data, cpp.pack_linear(weight, bias).data)


def test_a_wrong_shape_is_refused(cpp: CppKernels) -> None:
    x, weight, _ = _problem((4, 40, 64), torch.float32)
    packed = cpp.pack_linear(weight, None)
    with pytest.raises(AssertionError, match="packed_size"):
        cpp.linear(torch.empty(4, 64), x, packed)
    with pytest.raises(AssertionError, match="kDLFloat"):
        cpp.linear(torch.empty(4, 40), x.double(), packed)
    with pytest.raises(AssertionError, match="IsContiguous"):
        cpp.linear(torch.empty(4, 40), torch.empty(64, 4).T, packed)
