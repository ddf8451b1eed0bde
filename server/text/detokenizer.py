"""Text from tokens, one token at a time.

Owns the undecoded rest of one choice. Invariants: no returned string holds half a character; all
returned strings together are the text of the whole sequence (`Tokenizer.decode`); work per token
does not grow with the sequence.
"""

import codecs
from typing import Final, Protocol

import tokenizers

from diptych.server.text.pieces import PieceTable

_WINDOW_TOKENS: Final = 6  # context given to decoders that look at neighbours
_PENDING_TOKENS_MAX: Final = 24  # a broken character never holds text back for longer
_BROKEN: Final = "\ufffd"


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        ...

    def finish(self) -> str:
        """What is left, when no token follows."""
        ...


class ByteDetokenizer:
    """For vocabularies whose pieces are exact: an incremental UTF-8 decoder over the pieces."""

    def __init__(self, pieces: PieceTable, skip_special_tokens: bool) -> None:
        assert pieces.exact
        self._pieces = pieces
        self._skip = pieces.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_left = pieces.strip_left

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        return self._stripped(self._decoder.decode(self._pieces[token]))

    def finish(self) -> str:
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        """Takes away the leading spaces of the whole text, not of each part."""
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class WindowDetokenizer:
    """For every other decoder: decodes a sliding window twice and returns what is new."""

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        pieces: PieceTable,
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._library = library
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._glue_specials = not (skip_special_tokens or spaces_between_special_tokens)
        self._ids: list[int] = []
        self._read = 0  # ids[:_read] are the context: their text was returned
        self._last_special = False

    def push(self, token: int) -> str:
        special = token in self._pieces.special_ids
        if self._skip and special:
            return ""
        glued = self._glue_specials and special and self._last_special
        self._last_special = special
        if glued:
            text = self.finish() + self._pieces.text(token)
            self._ids, self._read = [token], 1
            return text
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True) if self._read < len(self._ids) else ""

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        held = after.endswith(_BROKEN) and len(self._ids) - self._read < _PENDING_TOKENS_MAX
        if len(after) <= len(before) or (held and not final):
            return ""
        self._ids = self._ids[max(0, min(self._read, len(self._ids) - _WINDOW_TOKENS)) :]
        self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False) if ids else ""
