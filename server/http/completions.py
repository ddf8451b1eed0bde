"""POST /v1/completions: one or many prompts (text or token ids) in, their continuations out.

Owns the shapes of text completions. The choice index is prompt * n + choice. With `echo` and
`logprobs` the prompt's own log-probabilities are returned, which evaluation harnesses rely on.
"""

from contextlib import aclosing
from typing import Final

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from diptych.engine.core.errors import InvalidRequestError
from diptych.engine.core.types import FinishReason
from diptych.server.http.answering import Answer, request_header_id, stream_response
from diptych.server.http.body import read_object
from diptych.server.http.completion_choice import ChoiceText, Echo
from diptych.server.http.front import Front
from diptych.server.http.jobs import Job, Outputs, run_jobs, sampling_fields, verify_common
from diptych.server.http.replies import Completion, CompletionChoice
from diptych.server.http.requests import CompletionRequest, Prompt, parse
from diptych.server.http.stream import unless_gone
from diptych.server.text.generation import OutputDelta
from diptych.server.text.prepare import merge_defaults, prepare_params

_MAX_TOKENS_DEFAULT: Final = 16  # OpenAI's


async def completions(front: Front, http: Request) -> Response:
    fields = await read_object(front, http)
    request, unknown = parse(fields, CompletionRequest)
    for name in unknown:
        front.metrics.unknown_field(name)
    model = front.model(request.model)
    answer = Answer(front, request, model, "cmpl", request_header_id(http, front))
    _verify(request)
    prompts = _prompts(request.prompt, front.settings.prompts_max)
    timeout_s = front.timeout_s(request.timeout_s, http.headers.get("x-request-timeout"))
    jobs = [await _job(front, request, prompt, timeout_s) for prompt in prompts]
    answer.submitted(jobs)
    echoes = [_echo(front, request, *pair) for pair in zip(prompts, jobs, strict=True)]
    reply = _Reply(request, answer, jobs, echoes)
    outputs = run_jobs(front, jobs)
    if request.stream:
        return await stream_response(
            front,
            http,
            answer,
            outputs,
            opening=list,
            chunks=reply.chunks,
            closing=reply.closing,
        )
    body = await unless_gone(http, reply.whole(outputs))
    headers = {"X-Request-Id": answer.request_id}
    return Response(msgspec.json.encode(body), 200, headers, media_type="application/json")


def _verify(request: CompletionRequest) -> None:
    verify_common(request)
    if request.max_tokens == 0 and (not request.echo or request.stream):
        raise InvalidRequestError(
            "max_tokens must be at least 1 (0 only with echo=true and stream=false).",
            param="max_tokens",
        )
    several = request.n is not None and request.n > 1
    if request.echo and request.stream and request.logprobs is not None and several:
        raise InvalidRequestError(
            "echo with logprobs and n > 1 is not available with stream=true.", param="echo"
        )


def _prompts(prompt: Prompt, most: int) -> list[str | list[int]]:
    """One string, a list of strings, one list of ids, or a list of lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt is an empty list.", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(prompt) not in (len(texts), len(lists)):
        raise InvalidRequestError(
            "prompt must be a string, a list of strings, a list of token ids or a list of lists "
            "of token ids, not a mixture.",
            param="prompt",
        )
    if len(prompt) > most:
        raise InvalidRequestError(f"prompt has more than {most} entries.", param="prompt")
    return [*texts, *lists]


async def _job(
    front: Front, request: CompletionRequest, prompt: str | list[int], timeout_s: float | None
) -> Job:
    fields = sampling_fields(request)
    asked = request.max_tokens
    fields["max_tokens"] = _MAX_TOKENS_DEFAULT if asked is None else max(1, asked)
    if asked is not None and asked < 0:
        fields["max_tokens"] = asked  # refused below, with its value
    fields["logprobs"] = request.logprobs
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        fields["prompt_logprobs"] = request.logprobs
    params = merge_defaults(fields, front.settings.sampling_defaults)
    params.verify(front.client.info.vocab_size)
    if isinstance(prompt, str):
        special = request.add_special_tokens is not False
        prompt = await front.encode_prompt(
            prompt,
            add_special_tokens=special,
            truncated=request.truncate_prompt_tokens is not None,
        )
    prepared = prepare_params(
        params,
        prompt,
        tokenizer=front.tokenizer,
        info=front.client.info,
        clip_max_tokens=asked is None or asked == 0,
    )
    return Job(
        prepared.prompt_ids, prepared.params, request.priority, request.cache_salt, timeout_s
    )


def _echo(
    front: Front, request: CompletionRequest, prompt: str | list[int], job: Job
) -> Echo | None:
    """The prompt as it is shown before the answer; a truncated one as the model saw it."""
    if not request.echo:
        return None
    if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
        text = prompt
    else:
        text = front.tokenizer.decode(job.prompt_ids, skip_special_tokens=False)
    return Echo(text, front.tokenizer.pieces.text(job.prompt_ids[0]))


class _Reply:
    """Collects the choices of one request, whole or as chunks."""

    def __init__(
        self,
        request: CompletionRequest,
        answer: Answer,
        jobs: list[Job],
        echoes: list[Echo | None],
    ) -> None:
        self._request = request
        self._answer = answer
        self._jobs = jobs
        self._n = jobs[0].params.n
        self._choices = [
            ChoiceText(request, job, echo, job_index * self._n + choice)
            for job_index, (job, echo) in enumerate(zip(jobs, echoes, strict=True))
            for choice in range(self._n)
        ]

    async def whole(self, outputs: Outputs) -> Completion:
        prompt_only = self._request.max_tokens == 0
        async with aclosing(outputs):
            async for job, delta in outputs:
                self._answer.count(job, delta, generated=not prompt_only)
                if delta.prompt_logprobs is not None:  # known once, valid for all choices
                    for choice in self._choices[job * self._n : (job + 1) * self._n]:
                        choice.prompt_entries = delta.prompt_logprobs
                if prompt_only:
                    delta = _without_tokens(delta)
                self._choice(job, delta).add(delta)
        return self._body([choice.whole() for choice in self._choices])

    def chunks(self, job: int, delta: OutputDelta) -> list[object]:
        self._answer.count(job, delta)
        choice = self._choice(job, delta)
        return [self._chunk([part]) for part in choice.chunks(delta)]

    def closing(self) -> list[object]:
        return [self._body([])] if self._answer.include_usage else []

    def _choice(self, job: int, delta: OutputDelta) -> ChoiceText:
        return self._choices[job * self._n + delta.choice]

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return msgspec.structs.replace(self._body(choices), usage=self._answer.chunk_usage())

    def _body(self, choices: list[CompletionChoice]) -> Completion:
        answer = self._answer
        return Completion(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            choices=choices,
            usage=answer.usage() if self._jobs else UNSET,
            system_fingerprint=answer.system_fingerprint,
        )


def _without_tokens(delta: OutputDelta) -> OutputDelta:
    """max_tokens=0: one token had to be computed to score the prompt, but none was asked for."""
    ended = None if delta.finish_reason is None else FinishReason.LENGTH
    return msgspec.structs.replace(
        delta, text="", token_ids=[], logprobs=None, finish_reason=ended, stop_reason=None
    )
