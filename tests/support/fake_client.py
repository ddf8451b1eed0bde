"""An `EngineClient` that answers with scripted tokens, for everything above token ids."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from diptych.engine.core.messages import ColdStart, Stats, WorkerStats
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.types import FinishReason
from diptych.server.client import Delta, EngineInfo, Health

Script = Callable[[list[int], SamplingParams, int], list[int]]


class FakeClient:
    """Each choice answers `script(prompt, params, choice)`; EOS ends it, `max_tokens` cuts it.

    `chunk`: tokens per delta. `gate`: when set, every delta but the first waits for it. `refuse`
    is raised before the first delta, `fail_after` = (deltas, error) later.
    """

    def __init__(
        self,
        script: Script,
        *,
        vocab_size: int,
        eos: int,
        max_model_len: int = 128,
        chunk: int = 1,
    ) -> None:
        self.info = EngineInfo(
            model_path="/models/tiny",
            dtype="float32",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=[eos],
            block_size=16,
            num_blocks=64,
            fingerprint="test",
        )
        self._script = script
        self.chunk = chunk
        self.gate: asyncio.Event | None = None
        self.refuse: Exception | None = None
        self.fail_after: tuple[int, Exception] | None = None
        self.healthy = Health(True, "")
        self.num_cached = 0
        self.calls: list[tuple[str, list[int], SamplingParams, dict[str, object]]] = []
        self.stopped: list[tuple[str, int]] = []
        self.ended: list[str] = []  # ids whose every choice finished
        self.aborted: list[str] = []  # ids closed early
        self.changed = asyncio.Event()

    async def stream(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        assert params.max_tokens is not None
        extra: dict[str, object] = {
            "priority": priority,
            "cache_salt": cache_salt,
            "timeout_s": timeout_s,
        }
        self.calls.append((request_id, prompt_ids, params, extra))
        await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        done = False
        try:
            sent = 0
            deltas = self._deltas(prompt_ids, params)
            for delta in deltas:
                if (request_id, delta.choice) in self.stopped:
                    continue
                if self.fail_after is not None and sent >= self.fail_after[0]:
                    raise self.fail_after[1]
                if sent and self.gate is not None:
                    await self.gate.wait()
                await asyncio.sleep(0)
                done = delta is deltas[-1]
                yield delta
                sent += 1
        finally:
            (self.ended if done else self.aborted).append(request_id)
            self.changed.set()

    def _deltas(self, prompt: list[int], params: SamplingParams) -> list[Delta]:
        per_choice = [self._choice(prompt, params, choice) for choice in range(params.n)]
        longest = max(len(deltas) for deltas in per_choice)
        return [
            deltas[step] for step in range(longest) for deltas in per_choice if step < len(deltas)
        ]

    def _choice(self, prompt: list[int], params: SamplingParams, choice: int) -> list[Delta]:
        assert params.max_tokens is not None
        ids = self._script(prompt, params, choice)[: params.max_tokens]
        stops = set(params.stop_token_ids) | set(self.info.eos_token_ids)
        finish = FinishInfo(FinishReason.LENGTH)
        for at, token in enumerate(ids):
            if token in stops:
                ids = ids[: at + 1]
                reason = token if token in params.stop_token_ids else None
                finish = FinishInfo(FinishReason.STOP, reason)
                break
        deltas: list[Delta] = []
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            last = start + self.chunk >= len(ids)
            deltas.append(
                Delta(
                    choice=choice,
                    first_index=start,
                    ids=part,
                    logprobs=self._logprobs(part, params.logprobs),
                    finish=finish if last else None,
                    num_cached=self.num_cached,
                    prompt_logprobs=(
                        self._logprobs(prompt[1:], params.prompt_logprobs)
                        if start == 0 and choice == 0
                        else None
                    ),
                )
            )
        return deltas

    def _logprobs(self, ids: list[int], top: int | None) -> list[TokenLogprobs] | None:
        if top is None:
            return None
        return [
            TokenLogprobs(token, -0.5, 1, [(token + i, -0.5 - i) for i in range(top)])
            for token in ids
        ]

    def stop(self, request_id: str, choice: int) -> None:
        self.stopped.append((request_id, choice))

    def stats(self) -> Stats | None:
        return Stats(
            scheduler_epoch=1,
            running=3,
            waiting=2,
            blocks_total=64,
            blocks_used=16,
            blocks_cached=8,
            prefix_queries=100,
            prefix_hits=40,
            preemptions=1,
            rejections=5,
            losses=0,
            prefill_tokens=200,
            workers=[WorkerStats(0, 1, 100, 1, 50, 0.01), WorkerStats(1, 1, 0, 2, 70, 0.01)],
            ready=True,
            dial_moves=6,
            pressure=(0.5, 0.25),
            workers_wanted=3,
            cold_start=ColdStart(1, 0.1, 1.2, 0.02, 0.08, 0.01, 0.002, 1.412),
            workers_asked=2,
            workers_retired=1,
        )

    def health(self) -> Health:
        return self.healthy

    async def close(self) -> None:
        self.changed.set()
