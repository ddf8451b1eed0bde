"""One choice of a text completion while its deltas arrive.

Owns its text, ids and log-probabilities so far. Invariant: `text_offset` of every entry counts the
characters of the token strings before it, the echoed prompt included.
"""

import msgspec
from msgspec import UNSET

from diptych.server.http.jobs import Job
from diptych.server.http.logprobs import completion_logprobs, echo_logprobs, joined, prompt_logprobs
from diptych.server.http.replies import CompletionChoice, CompletionLogprobs
from diptych.server.http.requests import CompletionRequest
from diptych.server.text.generation import OutputDelta, PositionLogprobs


class Echo(msgspec.Struct, frozen=True):
    text: str
    first_token: str


class ChoiceText:
    def __init__(self, request: CompletionRequest, job: Job, echo: Echo | None, index: int) -> None:
        self._request = request
        self._job = job
        self._echo = echo
        self._index = index
        self._started = False
        self._offset = 0  # characters of the token strings so far
        self._text: list[str] = []
        self._ids: list[int] = []
        self._entries: list[PositionLogprobs] = []
        self._end: OutputDelta | None = None
        self.prompt_entries: list[PositionLogprobs] = []

    def add(self, delta: OutputDelta) -> None:
        self._text.append(delta.text)
        self._ids.extend(delta.token_ids)
        self._entries.extend(delta.logprobs or [])
        if delta.finish_reason is not None:
            self._end = delta

    def whole(self) -> CompletionChoice:
        assert self._end is not None
        request = self._request
        logprobs = self._echoed_logprobs()
        generated = self._logprobs(self._entries)
        if logprobs is not None and generated is not None:
            logprobs = joined(logprobs, generated)
        wanted = request.prompt_logprobs
        return CompletionChoice(
            index=self._index,
            text=(self._echo.text if self._echo else "") + "".join(self._text),
            logprobs=generated if logprobs is None else logprobs,
            finish_reason=self._end.finish_reason,
            stop_reason=self._end.stop_reason,
            token_ids=self._ids if request.return_token_ids else UNSET,
            prompt_token_ids=self._job.prompt_ids if request.return_token_ids else UNSET,
            prompt_logprobs=(
                UNSET if wanted is None else prompt_logprobs(self.prompt_entries, wanted)
            ),
        )

    def chunks(self, delta: OutputDelta) -> list[CompletionChoice]:
        """The echo before the first text, the text if there is any, the end by itself."""
        parts: list[CompletionChoice] = []
        request = self._request
        if not self._started:
            self._started = True
            self.prompt_entries = delta.prompt_logprobs or []
            parts.extend(self._opening())
        wants_ids = request.return_token_ids and bool(delta.token_ids)
        if delta.text or wants_ids or delta.logprobs:
            parts.append(
                CompletionChoice(
                    index=self._index,
                    text=delta.text,
                    logprobs=self._logprobs(delta.logprobs or []),
                    token_ids=delta.token_ids if wants_ids else UNSET,
                )
            )
        if delta.finish_reason is not None:
            parts.append(
                CompletionChoice(
                    index=self._index,
                    text="",
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
            )
        return parts

    def _opening(self) -> list[CompletionChoice]:
        wants_ids = self._request.return_token_ids
        if self._echo is None and not wants_ids:
            return []
        return [
            CompletionChoice(
                index=self._index,
                text=self._echo.text if self._echo else "",
                logprobs=self._echoed_logprobs(),
                prompt_token_ids=self._job.prompt_ids if wants_ids else UNSET,
            )
        ]

    def _echoed_logprobs(self) -> CompletionLogprobs | None:
        top = self._request.logprobs
        if self._echo is None or top is None:
            return None
        as_ids = self._request.return_tokens_as_token_ids
        first = f"token_id:{self._job.prompt_ids[0]}" if as_ids else self._echo.first_token
        echoed = echo_logprobs(first, self.prompt_entries, top, as_ids)
        self._offset = len(self._echo.first_token) + sum(
            len(entry.chosen.text) for entry in self.prompt_entries
        )
        return echoed

    def _logprobs(self, entries: list[PositionLogprobs]) -> CompletionLogprobs | None:
        top = self._request.logprobs
        if top is None:
            return None
        as_ids = self._request.return_tokens_as_token_ids
        result = completion_logprobs(entries, top, as_ids, self._offset)
        self._offset += sum(len(entry.chosen.text) for entry in entries)
        return result
