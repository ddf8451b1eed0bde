"""What the two generating routes have in common: names, usage, and how a stream is framed.

Owns the running totals of one response. Invariant: usage counts each prompt once and each token
that was delivered once.
"""

import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from diptych.engine.core.errors import DiptychError, InvalidRequestError
from diptych.server.http.front import Front
from diptych.server.http.jobs import Job, Outputs
from diptych.server.http.replies import PromptTokensDetails, Usage
from diptych.server.http.requests import GenerateRequest, StreamOptions
from diptych.server.http.stream import DONE, EventStream, error_event, event, unless_gone
from diptych.server.text.generation import OutputDelta

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Answer:
    """Head and totals of one response. `jobs` are its prompts."""

    def __init__(
        self, front: Front, request: GenerateRequest, model: str, prefix: str, header_id: str
    ) -> None:
        if request.request_id is not None and not _REQUEST_ID.fullmatch(request.request_id):
            raise InvalidRequestError(
                "request_id must be 1 to 128 letters, digits or ._:- characters.",
                param="request_id",
            )
        self.request_id = request.request_id or header_id
        self.id = f"{prefix}-{self.request_id}"
        self.created = int(time.time())
        self.model = model
        self.system_fingerprint = front.system_fingerprint
        options = request.stream_options or StreamOptions()
        self.include_usage = options.include_usage
        self._continuous = options.continuous_usage_stats
        self._num_prompt = 0
        self._num_generated = 0
        self._cached: dict[int, int] = {}  # prompt -> its cached tokens

    def submitted(self, jobs: Sequence[Job]) -> None:
        self._num_prompt = sum(len(job.prompt_ids) for job in jobs)

    def count(self, job: int, delta: OutputDelta, *, generated: bool = True) -> None:
        """`generated` False: the tokens are not part of the answer."""
        self._num_generated += len(delta.token_ids) if generated else 0
        self._cached[job] = max(self._cached.get(job, 0), delta.num_cached)

    def usage(self) -> Usage:
        return Usage(
            self._num_prompt,
            self._num_generated,
            self._num_prompt + self._num_generated,
            PromptTokensDetails(sum(self._cached.values())),
        )

    def chunk_usage(self) -> Usage | UnsetType | None:
        """For a chunk that has choices: as OpenAI, null when the last chunk will have it."""
        if self._continuous:
            return self.usage()
        return None if self.include_usage else UNSET


def request_header_id(request: Request, front: Front) -> str:
    """The client's X-Request-Id if it can be shown again, else one of ours (see `gate`)."""
    given = request.scope.get("diptych.request_id")
    return given if isinstance(given, str) else front.new_id()


def valid_header_id(value: str) -> bool:
    return _REQUEST_ID.fullmatch(value) is not None


async def stream_response(
    front: Front,
    request: Request,
    answer: Answer,
    outputs: Outputs,
    *,
    opening: Callable[[], list[object]],
    chunks: Callable[[int, OutputDelta], list[object]],
    closing: Callable[[], list[object]],
) -> Response:
    """Waits for the first delta, so that a refusal is still an HTTP error; then streams."""
    try:
        first = await unless_gone(request, _first(outputs))
    except BaseException:
        await outputs.aclose()
        raise
    source = _events(first, outputs, opening, chunks, closing)
    response = EventStream(
        source, stall_s_max=front.settings.stall_s_max, on_stall=front.metrics.stalled.inc
    )
    response.headers["X-Request-Id"] = answer.request_id
    return response


async def _first(outputs: Outputs) -> tuple[int, OutputDelta]:
    return await anext(outputs)


async def _events(
    first: tuple[int, OutputDelta],
    outputs: Outputs,
    opening: Callable[[], list[object]],
    chunks: Callable[[int, OutputDelta], list[object]],
    closing: Callable[[], list[object]],
) -> AsyncGenerator[bytes, None]:
    """After the start an error is an event, and the stream ends without [DONE]."""
    async with aclosing(outputs):
        yield b"".join([event(chunk) for chunk in [*opening(), *chunks(*first)]])
        try:
            async for job, delta in outputs:
                data = b"".join([event(chunk) for chunk in chunks(job, delta)])
                if data:
                    yield data
        except DiptychError as error:
            yield error_event(error)
            return
        yield b"".join([*(event(chunk) for chunk in closing()), DONE])
