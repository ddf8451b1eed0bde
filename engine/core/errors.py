"""What a user, a peer or a machine can cause; each is answered, never dropped.

An `assert` elsewhere means a bug of ours. Everything else that can go wrong is a `DiptychError`
with the HTTP status, OpenAI error type and code that the front door answers with.
"""


class DiptychError(Exception):
    """Base of all operating errors."""

    status = 500
    type = "server_error"
    code: str | None = None
    retryable = True  # False: the same request would fail again

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(DiptychError):
    """The request cannot be served as written: 400."""

    status = 400
    type = "invalid_request_error"


class AuthenticationError(DiptychError):
    """Missing or wrong API key: 401."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFoundError(DiptychError):
    """Unknown model name: 404."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestTimeoutError(DiptychError):
    """The request's own deadline passed: 408."""

    status = 408
    type = "timeout_error"
    code = "deadline_exceeded"
    retryable = False


class OverloadedError(DiptychError):
    """A queue is full: 429, with the seconds after which room is expected."""

    status = 429
    type = "rate_limit_error"
    code = "server_overloaded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(DiptychError):
    """The engine behind the API server is gone or closing: 503."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"


class PoisonRequestError(DiptychError):
    """This request alone crashed a worker: 500 with its id."""

    code = "request_failed"
    retryable = False


class ConfigError(DiptychError):
    """A flag, file or combination that cannot work; raised before anything starts."""

    status = 400
    type = "invalid_request_error"


class ModelLoadError(DiptychError):
    """A model folder that cannot be served: names the file and the reason."""
