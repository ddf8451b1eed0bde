"""Who counts as living: epochs of API servers and workers, and when a pool is quiet."""

import pytest

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import PoolUp, WorkerUp
from diptych.scheduler.members import Members, PoolPhase


def test_api_epochs_only_rise() -> None:
    members = Members(16)
    assert members.api_up(0, 2)
    assert not members.api_up(0, 2)
    assert not members.api_up(0, 1)
    assert members.is_api(0, 2)
    assert members.api_up(0, 3)
    assert not members.is_api(0, 2)


def test_the_end_of_an_api_server_is_final() -> None:
    members = Members(16)
    members.api_up(0, 2)
    assert not members.api_down(0, 1), "an older incarnation"
    assert members.api_down(0, 2)
    assert not members.api_down(0, 2)
    assert not members.api_up(0, 2), "its messages may still come in"
    assert members.api_up(0, 3)


def test_an_api_server_that_ended_before_it_was_heard_of() -> None:
    members = Members(16)
    assert not members.api_down(0, 4)
    assert not members.api_up(0, 4)


def test_worker_epochs_only_rise() -> None:
    members = Members(16)
    worker = members.worker_up(WorkerUp(3, 5, 0, 50))
    assert members.worker(3, 5) is worker
    assert members.worker(3, 4) is None
    members.worker_down(worker)
    assert members.worker(3, 5) is None
    assert not members.is_new_worker(WorkerUp(3, 5, 0, 50))
    assert members.is_new_worker(WorkerUp(3, 6, 0, 50))


def test_workers_may_come_before_their_pool() -> None:
    members = Members(16)
    first = members.worker_up(WorkerUp(0, 1, 7, 100))
    members.worker_up(WorkerUp(1, 1, 8, 0))
    pool = members.pool_up(PoolUp(7, 4, 16))
    assert pool is not None
    assert list(pool.workers) == [0]
    assert members.pool_up(PoolUp(7, 4, 16)) is None
    late = members.worker_up(WorkerUp(2, 1, 7, 0))
    assert list(pool.workers) == [0, 2]
    members.check_integrity()
    first.joined = True
    assert not members.is_quiet(pool)
    late.joined = True
    assert members.is_quiet(pool)


def test_an_empty_pool_is_not_quiet() -> None:
    members = Members(16)
    pool = members.pool_up(PoolUp(0, 4, 16))
    assert pool is not None
    assert not members.is_quiet(pool)


def test_ready_needs_a_pool_and_both_kinds_of_work() -> None:
    members = Members(16)
    pool = members.pool_up(PoolUp(0, 4, 16))
    assert pool is not None
    prefill = members.worker_up(WorkerUp(0, 1, 0, 100))
    decode = members.worker_up(WorkerUp(1, 1, 0, 0))
    prefill.joined = True
    pool.phase = PoolPhase.USABLE
    assert not members.is_ready()
    decode.joined = True
    assert members.is_ready()
    members.pool_up(PoolUp(1, 4, 16))  # of a host that joins: it takes nothing away
    assert members.is_ready()


def test_whoever_is_left_does_everything_once_hosts_are_lost() -> None:
    members = Members(16)
    pools = [members.pool_up(PoolUp(i, 4, 16)) for i in (0, 1)]
    prefill = members.worker_up(WorkerUp(0, 1, 0, 100))
    decode = members.worker_up(WorkerUp(1, 1, 1, 0))
    for pool, worker in zip(pools, (prefill, decode), strict=True):
        assert pool is not None
        worker.joined, pool.phase = True, PoolPhase.USABLE
    assert members.is_ready()
    members.worker_down(decode)
    assert not members.must_stand_in()  # it will be started again
    assert not members.is_ready()
    assert pools[1] is not None
    members.pool_down(pools[1])
    assert members.must_stand_in()
    assert members.is_ready()
    members.sweep()
    assert list(members.pools) == [0]
    assert members.must_stand_in()


def test_a_new_scheduler_hears_that_hosts_are_lost() -> None:
    """It never saw them, and must not wait for those that decoded there."""
    for apart in (False, True):
        members = Members(16)
        pool = members.pool_up(PoolUp(0, 4, 16, apart))
        assert pool is not None
        worker = members.worker_up(WorkerUp(0, 1, 0, 100))
        worker.joined, pool.phase = True, PoolPhase.USABLE
        assert members.must_stand_in() == members.is_ready() == apart


def test_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="32 tokens"):
        Members(16).pool_up(PoolUp(0, 4, 32))
