"""A decoder's weights, cut into shards and packed for its kernels.

Owns the packed tensors; made once per host, in the process that later forks the workers and their
ranks, which then share the memory: every rank finds every shard here. Invariants: nothing here is
written after `pack_weights`; each weight is in one shard, but for KV heads that several shards use.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.engine.core.model_config import ModelConfig
from diptych.engine.core.sharding import Shard, cut
from diptych.engine.loader import WeightSource
from diptych.engine.models.rope import cos_sin_table
from diptych.kernels import Kernels, Narrow, PackedLinear

__all__ = ["DecoderWeights", "LayerShard", "LayerWeights", "pack_weights"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerShard:
    """`o` and `down` give a part of a sum over all shards; biases are in the first one's."""

    qkv: PackedLinear  # hidden -> q heads, k heads, v heads of the shard
    o: PackedLinear  # q heads of the shard -> hidden
    gate_up: PackedLinear  # hidden -> gate, up of the shard's inner columns
    down: PackedLinear  # inner columns of the shard -> hidden


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    attn_norm: Tensor  # [hidden] fp32
    q_norm: Tensor | None  # [head_dim] fp32
    k_norm: Tensor | None  # [head_dim] fp32
    mlp_norm: Tensor  # [hidden] fp32
    shards: list[LayerShard]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    shards: list[Shard]
    embedding: Tensor | None  # [vocab, hidden] model dtype; None (tied): the output head itself
    layers: list[LayerWeights]
    norm: Tensor  # [hidden] fp32
    lm_head: list[PackedLinear]  # by shard: hidden -> its part of the vocabulary
    cos_sin: Tensor  # [max_model_len, head_dim] fp32


def pack_weights(
    config: ModelConfig,
    source: WeightSource,
    kernels: Kernels,
    narrow: Narrow | None = None,
    num_shards: int = 1,
) -> DecoderWeights:
    """Reads every tensor once; at most one layer is held twice. Raises ConfigError where the model
    cannot be cut into so many shards.

    `narrow` rounds the layers' matrices. Embedding and output head stay in the model's dtype: their
    error goes into every logit unaveraged.
    """
    shards = cut(config, num_shards)
    table = source.get("model.embed_tokens.weight")  # [vocab, hidden]
    tied = config.tied_embeddings
    head = table if tied else source.get("lm_head.weight")  # [vocab, hidden]
    return DecoderWeights(
        shards=shards,
        embedding=None if tied else table.clone(),
        layers=[
            _Layer(config, source, kernels, narrow, layer).pack(shards)
            for layer in range(config.num_layers)
        ],
        norm=source.get("model.norm.weight").to(torch.float32, copy=True),
        lm_head=[
            kernels.pack_linear(head[shard.vocab.start : shard.vocab.stop], None)
            for shard in shards
        ],
        cos_sin=cos_sin_table(config.rope, config.head_dim, config.max_model_len),
    )


class _Layer:
    """Reads and packs one layer."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kernels: Kernels,
        narrow: Narrow | None,
        layer: int,
    ) -> None:
        self._config = config
        self._source = source
        self._kernels = kernels
        self._narrow = narrow
        self._prefix = f"model.layers.{layer}."

    def pack(self, shards: list[Shard]) -> LayerWeights:
        qk_norm = self._config.qk_norm
        return LayerWeights(
            attn_norm=self._norm("input_layernorm"),
            q_norm=self._norm("self_attn.q_norm") if qk_norm else None,
            k_norm=self._norm("self_attn.k_norm") if qk_norm else None,
            mlp_norm=self._norm("post_attention_layernorm"),
            shards=self._shards(shards),
        )

    def _norm(self, name: str) -> Tensor:
        return self._source.get(f"{self._prefix}{name}.weight").to(torch.float32, copy=True)

    def _shards(self, shards: list[Shard]) -> list[LayerShard]:
        config, dim = self._config, self._config.head_dim
        q, k, v = (self._read(f"self_attn.{name}_proj", config.qkv_bias) for name in "qkv")
        gate, up = (self._read(f"mlp.{name}_proj", config.mlp_bias) for name in ("gate", "up"))
        o = self._read("self_attn.o_proj", config.o_bias)
        down = self._read("mlp.down_proj", config.mlp_bias)
        packed = []
        for index, shard in enumerate(shards):
            q_rows, kv_rows = _scaled(shard.q_heads, dim), _scaled(shard.kv_heads, dim)
            packed.append(
                LayerShard(
                    qkv=self._by_outputs((q, q_rows), (k, kv_rows), (v, kv_rows)),
                    o=self._by_inputs(o, q_rows, first=index == 0),
                    gate_up=self._by_outputs((gate, shard.inner), (up, shard.inner)),
                    down=self._by_inputs(down, shard.inner, first=index == 0),
                )
            )
        return packed

    def _read(self, name: str, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K] and bias [N]."""
        weight = self._source.get(f"{self._prefix}{name}.weight")
        return weight, self._source.get(f"{self._prefix}{name}.bias") if has_bias else None

    def _by_outputs(self, *parts: tuple[tuple[Tensor, Tensor | None], range]) -> PackedLinear:
        """Some outputs of each of several layers with one input."""
        weights = [weight[rows.start : rows.stop] for (weight, _), rows in parts]
        biases = [bias[rows.start : rows.stop] for (_, bias), rows in parts if bias is not None]
        bias = torch.cat(biases) if biases else None
        return self._kernels.pack_linear(weights, bias, self._narrow)

    def _by_inputs(
        self, layer: tuple[Tensor, Tensor | None], columns: range, *, first: bool
    ) -> PackedLinear:
        """Some inputs of a layer; its bias is added once."""
        weight, bias = layer
        part = weight[:, columns.start : columns.stop].contiguous()
        return self._kernels.pack_linear(part, bias if first else None, self._narrow)


def _scaled(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)
