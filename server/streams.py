"""The open streams of one API server: between its journal and the coroutines that wait for tokens.

Owns the journal and one buffer per open request. Invariant: an open stream ends exactly once, by
its last delta, by an error, or by its reader going away (which closes the request in the journal).
Used from one event loop only; whoever owns it carries the journal's sends out through `send`.
"""

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from diptych.engine.core.errors import DiptychError, EngineDeadError, InvalidRequestError
from diptych.engine.core.hashing import cache_salt as salt_of
from diptych.engine.core.hashing import hash_root
from diptych.engine.core.messages import Send
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.request import Request
from diptych.engine.core.types import pack_ids
from diptych.scheduler.commands import Delivered, Ended, JournalInput, Refused
from diptych.scheduler.journal import Journal
from diptych.server.client import Delta, EngineInfo


@dataclass(slots=True)
class _Stream:
    """Deltas not read yet. Bounded by what the request may generate (n * max_tokens)."""

    items: deque[Delta] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    error: DiptychError | None = None


class Streams:
    """Opens requests in the journal and hands what it delivers to their readers."""

    def __init__(
        self,
        journal: Journal,
        info: EngineInfo,
        send: Callable[[list[Send]], None],
        *,
        server_key: bytes | None = None,
    ) -> None:
        self.journal = journal
        self.info = info
        self._send = send
        self._server_key = server_key or os.urandom(32)
        self._streams: dict[str, _Stream] = {}
        self._tie = itertools.count()
        self.closing = False

    @property
    def num_open(self) -> int:
        return len(self._streams)

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
        """See `EngineClient.stream`."""
        if self.closing:
            raise EngineDeadError("The engine is shutting down.")
        if request_id in self._streams:
            raise InvalidRequestError(f"Request id {request_id!r} is in use.", param="request_id")
        request = self._resolve(request_id, prompt_ids, params, priority, cache_salt)
        self.journal.open(request, time.monotonic(), timeout_s)
        stream = self._streams[request_id] = _Stream()
        self.flush()
        try:
            while True:
                while stream.items:
                    yield _next(stream.items)
                if stream.error is not None:
                    raise stream.error
                if stream.ended:
                    return
                stream.wake.clear()
                await stream.wake.wait()
        finally:
            del self._streams[request_id]
            if not stream.ended:
                self.journal.close(request_id)
                self.flush()

    def handle(self, message: JournalInput) -> None:
        """Takes one message from the scheduler or a worker; call `flush` after the last one."""
        self.journal.handle(message, time.monotonic())

    def tick(self) -> None:
        """Ends what is past its deadline. Call a few times a second."""
        self.journal.tick(time.monotonic())
        self.flush()

    def stop(self, request_id: str, choice: int) -> None:
        """See `EngineClient.stop`."""
        if request_id in self._streams:
            self.journal.stop(request_id, choice)
            self.flush()

    def fail_all(self, error: DiptychError) -> None:
        """Ends every open stream with this error: the engine is gone."""
        for stream in self._streams.values():
            stream.error = stream.error or error
            stream.wake.set()

    def flush(self) -> None:
        """Carries out what the journal decided, in order."""
        sends: list[Send] = []
        for command in self.journal.take():
            if isinstance(command, Send):
                sends.append(command)
            elif isinstance(command, Delivered):
                self._deliver(command)
            elif isinstance(command, Refused):
                self._end(command.request, command.error)
            else:
                assert isinstance(command, Ended)
                self._end(command.request, None)
        if sends:
            self._send(sends)

    def _deliver(self, command: Delivered) -> None:
        tokens = command.tokens
        stream = self._streams.get(command.request)
        if stream is None:
            return  # the reader has gone; the journal has closed the request
        stream.items.append(
            Delta(
                choice=tokens.ref.choice,
                first_index=tokens.first_index,
                ids=tokens.ids,
                logprobs=tokens.logprobs,
                finish=tokens.finish,
                num_cached=tokens.num_cached,
                prompt_logprobs=tokens.prompt_logprobs,
                queued_s=command.queued_s,
                preemptions=command.preemptions,
            )
        )
        stream.wake.set()

    def _end(self, request_id: str, error: DiptychError | None) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        stream.ended = True
        stream.error = error
        stream.wake.set()

    def _resolve(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str,
    ) -> Request:
        """The immutable request: seed and max_tokens are set, so an attempt can be repeated."""
        limit = self.info.max_model_len
        if not prompt_ids:
            raise InvalidRequestError("The prompt is empty: send at least one token.")
        if len(prompt_ids) >= limit:
            raise InvalidRequestError(
                f"This model's maximum context length is {limit} tokens; the prompt has "
                f"{len(prompt_ids)} tokens and leaves no room for an answer. Shorten the prompt.",
                code="context_length_exceeded",
            )
        room = limit - len(prompt_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = params.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little") >> 1
        return Request(
            id=request_id,
            prompt_ids=pack_ids(prompt_ids),
            params=replace(params, max_tokens=max_tokens, seed=seed),
            rank=time.time_ns() // 16 * 16 + next(self._tie) % 16,
            priority=priority,
            root=hash_root(self.info.fingerprint, salt_of(self._server_key, cache_salt)),
        )


def _next(items: deque[Delta]) -> Delta:
    """The oldest delta, and what follows of the same choice: a reader that is slower than the
    engine gets several tokens at a time, and catches up."""
    delta = items.popleft()
    if not items or items[0].choice != delta.choice or delta.finish is not None:
        return delta
    ids, logprobs = list(delta.ids), list(delta.logprobs or ())
    last, prompt_logprobs = delta, delta.prompt_logprobs
    while items and items[0].choice == delta.choice and last.finish is None:
        last = items.popleft()
        ids += last.ids
        logprobs += last.logprobs or ()
        if last.prompt_logprobs is not None:
            prompt_logprobs = last.prompt_logprobs
    return replace(
        last,
        first_index=delta.first_index,
        ids=ids,
        logprobs=logprobs or None,
        prompt_logprobs=prompt_logprobs,
    )
