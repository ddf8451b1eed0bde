"""The layers of a decoder: one call of the backend for all where it has one, or many.

Owns the activations inside a layer (grown to the largest step seen, never shrunk). A rank computes
its shards one after another; what all shards add up to, every rank has. Invariant: both ways give
the same bits.
"""

from typing import Final, Protocol

import torch
from torch import Tensor

from diptych.engine.batch import ModelInput
from diptych.engine.collectives import Collectives
from diptych.engine.core.model_config import ModelConfig
from diptych.engine.core.sharding import Shard
from diptych.engine.models.weights import DecoderWeights, LayerShard, LayerWeights
from diptych.engine.pool import KVPool
from diptych.kernels import DecoderParts, FusedDecoder, Kernels, LayerParts

__all__ = ["Layers", "SingleCalls", "fused_decoder"]

_ROWS_MIN: Final = 16  # rows of the smallest buffers

_OwnShard = tuple[LayerShard, Tensor, Tensor]  # and its heads' keys and values


class Layers(Protocol):
    def run_layers(self, residual: Tensor, inputs: ModelInput, outputs: Tensor | None, /) -> None:
        """All layers of a step over residual ([T, hidden] fp32: the embeddings, then the hidden
        states), writing its KV into the pool. outputs: as in `FusedDecoder.run_layers`."""
        ...


def fused_decoder(
    config: ModelConfig,
    weights: DecoderWeights,
    kernels: Kernels,
    pool: KVPool,
    pulse: Tensor | None,
) -> FusedDecoder | None:
    """None for a model of several shards, between which sums are taken, and where the backend has
    single calls only."""
    if len(weights.shards) > 1:
        return None
    layers = []
    for index, (layer, window) in enumerate(zip(weights.layers, config.windows, strict=True)):
        (shard,) = layer.shards
        k_cache, v_cache = pool.layer(index)
        parts = LayerParts(
            attn_norm=layer.attn_norm,
            mlp_norm=layer.mlp_norm,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            qkv=shard.qkv,
            o=shard.o,
            gate_up=shard.gate_up,
            down=shard.down,
            k_cache=k_cache,
            v_cache=v_cache,
            window=window or 0,
        )
        layers.append(parts)
    (head,) = weights.lm_head
    return kernels.fuse_decoder(
        DecoderParts(
            layers=layers,
            embedding=head if weights.embedding is None else weights.embedding,
            norm=weights.norm,
            head=head,
            cos_sin=weights.cos_sin,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            pulse=pulse,
        )
    )


class _Buffers:
    """Activations of up to `rows` tokens, all fp32; those inside a shard are of one shard."""

    __slots__ = (
        "attention",
        "gate_up",
        "head_dim",
        "hidden",
        "inner",
        "num_kv",
        "num_q",
        "qk",
        "qkv",
    )

    def __init__(self, config: ModelConfig, shard: Shard, rows: int) -> None:
        def buffer(width: int) -> Tensor:
            return torch.empty(rows, width, dtype=torch.float32)

        self.head_dim = config.head_dim
        self.num_q, self.num_kv = len(shard.q_heads), len(shard.kv_heads)
        q_size, kv_size = self.num_q * self.head_dim, self.num_kv * self.head_dim
        self.hidden = buffer(config.hidden_size)
        self.qkv = buffer(q_size + 2 * kv_size)
        self.attention = buffer(q_size)
        self.gate_up = buffer(2 * len(shard.inner))
        self.inner = buffer(len(shard.inner))
        # The norm of q and k wants dense heads, so these leave the fused rows.
        self.qk = torch.empty(rows * (q_size + kv_size if config.qk_norm else 0))


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
        "v",
    )

    def __init__(self, buffers: _Buffers, rows: int) -> None:
        dim, num_q, num_kv = buffers.head_dim, buffers.num_q, buffers.num_kv
        self.hidden = buffers.hidden[:rows]  # [T, hidden]
        self.qkv = buffers.qkv[:rows]  # [T, q_size + 2 * kv_size]
        self.attention = buffers.attention[:rows]  # [T, q_size]
        self.attention_heads = self.attention.view(rows, -1, dim)  # [T, Hq, D]
        self.gate_up = buffers.gate_up[:rows]  # [T, 2 * inner]
        self.inner = buffers.inner[:rows]  # [T, inner]
        heads = self.qkv.view(rows, -1, dim)  # [T, Hq + 2 * Hk, D]
        self.q = heads[:, :num_q]  # [T, Hq, D], rows strided
        self.k = heads[:, num_q : num_q + num_kv]  # [T, Hk, D], rows strided
        self.v = heads[:, num_q + num_kv :]  # [T, Hk, D], rows strided
        self.q_dense = self.k_dense = self.q_heads = self.k_heads = buffers.qk
        if buffers.qk.numel():
            split = rows * num_q * dim
            end = split + rows * num_kv * dim
            self.q_heads = buffers.qk[:split].view(-1, dim)  # [T * Hq, D]
            self.k_heads = buffers.qk[split:end].view(-1, dim)  # [T * Hk, D]
            self.q_dense = self.q_heads.view(rows, num_q, dim)  # [T, Hq, D]
            self.k_dense = self.k_heads.view(rows, num_kv, dim)  # [T, Hk, D]


class SingleCalls:
    """A call for each operation; of several shards, one rank's part."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        kernels: Kernels,
        pool: KVPool,
        ranks: Collectives,
        pulse: Tensor | None,
    ) -> None:
        self._config = config
        self._pulse = pulse
        self._kernels = kernels
        self._cos_sin = weights.cos_sin
        self._ranks = ranks
        self._whole = len(weights.shards) == 1  # nothing is added up
        self._shards = [weights.shards[index] for index in ranks.shards]
        self._layers = [
            (layer, window or 0, self._own(layer, pool, index))
            for index, (layer, window) in enumerate(
                zip(weights.layers, config.windows, strict=True)
            )
        ]
        self._scale = config.head_dim**-0.5
        self._buffers = _Buffers(config, self._shards[0], _ROWS_MIN)
        self._views = _Views(self._buffers, 1)

    def _own(self, layer: LayerWeights, pool: KVPool, index: int) -> list[_OwnShard]:
        """The shards of this rank in one layer, with the keys and values of their heads."""
        return [
            (layer.shards[number], *pool.layer(index, shard.kv_heads))
            for number, shard in zip(self._ranks.shards, self._shards, strict=True)
        ]

    def run_layers(self, residual: Tensor, inputs: ModelInput, outputs: Tensor | None, /) -> None:
        """As `Layers.run_layers`; computes every row all the same."""
        kernels, eps = self._kernels, self._config.rms_norm_eps
        b = self._views_of(residual.shape[0])
        for index, (layer, window, shards) in enumerate(self._layers):
            if index == 0:
                kernels.rms_norm(b.hidden, residual, layer.attn_norm, eps)
            else:
                kernels.add_rms_norm(b.hidden, residual, b.hidden, layer.attn_norm, eps)
            parts = self._parts(b.hidden)
            for part, (shard, k_cache, v_cache) in zip(parts, shards, strict=True):
                self._attend(layer, shard, inputs, b, k_cache, v_cache, window)
                kernels.linear(part, b.attention, shard.o)
            self._sum(b.hidden)
            kernels.add_rms_norm(b.hidden, residual, b.hidden, layer.mlp_norm, eps)
            parts = self._parts(b.hidden)
            for part, (shard, _, _) in zip(parts, shards, strict=True):
                kernels.linear(b.gate_up, b.hidden, shard.gate_up)
                kernels.silu_mul(b.inner, b.gate_up)
                kernels.linear(part, b.inner, shard.down)
            self._sum(b.hidden)
            if self._pulse is not None:
                self._pulse.add_(1)
        residual.add_(b.hidden)

    def _parts(self, out: Tensor) -> list[Tensor]:
        """Where each shard of this rank puts its part of `out`."""
        if self._whole:
            return [out]
        return [part.view(out.shape) for part in self._ranks.parts(out.numel())]

    def _sum(self, out: Tensor) -> None:
        """Adds up the parts of all shards of all ranks."""
        if not self._whole:
            self._kernels.sum_parts(out, self._ranks.gather())

    def _views_of(self, rows: int) -> _Views:
        """Decode steps of one batch size follow each other: their views are made once."""
        if rows != self._views.hidden.shape[0]:
            capacity = self._buffers.hidden.shape[0]
            if rows > capacity:
                rows_max = max(rows, 2 * capacity)
                self._buffers = _Buffers(self._config, self._shards[0], rows_max)
            self._views = _Views(self._buffers, rows)
        return self._views

    def _attend(
        self,
        layer: LayerWeights,
        shard: LayerShard,
        inputs: ModelInput,
        b: _Views,
        k_cache: Tensor,
        v_cache: Tensor,
        window: int,
    ) -> None:
        """b.hidden -> b.attention; k_cache, v_cache: [num_blocks, Hk, block_size, D].

        Where neighbouring shards have one KV head, each writes it: the same bytes, so that none has
        to wait for another's.
        """
        kernels, eps = self._kernels, self._config.rms_norm_eps
        kernels.linear(b.qkv, b.hidden, shard.qkv)
        q, k = b.q, b.k
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = b.q_dense.copy_(q), b.k_dense.copy_(k)
            kernels.rms_norm(b.q_heads, b.q_heads, layer.q_norm, eps)
            kernels.rms_norm(b.k_heads, b.k_heads, layer.k_norm, eps)
        kernels.rope(q, k, inputs.positions, self._cos_sin)
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
