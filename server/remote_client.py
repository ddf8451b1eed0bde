"""An `EngineClient` over the processes of a supervisor: one API server's side of the wires.

Owns the channels and the journal of this API server. Invariant: every message is handled in the
order it came, and what the journal decides on a batch of messages leaves in one go after it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

from diptych.engine.core.errors import EngineDeadError
from diptych.engine.core.messages import (
    Accepted,
    Address,
    AnyMessage,
    Drain,
    Failed,
    Lost,
    Placed,
    Rejected,
    SchedulerDown,
    SchedulerUp,
    Send,
    Stats,
    TokenBatch,
)
from diptych.engine.core.params import SamplingParams
from diptych.scheduler.journal import Journal
from diptych.server.boot import ApiBoot
from diptych.server.client import Delta, Health
from diptych.server.streams import Streams
from diptych.transfer.channels import AsyncChannels

_TICK_S: Final = 0.1
_STATS_AGE_S_MAX: Final = 2.0
_STALL_S_MAX: Final = 10.0
_FOR_JOURNAL: Final = (
    Accepted,
    Rejected,
    Placed,
    Lost,
    Failed,
    TokenBatch,
    SchedulerUp,
    SchedulerDown,
)


class RemoteClient:
    """Made and closed inside a running event loop. `on_drain` is called when told to drain."""

    def __init__(self, boot: ApiBoot, on_drain: Callable[[float], None] | None = None) -> None:
        self.info = boot.info
        journal = Journal(boot.api, boot.api_epoch, block_size=boot.info.block_size)
        key = bytes.fromhex(boot.salt_key)
        self._streams = Streams(journal, boot.info, self._post, server_key=key)
        self._loop = asyncio.get_running_loop()
        self._channels = AsyncChannels(
            boot.path, Address("api", boot.api, boot.api_epoch), self._on_message, boot.network
        )
        self._on_drain = on_drain
        self._flush_due = False
        self._scheduler_up = False
        self._stats: Stats | None = None
        self._stats_at_s = 0.0
        self._steps = -1
        self._progress_at_s = time.monotonic()
        self._ticker = self._loop.create_task(self._tick())
        self._channels.announce()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return self._streams.num_open

    def stream(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.stream`."""
        return self._streams.stream(
            request_id,
            prompt_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
        )

    def stop(self, request_id: str, choice: int) -> None:
        self._streams.stop(request_id, choice)

    def stats(self) -> Stats | None:
        return self._stats

    def health(self) -> Health:
        """Not ok while the scheduler is away, no worker can serve, or running work stands still."""
        now = time.monotonic()
        if self._streams.closing:
            return Health(False, "the engine is shutting down")
        if not self._scheduler_up or self._stats is None:
            return Health(False, "the scheduler is starting")
        if now - self._stats_at_s > _STATS_AGE_S_MAX:
            return Health(False, f"no word from the scheduler for {now - self._stats_at_s:.0f} s")
        if not self._stats.ready:
            return Health(False, "no worker is ready")
        if self._stats.running and now - self._progress_at_s > _STALL_S_MAX:
            return Health(False, f"no step for {now - self._progress_at_s:.0f} s with work to do")
        return Health(True, "")

    def fail_all(self, reason: str) -> None:
        """The engine behind is gone: every open stream ends with an error, new ones are refused."""
        self._streams.closing = True
        self._streams.fail_all(EngineDeadError(reason))

    async def close(self) -> None:
        """Aborts what is open. Idempotent."""
        self.fail_all("The engine was closed.")
        self._ticker.cancel()
        await asyncio.wait([self._ticker])
        self._channels.close()

    def _post(self, sends: list[Send]) -> None:
        for send in sends:
            self._channels.send(send)

    def _on_message(self, message: AnyMessage) -> None:
        if isinstance(message, _FOR_JOURNAL):
            if isinstance(message, TokenBatch):
                self._progress_at_s = time.monotonic()
            elif isinstance(message, SchedulerUp):
                self._scheduler_up = True
            elif isinstance(message, SchedulerDown):
                self._scheduler_up = False
            self._streams.handle(message)
            if not self._flush_due:
                self._flush_due = True
                self._loop.call_soon(self._flush)
        elif isinstance(message, Stats):
            self._take_stats(message)
        elif isinstance(message, Drain) and self._on_drain is not None:
            self._on_drain(message.grace_s)

    def _take_stats(self, stats: Stats) -> None:
        self._stats = stats
        self._stats_at_s = time.monotonic()
        steps = sum(worker.steps for worker in stats.workers)
        if steps != self._steps or not stats.running:
            self._steps = steps
            self._progress_at_s = self._stats_at_s

    def _flush(self) -> None:
        self._flush_due = False
        self._streams.flush()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._streams.tick()
