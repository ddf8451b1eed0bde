"""Rounding of weights and activations to integers: which integers, which scales.

Owns the schemes and their names; no layout (that is the backend's). Invariant: the integers and
scales are a function of the weight matrix alone, so every process that loads a model holds the same
ones. int8: one fp32 scale per output, weights in [-127, 127]. int4: one scale per output and group
of inputs, weights in [-8, 7]; the scale has five significant bits, so that scale * integer is a
bf16 number exactly and no kernel ever rounds a weight. Activations: one fp32 scale per row (token),
integers of 16 bits (weight-only schemes: finer than bf16 where it matters) or of 8, made anew in
every step, so that a row never depends on another.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["NARROW", "Narrow", "round_int4", "round_int8", "round_rows"]

_SCALE_BITS: Final = 5  # significant bits of an int4 scale
_INT4_STEPS: Final = (7.0, 7.5, 8.0, 8.5, 9.0)
"""Largest weight of a group over its scale, tried in turn: a finer step clips the largest."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """How the weights of a linear layer are rounded."""

    bits: Literal[4, 8]
    group: int  # inputs that share a scale; 0: all
    act_bits: Literal[8, 16] = 16  # what activations are rounded to


NARROW: Final[dict[str, Narrow]] = {
    "int8": Narrow(8, 0),
    "int4": Narrow(4, 64),
    "int4-g32": Narrow(4, 32),
    "int4-g64": Narrow(4, 64),
    "int4-g128": Narrow(4, 128),
    "w8a8": Narrow(8, 0, 8),
    "w4a8": Narrow(4, 64, 8),
    "w4a8-g32": Narrow(4, 32, 8),
    "w4a8-g128": Narrow(4, 128, 8),
}
_ROW_LIMITS: Final = {8: 127.0, 16: 127.0 * 256}  # the integer of a row's largest value
_NOTHING: Final = 1e-30  # a row without a larger value is taken for zeros


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K] any float -> integers [N, K] int8, scales [N] fp32."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1)  # [N]
    scales = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def round_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight: [N, K] any float, K a multiple of group -> integers [N, K] int8, scales
    [N, K / group] fp32.

    Each group takes the scale of `_INT4_STEPS`, of either sign, with the least squared error.
    """
    groups = weight.float().view(weight.shape[0], -1, group)  # [N, G, group]
    at = groups.abs().argmax(dim=2, keepdim=True)
    extreme = groups.gather(2, at)  # [N, G, 1], with its sign: -8 has no positive partner
    best_error = torch.full(extreme.shape, torch.inf)
    best_scale = torch.ones(extreme.shape)
    for step in _INT4_STEPS:
        scale = _few_bits(extreme / -step)
        scale = torch.where(scale == 0, 1.0, scale)
        rounded = (groups / scale).round_().clamp_(-8, 7)
        error = (rounded.mul_(scale) - groups).square_().sum(dim=2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    integers = (groups / best_scale).round_().clamp_(-8, 7).to(torch.int8)
    return integers.flatten(1), best_scale[:, :, 0].contiguous()


def round_rows(x: Tensor, bits: Literal[8, 16]) -> tuple[Tensor, Tensor]:
    """x: [T, K] fp32 -> integers [T, K] int32, scales [T] fp32: NaN where a value is not finite."""
    limit = _ROW_LIMITS[bits]
    largest = x.abs().amax(dim=1)  # [T], NaN stays
    finite = largest.isfinite()
    some = finite & (largest >= _NOTHING)
    divided = torch.tensor(limit) / torch.where(some, largest, 1.0)  # a number here is no division
    inverse = torch.where(some, divided, 0.0)
    scales = torch.where(some, largest / limit, torch.where(finite, 0.0, torch.nan))
    integers = torch.where(some[:, None], x, 0.0) * inverse[:, None]
    return integers.round().to(torch.int32), scales


def _few_bits(x: Tensor) -> Tensor:
    """fp32 rounded to `_SCALE_BITS` significant bits."""
    mantissa, exponent = torch.frexp(x)
    unit = float(1 << _SCALE_BITS)
    return torch.ldexp((mantissa * unit).round() / unit, exponent)
