"""The training model: a small Llama whose layer weights are stacked, and its export.

Weights are fp32 and stacked over layers ([L, out, in]) so that the optimizer works on seven big
tensors; the forward pass runs in bf16. `export` writes the Hugging Face layout (bf16). Invariant:
the forward pass computes what `LlamaForCausalLM` computes with the exported weights.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bench.train_builtin import tokenizer as tok


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of the model; `max_len` is the context in tokens."""

    vocab_size: int
    num_layers: int = 6
    hidden: int = 192
    ffn: int = 384
    num_q_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    max_len: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


Weights = dict[str, Tensor]
# name -> Hugging Face name inside model.layers.{i}
LAYER_NAMES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm_attn": "input_layernorm",
    "norm_ffn": "post_attention_layernorm",
}
MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")


def init_weights(shape: ModelShape, seed: int) -> Weights:
    """Fresh fp32 weights; the projections back into the residual stream start at zero."""
    gen = torch.Generator().manual_seed(seed)
    s, n = shape, shape.num_layers

    def matrix(out: int, inp: int) -> Tensor:
        normal = torch.randn(n, out, inp, generator=gen)
        return normal / math.sqrt(inp)  # [L, out, in]

    q_dim, kv_dim = s.num_q_heads * s.head_dim, s.num_kv_heads * s.head_dim
    weights = {
        "embed": torch.randn(s.vocab_size, s.hidden, generator=gen) * 0.05,  # [V, hidden]
        "norm": torch.ones(s.hidden),
        "norm_attn": torch.ones(n, s.hidden),
        "norm_ffn": torch.ones(n, s.hidden),
        "wq": matrix(q_dim, s.hidden),
        "wk": matrix(kv_dim, s.hidden),
        "wv": matrix(kv_dim, s.hidden),
        "wo": torch.zeros(n, s.hidden, q_dim),
        "gate": matrix(s.ffn, s.hidden),
        "up": matrix(s.ffn, s.hidden),
        "down": torch.zeros(n, s.hidden, s.ffn),
    }
    return {name: w.requires_grad_() for name, w in weights.items()}


def rope_table(shape: ModelShape, num_tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [num_tokens, q_dim] bf16, the same for every head."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32), shape.rope_theta**-half)
    angles = angles.repeat(1, 2 * shape.num_q_heads)  # both halves of a head turn alike
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _rotated(w: Tensor, head_dim: int) -> Tensor:
    """The projection [out, in] whose output is the rotated half of each head's output of `w`."""
    left, right = w.view(-1, 2, head_dim // 2, w.size(-1)).unbind(1)
    return torch.stack((-right, left), dim=1).view_as(w)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [B, T, q_dim] from scaled q [B, Hq, T, D] and k, v [B, Hkv, T, D].

    Written out: at these lengths that is several times faster on a CPU than the fused kernel's
    backward pass. The query heads of a group share one product with their key head.
    """
    num_seqs, num_kv_heads, num_tokens, head_dim = k.shape
    group = q.size(1) // num_kv_heads
    future = torch.full((num_tokens, num_tokens), -torch.inf, dtype=q.dtype).triu(1)
    q = q.reshape(num_seqs, num_kv_heads, group * num_tokens, head_dim)
    scores = (q @ k.mT).view(num_seqs, num_kv_heads, group, num_tokens, num_tokens) + future
    mixed = scores.softmax(-1).view(num_seqs, num_kv_heads, group * num_tokens, num_tokens) @ v
    mixed = mixed.view(num_seqs, num_kv_heads * group, num_tokens, head_dim)
    return mixed.transpose(1, 2).reshape(num_seqs, num_tokens, -1)


def forward(
    shape: ModelShape, weights: Weights, ids: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """Final hidden states [B, T, hidden] bf16 of token ids [B, T] int64 (right padded)."""
    s = shape
    w16 = {name: w.bfloat16() for name, w in weights.items()}
    layers = [
        dict(zip(LAYER_NAMES, parts, strict=True))
        for parts in zip(*(w16[name].unbind() for name in LAYER_NAMES), strict=True)
    ]
    num_seqs, num_tokens = ids.shape
    cos, sin = (table[:num_tokens] for table in rope)  # [T, q_dim]
    x = F.embedding(ids, w16["embed"])  # [B, T, hidden]

    def heads(y: Tensor) -> Tensor:
        return y.view(num_seqs, num_tokens, -1, s.head_dim).transpose(1, 2)  # [B, H, T, head_dim]

    def roped(h: Tensor, w: Tensor) -> Tensor:
        # Two products with the small weights are cheaper than shuffling every token's halves.
        c, n = cos[:, : w.size(0)], sin[:, : w.size(0)]
        return heads(F.linear(h, w) * c + F.linear(h, _rotated(w, s.head_dim)) * n)

    scale = s.head_dim**-0.5  # a change of the queries, made to their smaller weights
    for w in layers:
        h = F.rms_norm(x, (s.hidden,), w["norm_attn"], s.norm_eps)
        q, k, v = roped(h, w["wq"] * scale), roped(h, w["wk"]), heads(F.linear(h, w["wv"]))
        x = x + F.linear(_attention(q, k, v), w["wo"])
        h = F.rms_norm(x, (s.hidden,), w["norm_ffn"], s.norm_eps)
        x = x + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])
    return F.rms_norm(x, (s.hidden,), w16["norm"], s.norm_eps)


def answer_loss(
    shape: ModelShape, weights: Weights, ids: Tensor, targets: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """Summed cross entropy over positions whose target [B, T] int64 is not negative."""
    hidden = forward(shape, weights, ids, rope)
    wanted = targets >= 0
    logits = F.linear(hidden[wanted], weights["embed"].bfloat16())  # [num wanted, V]
    return F.cross_entropy(logits.float(), targets[wanted], reduction="sum")


def export(shape: ModelShape, weights: Weights, folder: Path) -> None:
    """Write config, bf16 weights, generation defaults and tokenizer as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    for ours, theirs in LAYER_NAMES.items():
        for i in range(shape.num_layers):
            tensors[f"model.layers.{i}.{theirs}.weight"] = weights[ours][i]
    stored = {n: w.detach().to(torch.bfloat16).contiguous().clone() for n, w in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    ids = {name: i for i, name in enumerate(tok.SPECIALS)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids[tok.BOS],
        "eos_token_id": ids[tok.END],
        "pad_token_id": ids[tok.PAD],
    }
    generation = {k: v for k, v in config.items() if k.endswith("_token_id")}
    generation["do_sample"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tok.save(folder, shape.max_len)
