"""POST /tokenize and /detokenize in the dialects that share these paths.

Owns the dispatch on body keys: `prompt`/`messages` is vLLM's, `inputs` TGI's, `content`
llama.cpp's. Answers to /detokenize carry both names that clients look for.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from diptych.engine.core.errors import InvalidRequestError
from diptych.server.http.body import read_object
from diptych.server.http.chat import encode_chat
from diptych.server.http.front import Front
from diptych.server.http.requests import ChatRequest, parse


class _TokenizeText(msgspec.Struct, frozen=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class _TokenizeInputs(msgspec.Struct, frozen=True):
    inputs: str
    add_special_tokens: bool = True


class _TokenizeContent(msgspec.Struct, frozen=True):
    content: str
    add_special: bool = False
    with_pieces: bool = False


class _Detokenize(msgspec.Struct, frozen=True):
    tokens: list[int]
    model: str | None = None


class _Tokens(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class _Span(msgspec.Struct, frozen=True):
    id: int
    text: str
    start: int
    stop: int


class _Piece(msgspec.Struct, frozen=True):
    id: int
    piece: str | list[int]


class _Pieces(msgspec.Struct, frozen=True):
    tokens: list[int] | list[_Piece]


class _Text(msgspec.Struct, frozen=True):
    prompt: str
    content: str


async def tokenize(front: Front, http: Request) -> Response:
    fields = await read_object(front, http)
    if "inputs" in fields:
        return _json(await _spans(front, parse(fields, _TokenizeInputs)[0]))
    if "content" in fields:
        return _json(await _pieces(front, parse(fields, _TokenizeContent)[0]))
    if "messages" in fields:
        strings = fields.pop("return_token_strs", False) is True
        chat = parse(fields, ChatRequest)[0]
        front.model(chat.model)
        return _json(_tokens(front, await encode_chat(front, chat), strings))
    if "prompt" not in fields:
        raise InvalidRequestError("Send prompt, messages, inputs or content.", param="prompt")
    text = parse(fields, _TokenizeText)[0]
    front.model(text.model)
    ids = await front.encode(text.prompt, add_special_tokens=text.add_special_tokens)
    return _json(_tokens(front, ids, text.return_token_strs))


async def detokenize(front: Front, http: Request) -> Response:
    request = parse(await read_object(front, http), _Detokenize)[0]
    front.model(request.model)
    size = front.client.info.vocab_size
    if any(not 0 <= token < size for token in request.tokens):
        raise InvalidRequestError(f"tokens must be ids from 0 to {size - 1}.", param="tokens")
    text = await front.decode(request.tokens)
    return _json(_Text(text, text))


def _tokens(front: Front, ids: list[int], strings: bool) -> _Tokens:
    names = [front.tokenizer.pieces.text(token) for token in ids] if strings else None
    return _Tokens(len(ids), front.client.info.max_model_len, ids, names)


async def _spans(front: Front, request: _TokenizeInputs) -> list[_Span]:
    ids, offsets = await front.encode_offsets(
        request.inputs, add_special_tokens=request.add_special_tokens
    )
    return [
        _Span(token, front.tokenizer.pieces.text(token), start, stop)
        for token, (start, stop) in zip(ids, offsets, strict=True)
    ]


async def _pieces(front: Front, request: _TokenizeContent) -> _Pieces:
    """A piece that is no whole text is a list of its bytes."""
    ids = await front.encode(request.content, add_special_tokens=request.add_special)
    if not request.with_pieces:
        return _Pieces(ids)
    return _Pieces([_Piece(token, _text_or_bytes(front.tokenizer.pieces[token])) for token in ids])


def _text_or_bytes(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
