"""A decoder as one object of the C++ library: one call for its layers, or for a whole decode step.

Owns the object and a reference to every tensor whose address it holds. Invariant: on one level the
results are, bit for bit, those of the single calls (csrc/cpu/layer.h).
"""

from torch import Tensor

from diptych.kernels import library
from diptych.kernels.base import DecodeRows, DecoderParts, LayerParts, PackedLinear, StepIndices

__all__ = ["CppDecoder"]


class CppDecoder:
    """`FusedDecoder` in C++."""

    def __init__(self, level: int, parts: DecoderParts) -> None:
        """level: the library's own number."""
        lib = library.load()
        self._level = level
        self._kept = parts  # C++ knows their addresses only
        self._run_layers = lib.run_layers
        self._decode = lib.decode
        self._layers = lib.new_layers(parts.cos_sin, parts.eps, parts.scale, parts.pulse)
        for layer in parts.layers:
            self._add_layer(layer)
        self._add_ends(parts)

    def _add_layer(self, layer: LayerParts) -> None:
        lib = library.load()
        lib.add_layer(
            self._layers,
            layer.attn_norm,
            layer.mlp_norm,
            layer.q_norm,
            layer.k_norm,
            layer.k_cache,
            layer.v_cache,
            layer.window,
        )
        for w in (layer.qkv, layer.o, layer.gate_up, layer.down):
            narrow = w.narrow
            widths = (0, 0, 0) if narrow is None else (narrow.bits, narrow.group, narrow.act_bits)
            lib.add_weights(self._layers, w.data, w.scales, w.bias, w.num_out, w.num_in, *widths)

    def _add_ends(self, parts: DecoderParts) -> None:
        table, head = parts.embedding, parts.head
        assert head.narrow is None, "a narrow output head"
        if isinstance(table, PackedLinear):
            assert table.narrow is None, "a narrow table"
            embedding, num_tokens = table.data, table.num_out
        else:
            embedding, num_tokens = table, table.shape[0]
        library.load().add_ends(
            self._layers, embedding, num_tokens, parts.norm, head.data, head.bias, head.num_out
        )

    def run_layers(self, residual: Tensor, indices: StepIndices, outputs: Tensor | None) -> None:
        self._run_layers(
            self._level,
            self._layers,
            residual,
            indices.positions,
            indices.slot_mapping,
            indices.qo_indptr,
            indices.kv_indptr,
            indices.kv_indices,
            indices.kv_len,
            outputs,
        )

    def decode(self, rows: DecodeRows, logits: Tensor, *, choose: bool) -> bool:
        done: bool = self._decode(
            self._level,
            self._layers,
            rows.num_rows,
            rows.ids,
            rows.positions,
            rows.kv_indptr,
            rows.kv_indices,
            logits,
            rows.chosen,
            rows.logprobs,
            choose,
        )
        return done
