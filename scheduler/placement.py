"""Where a row runs: on one worker, or prefill on one and decode on another, in one pool or two.

Owns no state. A dial of 100 means prefill only, 0 decode only but for short uncached prompts, which
are prefilled where they decode; in between, both. Invariant: equal inputs give equal choices; ties
go to the lower worker id.
"""

from dataclasses import dataclass

from diptych.engine.core.types import HASH_UNIT_TOKENS, BlockId
from diptych.scheduler.members import Pool, Worker


@dataclass(slots=True, frozen=True)
class Seats:
    """`decoder` None: `first` does both."""

    first: Worker
    decoder: Worker | None
    ttft_s: float  # estimate: until the prompt is computed
    score_s: float  # what placements are compared by


@dataclass(slots=True, frozen=True)
class PrefillSide:
    """Where the prompt is computed when that is not the pool in which it decodes."""

    pool: Pool
    found: list[BlockId]  # prefix-cache hit there
    num_new: int  # blocks to allocate there
    num_start: int  # blocks that are not computed: found there, or pulled from the other pool
    tail_tokens: int | None = None  # to be computed where it decodes, the head comes from here


@dataclass(slots=True, frozen=True)
class Placement:
    pool: Pool  # in which it decodes
    seats: Seats
    found: list[BlockId]  # prefix-cache hit, to be shared
    num_new: int  # blocks to allocate
    uncached_tokens: int  # to be computed by `seats.first`
    prefill: PrefillSide | None = None


class Placer:
    """Chooses seats in one pool. `ward` is a worker kept free for a suspect, or None; `stand_in`:
    nobody is left who decodes, so that any worker does."""

    def __init__(self, sequences_max: int, local_prefill_tokens: int) -> None:
        self.ward: Worker | None = None
        self.stand_in = False
        self._sequences_max = sequences_max
        self.local_prefill_tokens = local_prefill_tokens

    def seats(self, pool: Pool, uncached_tokens: int) -> Seats | None:
        """The cheapest seats now; None when every combination lacks a free one."""
        prefiller = decoder = mixed = None
        prefill_s = decode_s = mixed_s = 0.0
        for worker in pool.workers.values():
            if not self._has_seat(worker):
                continue
            ttft_s = (worker.backlog_tokens + uncached_tokens) * worker.cost.prefill_s
            load_s = (len(worker.assigned) + 1) * worker.cost.step_s
            if worker.dial >= 100:
                score_s = ttft_s + len(worker.assigned) * 1e-9
                if prefiller is None or (score_s, worker.id) < (prefill_s, prefiller.id):
                    prefiller, prefill_s = worker, score_s
            elif worker.dial <= 0:
                if decoder is None or (load_s, worker.id) < (decode_s, decoder.id):
                    decoder, decode_s = worker, load_s
            else:
                score_s = ttft_s * 100.0 / worker.dial + load_s
                if mixed is None or (score_s, worker.id) < (mixed_s, mixed.id):
                    mixed, mixed_s = worker, score_s
        best = None if mixed is None else Seats(mixed, None, mixed_s, mixed_s)
        split = self._split(prefiller, prefill_s, decoder, decode_s, mixed, uncached_tokens)
        if split is not None and (best is None or split.score_s < best.score_s):
            best = split
        return best

    def local(self, pool: Pool, uncached_tokens: int) -> Seats | None:
        """Everything on one worker that decodes, however long the prompt is."""
        best = self.decoder(pool)
        if best is None:
            return None
        return self.local_at(best, uncached_tokens)

    def local_at(self, worker: Worker, uncached_tokens: int, head_s: float = 0.0) -> Seats:
        """Prefill where it decodes. `head_s`: until the part that is computed elsewhere is here."""
        # It stalls every sequence there, and whoever comes next, for as long as it computes.
        stall_s = (worker.backlog_tokens + uncached_tokens) * worker.cost.prefill_s
        ttft_s = head_s + stall_s + self._beside_s(worker, uncached_tokens)
        load_s = (len(worker.assigned) + 1) * worker.cost.step_s
        score_s = ttft_s + stall_s * (1 + len(worker.assigned)) + load_s
        return Seats(worker, None, ttft_s, score_s)

    def _beside_s(self, worker: Worker, tokens: int) -> float:
        """The steps of its decodes, which a prompt on a decode worker shares a block at a time."""
        if not worker.assigned or worker.dial > 0:
            return 0.0
        return tokens / HASH_UNIT_TOKENS * worker.cost.step_s

    def across(
        self, prefiller: Worker, decoder: Worker, uncached_tokens: int, exposed_s: float
    ) -> Seats:
        """A pair in two pools. `exposed_s`: what the transfer adds for this one."""
        ttft_s = (prefiller.backlog_tokens + uncached_tokens) * prefiller.cost.prefill_s
        ttft_s *= 100.0 / prefiller.dial
        load_s = (len(decoder.assigned) + 1) * decoder.cost.step_s
        return Seats(prefiller, decoder, ttft_s, ttft_s + exposed_s + load_s)

    def prefiller(self, pool: Pool) -> Worker | None:
        """The worker of the pool that would have a prompt computed first."""
        workers = [w for w in pool.workers.values() if w.dial > 0 and self._has_seat(w)]
        return min(workers, key=_prefill_load, default=None)

    def reader(self, pool: Pool) -> Worker | None:
        """The worker of the pool that has the least to do: it only shows what is cached."""
        workers = [w for w in pool.workers.values() if self._has_seat(w)]
        return min(workers, key=lambda w: (len(w.assigned), w.id), default=None)

    def decoder(self, pool: Pool) -> Worker | None:
        """The worker of the pool with the shortest steps to come."""
        most = 101 if self.stand_in else 100
        workers = [w for w in pool.workers.values() if w.dial < most and self._has_seat(w)]
        return min(workers, key=_decode_load, default=None)

    def _has_seat(self, worker: Worker) -> bool:
        return (
            worker.serves and worker is not self.ward and len(worker.assigned) < self._sequences_max
        )

    def _split(
        self,
        prefiller: Worker | None,
        prefill_s: float,
        decoder: Worker | None,
        decode_s: float,
        mixed: Worker | None,
        uncached_tokens: int,
    ) -> Seats | None:
        """A pair of specialists (or one and a mixed worker), or a short prompt at its decoder."""
        if decoder is not None and uncached_tokens <= self.local_prefill_tokens:
            # It delays every sequence of that worker once; less than a step is not felt.
            stall_s = uncached_tokens * decoder.cost.prefill_s
            if prefiller is None or stall_s <= decoder.cost.step_s + prefill_s:
                return Seats(decoder, None, stall_s, stall_s + decode_s)
        if prefiller is not None and decoder is not None:
            pair = Seats(prefiller, decoder, prefill_s, prefill_s + decode_s)
            local = self.local_at(decoder, uncached_tokens)
            return local if local.score_s < pair.score_s else pair
        if mixed is None or (prefiller is None) == (decoder is None):
            return None
        load_s = (len(mixed.assigned) + 1) * mixed.cost.step_s
        if prefiller is not None:
            return Seats(prefiller, mixed, prefill_s, prefill_s + load_s)
        assert decoder is not None
        ttft_s = (mixed.backlog_tokens + uncached_tokens) * mixed.cost.prefill_s
        return Seats(mixed, decoder, ttft_s, ttft_s * 100.0 / mixed.dial + decode_s)


def _prefill_load(worker: Worker) -> tuple[float, int, int]:
    wait_s = worker.backlog_tokens * worker.cost.prefill_s * 100.0 / worker.dial
    return wait_s, len(worker.assigned), worker.id


def _decode_load(worker: Worker) -> tuple[float, int]:
    return (len(worker.assigned) + 1) * worker.cost.step_s, worker.id
