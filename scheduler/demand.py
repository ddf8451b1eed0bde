"""What is asked of all workers together, now and lately: what roles are chosen for. Pure.

Owns the averages, and samples of what they were: roles that suit what is asked now should suit
what comes back, too. Invariant: after `NUM_SAMPLES * SAMPLE_PERIODS` looks a demand is forgotten.
"""

from collections import deque
from typing import Final

from diptych.scheduler.forecast import Costs, Demand
from diptych.scheduler.members import Members, Worker
from diptych.scheduler.queue import WaitingRoom

_WEIGHT: Final = 0.5  # of the newest look
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

    def look(
        self, members: Members, room: WaitingRoom, elapsed_s: float, lacks_room: bool
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
        if lacks_room and rows:
            decoded *= 1.0 + room.num_rows / rows
        if placed or room.num_rows:
            prompt = squares / placed if placed else room.num_tokens / room.num_rows
            self._prompt = _blend(self._prompt, prompt) if self._prompt else prompt
        self._prefill = _blend(self._prefill, arrived / elapsed_s)
        self._decode = _blend(self._decode, decoded / elapsed_s)
        queued = sum(worker.backlog_tokens for worker in workers) + room.num_tokens
        now = Demand(self._prefill, self._prompt, float(queued), self._decode)
        scenarios = [(1.0, now)]
        scenarios += [(LATELY / len(self._samples), sample) for sample in self._samples]
        self._looks += 1
        if self._looks % SAMPLE_PERIODS == 0 and not now.none:
            self._samples.append(now)
        return scenarios


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


def _blend(old: float, new: float) -> float:
    value = old + (new - old) * _WEIGHT
    return value if value > _NOTHING else 0.0
