"""The ASGI middleware in front of all routes: request ids, API keys, drain, counting.

Owns who may pass. Invariants: without a valid key only a fixed list of paths answers, unknown paths
included; every response carries X-Request-Id; every admitted request leaves again.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.engine.core.errors import AuthenticationError, DiptychError
from diptych.server.http.answering import valid_header_id
from diptych.server.http.front import Front

OPEN_PATHS: Final = frozenset({"/health", "/ping", "/ready", "/metrics"})


class Gate:
    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front
        self._keys = [_digest(key.encode()) for key in front.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        given = _header(scope, b"x-request-id").decode("latin-1")
        request_id = given if valid_header_id(given) else self._front.new_id()
        scope["diptych.request_id"] = request_id
        stamped = self._stamped(send, path, request_id)
        works = path not in OPEN_PATHS and scope["method"] == "POST"
        try:
            if path not in OPEN_PATHS:
                self._authenticate(_header(scope, b"authorization"))
            if works:
                self._front.enter()
        except DiptychError as error:
            await self._front.error_response(error)(scope, receive, stamped)
            return
        try:
            await self._app(scope, receive, stamped)
        finally:
            if works:
                self._front.leave()

    def _authenticate(self, header: bytes) -> None:
        """Compares with every key and without an early exit: its time says nothing."""
        if not self._keys:
            return
        scheme, _, key = header.partition(b" ")
        digest = _digest(key.strip())
        matches = sum(hmac.compare_digest(digest, known) for known in self._keys)
        if not key.strip() or scheme.lower() != b"bearer":
            raise AuthenticationError(
                "You did not send an API key. Send it in the header 'Authorization: Bearer KEY'."
            )
        if not matches:
            raise AuthenticationError("The API key is not valid for this server.")

    def _stamped(self, send: Send, path: str, request_id: str) -> Send:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                if not any(name == b"x-request-id" for name, _ in headers):
                    message["headers"] = [*headers, (b"x-request-id", request_id.encode())]
                self._front.metrics.responded(path, message["status"])
            await send(message)

        return stamped


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> bytes:
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")
