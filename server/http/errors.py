"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`.

Owns the HTTP-only errors and the one place where an error becomes bytes. Invariant: a client sees
our own short sentences only, never the text of an exception that is not a DiptychError.
"""

import math

import msgspec
from starlette.responses import Response

from diptych.engine.core.errors import (
    DiptychError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorObject


class UnknownUrlError(DiptychError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowedError(DiptychError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimeoutError(DiptychError):
    """The client did not send its request in time."""

    status = 408
    type = "timeout_error"
    code = "request_body_timeout"


class BodyTooLargeError(InvalidRequestError):
    status = 413
    code = "request_too_large"


class MediaTypeError(InvalidRequestError):
    status = 415
    code = "unsupported_media_type"


class DrainingError(EngineDeadError):
    """This server finishes what it has and takes nothing new."""

    code = "server_draining"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("The server is shutting down; try again on another one, or later.")
        self.retry_after_s = retry_after_s


class InternalError(DiptychError):
    """Something of ours broke; the log has the details under the request id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The server had an internal error while serving request {request_id}.")


def error_body(error: DiptychError) -> bytes:
    return msgspec.json.encode(
        ErrorReply(ErrorObject(error.message, error.type, error.param, error.code))
    )


def error_response(error: DiptychError, overload_status: int) -> Response:
    """The HTTP answer; `overload_status` is what overload is answered with (429 or 503)."""
    headers: dict[str, str] = {}
    status = overload_status if isinstance(error, OverloadedError) else error.status
    retry_after_s = getattr(error, "retry_after_s", None)
    if isinstance(retry_after_s, int | float):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if not error.retryable:
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would send a 408 or 500 again
    return Response(error_body(error), status, headers, media_type="application/json")
