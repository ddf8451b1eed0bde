"""The cos/sin table of rotary position embedding, for every scaling that RopeConfig expresses.

Owns the formulas. Invariant: the table is a function of the configuration only, computed in fp64
where the processor's vector width could show, so equal configurations give equal bits.
"""

import math

import torch
from torch import Tensor

from diptych.engine.core.rope_config import RopeConfig

__all__ = ["cos_sin_table", "inverse_frequencies"]

_ROWS = 4096  # positions computed at once


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """Radians per token of each pair of dimensions, [dim/2] fp32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    theta = rope.theta
    if rope.type == "dynamic":
        stretch = rope.factor * rope.frozen_len / rope.original_len - (rope.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    plain = theta**-exponents  # [dim/2] fp64
    if rope.type == "linear":
        plain = plain / rope.factor
    elif rope.type == "llama3":
        plain = _llama3(rope, plain)
    elif rope.type == "yarn":
        plain = _yarn(rope, plain, dim)
    return plain.float()


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    turns = rope.original_len * plain / (2 * math.pi)  # full turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, plain: Tensor, dim: int) -> Tensor:
    """Dimensions that turn often are kept, those that turn rarely interpolated, a ramp between."""

    def dimension(turns: float) -> float:  # the one that makes `turns` in the original context
        return (
            dim * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def cos_sin_table(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    """[num_positions, dim] fp32; a row is cos[dim/2], sin[dim/2]."""
    frequencies = inverse_frequencies(rope, dim)  # [dim/2] fp32
    table = torch.empty(num_positions, dim, dtype=torch.float32)
    for start in range(0, num_positions, _ROWS):
        rows = table[start : start + _ROWS]
        positions = torch.arange(start, start + len(rows), dtype=torch.float32)
        angles = (positions[:, None] * frequencies).double()  # rounded to fp32 as in training
        rows[:, : dim // 2] = angles.cos() * rope.attention_factor
        rows[:, dim // 2 :] = angles.sin() * rope.attention_factor
    return table
