"""Which workers move between prefill and decode: one message each, no drain, no flush. Pure.

Owns the hysteresis of the moves. Invariants: as long as anybody serves, somebody prefills and
somebody decodes; a worker moves half a step (50 of 100) at a time, so that it does both while it
changes sides; after a move one way no move goes the other way for `TURN_PERIODS`, unless urgent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from diptych.scheduler.load import Load
from diptych.scheduler.members import Worker

HALF: Final = 50
ACTS_AT: Final = 0.8
"""Pressure below which nothing moves for a target's sake: it is met."""
GAIN: Final = 0.9
"""A move must bring the worst pressure below this share of what it is."""
CALM_AT: Final = 0.4
CALM_PERIODS: Final = 10
"""So many quiet periods, and workers go back to the roles that they were started in."""
TURN_PERIODS: Final = 3
URGENT: Final = 2.0
"""Pressure above which two half steps, or those of a quarter of the workers, are taken at once, and
a move may be turned back after one period."""


@dataclass(slots=True, frozen=True)
class Move:
    worker: Worker
    dial: int


class DialController:
    """`decide` once per period, `repair` whenever somebody came or went."""

    def __init__(self) -> None:
        self._direction = 0  # of the last move: +1 to prefill, -1 to decode
        self._since_move = TURN_PERIODS
        self._calm = 0

    def decide(self, workers: list[Worker], load: Load) -> list[Move]:
        """`workers`: those that take new rows."""
        self._since_move += 1
        self._calm = self._calm + 1 if load.worst < CALM_AT else 0
        if len(workers) < 2:
            return []
        if load.worst < ACTS_AT:
            return self._home(workers, load) if self._calm >= CALM_PERIODS else []
        direction = 1 if load.prefill > load.decode else -1
        urgent = load.worst >= URGENT
        turns = direction == -self._direction
        if turns and self._since_move <= (1 if urgent else TURN_PERIODS):
            return []
        moves: list[Move] = []
        dials = {worker.id: worker.dial for worker in workers}
        for _ in range(max(2, len(workers) // 4) if urgent else 1):
            shift = direction * HALF / 100.0 * (len(moves) + 1)
            if load.after(shift, -shift) > GAIN * load.worst:
                break
            move = _next(workers, dials, direction)
            if move is None:
                break
            dials[move.worker.id] = move.dial
            moves.append(move)
        if moves:
            self._direction, self._since_move = direction, 0
        return moves

    def _home(self, workers: list[Worker], load: Load) -> list[Move]:
        """One worker half a step back to its first role, if that leaves the targets met."""
        for worker in workers:
            towards = (worker.home_dial > worker.dial) - (worker.home_dial < worker.dial)
            shift = towards * HALF / 100.0
            if not towards or load.after(shift, -shift) >= CALM_AT:
                continue
            dial = worker.dial + towards * min(HALF, abs(worker.home_dial - worker.dial))
            dials = {other.id: other.dial for other in workers} | {worker.id: dial}
            if covers(dials.values()):
                return [Move(worker, dial)]
        return []


def repair(workers: list[Worker]) -> list[Move]:
    """Nobody prefills, or nobody decodes: the least busy worker does both from now."""
    if not workers or covers([worker.dial for worker in workers]):
        return []
    return [Move(min(workers, key=lambda w: (w.backlog_tokens, len(w.assigned), w.id)), HALF)]


def _next(workers: list[Worker], dials: dict[int, int], direction: int) -> Move | None:
    """The cheapest half step: a worker that does both already, else the least busy one."""

    def order(worker: Worker) -> tuple[bool, int, int, int]:
        whole = dials[worker.id] in (0, 100)
        queue = worker.backlog_tokens if direction < 0 else 0
        return whole, queue, len(worker.assigned), worker.id

    for worker in sorted(workers, key=order):
        dial = min(100, max(0, dials[worker.id] + direction * HALF))
        if dial != dials[worker.id] and covers((dials | {worker.id: dial}).values()):
            return Move(worker, dial)
    return None


def covers(dials: Iterable[int]) -> bool:
    """Somebody prefills and somebody decodes."""
    known = list(dials)
    return any(dial > 0 for dial in known) and any(dial < 100 for dial in known)
