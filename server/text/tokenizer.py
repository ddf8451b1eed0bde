"""The tokenizer of a model folder, without torch and transformers.

Owns the library object of tokenizer.json, the table of pieces and the chat templates. Invariant:
`encode` gives the ids that Hugging Face's fast tokenizer of the same folder gives, special tokens
at the start included (tokenizer.json's post-processor decides them).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jinja2
import msgspec
import tokenizers

from diptych.engine.core.errors import InvalidRequestError, ModelLoadError
from diptych.server.text.chat_template import ChatTemplate
from diptych.server.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from diptych.server.text.pieces import PieceTable, TokenizerFile


class _TokenContent(msgspec.Struct, frozen=True):
    content: str


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


_TokenName = str | _TokenContent | None


class _TokenizerConfig(msgspec.Struct, frozen=True):
    """What tokenizer_config.json adds: names of special tokens and the chat template."""

    bos_token: _TokenName = None
    eos_token: _TokenName = None
    unk_token: _TokenName = None
    pad_token: _TokenName = None
    chat_template: str | list[_NamedTemplate] | None = None

    def named_tokens(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        values = {name: getattr(self, name) for name in names}
        return {
            name: value if isinstance(value, str) else value.content
            for name, value in values.items()
            if value is not None
        }


class Tokenizer:
    """`chat_template`: a file that replaces the model's own template."""

    def __init__(self, folder: str | Path, chat_template: str | Path | None = None) -> None:
        """Raises ModelLoadError naming the file."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            file = TokenizerFile.read(path)
            self._library = tokenizers.Tokenizer.from_file(str(path))
        except FileNotFoundError as error:
            raise ModelLoadError(f"{path} is missing; a fast tokenizer is required") from error
        except Exception as error:  # the library raises plain Exception for a bad file
            raise ModelLoadError(f"{path} cannot be read: {error}") from error
        self._library.no_padding()
        self._library.no_truncation()
        self.pieces = PieceTable(self._library, file)
        config = _read_config(folder / "tokenizer_config.json")
        self.tokens = config.named_tokens()
        self._templates = _read_templates(folder, config, self.tokens, chat_template)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows; the model's own vocabulary may be padded beyond it."""
        return self._library.get_vocab_size(with_added_tokens=True)

    @cached_property
    def token_chars_max(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length over this."""
        return max(1, *map(len, self._library.get_vocab(with_added_tokens=True)))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode_offsets(text, add_special_tokens=add_special_tokens)[0]

    def encode_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the half-open interval of characters that each stands for."""
        try:
            encoding = self._library.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError("The text holds half of a surrogate pair.") from error
        return encoding.ids, encoding.offsets

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        detokenizer = self.detokenizer(
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def detokenizer(
        self, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh one, for one choice."""
        if self.pieces.exact:
            return ByteDetokenizer(self.pieces, skip_special_tokens)
        return WindowDetokenizer(
            self._library,
            self.pieces,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False."""
        if not self._templates:
            raise InvalidRequestError(
                "This model has no chat template. Use /v1/completions, or start the server with "
                "--chat-template FILE."
            )
        template = self._templates.get("default") or next(iter(self._templates.values()))
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            arguments=arguments,
        )


def _read_config(path: Path) -> _TokenizerConfig:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig)
    except FileNotFoundError:
        return _TokenizerConfig()
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _read_templates(
    folder: Path,
    config: _TokenizerConfig,
    tokens: Mapping[str, str],
    override: str | Path | None,
) -> dict[str, ChatTemplate]:
    """By name. A template file in the folder wins over tokenizer_config.json's entry."""
    path = Path(override) if override is not None else folder / "chat_template.jinja"
    sources: dict[str, str] = {}
    if isinstance(config.chat_template, str):
        sources["default"] = config.chat_template
    elif config.chat_template:
        sources = {entry.name: entry.template for entry in config.chat_template}
    try:
        if override is not None or path.exists():
            sources["default"] = path.read_text(encoding="utf-8")
        return {name: ChatTemplate(source, tokens) for name, source in sources.items()}
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise ModelLoadError(f"the chat template of {path.parent} is broken: {error}") from error
