"""The oracle of the engine: transformers, on tiny random checkpoints of every supported family.

Owns the list of families and how a checkpoint of one is made and answered. Invariant: a checkpoint
is a function of (family, dtype, seed), and its norms and biases are random too, so that leaving one
out shows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["FAMILIES", "VOCAB_SIZE", "Oracle", "make_checkpoint"]

VOCAB_SIZE: Final = 160
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# Large weights make every part of the model matter; in bf16 they would drown it in rounding (there,
# transformers' own bf16 logits stray 3e-2 from its fp32 ones).
_STD: Final = {torch.float32: 0.12, torch.bfloat16: 0.05, torch.float16: 0.12}

# name -> (transformers' configuration class, what differs from _SIZES)
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_scaling": _LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "LlamaConfig",
        {
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 64,
        },
    ),
    "llama-yarn": ("LlamaConfig", {"rope_scaling": _YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 21, "head_dim": 32}),
    "mistral-full": ("MistralConfig", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2Config", {"rope_scaling": _YARN | {"beta_fast": 16, "beta_slow": 2}}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-layers": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 18,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def make_checkpoint(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> None:
    """Writes config.json and safetensors as transformers does."""
    class_name, changes = FAMILIES[family]
    config = getattr(transformers, class_name)(
        **_SIZES | {"initializer_range": _STD[dtype]} | changes
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    transformers.utils.logging.disable_progress_bar()
    model.to(dtype).save_pretrained(folder)


@dataclass(slots=True, eq=False)
class Oracle:
    """transformers' own model of a checkpoint."""

    model: Any

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, frozen_len: int | None = None
    ) -> "Oracle":
        """frozen_len: where the rope scaling depends on the length, the length it is frozen at."""
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        rotary = model.model.rotary_emb
        if rotary.rope_type == "dynamic":
            assert frozen_len is not None, "say where dynamic rope is frozen"
            init = ROPE_INIT_FUNCTIONS["dynamic"]
            rotary.inv_freq = init(model.config, seq_len=frozen_len)[0]
            rotary.rope_type = "default"  # no updates from here on
        return cls(model)

    def logits(self, ids: list[int]) -> Tensor:
        """[len(ids), vocab] fp32."""
        with torch.no_grad():
            result: Tensor = self.model(torch.tensor([ids])).logits[0].float()
        return result

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What `generate` appends to the prompt."""
        ids = torch.tensor([prompt])
        answer = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )
        tokens: list[int] = answer[0, len(prompt) :].tolist()
        return tokens
