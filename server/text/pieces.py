"""The bytes that each token id stands for, read from a `tokenizer.json`.

Owns a lazily filled table id -> bytes. Invariant: for byte-level and byte-fallback vocabularies the
text of a sequence is the UTF-8 decoding of the concatenated pieces (less `strip_left` leading
spaces), so that text can be made one token at a time. Other decoders have `exact` False.
"""

from pathlib import Path
from typing import Final

import msgspec
import tokenizers

_SPACE_MARK: Final = "▁"


class AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _Decoder(msgspec.Struct, frozen=True):
    type: str = ""
    decoders: list["_Decoder"] = []
    content: object = None
    start: int = 0
    stop: int = 0
    pattern: object = None


class TokenizerFile(msgspec.Struct, frozen=True):
    """The few parts of tokenizer.json that are read here; the library reads the rest."""

    added_tokens: list[AddedToken] = []
    decoder: _Decoder | None = None

    @staticmethod
    def read(path: Path) -> "TokenizerFile":
        """Raises OSError and msgspec.MsgspecError."""
        return msgspec.json.decode(path.read_bytes(), type=TokenizerFile)


def _byte_of_char() -> dict[str, int]:
    """The printable alphabet of byte-level BPE: character -> byte (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    shifted = 0x100
    for byte in range(0x100):
        if chr(byte) not in table:
            table[chr(shifted)] = byte
            shifted += 1
    return table


_BYTE_OF_CHAR: Final = _byte_of_char()


def _byte_level(token: str) -> bytes:
    """A token with a character outside the alphabet (an added one) stands for itself."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SPACE_MARK, " ").encode()


class PieceTable:
    """`strip_left`: how many leading spaces a decoded text loses (0 or 1 in practice)."""

    def __init__(self, library: tokenizers.Tokenizer, file: TokenizerFile) -> None:
        self._library = library
        self._pieces: dict[int, bytes] = {}
        self.special_ids = frozenset(token.id for token in file.added_tokens if token.special)
        self._added = {token.id: token.content for token in file.added_tokens}
        self.exact = True
        self.strip_left = 0
        self._convert = _byte_level
        decoder = file.decoder
        kinds = [] if decoder is None else [part.type for part in decoder.decoders]
        if decoder is not None and decoder.type == "ByteLevel":
            return
        self._convert = _byte_fallback
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
            assert decoder is not None
            mark, strip = decoder.decoders[0], decoder.decoders[3:]
            self.strip_left = strip[0].start if strip else 0
            self.exact = mark.pattern == {"String": _SPACE_MARK} and mark.content == " "
            self.exact = self.exact and not any(part.stop for part in strip)
        else:
            self.exact = False

    def __getitem__(self, token: int) -> bytes:
        """An id outside the vocabulary (padding of the embedding) stands for no bytes."""
        piece = self._pieces.get(token)
        if piece is None:
            text = self._library.id_to_token(token)
            piece = b"" if text is None else self._convert(text)
            self._pieces[token] = piece
        return piece

    def text(self, token: int) -> str:
        """For people and logprobs: bytes that are no whole character show as U+FFFD."""
        return self[token].decode("utf-8", "replace")
