"""What one request went through, as the API server saw it, observed into the metrics at its end.

Owns the times and token counts of one request. Invariant: every request that the engine accepted
ends in exactly one `finished_reason` per choice, an abandoned or failed one included.
"""

import time

from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import FinishReason
from diptych.server.http.metrics import Metrics
from diptych.server.text.generation import OutputDelta


class Timeline:
    def __init__(self, metrics: Metrics, num_prompt: int, params: SamplingParams) -> None:
        self._metrics = metrics
        self._num_prompt = num_prompt
        self._params = params
        self._arrived_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = self._arrived_s
        self._choice_s = [0.0] * params.n  # last token of each choice
        self._num_tokens = [0] * params.n
        self._open = set(range(params.n))
        self._queued_s: float | None = None
        self._preemptions = 0

    def saw(self, delta: OutputDelta) -> None:
        now = time.monotonic()
        count = len(delta.token_ids)
        self._queued_s, self._preemptions = delta.queued_s, delta.preemptions
        if self._first_s is None:
            self._first_s = now
            self._accepted(delta)
        if count and self._num_tokens[delta.choice]:
            gap_s = (now - self._choice_s[delta.choice]) / count
            self._metrics.itl.observe(gap_s, count)
        self._choice_s[delta.choice] = self._last_s = now
        self._num_tokens[delta.choice] += count
        self._metrics.generated.inc(count)
        if delta.finish_reason is not None:
            self._ended(delta.choice, delta.finish_reason)

    def close(self, reason: FinishReason) -> None:
        """The request is over; choices still open ended for `reason`."""
        if self._first_s is None:
            return  # never accepted: counted as a rejection or an error elsewhere
        for choice in sorted(self._open):
            self._ended(choice, reason)
        metrics, most = self._metrics, max(self._num_tokens)
        metrics.generation_len_max.observe(most)
        metrics.e2e.observe(time.monotonic() - self._arrived_s)
        metrics.inference.observe(self._last_s - self._arrived_s)
        metrics.decode.observe(self._last_s - self._first_s)
        queued_s = self._queued_s or 0.0  # not known: the first token overtook the news
        metrics.queue.observe(queued_s)
        metrics.prefill.observe(max(0.0, self._first_s - self._arrived_s - queued_s))
        metrics.preemptions.observe(self._preemptions)
        if most > 1:
            metrics.tpot.observe((self._last_s - self._first_s) / (most - 1))

    def _accepted(self, delta: OutputDelta) -> None:
        assert self._first_s is not None
        metrics = self._metrics
        metrics.ttft.observe(self._first_s - self._arrived_s)
        metrics.prompt_tokens.inc(self._num_prompt)
        metrics.prompt_cached.inc(delta.num_cached)
        metrics.prompt_len.observe(self._num_prompt)
        metrics.params_n.observe(self._params.n)
        metrics.params_max_tokens.observe(self._params.max_tokens or 0)

    def _ended(self, choice: int, reason: FinishReason) -> None:
        self._open.discard(choice)
        self._metrics.finished(reason)
        self._metrics.generation_len.observe(self._num_tokens[choice])
