"""From a request to running generations, and their deltas merged into one stream.

Owns nothing for longer than a request. Invariant: closing the merged stream closes every
generation under it, so the engine aborts all of them.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

import msgspec

from diptych.engine.core.errors import DiptychError, InvalidRequestError, OverloadedError
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import FinishReason
from diptych.server.http.front import Front
from diptych.server.http.requests import GenerateRequest
from diptych.server.http.timeline import Timeline
from diptych.server.text.generation import OutputDelta, generate

_BUFFER_DELTAS_MAX: Final = 256  # of one response over several prompts; then producers wait
_SALT_CHARS_MAX: Final = 256
_PRIORITY_MAX: Final = 2**31 - 1
_SAMPLING: Final = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerateRequest.__struct_fields__ and name != "stop"
)

Outputs = AsyncGenerator[tuple[int, OutputDelta], None]


class Job(msgspec.Struct, frozen=True):
    """One prompt to answer."""

    prompt_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    timeout_s: float | None


def sampling_fields(request: GenerateRequest) -> dict[str, object]:
    """What the client said about sampling, under the names of `SamplingParams`."""
    fields = {name: getattr(request, name) for name in _SAMPLING}
    fields["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    return {name: value for name, value in fields.items() if value is not None}


def verify_common(request: GenerateRequest) -> None:
    """The rules that are not about sampling."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError(
            "stream_options is only allowed with stream=true.", param="stream_options"
        )
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs is not available with stream=true.", param="prompt_logprobs"
        )
    if len(request.cache_salt) > _SALT_CHARS_MAX:
        raise InvalidRequestError(
            f"cache_salt must have at most {_SALT_CHARS_MAX} characters.", param="cache_salt"
        )
    if abs(request.priority) > _PRIORITY_MAX:
        raise InvalidRequestError("priority must be a 32-bit integer.", param="priority")


def run_jobs(front: Front, jobs: Sequence[Job]) -> Outputs:
    """(index of the job, its delta), as they come. The first item decides: it raises a refusal."""
    assert jobs
    return _alone(front, jobs[0]) if len(jobs) == 1 else _merged(front, jobs)


async def _run(front: Front, job: Job) -> AsyncGenerator[OutputDelta, None]:
    timeline = Timeline(front.metrics, len(job.prompt_ids), job.params)
    reason = FinishReason.ABORT  # what it is if nobody reads on
    stream = generate(
        front.client,
        front.tokenizer,
        front.new_id(),
        job.prompt_ids,
        job.params,
        priority=job.priority,
        cache_salt=job.cache_salt,
        timeout_s=job.timeout_s,
    )
    try:
        async with aclosing(stream):
            async for delta in stream:
                timeline.saw(delta)
                if delta.finish_reason is FinishReason.ERROR:
                    raise DiptychError(delta.message or "The engine could not go on.")
                yield delta
    except OverloadedError:
        front.metrics.rejected("queue_full")
        raise
    except DiptychError:
        reason = FinishReason.ERROR
        raise
    finally:
        timeline.close(reason)


async def _alone(front: Front, job: Job) -> Outputs:
    stream = _run(front, job)
    async with aclosing(stream):
        async for delta in stream:
            yield 0, delta


async def _merged(front: Front, jobs: Sequence[Job]) -> Outputs:
    queue: asyncio.Queue[tuple[int, OutputDelta | Exception | None]]
    queue = asyncio.Queue(_BUFFER_DELTAS_MAX)

    async def pump(index: int) -> None:
        stream = _run(front, jobs[index])
        try:
            async with aclosing(stream):
                async for delta in stream:
                    await queue.put((index, delta))
            await queue.put((index, None))
        except Exception as error:  # the root of this task: whoever reads the queue raises it
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(jobs))]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
