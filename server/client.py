"""What the front doors (HTTP, Python) see of an engine, however it runs.

`EngineClient` is the only way in: token ids in, token ids out. Two kinds exist: the inline one
(everything in this process) and the one that speaks to the processes of a supervisor. Text, stop
strings and OpenAI shapes live above it.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from diptych.engine.core.messages import Stats
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import FinishInfo, TokenLogprobs


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the served model that never change while it is served."""

    model_path: str
    dtype: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and output that fit the model and the pool
    eos_token_ids: list[int]
    block_size: int
    num_blocks: int
    fingerprint: str  # numerics fingerprint


class Delta(msgspec.Struct, frozen=True):
    """New tokens of one choice. Each token index of a choice arrives exactly once, in order.

    `finish` ends the choice. `num_cached` and `prompt_logprobs` as in `messages.Tokens`.
    """

    choice: int
    first_index: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishInfo | None = None
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    queued_s: float | None = None  # until the request was first placed, None while not known
    preemptions: int = 0  # of the request so far


class Health(msgspec.Struct, frozen=True):
    ok: bool
    reason: str  # why not, for people


class EngineClient(Protocol):
    """Async, used from one event loop. All methods raise DiptychError for operating errors."""

    info: EngineInfo

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
        """Submits and yields until every choice finished.

        Raises before the first item: OverloadedError, InvalidRequestError, EngineDeadError; later
        RequestTimeoutError, PoisonRequestError. Closing the iterator early (aclose, cancellation)
        aborts the request and frees its blocks within one step. `params` are verified by the
        caller; `seed` None and `max_tokens` None are resolved here.
        """
        ...

    def stop(self, request_id: str, choice: int) -> None:
        """Ends one choice early: the caller has all it needs (a stop string). No more deltas."""
        ...

    def stats(self) -> Stats | None:
        """The newest sums of the scheduler, None before the first."""
        ...

    def health(self) -> Health:
        """Ok only while the engine can make, and is making, progress."""
        ...

    async def close(self) -> None: ...
