"""What share of requests a split of workers between the roles would serve within the targets. Pure.

Owns nothing: a forecast is arithmetic on a demand, costs and a split. Prompts are a queue with
several servers; decodes on a worker are as many as arrive in the time that they stay, with that
number's spread; a worker that does both has for prompts what the target between tokens leaves of
its steps. Invariant: equal inputs give equal forecasts; a share is 0..1; more demand is never
served better.
"""

from dataclasses import dataclass
from math import erf, exp, log2, sqrt
from typing import Final

from diptych.engine.core.types import HASH_UNIT_TOKENS

PACED: Final = 0.9
"""Of the target between tokens: as far as `pace.py` fills a step with prompts."""
_STRESS: Final = 0.02
"""What twice the stress takes from a score: shares that are all 1, or all 0, still differ."""
_REST: Final = 0.05
"""Of a server's time, that is never taken for busy: a queue without end takes its time to grow."""
_HORIZON_S: Final = 2.0
"""A queue that is gone by then is not held against a split."""
_ROUNDS: Final = 4  # until rows and the time that they stay agree


@dataclass(slots=True, frozen=True)
class Costs:
    """Of the workers, taken as alike."""

    prefill_s: float  # per token
    base_s: float  # of a step without prefill ...
    row_s: float  # ... and of each decode in it


@dataclass(slots=True, frozen=True)
class Demand:
    """Of all workers together."""

    prefill_tokens_s: float  # prompt tokens to be computed, per second
    prompt_tokens: float  # of the prompt that such a token belongs to, on average
    queued_tokens: float  # prompt tokens that wait now
    decode_tokens_s: float
    requests_s: float = 0.0

    @property
    def none(self) -> bool:
        return self.prefill_tokens_s <= 0.0 and self.decode_tokens_s <= 0.0


@dataclass(slots=True, frozen=True)
class Split:
    """Workers by role."""

    prefill: int
    mixed: int
    decode: int

    @property
    def covers(self) -> bool:
        """Somebody prefills and somebody decodes."""
        return self.prefill + self.mixed > 0 and self.mixed + self.decode > 0


@dataclass(slots=True, frozen=True)
class Forecast:
    share: float  # of requests within both targets
    stress: float  # the expected time over its target, of the worse of the two

    @property
    def score(self) -> float:
        return self.share - _STRESS * log2(1.0 + min(self.stress, 1e6))


def forecast(
    split: Split, demand: Demand, costs: Costs, slo_s: tuple[float, float], seats_max: float
) -> Forecast:
    """`seats_max`: decodes that one worker has room for."""
    work = demand.prefill_tokens_s * costs.prefill_s  # workers that prompts keep busy
    rows, capacity = _balance(split, demand, costs, slo_s[1], work)
    used = work / capacity
    itl_share, itl_stress = _between(split, costs, slo_s[1], rows, min(used, 1.0), seats_max)
    ttft_share, ttft_stress = _first(split, demand, costs, slo_s[0], used, capacity)
    return Forecast(itl_share * ttft_share, max(itl_stress, ttft_stress))


def _balance(
    split: Split, demand: Demand, costs: Costs, itl_s: float, work: float
) -> tuple[float, float]:
    """(decodes per worker that decodes, workers' worth of time that prompts may have): the more a
    worker does for prompts, the longer its decodes stay, and the less is left for prompts."""
    rate = demand.decode_tokens_s / (split.mixed + split.decode)  # tokens per second and worker
    least_s = HASH_UNIT_TOKENS * costs.prefill_s  # a block's worth in every step
    rows, slow, speed = 0.0, 1.0, 1.0
    for _ in range(_ROUNDS):
        stay = rate * costs.row_s * slow
        rows = rate * costs.base_s * slow * max(1.0, stay) / max(1.0 - stay, _REST)
        step_s = costs.base_s + costs.row_s * max(1.0, rows)
        longest_s = max(PACED * itl_s, step_s + least_s)
        alone = exp(-rows)  # the time in which nobody decodes there
        speed = alone + (1.0 - alone) * (1.0 - step_s / longest_s)
        if split.prefill:  # placement gives a worker that does both half of what another gets
            speed = min(speed, 0.5)
        busy = min(speed, work / (split.prefill + split.mixed * speed) * speed)
        slow = min(1.0 / (1.0 - busy), longest_s / step_s) if split.mixed and busy < 1.0 else 1.0
    return rows, split.prefill + split.mixed * speed


def _between(
    split: Split, costs: Costs, itl_s: float, rows: float, used: float, seats_max: float
) -> tuple[float, float]:
    """(share, stress) of the time between tokens."""
    if rows <= 0.0:
        return 1.0, 0.0
    least_s = 0.0
    if split.mixed:
        least_s = used * HASH_UNIT_TOKENS * costs.prefill_s
        least_s *= split.mixed / (split.mixed + split.decode)
    most = min((itl_s - least_s - costs.base_s) / costs.row_s, seats_max)
    stress = (costs.base_s + costs.row_s * rows + least_s) / itl_s
    if most < 1.0:
        return 0.0, stress
    return 0.5 * (1.0 + erf((most + 0.5 - rows) / sqrt(2.0 * rows))), stress


def _first(
    split: Split, demand: Demand, costs: Costs, ttft_s: float, used: float, capacity: float
) -> tuple[float, float]:
    """(share, stress) of the time to the first token."""
    servers = split.prefill + split.mixed
    one_s = demand.prompt_tokens * costs.prefill_s  # of one worker's whole time
    own_s = one_s * servers / capacity
    drained_s = max(0.0, 1.0 - used) * capacity * _HORIZON_S
    queue_s = max(0.0, demand.queued_tokens * costs.prefill_s - drained_s) / capacity
    rest = max(1.0 - used, _REST)
    overload = max(1.0, used) ** 2
    waits = min(used, 1.0) ** (sqrt(2.0 * (servers + 1)) - 1.0)
    mean_s = own_s + overload * waits * one_s / (2.0 * rest * capacity)
    slack_s = ttft_s - own_s - queue_s
    late = 1.0
    if slack_s > 0.0:
        late = waits * exp(-2.0 * rest * slack_s * capacity / one_s) if one_s > 0.0 else 0.0
    return (1.0 - late) / overload, mean_s / ttft_s
