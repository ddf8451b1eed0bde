"""Small tokenizer folders built in place: byte-level BPE, byte fallback, and a plain word list."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello again; what is the value of the key?",
    "naïve café déjà vu über straße",
    "数字 と 文字 の 組み合わせ",
    '{"name": "value", "list": [1, 2, 3]}',
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('Unknown role ' + message['role']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_byte_level(folder: Path, vocab_size: int = 400) -> Path:
    """Byte-level BPE with BOS by post-processor and a chat template; as Llama 3 and Qwen."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([AddedToken("<think>", special=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return _write(folder, library, "<|bos|>", "<|end|>")


def write_byte_fallback(folder: Path) -> Path:
    """SentencePiece-like BPE with byte tokens; as Llama 2 and Mistral."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyz,.é":
        vocab[char] = len(vocab)
    merges = [("▁", "t"), ("▁", "h"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("▁h", "e")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    library = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _write(folder, library, "<s>", "</s>")


def write_metaspace(folder: Path) -> Path:
    """A unigram vocabulary with a Metaspace decoder: pieces depend on their neighbours."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), ("▁fox", -2.0), ("he", -2.5)]
    pieces += [(char, -5.0) for char in "abcdefghijklmnopqrstuvwxyzé数"]
    library = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<s>", "</s>"])
    return _write(folder, library, "<s>", "</s>")


def _write(folder: Path, library: Tokenizer, bos: str, eos: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos, "special": True},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
