"""Rounding of weights to int8 and int4."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.kernels.narrow import round_int4, round_int8


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
