"""Model folders made on the spot: configurations for dummy weights, with a byte tokenizer.

`tiny` is for tests of the machinery, `bench-tiny` for the cost of serving itself; `bench-360m` and
`bench-1b` have the sizes that speed is measured on. `python -m bench.models bench-360m FOLDER`
writes one; serve it with `--load-format dummy`. With `--weights` the folder holds random weights
too, and a tokenizer whose every id is printable text: what other engines need to serve it.
"""

import argparse
import json
import string
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
    "bench-tiny": {  # as little work as every engine accepts: some want a head_dim of 64
        "tie_word_embeddings": False,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "vocab_size": 512,
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


def write_weights(folder: Path, size: str, dtype: str = "bfloat16", **changes: object) -> Path:
    """A model with weights by transformers' own initialisation, and all ids printable."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_model(folder, size, dtype, **changes)
    config = AutoConfig.from_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _merges(count: int) -> list[tuple[str, str]]:
    """The first `count` pairs of letters and digits, then triples of a pair and one more."""
    letters = string.ascii_letters + string.digits
    pairs = [(a, b) for a in letters for b in letters]
    triples = [(a + b, c) for a, b in pairs for c in letters]
    return (pairs + triples)[:count]


def write_tokenizer(folder: Path, vocab_size: int = 0) -> None:
    """A byte-level tokenizer: ids 0 to 255 are bytes, 256 to 258 special, then text up to
    `vocab_size` (so that a stream shows every token of a model that writes at random)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    vocab |= {"<pad>": 256, "<s>": 257, "</s>": 258}
    merges = _merges(max(0, vocab_size - len(vocab)))
    vocab |= {left + right: 259 + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
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
    parser.add_argument("--weights", action="store_true", help="random weights too (transformers)")
    args = parser.parse_args()
    make = write_weights if args.weights else write_model
    print(make(args.folder, args.size, args.dtype))


if __name__ == "__main__":
    main()
