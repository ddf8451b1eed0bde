"""Server-sent events, and what happens when a client goes away or does not read.

Owns the response while it streams. Invariants: when the client is gone, or has not read for
`stall_s_max`, the event source is closed at once (which aborts its requests); nothing is sent after
the event that ended the stream; what is buffered for one client is bounded by the transport.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diptych.engine.core.errors import DiptychError
from diptych.server.http.errors import error_body

T = TypeVar("T")
_ENCODER: Final = msgspec.json.Encoder()
DONE: Final = b"data: [DONE]\n\n"
TRANSPORT_KEY: Final = "diptych.transport"
"""In an ASGI scope: the asyncio transport under the request, when our own server runs."""


class ClientGoneError(Exception):
    """Nobody is there to read an answer."""


def event(value: object) -> bytes:
    """One event; JSON has no line breaks, so one data line is enough."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


def error_event(error: DiptychError) -> bytes:
    return b"data: " + error_body(error) + b"\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, or ClientGoneError as soon as the client is gone (work cancelled)."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGoneError
        return worker.result()
    finally:
        await _cancel(worker)
        await _cancel(watcher)


async def _cancel(
    task: "asyncio.Future[object] | asyncio.Future[T] | asyncio.Future[None]",
) -> None:
    """Returns when the task is over; its outcome is not wanted any more."""
    if not task.done():
        task.cancel()
    await asyncio.wait({task})


class EventStream(Response):
    """`source` yields whole events. It is closed in every case before this returns."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        *,
        stall_s_max: float,
        on_stall: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._stall_s_max = stall_s_max
        self._on_stall = on_stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = scope.get(TRANSPORT_KEY)
        pump = asyncio.create_task(self._pump(send, transport))
        watcher = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({pump, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(pump)
            await _cancel(watcher)
            await self._source.aclose()
        if pump.cancelled():
            return
        if isinstance(pump.exception(), TimeoutError):
            self._on_stall()
            if transport is not None:
                transport.abort()  # closing would wait for the client to read
            return
        pump.result()

    async def _pump(self, send: Send, transport: asyncio.WriteTransport | None) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._in_time(send(start))
        async for data in self._source:
            if transport is not None and transport.is_closing():
                return  # the loop has not told the watcher yet
            sending = send({"type": "http.response.body", "body": data, "more_body": True})
            if transport is not None and not transport.get_write_buffer_size():
                await sending  # nothing waits before it, so it does not wait
            else:
                await self._in_time(sending)
        await self._in_time(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _in_time(self, sending: Awaitable[None]) -> None:
        """Sending waits while the transport's buffer is full."""
        async with asyncio.timeout(self._stall_s_max):
            await sending
