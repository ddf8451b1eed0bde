"""Which workers move between prefill and decode: one message each, no drain, no flush. Pure.

Owns the choice of the split and its hysteresis. Candidates are compared by the share of requests
that each is expected to serve within the targets (`forecast.py`), all workers doing both among
them. Invariants: as long as anybody serves, somebody prefills and somebody decodes; a split is
left only for one that promises more by `GAIN`, and within `TURN_PERIODS` of a move by `URGENT`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from diptych.scheduler.demand import Scenarios
from diptych.scheduler.forecast import PACED, Costs, Demand, Split, forecast
from diptych.scheduler.members import Worker

HALF: Final = 50
"""The dial of a worker that does both."""
GAIN: Final = 0.02
"""Of the score, that is about two in a hundred requests more within their targets."""
URGENT: Final = 0.2
TURN_PERIODS: Final = 3
PATIENCE: Final = 3
"""Looks in a row at which fewer workers that do both must promise more: those suit any turn of the
load at once, the others only the one that was seen."""
UNKNOWN: Final = (0.15, 0.3)
"""Weight of each load that was not seen and could come, beside what is asked now: while the load is
steady, and where it turned lately."""
RARE: Final = 0.05
"""Of the most requests per second: where fewer come, they count for so many."""
GRID: Final = 8
"""Up to so many workers every split is looked at; of more, a grid and this one's neighbours."""


@dataclass(slots=True, frozen=True)
class Move:
    worker: Worker
    dial: int


class DialController:
    """`decide` once per period, `repair` whenever somebody came or went."""

    def __init__(self, slo_s: tuple[float, float], seats_max: int) -> None:
        self._slo_s = slo_s
        self._seats_max = seats_max
        self._since_move = TURN_PERIODS
        self._apart = 0  # looks in a row that wanted fewer workers to do both

    def decide(
        self,
        workers: list[Worker],
        scenarios: Scenarios,
        costs: Costs | None,
        turned: bool = False,
    ) -> list[Move]:
        """`workers`: those that take new rows. `turned`: the load is not one that stays."""
        self._since_move += 1
        if len(workers) < 2 or costs is None or all(demand.none for _, demand in scenarios):
            return []
        here = split_of(workers)
        if not here.covers:
            return []  # `repair` comes first
        unknown = UNKNOWN[turned]
        scenarios = scenarios + self._unknown(len(workers), scenarios[0][1], costs, unknown)
        scores = {split: self._score(split, scenarios, costs) for split in candidates(here)}
        best = max(scores, key=scores.__getitem__)
        if not self._worth(scores[best] - scores[here], best.mixed - here.mixed):
            return []
        self._since_move = 0
        return moves_to(best, workers)

    def _unknown(self, count: int, now: Demand, costs: Costs, weight: float) -> Scenarios:
        """What nobody has asked for yet: half of what all can do, of prompts alone, of answers
        alone."""
        work = 0.5 * count
        step_s = min(PACED * self._slo_s[1], 2.0 * costs.base_s)
        rows = max(0.0, (step_s - costs.base_s) / costs.row_s)
        prefill, decode = work / costs.prefill_s, work * min(rows, self._seats_max) / step_s
        return [
            (weight, Demand(prefill, now.prompt_tokens, 0.0, 0.0, now.requests_s)),
            (weight, Demand(0.0, now.prompt_tokens, 0.0, decode, now.requests_s)),
        ]

    def _worth(self, gain: float, mixed_more: int) -> bool:
        """Whether a better split is so much better, and has been for long enough."""
        least = URGENT if self._since_move <= TURN_PERIODS else GAIN
        apart = gain >= least and mixed_more < 0
        self._apart = self._apart + 1 if apart else 0
        patience = PATIENCE - 1 if gain >= URGENT else PATIENCE
        return gain >= least and (not apart or self._apart >= patience)

    def _score(self, split: Split, scenarios: Scenarios, costs: Costs) -> float:
        """The share of all requests that meet their targets: a load counts by how many it has."""
        least = RARE * max(demand.requests_s for _, demand in scenarios) or 1.0
        weights = [weight * max(demand.requests_s, least) for weight, demand in scenarios]
        total = sum(
            weight * forecast(split, demand, costs, self._slo_s, self._seats_max).score
            for weight, (_, demand) in zip(weights, scenarios, strict=True)
        )
        return total / sum(weights)


def split_of(workers: list[Worker]) -> Split:
    prefill = sum(worker.dial >= 100 for worker in workers)
    decode = sum(worker.dial <= 0 for worker in workers)
    return Split(prefill, len(workers) - prefill - decode, decode)


def candidates(here: Split) -> Iterator[Split]:
    """Splits of as many workers that cover both roles, `here` first: it wins a draw."""
    count = here.prefill + here.mixed + here.decode
    yield here
    stride = -(-count // GRID)
    for prefill in range(0, count + 1, stride):
        for decode in range(0, count + 1 - prefill, stride):
            yield from _covering(count, prefill, decode)
    if stride == 1:
        return
    for prefill in range(here.prefill - 2, here.prefill + 3):
        for decode in range(here.decode - 2, here.decode + 3):
            yield from _covering(count, prefill, decode)


def _covering(count: int, prefill: int, decode: int) -> Iterator[Split]:
    split = Split(prefill, count - prefill - decode, decode)
    if min(prefill, split.mixed, decode) >= 0 and split.covers:
        yield split


def moves_to(split: Split, workers: list[Worker]) -> list[Move]:
    """As few and as short moves as the split needs: the order of dials stays; of equals, those
    with more prompts to compute and fewer rows are nearer to prefill."""
    order = sorted(workers, key=lambda w: (-w.dial, -w.backlog_tokens, len(w.assigned), w.id))
    moves = []
    for index, worker in enumerate(order):
        if index < split.prefill:
            dial = 100
        elif index >= len(order) - split.decode:
            dial = 0
        else:
            dial = worker.dial if 0 < worker.dial < 100 else HALF
        if dial != worker.dial:
            moves.append(Move(worker, dial))
    return moves


def repair(workers: list[Worker]) -> list[Move]:
    """Nobody prefills, or nobody decodes: the least busy worker does both from now."""
    if not workers or covers([worker.dial for worker in workers]):
        return []
    return [Move(min(workers, key=lambda w: (w.backlog_tokens, len(w.assigned), w.id)), HALF)]


def covers(dials: Iterable[int]) -> bool:
    """Somebody prefills and somebody decodes."""
    known = list(dials)
    return any(dial > 0 for dial in known) and any(dial < 100 for dial in known)
