"""The order in which the C++ kernels read int8 and int4 weights (csrc/cpu/integers.h).

Owns the layout only; what the integers are is narrow.py's. Panels of 16 outputs, integers unsigned
(plus 128 or plus 8); int8 [K/4][16][4], int4 [K/8][16][4] bytes with inputs 0..3 in their lower
and 4..7 in their upper nibbles, and scales [panel][group][16]. Outputs and inputs are padded with
zeros.
"""

from typing import Final

import torch
from torch import Tensor

from diptych.kernels.narrow import round_int4, round_int8

__all__ = ["pack_int4", "pack_int8"]

_PANEL: Final = 16  # outputs
_INPUTS: Final = 64  # K is padded to a multiple of this, and of the group


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K] -> bytes, scales [N] fp32."""
    integers, scales = round_int8(weight)
    padded = _pad(integers, _INPUTS)
    panels = padded.view(-1, _PANEL, padded.shape[1] // 4, 4)
    packed = panels.transpose(1, 2).contiguous()  # [panels, K/4, 16, 4] int8
    return (packed.view(torch.uint8) ^ 128).flatten(), scales


def pack_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight: [N, K] -> bytes, scales [panels * groups * 16] bf16 (exact)."""
    integers, scales = round_int4(_pad(weight, max(_INPUTS, group)), group)
    panels = integers.view(-1, _PANEL, integers.shape[1] // 8, 2, 4)
    halves = (panels + 8).view(torch.uint8)  # [panels, 16, K/8, 2, 4]
    packed = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2)  # [panels, K/8, 16, 4]
    steps = scales.view(-1, _PANEL, scales.shape[1]).transpose(1, 2)  # [panels, groups, 16]
    return packed.flatten(), steps.flatten().bfloat16()


def _pad(weight: Tensor, unit: int) -> Tensor:
    """weight: [N, K] -> both padded with zeros, N to the panel and K to `unit`."""
    num_out, num_in = weight.shape
    return torch.nn.functional.pad(weight, (0, -num_in % unit, 0, -num_out % _PANEL))
