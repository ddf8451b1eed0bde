"""One API server: the HTTP front door over a client, as a child of the supervisor or inline.

Owns the event loop. Invariant: it returns when its drain is over, and only then; an exception that
leaves here is a crash, which the supervisor answers with a restart.
"""

import asyncio
import logging
import signal
import socket

import msgspec

from diptych.engine.core.config import EngineOptions
from diptych.server.boot import ApiBoot
from diptych.server.http.serve import run_api
from diptych.server.http.settings import METER_SLOT_BYTES, HttpSettings
from diptych.server.logs import configure_logs
from diptych.server.remote_client import RemoteClient
from diptych.transfer.shared_memory import SharedMemory

_log = logging.getLogger("diptych")


def serve(boot: ApiBoot) -> None:
    """The target of an API server process (see `launch.run_supervisor`)."""
    asyncio.run(_serve(boot))


async def _serve(boot: ApiBoot) -> None:
    settings = msgspec.convert(boot.settings, HttpSettings)
    settings = msgspec.structs.replace(settings, api_number=boot.api)
    assert boot.listen_fd is not None, "the supervisor shares its listening socket"
    drain = asyncio.Event()
    client = RemoteClient(boot, on_drain=lambda _: drain.set())
    try:
        await run_api(
            client,
            boot.info.model_path,
            settings,
            ready=lambda: _announce(settings),
            drain_event=drain,
            sock=socket.socket(fileno=boot.listen_fd),
            meters=_meters(boot, settings),
        )
    finally:
        await client.close()


def _meters(boot: ApiBoot, settings: HttpSettings) -> memoryview | None:
    """Mapped for the life of the process."""
    if boot.meters_fd is None:
        return None
    return SharedMemory(boot.meters_fd, settings.num_apis * METER_SLOT_BYTES).view


def serve_inline(options: EngineOptions, settings: HttpSettings, listener: socket.socket) -> int:
    """Everything in this process. Returns 0 after SIGTERM or SIGINT and a drain."""
    configure_logs("inline", "INFO")
    asyncio.run(_serve_inline(options, settings, listener))
    return 0


async def _serve_inline(
    options: EngineOptions, settings: HttpSettings, listener: socket.socket
) -> None:
    drain = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, drain.set)
    from diptych.server.inline import InlineClient  # torch: an API server of its own has none

    client = InlineClient(options)
    try:
        await run_api(
            client,
            options.model.path,
            settings,
            ready=lambda: _announce(settings),
            drain_event=drain,
            sock=listener,
        )
    finally:
        await client.close()


def _announce(settings: HttpSettings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    _log.info("%s is served at http://%s:%d/v1", settings.model_names[0], host, settings.port)
