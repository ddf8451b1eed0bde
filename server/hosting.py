"""An engine hosted by a Python program: inline, or as processes that end with the program.

Owns the launched processes and the client that speaks to them. Invariant: when the engine behind is
gone, every open stream ends with an error instead of waiting.
"""

import asyncio
import time
from typing import Final

from diptych.engine.core.config import EngineOptions
from diptych.engine.core.errors import EngineDeadError
from diptych.server.client import EngineClient
from diptych.server.inline import InlineClient
from diptych.server.launch import Launched, start_engine
from diptych.server.remote_client import RemoteClient

_READY_S_MAX: Final = 30.0
_POLL_S: Final = 0.005


class Hosted:
    """A client and what is behind it. Made, used and closed in one event loop."""

    def __init__(self, client: EngineClient, launched: Launched | None) -> None:
        self.client = client
        self.launched = launched
        if launched is not None:
            asyncio.get_running_loop().add_reader(launched.fileno(), self._watch)

    async def close(self) -> None:
        """Ends the client, then every process. Idempotent."""
        await self.client.close()
        if self.launched is not None:
            launched, self.launched = self.launched, None
            asyncio.get_running_loop().remove_reader(launched.fileno())
            await asyncio.to_thread(launched.close)

    def _watch(self) -> None:
        """The supervisor holds the other end: it is readable for good once the engine is gone."""
        assert self.launched is not None
        if not self.launched.alive():
            asyncio.get_running_loop().remove_reader(self.launched.fileno())
            assert isinstance(self.client, RemoteClient)
            self.client.fail_all("The engine's supervisor died.")


async def host_engine(options: EngineOptions, *, inline: bool) -> Hosted:
    """Returns when requests can be served. Raises ModelLoadError, ConfigError."""
    if inline:
        return Hosted(InlineClient(options), None)
    launched = await asyncio.to_thread(start_engine, options)
    hosted = Hosted(RemoteClient(launched.api), launched)
    deadline_s = time.monotonic() + _READY_S_MAX
    try:
        while not hosted.client.health().ok:
            if time.monotonic() > deadline_s:
                raise EngineDeadError(f"Not ready: {hosted.client.health().reason}.")
            await asyncio.sleep(_POLL_S)
    except BaseException:
        await hosted.close()
        raise
    return hosted
