"""The loads: what one turn of one server measures.

Owns nothing. All prompts are token ids drawn from a seed that both sides of a pair share and no
two pairs do, so that a prefix cache helps only where the load means it to. Rates are tokens per
second, times milliseconds.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import aiohttp

from diptych.server.load.client import LoadRequest, LoadResult, run_request
from diptych.server.load.report import percentile

Metrics: TypeAlias = dict[str, float]
Load: TypeAlias = Callable[["Client", random.Random], Awaitable[Metrics]]

_FIRST_ID = 259  # ids below are bytes and special tokens
_STEADY_TOKENS = 8  # of every stream, before its gaps count
_LOOK_S = 0.005  # between two looks at the streams
_ENDLESS_IN, _ENDLESS_OUT = 128, 2048  # tokens of one answer of a running decode
_QUIET_TOKENS = 48  # gaps of every stream without the arriving prompt


class Client:
    """One server as a client sees it; every request has a connection of its own."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, vocab: int) -> None:
        self._session = session
        self.url = url
        self.model = model
        self.vocab = vocab

    def prompt(self, rng: random.Random, length: int) -> list[int]:
        return rng.choices(range(_FIRST_ID, self.vocab), k=length)

    async def run(
        self, prompt: list[int], num_out: int, result: LoadResult | None = None
    ) -> LoadResult:
        """Raises RuntimeError unless the whole answer came."""
        request = LoadRequest(prompt, num_out)
        result = await run_request(self._session, self.url, self.model, request, True, result)
        if result.error is not None:
            raise RuntimeError(f"{self.url}: {result.error}")
        if result.output_tokens != num_out:
            raise RuntimeError(f"{self.url}: {result.output_tokens} tokens instead of {num_out}")
        return result


def open_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=600, sock_connect=30),
    )


def one_stream(num_in: int, num_out: int) -> Load:
    async def load(client: Client, rng: random.Random) -> Metrics:
        result = await client.run(client.prompt(rng, num_in), num_out)
        seconds = result.chunk_s[-1] - result.chunk_s[0]
        return {"steady_tok_s": (num_out - 1) / seconds, "ttft_ms": result.ttft_s * 1e3}

    return load


def streams(count: int, num_in: int, num_out: int) -> Load:
    async def load(client: Client, rng: random.Random) -> Metrics:
        prompts = [client.prompt(rng, num_in) for _ in range(count)]
        return await _together(client, prompts, num_out)

    return load


def prefill(length: int, count: int) -> Load:
    """`count` prompts one after another; the median."""

    async def load(client: Client, rng: random.Random) -> Metrics:
        runs = [await client.run(client.prompt(rng, length), 1) for _ in range(count)]
        ttft_s = percentile([run.ttft_s for run in runs], 50)
        return {"prefill_tok_s": length / ttft_s, "ttft_ms": ttft_s * 1e3}

    return load


def shared_prefix(count: int, num_shared: int, num_own: int, num_out: int) -> Load:
    """The prefix is computed once before the clock starts."""

    async def load(client: Client, rng: random.Random) -> Metrics:
        prefix = client.prompt(rng, num_shared)
        await client.run(prefix + client.prompt(rng, num_own), 1)
        prompts = [prefix + client.prompt(rng, num_own) for _ in range(count)]
        return await _together(client, prompts, num_out)

    return load


def arrival(num_decodes: int, num_in: int) -> Load:
    """Gaps of running decodes, quiet and while a prompt of `num_in` tokens is computed."""

    async def load(client: Client, rng: random.Random) -> Metrics:
        alone = await client.run(client.prompt(rng, num_in), 1)
        streams = [_Endless(client, random.Random(rng.random())) for _ in range(num_decodes)]
        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        try:
            await _grown(streams, tasks, _STEADY_TOKENS)
            quiet_from_s = time.perf_counter()
            await _grown(streams, tasks, _STEADY_TOKENS + _QUIET_TOKENS)
            quiet_to_s = time.perf_counter()
            late = await client.run(client.prompt(rng, num_in), 1)
            await _grown(streams, tasks, max(stream.chunks for stream in streams) + 1)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        results = [result for stream in streams for result in stream.results]
        quiet = _gaps_ms(results, quiet_from_s, quiet_to_s)
        during = _gaps_ms(results, late.start_s, late.chunk_s[0])
        return {
            "quiet_itl_p50_ms": percentile(quiet, 50),
            "quiet_itl_p99_ms": percentile(quiet, 99),
            "itl_p50_ms": percentile(during, 50),
            "itl_p99_ms": percentile(during, 99),
            "p50_over_quiet": percentile(during, 50) / percentile(quiet, 50),
            "p99_over_quiet": percentile(during, 99) / percentile(quiet, 99),
            "ttft_ms": late.ttft_s * 1e3,
            "ttft_alone_ms": alone.ttft_s * 1e3,
            "ttft_over_alone": late.ttft_s / alone.ttft_s,
        }

    return load


async def _together(client: Client, prompts: list[list[int]], num_out: int) -> Metrics:
    results = await asyncio.gather(*(client.run(prompt, num_out) for prompt in prompts))
    seconds = max(r.end_s for r in results) - min(r.start_s for r in results)
    return {
        "output_tokens": sum(r.output_tokens for r in results),
        "output_tok_s": sum(r.output_tokens for r in results) / seconds,
        "ttft_p50_ms": percentile([r.ttft_s * 1e3 for r in results], 50),
        "itl_p50_ms": percentile([gap * 1e3 for r in results for gap in r.itl_s], 50),
        "itl_p99_ms": percentile([gap * 1e3 for r in results for gap in r.itl_s], 99),
    }


class _Endless:
    """A decode that goes on until it is cancelled: after a whole answer the next one begins.

    Servers of a small model can finish one answer before the slowest stream has grown enough.
    No gap is counted between two answers.
    """

    def __init__(self, client: Client, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self.results: list[LoadResult] = []

    @property
    def chunks(self) -> int:
        return sum(len(result.chunk_s) for result in self.results)

    async def run(self) -> None:
        while True:
            self.results.append(LoadResult(time.perf_counter()))
            prompt = self._client.prompt(self._rng, _ENDLESS_IN)
            await self._client.run(prompt, _ENDLESS_OUT, self.results[-1])


async def _grown(streams: list[_Endless], tasks: list[asyncio.Task[None]], count: int) -> None:
    """Until every stream has `count` chunks; raises what ended a stream."""
    while min(stream.chunks for stream in streams) < count:
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(_LOOK_S)


def _gaps_ms(results: list[LoadResult], from_s: float, to_s: float) -> list[float]:
    """Gaps that overlap [from_s, to_s)."""
    return [
        (late - early) * 1e3
        for result in results
        for early, late in zip(result.chunk_s, result.chunk_s[1:], strict=False)
        if late > from_s and early < to_s
    ]
