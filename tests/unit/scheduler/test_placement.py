"""Seats by dial, load and cost."""

from collections.abc import Sequence

from diptych.engine.core.messages import Address
from diptych.scheduler.ledger import PoolLedger
from diptych.scheduler.members import Pool, Worker
from diptych.scheduler.placement import Placer


def make_pool(dials: Sequence[int]) -> Pool:
    pool = Pool(0, PoolLedger(8))
    for number, dial in enumerate(dials):
        worker = Worker(number, 1, 0, dial, Address("worker", number, 1), joined=True)
        pool.workers[number] = worker
    return pool


def seats(pool: Pool, uncached: int, cap: int = 8, ward: int | None = None) -> object:
    placer = Placer(cap, 32)
    placer.ward = None if ward is None else pool.workers[ward]
    chosen = placer.seats(pool, uncached)
    if chosen is None:
        return None
    return (chosen.first.id, None if chosen.decoder is None else chosen.decoder.id)


def occupy(pool: Pool, worker: int, count: int) -> None:
    for i in range(count):
        pool.workers[worker].assigned[f"{worker}-{i}", 0] = None  # type: ignore[assignment]


def test_prefill_on_one_and_decode_on_another() -> None:
    assert seats(make_pool([100, 0]), 500) == (0, 1)


def test_a_short_prompt_is_prefilled_where_it_decodes() -> None:
    pool = make_pool([100, 0])
    assert seats(pool, 32) == (1, None)
    assert seats(pool, 33) == (0, 1)


def test_not_if_it_would_stall_the_decodes_and_the_prefill_side_is_free() -> None:
    pool = make_pool([100, 0])
    pool.workers[1].cost.prefill_s = 0.01  # 0.3 s for 30 tokens, against steps of 5 ms
    assert seats(pool, 30) == (0, 1)
    pool.workers[0].backlog_tokens = 100_000
    assert seats(pool, 30) == (1, None)


def test_a_mixed_worker_does_both() -> None:
    assert seats(make_pool([50, 50]), 500) == (0, None)


def test_least_prefill_backlog_and_fewest_sequences() -> None:
    pool = make_pool([100, 100, 0, 0])
    pool.workers[0].backlog_tokens = 100
    occupy(pool, 2, 1)
    assert seats(pool, 500) == (1, 3)


def test_ties_go_to_the_lower_id() -> None:
    assert seats(make_pool([100, 100, 0, 0]), 500) == (0, 2)


def test_full_workers_and_the_ward_are_not_chosen() -> None:
    pool = make_pool([100, 0, 0])
    occupy(pool, 1, 2)
    assert seats(pool, 500, cap=2) == (0, 2)
    assert seats(pool, 500, cap=2, ward=2) is None
    pool.workers[0].joined = False
    assert seats(pool, 500) is None
    assert seats(pool, 16) == (2, None)


def test_a_mixed_worker_completes_a_pair() -> None:
    assert seats(make_pool([100, 50]), 500) in ((0, 1), (1, None))
    pool = make_pool([0, 50])
    occupy(pool, 1, 4)
    assert seats(pool, 500) == (1, 0)


def test_a_long_queue_makes_a_prompt_stay_where_it_decodes() -> None:
    pool = make_pool([100, 0])
    pool.workers[0].backlog_tokens = 10_000
    assert seats(pool, 500) == (1, None)
    occupy(pool, 1, 30)  # but not if it would stall so many
    assert seats(pool, 500, cap=64) == (0, 1)
