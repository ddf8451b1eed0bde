"""Reading a request body under a limit of bytes and of time.

Owns nothing. Invariant: no more than `body_bytes_max` bytes of one body are ever held.
"""

import asyncio
from typing import Final

from starlette.requests import ClientDisconnect, Request

from diptych.engine.core.errors import InvalidRequestError
from diptych.server.http.errors import BodyTimeoutError, BodyTooLargeError, MediaTypeError
from diptych.server.http.front import Front
from diptych.server.http.requests import decode_object
from diptych.server.http.stream import ClientGoneError

_DISCARD_FACTOR: Final = 8  # of body_bytes_max: so much is read of a body that is refused


async def read_object(front: Front, request: Request) -> dict[str, object]:
    """The JSON object in the body. Raises the DiptychError to answer with."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise MediaTypeError(
            f"Send JSON with the header 'Content-Type: application/json', not {kind[:60]!r}."
        )
    settings = front.settings
    try:
        async with asyncio.timeout(settings.body_s_max):
            body = await _read(request, settings.body_bytes_max)
    except TimeoutError as error:
        raise BodyTimeoutError("The request body did not arrive in time.") from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    if not body.strip():
        raise InvalidRequestError("The request body is empty; send a JSON object.")
    return decode_object(body)


async def _read(request: Request, most: int) -> bytes:
    """The whole body. One that is too large is read to its end first (within limits of its own and
    of time), for a client that still sends would see a reset connection instead of the answer."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most and _waits_or_is_endless(request, int(said), most):
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most * _DISCARD_FACTOR:
            break
        if size > most:
            parts.clear()
        else:
            parts.append(part)
    if size > most:
        raise _too_large(most)
    return b"".join(parts)


def _waits_or_is_endless(request: Request, said: int, most: int) -> bool:
    """The client asks before it sends (`Expect`), or there is too much to read and throw away."""
    return "expect" in request.headers or said > most * _DISCARD_FACTOR


def _too_large(most: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The request body is larger than {most} bytes. Send a shorter prompt, or raise the "
        "server's limit."
    )
