"""A stream of text from a stream of token ids: shared by HTTP and the Python `Engine`.

Owns the detokenizer and the stop matcher of every choice of one request. Invariants: a stop string
ends its choice at the token that completes it, and nothing behind that token (ids, logprobs, usage)
is seen; the texts of a choice together are the text of its tokens up to the stop.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.types import FinishReason
from diptych.server.client import Delta, EngineClient
from diptych.server.text.stops import StopMatcher
from diptych.server.text.tokenizer import Tokenizer


class Candidate(msgspec.Struct, frozen=True):
    """One possible token at a position, as people read it."""

    id: int
    text: str
    bytes: bytes
    logprob: float
    rank: int


class PositionLogprobs(msgspec.Struct, frozen=True):
    chosen: Candidate
    top: list[Candidate]  # best first


class OutputDelta(msgspec.Struct, frozen=True):
    """What one step added to one choice. `finish_reason` set: the choice is over.

    `text` may lag behind `token_ids` (half characters, possible stop strings); the last delta
    brings the rest. `prompt_logprobs[i]` is about prompt token i + 1.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    prompt_logprobs: list[PositionLogprobs] | None = None
    message: str | None = None  # of an error
    queued_s: float | None = None  # until the request was first placed, None while not known
    preemptions: int = 0  # of the request so far


def readable(entry: TokenLogprobs, tokenizer: Tokenizer) -> PositionLogprobs:
    """Token strings and bytes for the chosen token and its rivals."""
    chosen = _candidate(tokenizer, entry.token, entry.logprob, entry.rank)
    top = [
        _candidate(tokenizer, token, logprob, rank)
        for rank, (token, logprob) in enumerate(entry.top, start=1)
    ]
    return PositionLogprobs(chosen, top)


def _candidate(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> Candidate:
    pieces = tokenizer.pieces
    return Candidate(token, pieces.text(token), pieces[token], logprob, rank)


class ChoiceText:
    """One choice: token ids in, text out."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = (
            tokenizer.detokenizer(
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            if params.detokenize
            else None
        )
        self._stops = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._num_tokens = 0
        self.finished = False

    def push(self, delta: Delta) -> OutputDelta:
        """`finished` is set when the engine ended the choice or a stop string did."""
        assert not self.finished
        finish = delta.finish
        text: list[str] = []
        for count, token in enumerate(delta.ids, start=1):
            last = count == len(delta.ids)
            silent = last and finish is not None and self._hides(finish)
            shown, stop = self._push_token(token, silent)
            text.append(shown)
            if stop is not None:
                self.finished = True
                return self._output(delta, count, text, FinishInfo(FinishReason.STOP, stop))
        if finish is not None:
            self.finished = True
            tail, stop = self._finish_text()
            text.append(tail)
            if stop is not None:
                finish = FinishInfo(FinishReason.STOP, stop)
        return self._output(delta, len(delta.ids), text, finish)

    def _hides(self, finish: FinishInfo) -> bool:
        """The token that stopped the choice (EOS, stop_token_ids) is counted but not shown."""
        return finish.reason is FinishReason.STOP and not self._params.include_stop_str_in_output

    def _push_token(self, token: int, silent: bool) -> tuple[str, str | None]:
        self._num_tokens += 1
        if self._detokenizer is None or silent:
            return "", None
        text = self._detokenizer.push(token)
        if self._num_tokens <= self._params.min_tokens:
            return text, None  # stop strings do not count yet
        return self._stops.push(text)

    def _finish_text(self) -> tuple[str, str | None]:
        if self._detokenizer is None:
            return "", None
        shown, stop = self._stops.push(self._detokenizer.finish())
        return shown + self._stops.flush(), stop

    def _output(
        self, delta: Delta, count: int, text: list[str], finish: FinishInfo | None
    ) -> OutputDelta:
        prompt = delta.prompt_logprobs
        return OutputDelta(
            choice=delta.choice,
            text="".join(text),
            token_ids=delta.ids[:count],
            logprobs=self._readable(delta.logprobs[:count] if delta.logprobs else None),
            finish_reason=None if finish is None else finish.reason,
            stop_reason=None if finish is None else finish.stop_reason,
            num_cached=delta.num_cached,
            prompt_logprobs=self._readable(prompt),
            message=None if finish is None else finish.message,
            queued_s=delta.queued_s,
            preemptions=delta.preemptions,
        )

    def _readable(self, entries: Sequence[TokenLogprobs] | None) -> list[PositionLogprobs] | None:
        if entries is None:
            return None
        return [readable(entry, self._tokenizer) for entry in entries]


async def generate(
    client: EngineClient,
    tokenizer: Tokenizer,
    request_id: str,
    prompt_ids: list[int],
    params: SamplingParams,
    *,
    priority: int = 0,
    cache_salt: str = "",
    timeout_s: float | None = None,
) -> AsyncGenerator[OutputDelta, None]:
    """Yields until every choice finished. `params` and `prompt_ids` come from `prepare_params`.

    Raises what `EngineClient.stream` raises. Closing it early aborts the request.
    """
    choices = [ChoiceText(tokenizer, params) for _ in range(params.n)]
    open_choices = params.n
    stream = client.stream(
        request_id,
        prompt_ids,
        params,
        priority=priority,
        cache_salt=cache_salt,
        timeout_s=timeout_s,
    )
    async with aclosing(stream):
        async for delta in stream:
            choice = choices[delta.choice]
            if choice.finished:
                continue  # on its way when the stop string matched
            output = choice.push(delta)
            if output.finish_reason is not None:
                open_choices -= 1
                if delta.finish is None:
                    client.stop(request_id, delta.choice)
            yield output
            if not open_choices:
                return
