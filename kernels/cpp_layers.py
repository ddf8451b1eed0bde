"""The layers of a decoder as one object of the C++ library: one call for any run of them.

Owns the object and a reference to every tensor whose address it holds. Invariant: on one level the
results are, bit for bit, those of the single calls (csrc/cpu/layer.h).
"""

from collections.abc import Sequence

from torch import Tensor

from diptych.kernels import library
from diptych.kernels.base import LayerParts, PackedLinear

__all__ = ["CppLayers"]


class CppLayers:
    """`FusedLayers` in C++."""

    def __init__(
        self, level: int, layers: Sequence[LayerParts], cos_sin: Tensor, eps: float, scale: float
    ) -> None:
        """level: the library's own number."""
        lib = library.load()
        self._level = level
        self._kept = list(layers), cos_sin  # C++ knows their addresses only
        self._run = lib.run_layers
        self._layers = lib.new_layers(cos_sin, eps, scale)
        for parts in layers:
            lib.add_layer(
                self._layers,
                parts.attn_norm,
                parts.mlp_norm,
                parts.q_norm,
                parts.k_norm,
                parts.k_cache,
                parts.v_cache,
                parts.window,
            )
            for weights in (parts.qkv, parts.o, parts.gate_up, parts.down):
                self._add(weights)

    def _add(self, w: PackedLinear) -> None:
        narrow = w.narrow
        widths = (0, 0, 0) if narrow is None else (narrow.bits, narrow.group, narrow.act_bits)
        library.load().add_weights(
            self._layers, w.data, w.scales, w.bias, w.num_out, w.num_in, *widths
        )

    def run(
        self,
        begin: int,
        end: int,
        residual: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len: Tensor,
    ) -> None:
        self._run(
            self._level,
            self._layers,
            begin,
            end,
            residual,
            positions,
            slot_mapping,
            qo_indptr,
            kv_indptr,
            kv_indices,
            kv_len,
        )
