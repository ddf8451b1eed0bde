"""uvicorn's HTTP protocol with limits on headers, and with the transport in reach of the app.

Owns the header deadline and header byte count of one connection. Invariant: a connection that does
not send a whole request head within the limits is closed and costs a bounded amount of memory.
"""

import asyncio

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from diptych.server.http.settings import HttpSettings
from diptych.server.http.stream import TRANSPORT_KEY


def make_protocol(settings: HttpSettings) -> type[asyncio.Protocol]:
    """uvicorn wants a class and calls it with its own arguments, so the limits are bound here."""

    class Protocol(HttpToolsProtocol):
        _head_bytes = 0
        _head_open = True
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
            super().connection_made(transport)
            inner = self.app

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                scope[TRANSPORT_KEY] = transport
                await inner(scope, receive, send)

            self.app = app
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self._head_open:
                if self._head_bytes > settings.header_bytes_max:
                    self.transport.close()
                    return
                self._head_bytes += len(data)
            super().data_received(data)

        def on_message_begin(self) -> None:
            self._head_open = True
            if self._deadline is None:
                self._await_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_open = False
            self._head_bytes = 0
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self._deadline = self.loop.call_later(settings.header_s_max, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol
