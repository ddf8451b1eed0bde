"""POST /v1/chat/completions: messages in, one assistant message per choice out.

Owns the shapes of chat answers. Everything that can be refused is refused before the engine or the
client sees anything of the request.
"""

from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from diptych.engine.core.errors import InvalidRequestError
from diptych.engine.core.params import LOGPROBS_MAX
from diptych.server.http.answering import Answer, request_header_id, stream_response
from diptych.server.http.body import read_object
from diptych.server.http.front import Front
from diptych.server.http.jobs import Job, Outputs, run_jobs, sampling_fields, verify_common
from diptych.server.http.logprobs import chat_logprobs, prompt_logprobs
from diptych.server.http.replies import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChunkDelta,
)
from diptych.server.http.requests import ChatRequest, ContentPart, Message, parse
from diptych.server.http.stream import unless_gone
from diptych.server.text.generation import OutputDelta, PositionLogprobs
from diptych.server.text.prepare import merge_defaults, prepare_params

_ARGUMENTS_MAX: Final = 32
_ARGUMENT_CHARS_MAX: Final = 1024
_ROLE_CHARS_MAX: Final = 64


async def chat_completions(front: Front, http: Request) -> Response:
    fields = await read_object(front, http)
    request, unknown = parse(fields, ChatRequest)
    for name in unknown:
        front.metrics.unknown_field(name)
    model = front.model(request.model)
    answer = Answer(front, request, model, "chatcmpl", request_header_id(http, front))
    job = await _job(front, http, request)
    answer.submitted([job])
    outputs = run_jobs(front, [job])
    if not request.stream:
        reply = await unless_gone(http, _whole(outputs, request, answer, job))
        return _json(reply, answer)
    frames = _Frames(request, answer, job)
    return await stream_response(
        front,
        http,
        answer,
        outputs,
        opening=frames.opening,
        chunks=frames.chunks,
        closing=frames.closing,
    )


def _json(reply: object, answer: Answer) -> Response:
    headers = {"X-Request-Id": answer.request_id}
    return Response(msgspec.json.encode(reply), 200, headers, media_type="application/json")


async def _job(front: Front, http: Request, request: ChatRequest) -> Job:
    verify_common(request)
    fields = sampling_fields(request)
    fields["max_tokens"] = (
        request.max_tokens
        if request.max_completion_tokens is None
        else request.max_completion_tokens
    )
    fields["logprobs"] = _top(request)
    params = merge_defaults(fields, front.settings.sampling_defaults)
    params.verify(front.client.info.vocab_size)
    timeout_s = front.timeout_s(request.timeout_s, http.headers.get("x-request-timeout"))
    prompt_ids = await encode_chat(front, request)
    prepared = prepare_params(params, prompt_ids, tokenizer=front.tokenizer, info=front.client.info)
    return Job(
        prepared.prompt_ids, prepared.params, request.priority, request.cache_salt, timeout_s
    )


def _top(request: ChatRequest) -> int | None:
    top = request.top_logprobs
    if top is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
    if top is not None and not 0 <= top <= LOGPROBS_MAX:
        raise InvalidRequestError(
            f"top_logprobs must be an integer between 0 and {LOGPROBS_MAX}, got {top}.",
            param="top_logprobs",
        )
    return (top or 0) if request.logprobs else None


async def encode_chat(front: Front, request: ChatRequest) -> list[int]:
    """The conversation as prompt ids. Raises InvalidRequestError."""
    if not request.messages:
        raise InvalidRequestError("messages is empty; send at least one message.", param="messages")
    most = front.settings.messages_max
    if len(request.messages) > most:
        raise InvalidRequestError(f"messages has more than {most} entries.", param="messages")
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise InvalidRequestError(
            "continue_final_message needs a last message of role assistant.", param="messages"
        )
    text = front.tokenizer.render_chat(
        [_plain(message, at) for at, message in enumerate(request.messages)],
        add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
        continue_final_message=request.continue_final_message,
        arguments=_arguments(request.chat_template_kwargs),
    )
    return await front.encode_prompt(
        text,
        add_special_tokens=bool(request.add_special_tokens),
        truncated=request.truncate_prompt_tokens is not None,
    )


def _arguments(arguments: Mapping[str, object]) -> Mapping[str, object]:
    """Plain values only: a template is code, and these reach it."""
    for name, value in arguments.items():
        plain = value is None or isinstance(value, bool | int | float | str)
        if not plain or not name.isidentifier() or len(str(value)) > _ARGUMENT_CHARS_MAX:
            raise InvalidRequestError(
                f"chat_template_kwargs: {name[:64]!r} must be a name with a number, a boolean or a "
                f"string of at most {_ARGUMENT_CHARS_MAX} characters.",
                param="chat_template_kwargs",
            )
    if len(arguments) > _ARGUMENTS_MAX:
        raise InvalidRequestError(
            f"chat_template_kwargs has more than {_ARGUMENTS_MAX} entries.",
            param="chat_template_kwargs",
        )
    return arguments


def _plain(message: Message, at: int) -> dict[str, object]:
    """As templates expect it: text content in one string. Parts that are no text are refused."""
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequestError(
                f"messages[{at}].{name}: tool calls are not supported.", param=f"messages[{at}]"
            )
    if not message.role or len(message.role) > _ROLE_CHARS_MAX:
        raise InvalidRequestError(
            f"messages[{at}].role must be a name such as system, user or assistant.",
            param=f"messages[{at}].role",
        )
    content = message.content
    if content is None:
        raise InvalidRequestError(
            f"messages[{at}].content is missing; send a string.", param=f"messages[{at}].content"
        )
    if not isinstance(content, str):
        content = "\n".join(_part_text(part, at, index) for index, part in enumerate(content))
    plain: dict[str, object] = {"role": message.role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    return plain


def _part_text(part: ContentPart, at: int, index: int) -> str:
    where = f"messages[{at}].content[{index}]"
    if part.type not in ("text", "input_text") or part.text is None:
        raise InvalidRequestError(
            f"{where}: parts of type {part.type[:40]!r} are not supported; this server takes text "
            "only.",
            param=where,
            code="unsupported_content",
        )
    return part.text


def _chat_logprobs(
    request: ChatRequest, entries: list[PositionLogprobs] | None
) -> ChatLogprobs | None:
    if not request.logprobs:
        return None
    return chat_logprobs(
        entries or [], request.top_logprobs or 0, request.return_tokens_as_token_ids
    )


async def _whole(
    outputs: Outputs, request: ChatRequest, answer: Answer, job: Job
) -> ChatCompletion:
    texts: list[list[str]] = [[] for _ in range(job.params.n)]
    ids: list[list[int]] = [[] for _ in range(job.params.n)]
    entries: list[list[PositionLogprobs]] = [[] for _ in range(job.params.n)]
    ends: dict[int, OutputDelta] = {}
    prompt: list[PositionLogprobs] | None = None
    async with aclosing(outputs):
        async for index, delta in outputs:
            answer.count(index, delta)
            texts[delta.choice].append(delta.text)
            ids[delta.choice].extend(delta.token_ids)
            entries[delta.choice].extend(delta.logprobs or [])
            prompt = delta.prompt_logprobs if delta.prompt_logprobs is not None else prompt
            if delta.finish_reason is not None:
                ends[delta.choice] = delta
    choices = [
        ChatChoice(
            index=choice,
            message=ChatAnswer("assistant", "".join(texts[choice])),
            logprobs=_chat_logprobs(request, entries[choice]),
            finish_reason=ends[choice].finish_reason,
            stop_reason=ends[choice].stop_reason,
            token_ids=ids[choice] if request.return_token_ids else UNSET,
        )
        for choice in range(job.params.n)
    ]
    wanted = request.prompt_logprobs
    return ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=choices,
        usage=answer.usage(),
        system_fingerprint=answer.system_fingerprint,
        prompt_token_ids=job.prompt_ids if request.return_token_ids else UNSET,
        prompt_logprobs=UNSET if wanted is None else prompt_logprobs(prompt or [], wanted),
    )


class _Frames:
    """The chunks of one streamed answer: roles, text, ends, usage."""

    def __init__(self, request: ChatRequest, answer: Answer, job: Job) -> None:
        self._request = request
        self._answer = answer
        self._job = job

    def opening(self) -> list[object]:
        """One chunk with the role per choice; the first one may carry the prompt's ids."""
        chunks: list[object] = []
        for choice in range(self._job.params.n):
            role = ChatChunkChoice(index=choice, delta=ChunkDelta(role="assistant", content=""))
            chunk = self._chunk([role])
            if choice == 0 and self._request.return_token_ids:
                chunk = msgspec.structs.replace(chunk, prompt_token_ids=self._job.prompt_ids)
            chunks.append(chunk)
        return chunks

    def chunks(self, job: int, delta: OutputDelta) -> list[object]:
        self._answer.count(job, delta)
        request, chunks = self._request, list[object]()
        wants_ids = request.return_token_ids and bool(delta.token_ids)
        if delta.text or wants_ids or (request.logprobs and delta.logprobs):
            choice = ChatChunkChoice(
                index=delta.choice,
                delta=ChunkDelta(content=delta.text),
                logprobs=_chat_logprobs(request, delta.logprobs),
                token_ids=delta.token_ids if wants_ids else UNSET,
            )
            chunks.append(self._chunk([choice]))
        if delta.finish_reason is not None:
            reason = delta.stop_reason
            choice = ChatChunkChoice(
                index=delta.choice,
                delta=ChunkDelta(),
                finish_reason=delta.finish_reason,
                stop_reason=UNSET if reason is None else reason,
            )
            chunks.append(self._chunk([choice]))
        return chunks

    def closing(self) -> list[object]:
        if not self._answer.include_usage:
            return []
        return [msgspec.structs.replace(self._chunk([]), usage=self._answer.usage())]

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        answer = self._answer
        return ChatChunk(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            choices=choices,
            system_fingerprint=answer.system_fingerprint,
            usage=answer.chunk_usage(),
        )
