"""What all routes of one API server share.

Owns the count of requests in flight, the drain and the making of request ids. Invariant: internal
ids are never chosen by a client.
"""

import asyncio
import hashlib
import itertools
import secrets
import time
from typing import Final

from starlette.responses import Response

from diptych.engine.core.errors import (
    DiptychError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from diptych.server.client import EngineClient
from diptych.server.http.errors import DrainingError, error_response
from diptych.server.http.meters import Cells
from diptych.server.http.metrics import Metrics
from diptych.server.http.settings import HttpSettings
from diptych.server.text.tokenizer import Tokenizer

_THREAD_CHARS: Final = 16_384  # longer texts are tokenized beside the event loop


class Front:
    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        settings: HttpSettings,
        meters: memoryview | None = None,
    ) -> None:
        """`meters`: memory that all API servers share, None when there is only this one."""
        self.client = client
        self.tokenizer = tokenizer
        self.settings = settings
        cells = Cells(meters, settings.api_number, settings.num_apis)
        self.metrics = Metrics(settings.model_names[0], client, cells)
        self.created = int(time.time())
        digest = hashlib.sha256(client.info.fingerprint.encode()).hexdigest()
        self.system_fingerprint = f"fp_{digest[:12]}"
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._counter = itertools.count()

    def new_id(self) -> str:
        return f"{self.settings.api_number}-{next(self._counter)}-{secrets.token_hex(4)}"

    def error_response(self, error: DiptychError) -> Response:
        return error_response(error, self.settings.overload_status)

    def enter(self) -> None:
        """One more request in flight; pairs with `leave`."""
        if self.draining:
            raise DrainingError(self.settings.retry_after_s)
        if self.in_flight >= self.settings.in_flight_max:
            self.metrics.rejected("connections")
            raise OverloadedError(
                f"The server already has {self.in_flight} requests in flight. Try again later.",
                retry_after_s=1.0,
            )
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def begin_drain(self) -> None:
        """New requests get 503, /health says 503, what runs goes on."""
        self.draining = True

    async def drained(self) -> None:
        await self._idle.wait()

    def model(self, name: str | None) -> str:
        """The name to answer with. Raises ModelNotFoundError."""
        names = self.settings.model_names
        if not name:
            return names[0]
        if name not in names:
            raise ModelNotFoundError(
                f"The model {name[:100]!r} does not exist here. This server has: "
                f"{', '.join(names)}.",
                param="model",
            )
        return name

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return (await self.encode_offsets(text, add_special_tokens=add_special_tokens))[0]

    async def encode_offsets(
        self, text: str, *, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Long texts run in a thread (the library releases the interpreter's lock)."""
        encode = self.tokenizer.encode_offsets
        if len(text) <= _THREAD_CHARS:
            return encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)

    async def encode_prompt(
        self, text: str, *, add_special_tokens: bool, truncated: bool
    ) -> list[int]:
        """Refuses a text that cannot fit, however it is tokenized, before doing that work."""
        most = self.client.info.max_model_len
        least = len(text) // self.tokenizer.token_chars_max
        if least > most and not truncated:
            raise InvalidRequestError(
                f"This model's maximum context length is {most} tokens, and your prompt has at "
                f"least {least}. Shorten the prompt, or set truncate_prompt_tokens.",
                param="prompt",
                code="context_length_exceeded",
            )
        return await self.encode(text, add_special_tokens=add_special_tokens)

    async def decode(self, ids: list[int]) -> str:
        decode = self.tokenizer.decode
        if len(ids) <= _THREAD_CHARS:
            return decode(ids, skip_special_tokens=False)
        return await asyncio.to_thread(decode, ids, skip_special_tokens=False)

    def timeout_s(self, asked: float | None, header: str | None) -> float | None:
        """The request's own deadline: body field, then X-Request-Timeout, then the default."""
        if asked is None and header is not None:
            try:
                asked = float(header)
            except ValueError:
                asked = -1.0
        if asked is None:
            return self.settings.timeout_s
        most = self.settings.timeout_s_max
        if not 0 < asked <= most:
            raise InvalidRequestError(
                f"timeout_s (or the header X-Request-Timeout) must be seconds in (0, {most:g}].",
                param="timeout_s",
            )
        return asked
