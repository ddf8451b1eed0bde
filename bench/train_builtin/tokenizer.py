"""Byte-level tokenizer: template words are one token each, digits and all other text are bytes.

A pre-token (a word with its leading space, one digit, one sign) that is in the vocabulary becomes
one token; any other falls back to its bytes, so every text round-trips and the letters of a word
the tokenizer does not know are visible to the model. There are no merges.
"""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.train_builtin import free_text, templates

BOS, END, SYSTEM, USER, ASSISTANT, PAD = SPECIALS = (
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|pad|>",
)
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Only system, user and assistant messages are supported.') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
_SPLIT = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"
_PRE_TOKEN = re.compile(r" ?[A-Za-z]+| [^\sA-Za-z0-9]")  # what of the templates may be a word


def _words() -> list[str]:
    filled = [re.sub(r"\{\w+\}", "0", text) for text in templates.ALL]
    texts = [*filled, *(f"0{between}0" for between, _ in templates.LIST_STYLES)]
    texts += [*free_text.all_text(), '0 "0', " '0", ' {"0', "0 + 0 = 0"]
    found = {token for text in texts for token in _PRE_TOKEN.findall(text)}
    return sorted(token for token in found if len(token) > 1)


def build() -> Tokenizer:
    """The tokenizer, from the templates alone: the same source gives the same ids."""
    byte_names = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [token.replace(" ", "\u0120") for token in _words()]
    vocab = {name: i for i, name in enumerate([*SPECIALS, *byte_names, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return tokenizer


def build_fast(model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it, with the chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=build(),
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(folder: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template inside)."""
    build_fast(model_max_length).save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every version knows
    path.write_text(json.dumps(config, indent=2) + "\n")
