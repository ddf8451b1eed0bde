"""Model folders made on the spot: configurations for dummy weights, with a byte tokenizer.

`tiny` is for tests of the machinery; `bench-360m` and `bench-1b` have the sizes that speed is
measured on. `python -m bench.models bench-360m FOLDER` writes one; serve it with
`--load-format dummy`.
"""

import argparse
import json
from pathlib import Path
from typing import Final

_SIZES: Final[dict[str, dict[str, object]]] = {
    "tiny": {
        "tie_word_embeddings": False,  # tied random embeddings repeat the last token for ever
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 384,
        "max_position_embeddings": 4096,
    },
    "bench-360m": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "vocab_size": 49152,
        "max_position_embeddings": 16384,
    },
    "bench-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 49152,
        "max_position_embeddings": 16384,
    },
}
SIZES: Final = tuple(_SIZES)


def write_model(folder: Path, size: str, dtype: str = "bfloat16", **changes: object) -> Path:
    """A Llama configuration and a byte-level tokenizer without merges; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "torch_dtype": dtype,
    }
    config |= _SIZES[size]
    config |= changes
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, 256 to 258 special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])  # 256, 257, 258
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    print(write_model(args.folder, args.size, args.dtype))


if __name__ == "__main__":
    main()
