"""The Python front door: `from diptych import Engine`.

Owns one engine (inline or a supervisor with its processes) and the loop thread that speaks to it.
Invariant: the tokens are the same either way, and the same as over HTTP; `close` (or leaving the
`with`) ends every process that was started.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diptych.engine.core.config import (
    Dtype,
    EngineOptions,
    KVCacheDtype,
    Quantization,
)
from diptych.engine.core.errors import EngineDeadError, InvalidRequestError
from diptych.engine.core.messages import Stats
from diptych.engine.core.model_config import load_model_config
from diptych.engine.core.params import SamplingParams
from diptych.engine.hub import resolve_model
from diptych.server.builtin import BUILTIN_MODEL
from diptych.server.client import EngineInfo
from diptych.server.engine_arguments import EngineArguments, MoreArguments
from diptych.server.hosting import Hosted, host_engine
from diptych.server.loop_thread import LoopThread
from diptych.server.outputs import CompletionOutput, RequestOutput
from diptych.server.text.generation import OutputDelta, generate
from diptych.server.text.prepare import Prepared, merge_defaults, prepare_params
from diptych.server.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
ChatMessage = Mapping[str, object]

_OPEN_MAX: Final = 512  # requests that one `generate` call keeps open at once


class Engine:
    """Serves a model inside a Python program.

    model: a folder with a Hugging Face checkpoint, a hub name, or None for the built-in model.
    inline: True runs everything in this process (one worker); False starts `prefill` + `decode`
        + `mixed` worker processes under a supervisor.
    kv_cache_dtype: of the KV pools; "int8" holds about twice the tokens of "bfloat16" in the same
        memory, with a scale per token and head.
    separate_pools: prefill and decode workers each have their own KV memory; blocks move between
        them by `transfer` ("auto", "shm", "tcp" or "nixl").
    tensor_parallel_size: processes over which each worker's model is spread; `prefill_tp` and
        `decode_tp` say it for one kind of worker. Inline, the same shards are computed one after
        another, and give the same bits.
    ttft_slo_s, itl_slo_s: targets to the first token and between tokens, in seconds; with either,
        workers move between prefill and decode as the load asks.
    autoscale: fewest and most workers; one leaves after `scale_down_delay_s` of fewer being enough.
    And, as the CLI's flags of these names: prefill_block_size, decode_block_size,
        prefill_kv_cache_dtype, decode_kv_cache_dtype (with separate_pools), packed_cache, kernels,
        kernel_level, cpu_cores, prefill_core_share, prefill_batch_tokens, rank_link,
        hang_timeout_s, threads; and those named above (`EngineArguments` in engine_arguments.py
        says more).
    Raises ConfigError and ModelLoadError.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        inline: bool = False,
        prefill: int = 1,
        decode: int = 1,
        mixed: int = 0,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int = 1 << 30,
        kv_cache_dtype: KVCacheDtype = "auto",
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 512,
        max_chunk_tokens: int | None = None,
        separate_pools: bool = False,
        tensor_parallel_size: int = 1,
        ttft_slo_s: float | None = None,
        itl_slo_s: float | None = None,
        autoscale: tuple[int, int] | None = None,
        scale_down_delay_s: float = 60.0,
        load_format: str = "auto",
        quantization: Quantization | None = None,
        chat_template: str | Path | None = None,
        **more: Unpack[MoreArguments],
    ) -> None:
        folder = resolve_model(str(model or BUILTIN_MODEL))
        options = EngineArguments(
            prefill=0 if inline else prefill,
            decode=0 if inline else decode,
            mixed=1 if inline else mixed,
            dtype=dtype,
            max_model_len=max_model_len,
            load_format=load_format,
            quantization=quantization,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            separate_pools=separate_pools,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_chunk_tokens=max_chunk_tokens,
            ttft_slo_s=ttft_slo_s,
            itl_slo_s=itl_slo_s,
            autoscale=None if inline else autoscale,
            scale_down_delay_s=scale_down_delay_s,
            tensor_parallel_size=tensor_parallel_size,
            **more,
        ).options(folder)
        self.tokenizer = Tokenizer(folder, chat_template)
        self._defaults = load_model_config(folder, dtype, max_model_len).sampling_defaults
        self._loop = LoopThread("diptych-engine")
        self._hosted = self._host(options, inline)
        self._closed = False

    def _host(self, options: EngineOptions, inline: bool) -> Hosted:
        try:
            options.verify()
            return self._loop.run(host_engine(options, inline=inline))
        except BaseException:
            self._loop.stop()
            raise

    # ---- facts

    @property
    def info(self) -> EngineInfo:
        """Facts about the served model."""
        return self._hosted.client.info

    def stats(self) -> Stats | None:
        """The newest sums of the scheduler."""
        return self._hosted.client.stats()

    # ---- whole answers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers all prompts, in order. One `params` serves all, or give one per prompt."""
        batch = _as_prompts(prompts)
        each: list[SamplingParams | None]
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(each)} sampling parameters.")
        return self._running_loop().run(self._generate_all(batch, each, progress))

    def chat(
        self, messages: Sequence[ChatMessage], params: SamplingParams | None = None
    ) -> RequestOutput:
        """One answer to a conversation of {"role": ..., "content": ...} messages."""
        return self._running_loop().run(self._generate_one(self._chat_ids(messages), params))

    # ---- streams

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[OutputDelta]:
        """The pieces of an answer as they come. Leaving the loop early aborts the request."""
        return self._running_loop().iterate(self._deltas(prompt, params))

    def stream_chat(
        self, messages: Sequence[ChatMessage], params: SamplingParams | None = None
    ) -> Iterator[OutputDelta]:
        """As `stream`, for a conversation."""
        return self.stream(self._chat_ids(messages), params)

    def stream_async(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[OutputDelta, None]:
        """As `stream`, for `async for` in any event loop."""
        return self._running_loop().iterate_async(self._deltas(prompt, params))

    # ---- life

    def close(self) -> None:
        """Ends the engine and all its processes. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.run(self._hosted.close())
            self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- inside

    def _running_loop(self) -> LoopThread:
        if self._closed:
            raise EngineDeadError("The engine was closed.")
        return self._loop

    def _chat_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The template writes the special tokens itself."""
        text = self.tokenizer.render_chat(messages)
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def _generate_all(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams | None],
        progress: bool,
    ) -> list[RequestOutput]:
        gate = asyncio.Semaphore(_OPEN_MAX)
        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not progress, transient=True) as shown:
            bar = shown.add_task("", total=len(prompts))

            async def one(prompt: Prompt, each: SamplingParams | None) -> RequestOutput:
                async with gate:
                    output = await self._generate_one(prompt, each)
                shown.advance(bar)
                return output

            tasks = [asyncio.create_task(one(*pair)) for pair in zip(prompts, params, strict=True)]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                raise

    async def _generate_one(self, prompt: Prompt, params: SamplingParams | None) -> RequestOutput:
        request_id, prepared = self._prepare(prompt, params)
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=prepared.prompt_ids,
            outputs=[CompletionOutput(index) for index in range(prepared.params.n)],
        )
        async for delta in self._start(request_id, prepared):
            choice = output.outputs[delta.choice]
            choice.text += delta.text
            choice.token_ids += delta.token_ids
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
            if delta.logprobs is not None:
                choice.logprobs = (choice.logprobs or []) + delta.logprobs
            if delta.prompt_logprobs is not None:
                output.prompt_logprobs = delta.prompt_logprobs
            output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached)
        return output

    def _deltas(
        self, prompt: Prompt, params: SamplingParams | None
    ) -> AsyncGenerator[OutputDelta, None]:
        return self._start(*self._prepare(prompt, params))

    def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> tuple[str, Prepared]:
        """`params` None: the model's own defaults (generation_config.json), as vLLM does."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        prepared = prepare_params(
            merge_defaults({}, self._defaults) if params is None else params,
            ids,
            tokenizer=self.tokenizer,
            info=self.info,
        )
        return uuid.uuid4().hex, prepared

    def _start(self, request_id: str, prepared: Prepared) -> AsyncGenerator[OutputDelta, None]:
        return generate(
            self._hosted.client,
            self.tokenizer,
            request_id,
            prepared.prompt_ids,
            prepared.params,
        )


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text, one list of ids, or a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    rows: list[object] = list(prompts)
    if rows and all(isinstance(row, int) for row in rows):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
