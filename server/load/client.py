"""One streamed request against an OpenAI-compatible server, with the times of its pieces.

Owns nothing but the clock readings. Times are seconds of `time.perf_counter`.
"""

import json
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass(slots=True, frozen=True)
class LoadRequest:
    """What to send: token ids or text, and how many tokens to ask for."""

    prompt: list[int] | str
    max_tokens: int


@dataclass(slots=True)
class LoadResult:
    """What came back. `chunk_s` are the arrival times of chunks that carried tokens."""

    start_s: float
    end_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.chunk_s[0] - self.start_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, None with fewer than two."""
        if self.output_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: gaps between chunks."""
        return [late - early for early, late in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


async def run_request(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    request: LoadRequest,
    ignore_eos: bool,
    result: LoadResult | None = None,
) -> LoadResult:
    """Streams one completion. Never raises for what the server or the network does.

    A `result` that is passed in grows while the answer comes, for a caller who watches it.
    """
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": ignore_eos,
    }
    result = result or LoadResult(0.0)
    result.start_s = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                text = await response.text()
                result.error = f"HTTP {response.status}: {text[:200]}"
            else:
                await _read(response, result)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        result.error = f"{type(error).__name__}: {error}"
    result.end_s = time.perf_counter()
    return result


async def _read(response: aiohttp.ClientResponse, result: LoadResult) -> None:
    done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            result.error = str(chunk["error"])
            return
        if chunk.get("choices"):
            result.chunk_s.append(now)
        if usage := chunk.get("usage"):
            result.prompt_tokens = usage["prompt_tokens"]
            result.output_tokens = usage["completion_tokens"]
    if not done:
        result.error = "the stream ended without [DONE]"
    elif not result.chunk_s:
        result.error = "the stream had no tokens"
