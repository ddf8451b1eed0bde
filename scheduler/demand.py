"""What is asked of all workers together, now and lately: what roles are chosen for. Pure.

Owns the averages, and samples of what they were: roles that suit what is asked now should suit
what comes back, too. Invariant: after `NUM_SAMPLES * SAMPLE_PERIODS` looks a demand is forgotten.
"""

from collections import deque
from math import sqrt
from typing import Final

from diptych.scheduler.forecast import Costs, Demand
from diptych.scheduler.members import Members, Worker
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.runs import RunCounts

_WEIGHT: Final = 0.5  # of the newest look ...
_TURN: Final = 0.8  # ... where the load turns
_ACCIDENT: Final = 3.0  # standard deviations of a count
_NOTHING: Final = 1e-3  # tokens per second
SAMPLE_PERIODS: Final = 4
NUM_SAMPLES: Final = 8
LATELY: Final = 0.5
"""Weight of all samples together, beside what is asked now."""

Scenarios = list[tuple[float, Demand]]
"""(weight, demand)."""


class DemandMeter:
    """`look` once per period; the counters of the workers start again with it."""

    def __init__(self) -> None:
        self._prefill = self._decode = 0.0  # tokens per second
        self._looks = 0
        self._samples: deque[Demand] = deque(maxlen=NUM_SAMPLES)
        self._prompt = 0.0  # tokens
        self._waiting = 0  # tokens in the room at the last look
        self._rows_s = 0.0  # that came, per second
        self._turned_at: int | None = None  # look
        self._seen = (0, 0)  # rows placed or in the room, rows finished
        self._answers = (0.0, 0.0)  # tokens decoded, rows that began or ended: the mean

    @property
    def turned(self) -> bool:
        """The load turned within the time that samples are kept for."""
        kept = NUM_SAMPLES * SAMPLE_PERIODS
        return self._turned_at is not None and self._looks - self._turned_at <= kept

    def look(
        self,
        members: Members,
        room: WaitingRoom,
        counts: RunCounts,
        elapsed_s: float,
        lacks_room: bool,
    ) -> Scenarios:
        """`lacks_room`: what waits only lacks a place to decode."""
        workers = list(members.workers.values())
        placed = sum(worker.placed_tokens for worker in workers)
        squares = sum(worker.placed_squares for worker in workers)
        decoded = float(sum(worker.decoded_tokens for worker in workers))
        rows = sum(len(worker.assigned) for worker in workers)
        for worker in workers:
            worker.placed_tokens = worker.placed_squares = worker.decoded_tokens = 0
        arrived = max(0, placed + room.num_tokens - self._waiting)
        self._waiting = room.num_tokens
        came, finished = self._count(counts, room.num_rows)
        weight = _WEIGHT
        if self._turns(came, elapsed_s):
            weight, self._turned_at = _TURN, self._looks
        if lacks_room and rows:
            decoded *= 1.0 + room.num_rows / rows
        if placed or room.num_rows:
            prompt = squares / placed if placed else room.num_tokens / room.num_rows
            self._prompt = _blend(self._prompt, prompt, weight) if self._prompt else prompt
        self._rows_s = _blend(self._rows_s, came / elapsed_s, weight)
        self._prefill = _blend(self._prefill, arrived / elapsed_s, weight)
        self._decode = _blend(self._decode, decoded / elapsed_s, weight)
        tokens, ended = self._answers
        self._answers = tokens, ended = (
            _blend(tokens, decoded, weight),
            _blend(ended, 0.5 * (came + finished), weight),
        )
        # What was decoded lags behind what is asked, and is never more than the workers can do.
        asked = self._rows_s * tokens / ended if ended else 0.0
        queued = sum(worker.backlog_tokens for worker in workers) + room.num_tokens
        decode = max(self._decode, asked)
        now = Demand(self._prefill, self._prompt, float(queued), decode, self._rows_s)
        scenarios = [(1.0, now)]
        scenarios += [(LATELY / len(self._samples), sample) for sample in self._samples]
        self._looks += 1
        if self._looks % SAMPLE_PERIODS == 0 and not now.none:
            self._samples.append(now)
        return scenarios

    def _count(self, counts: RunCounts, num_waiting: int) -> tuple[int, int]:
        """(rows that came, rows that finished) since the last look."""
        seen, finished = counts.placed + num_waiting, counts.finished
        came = max(0, seen - self._seen[0])
        done = finished - self._seen[1]
        self._seen = seen, finished
        return came, done

    def _turns(self, came: int, elapsed_s: float) -> bool:
        """So many more, or fewer, came than lately that it is no accident."""
        expected = self._rows_s * elapsed_s
        return abs(came - expected) > _ACCIDENT * sqrt(max(came, expected, 1.0))


def costs_of(workers: list[Worker]) -> Costs | None:
    """The mean of the workers'; None while none has shown any."""
    known = [worker.cost for worker in workers if any(worker.cost.known)]
    if not known:
        return None
    return Costs(
        sum(cost.prefill_s for cost in known) / len(known),
        sum(cost.base_s for cost in known) / len(known),
        sum(cost.row_s for cost in known) / len(known),
    )


def _blend(old: float, new: float, weight: float) -> float:
    value = old + (new - old) * weight
    return value if value > _NOTHING else 0.0
