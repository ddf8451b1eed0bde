"""The decoder: token ids to hidden states to logits, over the kernels and the paged pool.

Owns the activation buffers of one worker (grown to the largest step seen, never shrunk). Invariant:
a row's result depends on its own sequence only, so any batch and any chunking give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from diptych.engine.batch import ModelInput
from diptych.engine.core.model_config import ModelConfig
from diptych.engine.models.weights import DecoderWeights, LayerWeights
from diptych.engine.pool import KVPool
from diptych.kernels import Kernels

__all__ = ["Decoder"]

_ROWS_MIN: Final = 16  # rows of the smallest buffers


@dataclass(slots=True, eq=False)
class _Buffers:
    """All fp32, [rows, ...]; a step of T tokens uses the first T rows."""

    residual: Tensor  # [rows, hidden]
    hidden: Tensor  # [rows, hidden]
    qkv: Tensor  # [rows, q_size + 2 * kv_size]
    q: Tensor  # [rows, q_size], only with qk_norm
    k: Tensor  # [rows, kv_size], only with qk_norm
    attention: Tensor  # [rows, q_size]
    gate_up: Tensor  # [rows, 2 * inner]
    inner: Tensor  # [rows, inner]

    @classmethod
    def make(cls, config: ModelConfig, rows: int) -> "_Buffers":
        def buffer(width: int) -> Tensor:
            return torch.empty(rows, width, dtype=torch.float32)

        return cls(
            residual=buffer(config.hidden_size),
            hidden=buffer(config.hidden_size),
            qkv=buffer(config.q_size + 2 * config.kv_size),
            q=buffer(config.q_size if config.qk_norm else 0),
            k=buffer(config.kv_size if config.qk_norm else 0),
            attention=buffer(config.q_size),
            gate_up=buffer(2 * config.intermediate_size),
            inner=buffer(config.intermediate_size),
        )

    def first(self, rows: int) -> "_Buffers":
        return _Buffers(
            self.residual[:rows],
            self.hidden[:rows],
            self.qkv[:rows],
            self.q[:rows],
            self.k[:rows],
            self.attention[:rows],
            self.gate_up[:rows],
            self.inner[:rows],
        )


class Decoder:
    """One worker's decoder. `forward` writes the KV of the step into the pool."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, kernels: Kernels, pool: KVPool
    ) -> None:
        self._config = config
        self._weights = weights
        self._kernels = kernels
        self._layers = [
            (layer, window or 0, *pool.layer(index))
            for index, (layer, window) in enumerate(
                zip(weights.layers, config.windows, strict=True)
            )
        ]
        self._scale = config.head_dim**-0.5
        self._buffers = _Buffers.make(config, _ROWS_MIN)
        self._logits = torch.empty(1, config.vocab_size, dtype=torch.float32)

    def forward(self, inputs: ModelInput, on_layer: Callable[[], None] | None = None) -> Tensor:
        """Hidden states before the last norm, [T, hidden] fp32; valid until the next call."""
        kernels, eps = self._kernels, self._config.rms_norm_eps
        rows = inputs.ids.shape[0]
        capacity = self._buffers.hidden.shape[0]
        if rows > capacity:
            self._buffers = _Buffers.make(self._config, max(rows, 2 * capacity))
        b = self._buffers.first(rows)
        kernels.embedding(b.residual, self._weights.embedding, inputs.ids)
        for index, (layer, window, k_cache, v_cache) in enumerate(self._layers):
            if index == 0:
                kernels.rms_norm(b.hidden, b.residual, layer.attn_norm, eps)
            else:
                kernels.add_rms_norm(b.hidden, b.residual, b.hidden, layer.attn_norm, eps)
            self._attend(layer, inputs, b, k_cache, v_cache, window)
            kernels.linear(b.hidden, b.attention, layer.o)
            kernels.add_rms_norm(b.hidden, b.residual, b.hidden, layer.mlp_norm, eps)
            kernels.linear(b.gate_up, b.hidden, layer.gate_up)
            kernels.silu_mul(b.inner, b.gate_up)
            kernels.linear(b.hidden, b.inner, layer.down)
            if on_layer is not None:
                on_layer()
        return b.residual.add_(b.hidden)

    def _attend(
        self,
        layer: LayerWeights,
        inputs: ModelInput,
        b: _Buffers,
        k_cache: Tensor,
        v_cache: Tensor,
        window: int,
    ) -> None:
        """b.hidden -> b.attention; k_cache, v_cache: [num_blocks, kv_heads, block_size, D]."""
        config, kernels = self._config, self._kernels
        rows, dim, eps = b.hidden.shape[0], config.head_dim, config.rms_norm_eps
        kernels.linear(b.qkv, b.hidden, layer.qkv)
        q, k = b.qkv[:, : config.q_size], b.qkv[:, config.q_size : -config.kv_size]
        v = b.qkv[:, -config.kv_size :]
        if layer.q_norm is not None and layer.k_norm is not None:
            # The norm wants dense heads, so q and k leave the fused rows.
            q, k = b.q.copy_(q), b.k.copy_(k)
            q_heads, k_heads = q.view(-1, dim), k.view(-1, dim)  # [T * heads, D]
            kernels.rms_norm(q_heads, q_heads, layer.q_norm, eps)
            kernels.rms_norm(k_heads, k_heads, layer.k_norm, eps)
        q = q.view(rows, config.num_q_heads, dim)
        k = k.view(rows, config.num_kv_heads, dim)
        v = v.view(rows, config.num_kv_heads, dim)
        kernels.rope(q, k, inputs.positions, self._weights.cos_sin)
        kernels.write_kv(k_cache, v_cache, k, v, inputs.slot_mapping)
        kernels.attention(
            b.attention.view(rows, config.num_q_heads, dim),
            q,
            k_cache,
            v_cache,
            inputs.qo_indptr,
            inputs.kv_indptr,
            inputs.kv_indices,
            inputs.kv_len,
            self._scale,
            window,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, vocab] fp32 of hidden states [R, hidden] (overwritten); valid until the next call."""
        rows = hidden.shape[0]
        if rows > self._logits.shape[0]:
            self._logits = torch.empty(rows, self._config.vocab_size, dtype=torch.float32)
        weights, logits = self._weights, self._logits[:rows]
        self._kernels.rms_norm(hidden, hidden, weights.norm, self._config.rms_norm_eps)
        self._kernels.linear(logits, hidden, weights.lm_head)
        return logits
