"""A decoder's weights, packed for its kernels.

Owns the packed tensors; made once per host, in the process that later forks the workers, which then
share the memory. Invariant: nothing here is written after `pack_weights`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.engine.core.model_config import ModelConfig
from diptych.engine.loader import WeightSource
from diptych.engine.models.rope import cos_sin_table
from diptych.kernels import Kernels, Narrow, PackedLinear

__all__ = ["DecoderWeights", "LayerWeights", "pack_weights"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    attn_norm: Tensor  # [hidden] fp32
    qkv: PackedLinear  # hidden -> q heads, k heads, v heads
    q_norm: Tensor | None  # [head_dim] fp32
    k_norm: Tensor | None  # [head_dim] fp32
    o: PackedLinear  # q heads -> hidden
    mlp_norm: Tensor  # [hidden] fp32
    gate_up: PackedLinear  # hidden -> gate, up
    down: PackedLinear  # inner -> hidden


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    embedding: Tensor | PackedLinear  # [vocab, hidden] model dtype; tied: the output head itself
    layers: list[LayerWeights]
    norm: Tensor  # [hidden] fp32
    lm_head: PackedLinear  # hidden -> vocab
    cos_sin: Tensor  # [max_model_len, head_dim] fp32


def pack_weights(
    config: ModelConfig, source: WeightSource, kernels: Kernels, narrow: Narrow | None = None
) -> DecoderWeights:
    """Reads every tensor once; at most one layer is held twice.

    `narrow` rounds the layers' matrices. Embedding and output head stay in the model's dtype: their
    error goes into every logit unaveraged.
    """
    table = source.get("model.embed_tokens.weight")  # [vocab, hidden]
    tied = config.tied_embeddings
    lm_head = kernels.pack_linear(table if tied else source.get("lm_head.weight"), None)
    return DecoderWeights(
        embedding=lm_head if tied else table.clone(),
        layers=[
            _layer(config, source, kernels, narrow, layer) for layer in range(config.num_layers)
        ],
        norm=source.get("model.norm.weight").to(torch.float32, copy=True),
        lm_head=lm_head,
        cos_sin=cos_sin_table(config.rope, config.head_dim, config.max_model_len),
    )


def _layer(
    config: ModelConfig, source: WeightSource, kernels: Kernels, narrow: Narrow | None, layer: int
) -> LayerWeights:
    prefix = f"model.layers.{layer}."

    def linear(names: list[str], has_bias: bool) -> PackedLinear:
        weights = [source.get(f"{prefix}{name}.weight") for name in names]
        biases = [source.get(f"{prefix}{name}.bias") for name in names] if has_bias else []
        bias = torch.cat(biases) if has_bias else None
        return kernels.pack_linear(torch.cat(weights), bias, narrow)

    def norm(name: str) -> Tensor:
        return source.get(f"{prefix}{name}.weight").to(torch.float32, copy=True)

    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    return LayerWeights(
        attn_norm=norm("input_layernorm"),
        qkv=linear(attention, config.qkv_bias),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        o=linear(["self_attn.o_proj"], config.o_bias),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear(["mlp.gate_proj", "mlp.up_proj"], config.mlp_bias),
        down=linear(["mlp.down_proj"], config.mlp_bias),
    )
