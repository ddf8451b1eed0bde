"""How much prefill one step can take beside decodes without missing the target between tokens.

Owns one worker's own costs, fitted from every step. Invariant: without a target, or without
decodes, nothing is held back; a prompt always gets a block's worth of each step.
"""

from diptych.scheduler.cost_model import WorkerCost

_SAFE = 0.9  # of the target: what is left is for messages and for the spread of steps


class Pace:
    def __init__(self, itl_slo_s: float | None) -> None:
        self._itl_slo_s = itl_slo_s
        self._cost = WorkerCost()

    def observe(self, compute_s: float, prefill_tokens: int, num_decodes: int) -> None:
        """A step is over."""
        if self._itl_slo_s is not None:
            self._cost.observe(1, compute_s, prefill_tokens, num_decodes)

    def prefill_tokens_max(self) -> int | None:
        """Of a step with decodes; None: no limit of this kind."""
        if self._itl_slo_s is None:
            return None
        left_s = _SAFE * self._itl_slo_s - self._cost.step_s
        return max(0, int(left_s / self._cost.prefill_s))
