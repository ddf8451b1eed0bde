"""What a checkpoint's config.json and generation_config.json say, resolved to plain numbers.

Owns `ModelConfig`: everything the engine, the pool and the front door need to know of a model
without torch. Invariant: a field that would change the computation is either expressed here or the
model is refused with the file and the reason; nothing is silently approximated.
"""

from pathlib import Path
from typing import Final, Literal

import msgspec

from diptych.engine.core.config import Dtype, KVCacheDtype
from diptych.engine.core.errors import ConfigError, DiptychError, ModelLoadError
from diptych.engine.core.json_fields import JsonFields
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.rope_config import RopeConfig, parse_rope
from diptych.engine.core.types import KV_SCALE_BYTES

StoredDtype = Literal["float32", "bfloat16", "float16"]
KVDtype = Literal["float32", "bfloat16", "float16", "int8"]

DTYPE_BYTES: Final[dict[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
LAYERS_MAX: Final = 1024
POSITIONS_MAX: Final = 1 << 24  # tokens; the rope table has a row for each
_DTYPE_NAMES: Final[dict[str, StoredDtype]] = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
_ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REFUSED: Final = {
    "quantization_config": "quantized checkpoints are not supported",
    "auto_map": "the checkpoint brings its own code, and remote code is never run",
    "num_experts": "mixture of experts is not supported",
    "num_local_experts": "mixture of experts is not supported",
    "n_routed_experts": "mixture of experts is not supported",
    "attn_logit_softcapping": "soft-capped logits are not supported",
    "final_logit_softcapping": "soft-capped logits are not supported",
    "logits_scaling": "scaled logits are not supported",
    "logit_scale": "scaled logits are not supported",
    "embedding_multiplier": "scaled embeddings are not supported",
    "residual_multiplier": "scaled residuals are not supported",
    "attention_multiplier": "scaled attention is not supported",
}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder: grouped-query attention, RMS norms, gated SiLU."""

    architecture: str
    dtype: StoredDtype  # of weights, and of KV where nothing else is asked for
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    qk_norm: bool  # RMS norm of each head of q and k, before rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]  # per layer: keys a query sees, itself included; None: all
    max_model_len: int  # tokens, prompt and answer together
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    sampling_defaults: dict[str, float | int]  # of generation_config.json, by SamplingParams name

    @property
    def q_size(self) -> int:
        return self.num_q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def kv_dtype(self, *wanted: KVCacheDtype) -> KVDtype:
        """The first of `wanted` that is not "auto"; then the model's."""
        return next((dtype for dtype in wanted if dtype != "auto"), self.dtype)

    def kv_row(self, dtype: KVDtype | None = None) -> int:
        """Elements of one token's row of one KV head in the pool: of int8, its scale too."""
        return self.head_dim + (KV_SCALE_BYTES if dtype == "int8" else 0)

    def block_bytes(self, block_size: int, dtype: KVDtype | None = None) -> int:
        """Bytes of one block: all layers, keys and values. dtype: None is the model's."""
        rows = self.num_layers * 2 * self.num_kv_heads * block_size
        return rows * self.kv_row(dtype) * DTYPE_BYTES[dtype or self.dtype]

    def num_blocks_for(self, memory_bytes: int, block_size: int) -> int:
        return memory_bytes // self.block_bytes(block_size)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the checkpoint must hold."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        linears = {
            "self_attn.q_proj": (self.q_size, hidden, self.qkv_bias),
            "self_attn.k_proj": (self.kv_size, hidden, self.qkv_bias),
            "self_attn.v_proj": (self.kv_size, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, self.q_size, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.qk_norm:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, (num_out, num_in, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (num_out, num_in)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (num_out,)
            for name, size in norms.items():
                shapes[f"{prefix}{name}.weight"] = (size,)
        return shapes


def load_model_config(
    folder: str | Path, dtype: Dtype = "auto", max_model_len: int | None = None
) -> ModelConfig:
    """Reads the two files of `folder`. Raises ModelLoadError naming the file and the reason.

    max_model_len: None takes the model's own; a larger one than the model's is a ConfigError.
    """
    folder = Path(folder)
    fields = JsonFields.read(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = JsonFields(generation_path, {})
    if generation_path.is_file():
        generation = JsonFields.read(generation_path)
    return _resolve(fields, generation, dtype, max_model_len)


def _resolve(
    fields: JsonFields, generation: JsonFields, dtype: Dtype, max_model_len: int | None
) -> ModelConfig:
    architecture = _architecture(fields)
    for name, reason in _REFUSED.items():
        if fields.has(name):
            raise fields.bad(f"{name} is set: {reason}")
    activation = fields.text("hidden_act") or fields.text("hidden_activation") or "silu"
    if activation != "silu":
        raise fields.bad(f"hidden_act must be 'silu', got {activation!r}")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.bad("partial_rotary_factor other than 1 is not supported")
    num_layers = fields.integer("num_hidden_layers", high=LAYERS_MAX)
    hidden_size, num_q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_position = fields.integer("max_position_embeddings", high=POSITIONS_MAX)
    rope = parse_rope(fields, max_position)
    own_len = rope.context_len(max_position)
    if own_len > POSITIONS_MAX:
        raise fields.bad(f"a context of {own_len} tokens is longer than {POSITIONS_MAX}")
    length = _max_model_len(fields, own_len, max_model_len)
    if rope.type == "dynamic":
        rope = msgspec.structs.replace(rope, frozen_len=max(length, max_position))
    attention_bias = fields.boolean("attention_bias", False)
    qwen2, mistral = architecture == "Qwen2ForCausalLM", architecture == "MistralForCausalLM"
    config = ModelConfig(
        architecture=architecture,
        dtype=_dtype(fields, dtype),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=fields.integer("num_key_value_heads", 8 if mistral else num_q_heads),
        head_dim=fields.integer("head_dim", _head_dim(architecture, hidden_size, num_q_heads)),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        qk_norm=architecture == "Qwen3ForCausalLM",
        qkv_bias=qwen2 or (attention_bias and not mistral),
        o_bias=attention_bias and not (qwen2 or mistral),
        mlp_bias=fields.boolean("mlp_bias", False) and architecture == "LlamaForCausalLM",
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
        windows=_windows(fields, architecture, num_layers, length),
        max_model_len=length,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=frozenset(
            fields.token_ids("eos_token_id") + generation.token_ids("eos_token_id")
        ),
        sampling_defaults=_sampling_defaults(generation),
    )
    _verify_sizes(fields, config)
    return config


def _architecture(fields: JsonFields) -> str:
    names = fields.texts("architectures") or []
    if not names:
        model_type = fields.text("model_type")
        names = [_ARCHITECTURES.get(model_type or "", model_type or "none given")]
    known = ", ".join(_ARCHITECTURES.values())
    if len(names) != 1 or names[0] not in _ARCHITECTURES.values():
        raise fields.bad(f"architecture {', '.join(names)} is not supported (these are: {known})")
    return names[0]


def _head_dim(architecture: str, hidden_size: int, num_q_heads: int) -> int:
    """Where config.json does not say; Qwen3 has a fixed default."""
    return 128 if architecture == "Qwen3ForCausalLM" else max(1, hidden_size // num_q_heads)


def _dtype(fields: JsonFields, wanted: Dtype) -> StoredDtype:
    if wanted != "auto":
        return wanted
    name = fields.text("dtype") or fields.text("torch_dtype") or "float32"
    known = _DTYPE_NAMES.get(name.removeprefix("torch."))
    if known is None:
        raise fields.bad(f"dtype {name!r} is not supported; ask for float32, bfloat16 or float16")
    return known


def _max_model_len(fields: JsonFields, own: int, wanted: int | None) -> int:
    if wanted is None:
        return own
    if not 1 <= wanted <= own:
        raise ConfigError(
            f"max_model_len must be between 1 and {own} (what {fields.path} allows), got {wanted}"
        )
    return wanted


def _windows(
    fields: JsonFields, architecture: str, num_layers: int, length: int
) -> tuple[int | None, ...]:
    """The sliding window of each layer; one that no sequence can reach counts as none."""
    window: int | None = None
    first = 0  # layers before it see everything
    if architecture == "MistralForCausalLM":
        if "sliding_window" not in fields.fields:
            window = 4096  # the family's default where the field is absent, not null
        elif fields.has("sliding_window"):
            window = fields.integer("sliding_window")
    elif architecture == "LlamaForCausalLM":
        if fields.has("sliding_window"):
            raise fields.bad("sliding_window is not defined for LlamaForCausalLM")
    elif fields.boolean("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096)
        if "sliding_window" in fields.fields and not fields.has("sliding_window"):
            window = None
        first = fields.integer("max_window_layers", 28, low=0)
    slides = [window is not None and layer >= first for layer in range(num_layers)]
    types = fields.texts("layer_types")
    if types is not None:
        slides = _layer_types(fields, types, slides, fixed=not architecture.startswith("Qwen"))
        if any(slides) and window is None:
            raise fields.bad("layer_types asks for sliding_attention, but no window is in use")
    reachable = window if window is not None and window < length else None
    return tuple(reachable if slide else None for slide in slides)


def _layer_types(
    fields: JsonFields, types: list[str], slides: list[bool], *, fixed: bool
) -> list[bool]:
    kinds = {"full_attention": False, "sliding_attention": True}
    unknown = set(types) - kinds.keys()
    if unknown:
        raise fields.bad(f"layer_types holds {sorted(unknown)}, which are not supported")
    if len(types) != len(slides):
        raise fields.bad(f"layer_types has {len(types)} entries for {len(slides)} layers")
    wanted = [kinds[kind] for kind in types]
    if fixed and wanted != slides:
        raise fields.bad("layer_types disagrees with sliding_window for this architecture")
    return wanted


def _sampling_defaults(generation: JsonFields) -> dict[str, float | int]:
    """generation_config.json in SamplingParams' names. `do_sample: false` means greedy."""
    defaults: dict[str, float | int] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if generation.has(name):
            defaults[name] = generation.number(name, positive=False)
    if generation.has("top_k"):
        defaults["top_k"] = generation.integer("top_k", low=-1)
    if generation.has("max_new_tokens"):
        defaults["max_tokens"] = generation.integer("max_new_tokens")
    if not generation.boolean("do_sample", True):
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults).verify()  # type: ignore[arg-type]  # names checked above
    except DiptychError as error:
        raise ModelLoadError(f"{generation.path}: {error.message}") from error
    return defaults


def _verify_sizes(fields: JsonFields, config: ModelConfig) -> None:
    if config.num_q_heads % config.num_kv_heads:
        raise fields.bad(
            f"num_attention_heads ({config.num_q_heads}) must be a multiple of"
            f" num_key_value_heads ({config.num_kv_heads})"
        )
    if config.head_dim % 2 or config.head_dim < 4:
        raise fields.bad(f"head_dim must be even and at least 4, got {config.head_dim}")
    if config.hidden_size % config.num_q_heads and not fields.has("head_dim"):
        raise fields.bad(
            f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads"
            f" ({config.num_q_heads}) where head_dim is not given"
        )
    beyond = [token for token in config.eos_token_ids if token >= config.vocab_size]
    if beyond:
        raise fields.bad(f"eos_token_id {beyond[0]} is outside the vocabulary")
