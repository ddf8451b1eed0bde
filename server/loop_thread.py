"""An asyncio loop in a thread of its own, so that plain functions and other loops can use it.

Owns the thread and the loop. Invariant: a coroutine given to it runs there and nowhere else; an
exception comes back to the caller.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")
_END: Final = object()


class LoopThread:
    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end; Ctrl-C in the caller cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def call(self, work: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        """Runs a coroutine there, awaited in the caller's own running loop."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an async generator, for a plain `for`. Leaving early closes it."""
        try:
            while (item := self.run(_next(items))) is not _END:
                yield item  # type: ignore[misc]
        finally:
            self.run(_close(items))

    async def iterate_async(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The items of an async generator that runs there, for an `async for` anywhere."""
        try:
            while (item := await self.call(_next(items))) is not _END:
                yield item  # type: ignore[misc]
        finally:
            await self.call(_close(items))

    def stop(self) -> None:
        """Ends the loop and the thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _next(items: AsyncGenerator[T, None]) -> T | object:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        return _END


async def _close(items: AsyncGenerator[T, None]) -> None:
    await items.aclose()
