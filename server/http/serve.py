"""Running the app in uvicorn: the socket, readiness, drain and the end.

Owns the listening socket and the server of one process. Invariant: after the drain event nothing
new is admitted, running streams get `grace_s`, and then this returns.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import fastapi
import uvicorn

from diptych.server.client import EngineClient
from diptych.server.http.app import front_of, make_app
from diptych.server.http.listening import BACKLOG, open_socket
from diptych.server.http.protocol import make_protocol
from diptych.server.http.settings import HttpSettings
from diptych.server.text.tokenizer import Tokenizer

_CLOSING_S = 1  # for what is left after the grace: its tasks are cancelled


class _Server(uvicorn.Server):
    """Signals belong to the process around it; `up` is called once connections are accepted."""

    def __init__(self, config: uvicorn.Config, up: Callable[[], None]) -> None:
        super().__init__(config)
        self._up = up

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # the loop was told fewer, see `serve_http`
        self._up()


async def serve_http(
    app: fastapi.FastAPI,
    sock: socket.socket,
    *,
    ready: Callable[[], None],
    drain_event: asyncio.Event,
) -> None:
    """Serves until `drain_event` is set and what runs is over (or its grace is). Closes `sock`."""
    front = front_of(app)
    settings = front.settings
    config = uvicorn.Config(
        app,
        http=make_protocol(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Of a shared socket one connection is taken per turn: the others are for whoever is idle.
        backlog=BACKLOG if settings.num_apis == 1 else 1,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=_CLOSING_S,
    )
    server = _Server(config, ready)
    serving = asyncio.create_task(server.serve([sock]))
    waiting = asyncio.create_task(drain_event.wait())
    try:
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            front.begin_drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(front.drained(), settings.grace_s)
    finally:
        waiting.cancel()
        server.should_exit = True
        await serving


async def run_api(
    client: EngineClient,
    tokenizer_path: str | Path,
    settings: HttpSettings,
    *,
    ready: Callable[[], None],
    drain_event: asyncio.Event,
    sock: socket.socket | None = None,
    meters: memoryview | None = None,
) -> None:
    """One API server, whole. `sock`: a listening socket of the caller's, else one is opened;
    `meters`: memory in which all API servers of this socket count."""
    tokenizer = Tokenizer(tokenizer_path, settings.chat_template)
    app = make_app(client, tokenizer, settings, meters)
    await serve_http(app, sock or open_socket(settings), ready=ready, drain_event=drain_event)
