"""The decoder: token ids to hidden states to logits, over the kernels and the paged pool.

Owns the activation buffers of one worker (grown to the largest step seen, never shrunk). Invariant:
a row's result depends on its own sequence only, so any batch and any chunking give the same bits.
"""

from collections.abc import Callable
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


class _Buffers:
    """Activations of up to `rows` tokens, all fp32."""

    __slots__ = ("attention", "config", "gate_up", "hidden", "inner", "qk", "qkv", "residual")

    def __init__(self, config: ModelConfig, rows: int) -> None:
        def buffer(width: int) -> Tensor:
            return torch.empty(rows, width, dtype=torch.float32)

        self.config = config
        self.residual = buffer(config.hidden_size)
        self.hidden = buffer(config.hidden_size)
        self.qkv = buffer(config.q_size + 2 * config.kv_size)
        self.attention = buffer(config.q_size)
        self.gate_up = buffer(2 * config.intermediate_size)
        self.inner = buffer(config.intermediate_size)
        # The norm of q and k wants dense heads, so these leave the fused rows.
        self.qk = torch.empty(rows * (config.q_size + config.kv_size if config.qk_norm else 0))


class _Views:
    """The first T rows of the buffers, in every shape that a layer needs; made once per T."""

    __slots__ = (
        "attention",
        "attention_heads",
        "gate_up",
        "hidden",
        "inner",
        "k",
        "k_dense",
        "k_heads",
        "q",
        "q_dense",
        "q_heads",
        "qkv",
        "residual",
        "v",
    )

    def __init__(self, buffers: _Buffers, rows: int) -> None:
        config, dim = buffers.config, buffers.config.head_dim
        self.residual = buffers.residual[:rows]  # [T, hidden]
        self.hidden = buffers.hidden[:rows]  # [T, hidden]
        self.qkv = buffers.qkv[:rows]  # [T, q_size + 2 * kv_size]
        self.attention = buffers.attention[:rows]  # [T, q_size]
        self.attention_heads = self.attention.view(rows, -1, dim)  # [T, Hq, D]
        self.gate_up = buffers.gate_up[:rows]  # [T, 2 * inner]
        self.inner = buffers.inner[:rows]  # [T, inner]
        heads = self.qkv.view(rows, -1, dim)  # [T, Hq + 2 * Hk, D]
        num_q, num_kv = config.num_q_heads, config.num_kv_heads
        self.q = heads[:, :num_q]  # [T, Hq, D], rows strided
        self.k = heads[:, num_q : num_q + num_kv]  # [T, Hk, D], rows strided
        self.v = heads[:, num_q + num_kv :]  # [T, Hk, D], rows strided
        self.q_dense = self.k_dense = self.q_heads = self.k_heads = buffers.qk
        if config.qk_norm:
            split = rows * config.q_size
            end = split + rows * config.kv_size
            self.q_heads = buffers.qk[:split].view(-1, dim)  # [T * Hq, D]
            self.k_heads = buffers.qk[split:end].view(-1, dim)  # [T * Hk, D]
            self.q_dense = self.q_heads.view(rows, num_q, dim)  # [T, Hq, D]
            self.k_dense = self.k_heads.view(rows, num_kv, dim)  # [T, Hk, D]


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
        self._buffers = _Buffers(config, _ROWS_MIN)
        self._views = _Views(self._buffers, 1)
        self._logits = torch.empty(1, config.vocab_size, dtype=torch.float32)

    def forward(self, inputs: ModelInput, on_layer: Callable[[], None] | None = None) -> Tensor:
        """Hidden states before the last norm, [T, hidden] fp32; valid until the next call."""
        kernels, eps = self._kernels, self._config.rms_norm_eps
        b = self._views_of(inputs.ids.shape[0])
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

    def _views_of(self, rows: int) -> _Views:
        """Decode steps of one batch size follow each other: their views are made once."""
        if rows != self._views.hidden.shape[0]:
            capacity = self._buffers.hidden.shape[0]
            if rows > capacity:
                self._buffers = _Buffers(self._config, max(rows, 2 * capacity))
            self._views = _Views(self._buffers, rows)
        return self._views

    def _attend(
        self,
        layer: LayerWeights,
        inputs: ModelInput,
        b: _Views,
        k_cache: Tensor,
        v_cache: Tensor,
        window: int,
    ) -> None:
        """b.hidden -> b.attention; k_cache, v_cache: [num_blocks, Hk, block_size, D]."""
        kernels, eps = self._kernels, self._config.rms_norm_eps
        kernels.linear(b.qkv, b.hidden, layer.qkv)
        q, k = b.q, b.k
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = b.q_dense.copy_(q), b.k_dense.copy_(k)
            kernels.rms_norm(b.q_heads, b.q_heads, layer.q_norm, eps)
            kernels.rms_norm(b.k_heads, b.k_heads, layer.k_norm, eps)
        kernels.rope(q, k, inputs.positions, self._weights.cos_sin)
        kernels.write_kv(k_cache, v_cache, k, b.v, inputs.slot_mapping)
        kernels.attention(
            b.attention_heads,
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
