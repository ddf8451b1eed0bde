"""Rounding of weights to int8 and int4."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.kernels.narrow import round_int4, round_int8, round_rows


def test_int8_is_within_half_a_step() -> None:
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    integers, scales = round_int8(weight)
    error = (integers * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert integers.abs().max() == 127


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_products_are_bf16_numbers(group: int) -> None:
    weight = torch.randn(20, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    integers, scales = round_int4(weight, group)
    products = integers.float().unflatten(1, (-1, group)) * scales[:, :, None]
    assert torch.equal(products, products.bfloat16().float())
    assert integers.min() >= -8
    assert integers.max() <= 7


def test_int4_error_is_near_the_best_scales() -> None:
    """The step of a group of 64 normal numbers is about 2.4 / 7.5 standard deviations."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    integers, scales = round_int4(weight, 64)
    widened = (integers.float().unflatten(1, (-1, 64)) * scales[:, :, None]).flatten(1)
    assert (widened - weight).square().mean().sqrt() < 0.1


@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
def test_zeros_and_extremes_stay_finite(seed: int, size: float) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * size
    weight[1] = 0.0
    for integers, scales in (round_int8(weight), round_int4(weight, 32)):
        assert scales.isfinite().all()
        assert (scales != 0).all()
        assert (integers[1] == 0).all()


@given(st.integers(0, 1000), st.sampled_from([1e-28, 1.0, 1e30]))
def test_rows_are_rounded_to_half_a_step(seed: int, size: float) -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * size
    for bits, limit in ((8, 127), (16, 32512)):
        integers, scales = round_rows(x, bits)
        assert int(integers.abs().max()) == limit
        assert ((integers * scales[:, None] - x).abs() <= scales[:, None] * 0.51).all()


def test_rows_of_nothing_and_of_infinity() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-31, 0.0], [1.0, torch.inf], [torch.nan, 1.0], [1.0, 2.0]])
    integers, scales = round_rows(x, 8)
    assert (integers[:4] == 0).all()
    assert (scales[:2] == 0).all()
    assert scales[2:4].isnan().all()
    assert integers[4].tolist() == [64, 127]
