"""The inline engine: journal, scheduler, batchers and runner in one process and one thread.

For notebooks, debuggers and tests. Owns one pool and one runner that all its workers share.
Invariant: the same pure machines run as in production, so tokens are the same; only the wires are
missing. A step blocks the event loop for its duration.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import cast

from diptych.engine.core.config import EngineOptions, WorkerSpec
from diptych.engine.core.errors import ConfigError, EngineDeadError
from diptych.engine.core.messages import (
    Address,
    ApiUp,
    PoolUp,
    SchedulerUp,
    Send,
    Stats,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import DownCause, Epoch, WorkerId
from diptych.engine.packing import keep_packed
from diptych.engine.pool import KVPool
from diptych.engine.runner import Runner, load_model, make_runner
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.commands import (
    BatcherInput,
    JournalInput,
    PoolRead,
    ReadPool,
    SchedulerInput,
)
from diptych.scheduler.journal import Journal
from diptych.scheduler.scheduler import Scheduler
from diptych.server.client import Delta, EngineInfo, Health
from diptych.server.streams import Streams

_EPOCH = 1
_TICK_S = 0.25


class InlineClient:
    """An `EngineClient` with everything inside."""

    def __init__(self, options: EngineOptions) -> None:
        options.verify()
        if options.separate_pools:
            raise ConfigError("an inline engine has one memory: separate pools need processes")
        if options.scheduler.autoscale is not None:
            raise ConfigError("an inline engine has no processes: autoscaling needs them")
        self._options = options
        threads = options.threads or 1
        model = load_model(options.model, options.num_shards, threads=threads)
        if model.prepared.cache_path is not None:
            keep_packed(model.prepared, model.prepared.cache_path)
        config = model.config
        block_size = options.cache.block_size
        kv_dtype = config.kv_dtype(options.cache.kv_cache_dtype)
        num_blocks = options.cache.blocks(config.block_bytes(block_size, kv_dtype))
        pool = KVPool.over(None, config, num_blocks, block_size, dtype=kv_dtype)
        self._runner: Runner = make_runner(model, pool, options.threads or 1)
        self.info = EngineInfo(
            model_path=options.model.path,
            dtype=config.dtype,
            vocab_size=config.vocab_size,
            max_model_len=min(config.max_model_len, num_blocks * block_size),
            eos_token_ids=sorted(config.eos_token_ids),
            block_size=block_size,
            num_blocks=num_blocks,
            fingerprint=model.fingerprint_over([kv_dtype]),
        )
        self._scheduler = Scheduler(_EPOCH, options.scheduler, options.cache)
        self._epochs = {spec.worker: _EPOCH for spec in options.workers()}
        self._batchers = {
            spec.worker: self._make_batcher(spec.worker, _EPOCH) for spec in options.workers()
        }
        self._wire: deque[Send] = deque()
        self._streams = Streams(Journal(0, _EPOCH, block_size=block_size), self.info, self._post)
        self._stats: Stats | None = None
        self._driver: asyncio.Task[None] | None = None
        self._next_tick_s = 0.0
        self._boot(options.workers())

    # ---- EngineClient

    async def stream(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        deltas = self._streams.stream(
            request_id,
            prompt_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
        )
        self._wake()
        try:
            async for delta in deltas:
                yield delta
        finally:
            await deltas.aclose()

    def stop(self, request_id: str, choice: int) -> None:
        self._streams.stop(request_id, choice)

    def stats(self) -> Stats | None:
        if self._driver is None or self._driver.done():  # idle: nobody ticks
            self._next_tick_s = 0.0
            self._pump()
        return self._stats

    def health(self) -> Health:
        failed = self._driver is not None and self._driver.done() and self._streams.num_open > 0
        return Health(not failed and not self._streams.closing, "the engine stopped")

    async def close(self) -> None:
        self._streams.closing = True
        self._streams.fail_all(EngineDeadError("The engine was closed."))
        if self._driver is not None:
            await asyncio.wait([self._driver])

    def check_integrity(self) -> None:
        """Asserts that all three machines agree with themselves."""
        self._scheduler.check_integrity()
        for batcher in self._batchers.values():
            batcher.check_integrity()

    def fail_worker(self, worker: WorkerId) -> None:
        """As if the worker's process had died and another had come; for tests of recovery."""
        spec = next(spec for spec in self._options.workers() if spec.worker == worker)
        epoch = self._epochs[worker]
        self._epochs[worker] = epoch + 1
        self._batchers[worker] = self._make_batcher(worker, epoch + 1)
        down = WorkerDown(worker, epoch, DownCause.KILLED)
        up = WorkerUp(worker, epoch + 1, spec.pool, spec.dial)
        self._decide([down, up], time.monotonic())
        self._wake()

    # ---- the wires and the loop

    def _post(self, sends: list[Send]) -> None:
        self._wire.extend(sends)
        self._wake()

    def _wake(self) -> None:
        if self._driver is None or self._driver.done():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                return  # not serving yet
            self._driver = loop.create_task(self._drive())

    async def _drive(self) -> None:
        """Runs steps while there is anything to do; every step lets other coroutines run."""
        try:
            while self._streams.num_open or self._wire or self._busy():
                self._pump()
                for batcher in self._batchers.values():
                    self._step(batcher)
                self._pump()
                await asyncio.sleep(0)
        except BaseException as error:
            self._streams.fail_all(EngineDeadError(f"The inline engine failed: {error!r}"))
            raise

    def _busy(self) -> bool:
        return any(batcher.has_work for batcher in self._batchers.values())

    def _step(self, batcher: Batcher) -> None:
        plan = batcher.plan()
        if plan.empty:
            return
        batcher.commit(plan, self._runner.run(plan))

    def _pump(self) -> None:
        """Delivers messages until all are quiet."""
        now = time.monotonic()
        if now >= self._next_tick_s:
            self._next_tick_s = now + _TICK_S
            self._streams.tick()
            self._decide([], now)
        self._collect()
        while self._wire:
            inputs: list[SchedulerInput] = []
            while self._wire:
                send = self._wire.popleft()
                if send.to.kind == "scheduler":
                    inputs.append(cast(SchedulerInput, send.message))
                elif send.to.kind == "worker":
                    self._batchers[send.to.number].handle(cast(BatcherInput, send.message))
                elif isinstance(send.message, Stats):
                    self._stats = send.message
                else:
                    self._streams.handle(cast(JournalInput, send.message))
            if inputs:
                self._decide(inputs, now)
            self._streams.flush()
            self._collect()

    def _decide(self, inputs: list[SchedulerInput], now: float) -> None:
        for command in self._scheduler.step(inputs, now):
            if isinstance(command, ReadPool):
                empty = PoolRead(command.pool, [0] * self.info.num_blocks, [])
                self._decide([empty], now)
            else:
                self._wire.append(command)

    def _collect(self) -> None:
        """Page writes have no reader here: this pool dies with its only scheduler."""
        for batcher in self._batchers.values():
            self._wire.extend(c for c in batcher.take() if isinstance(c, Send))

    def _make_batcher(self, worker: WorkerId, epoch: Epoch) -> Batcher:
        return Batcher(
            worker,
            epoch,
            self._options.batch,
            block_size=self.info.block_size,
            eos_token_ids=frozenset(self.info.eos_token_ids),
            max_model_len=self.info.max_model_len,
        )

    def _boot(self, workers: list[WorkerSpec]) -> None:
        inputs: list[SchedulerInput] = [PoolUp(0, self.info.num_blocks, self.info.block_size)]
        inputs += [WorkerUp(spec.worker, _EPOCH, spec.pool, spec.dial) for spec in workers]
        inputs.append(ApiUp(0, _EPOCH))
        self._decide(inputs, time.monotonic())
        self._wire.append(Send(Address("api", 0, _EPOCH), SchedulerUp(_EPOCH)))
        self._pump()
