"""Workers and pools: the handshake, losses, faults and suspects."""

import msgspec
import pytest

from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import (
    ApiUp,
    Failed,
    Join,
    Joined,
    Lost,
    PoolUp,
    Progress,
    Stats,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import STEP_SIZES, DownCause, LossCause, Role, step_size
from diptych.scheduler.commands import PoolRead
from diptych.scheduler.lifecycle import RowState
from diptych.scheduler.scheduler import Scheduler
from tests.unit.scheduler.world import EPOCH, SIZE, World, make_request, page_entries

LONG = list(range(100))
OTHER = list(range(500, 600))


def ref(name: str, choice: int = 0, attempt: int = 0) -> SeqRef:
    return SeqRef(name, choice, attempt)


# ---- pools -------------------------------------------------------------------------------------


def test_a_pool_is_read_once_every_known_worker_joined() -> None:
    world = World(up=False)
    world.auto_read = False
    world.step(ApiUp(0, 1))
    world.worker_up(0, 100, join=False)
    assert world.of(Join) == [Join(EPOCH, 1, 100)]
    world.worker_up(1, 0, join=False)
    world.step(PoolUp(0, 64, SIZE))
    world.joined(0)
    assert not world.reads
    world.joined(1)
    assert world.reads == [0]
    world.submit(make_request("a", LONG))
    assert world.state("a") is RowState.QUEUED
    entries = page_entries(LONG, [9, 8, 7])
    generations = list(range(100, 164))
    world.step(PoolRead(0, generations, entries))
    [(_, decode), (_, prefill)] = world.assigns()
    assert decode.num_computed == prefill.num_computed == 48
    assert prefill.block_table[:3] == [9, 8, 7]
    assert prefill.generations[:3] == [109, 108, 107]
    assert prefill.generations[3:] == [generations[b] + 1 for b in prefill.block_table[3:]]


def test_a_worker_that_goes_down_instead_of_joining_does_not_hold_the_pool_up() -> None:
    world = World(up=False)
    world.worker_up(0, 50, join=False)
    world.worker_up(1, 50, join=False)
    world.step(PoolUp(0, 64, SIZE))
    world.joined(0)
    world.down(1)
    assert world.reads == [0]


def test_stale_joins_and_progress_are_ignored() -> None:
    world = World(up=False)
    world.worker_up(0, 50, join=False)
    world.step(PoolUp(0, 64, SIZE))
    world.step(Joined(EPOCH - 1, 0, 1))
    world.step(Joined(EPOCH, 0, 2))
    assert not world.reads
    world.step(Progress(EPOCH, 0, 1, 1, 1.0, 1, 1, [], [], [], [], []))
    world.joined(0)
    assert world.reads == [0]


def test_a_pool_of_another_block_size_is_refused() -> None:
    scheduler = Scheduler(1, SchedulerOptions(), CacheOptions())
    with pytest.raises(ConfigError, match="32 tokens"):
        scheduler.step([PoolUp(0, 8, 32)], 0.0)


def test_a_worker_announced_again_is_asked_again_until_it_joined() -> None:
    world = World(up=False)
    world.worker_up(0, 50, join=False)
    world.step(WorkerUp(0, 1, 0, 50))
    assert world.of(Join)
    world.joined(0)
    world.step(WorkerUp(0, 1, 0, 50))
    assert not world.of(Join)


def test_two_pools_are_used_apart() -> None:
    world = World((50,))
    world.held[1], world.epochs[1] = {}, 1
    world.step(WorkerUp(1, 1, 1, 50), PoolUp(1, 64, SIZE), Joined(EPOCH, 1, 1))
    assert world.reads == [0, 1]
    world.submit(make_request("a", LONG))
    world.submit(make_request("b", OTHER))
    rows = world.scheduler.audit().rows
    assert [(row.pool, row.holds) for row in rows] == [(0, [0]), (1, [1])]


def test_a_seat_limit_per_worker() -> None:
    world = World((100, 0), options=SchedulerOptions(max_num_seqs=1))
    world.submit(make_request("a", LONG))
    world.submit(make_request("b", OTHER))
    world.prefill_done(0, ref("a"))
    assert world.state("b") is RowState.QUEUED, "the decode side is full"
    world.progress(1, finished=[ref("a")])
    assert world.state("b") is RowState.RUNNING


# ---- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 1])
def test_a_lost_side_takes_the_other_one_back_before_blocks_are_free(dead: int) -> None:
    world = World()
    world.submit(make_request("a", LONG))
    world.down(dead)
    assert world.revoked() == [1 - dead]
    assert not world.heard(Lost)
    assert world.scheduler.audit().pools[0].private == 8
    world.progress(1 - dead, released=[ref("a")])
    [lost] = world.heard(Lost)
    assert isinstance(lost, Lost)
    assert (lost.ref, lost.cause) == (ref("a"), LossCause.WORKER)
    assert world.scheduler.audit().pools[0].free == 64


def test_what_was_committed_survives_the_worker() -> None:
    world = World((50,))
    request = make_request("a", LONG)
    world.submit(request)
    world.progress(0, committed=world.full(0, ref("a"), 5))
    world.down(0)
    assert world.heard(Lost)
    world.worker_up(0, 50)
    world.submit(request, attempt=1, recovering=True)
    [(_, assign)] = world.assigns()
    assert assign.num_computed == 80


def test_a_decoding_row_does_not_need_its_prefill_side() -> None:
    world = World()
    world.submit(make_request("a", LONG, max_tokens=100))
    world.prefill_done(0, ref("a"))
    world.held[1][ref("a")].committed = 6
    world.progress(1, committed=world.full(1, ref("a"), 7))
    world.down(0)
    assert world.state("a") is RowState.RUNNING


def test_a_seal_that_may_be_lost_with_its_sender_is_a_loss() -> None:
    world = World()
    world.submit(make_request("a", LONG))
    world.prefill_done(0, ref("a"))
    world.down(0)
    assert world.revoked() == [1]
    world.progress(1, released=[ref("a")])
    assert world.state("a") is RowState.LOST


def test_tokens_of_an_ended_row_may_be_lost_with_its_worker() -> None:
    world = World((50,))
    for name, prompt in (("open", LONG), ("closed", OTHER)):
        world.submit(make_request(name, prompt))
        world.progress(0, finished=[ref(name)])
    world.close("closed")
    world.down(0)
    assert [m.ref for m in world.heard(Lost) if isinstance(m, Lost)] == [ref("open")]
    world.worker_up(0, 50)
    world.submit(make_request("open", LONG), attempt=1, recovering=True)
    assert world.state("open") is RowState.RUNNING


def test_a_restarted_worker_is_used_again_and_old_news_of_it_is_ignored() -> None:
    world = World((50,))
    world.submit(make_request("a", LONG))
    world.down(0)
    world.worker_up(0, 50)
    world.submit(make_request("a", LONG), attempt=1, recovering=True)
    world.step(WorkerDown(0, 1, DownCause.KILLED))
    world.step(Progress(EPOCH, 0, 1, 1, 1.0, 1, 1, [], [], [ref("a", 0, 1)], [], []))
    assert world.state("a") is RowState.RUNNING


def test_a_worker_up_of_a_newer_epoch_ends_the_older_one() -> None:
    world = World((50,))
    world.submit(make_request("a", LONG))
    world.worker_up(0, 50)
    assert world.state("a") is RowState.LOST


def test_an_unasked_release_is_a_loss() -> None:
    world = World()
    world.submit(make_request("a", LONG))
    world.progress(1, released=[ref("a")])
    assert world.revoked() == [0]
    world.progress(0, released=[ref("a")])
    assert world.state("a") is RowState.LOST


def test_abort_of_a_lost_row() -> None:
    world = World((50,))
    world.submit(make_request("a", LONG))
    world.down(0)
    world.abort("a")
    assert world.state("a") is RowState.DONE
    world.close("a")
    world.at_rest()


# ---- faults ------------------------------------------------------------------------------------


def test_only_a_fault_makes_suspects() -> None:
    for cause, faults in ((DownCause.FAULT, 1), (DownCause.KILLED, 0), (DownCause.HUNG, 0)):
        world = World((50,))
        world.submit(make_request("a", LONG))
        world.down(0, cause)
        assert [row.faults for row in world.scheduler.audit().rows] == [faults]
        [lost] = world.heard(Lost)
        assert isinstance(lost, Lost)
        assert lost.cause is (LossCause.FAULT if faults else LossCause.WORKER)


def test_suspects_run_alone_one_after_the_other() -> None:
    world = World((50,))
    requests = [make_request("a", LONG, rank=1), make_request("b", OTHER, rank=2)]
    for request in requests:
        world.submit(request)
    world.down(0, DownCause.FAULT)
    for request in requests:
        world.submit(request, attempt=1, recovering=True)
    world.worker_up(0, 50)
    world.submit(make_request("c", list(range(900, 990)), rank=0))
    running = [r.key[0] for r in world.scheduler.audit().rows if r.state is RowState.RUNNING]
    assert running == ["a"]
    world.progress(0, finished=[ref("a", 0, 1)])
    assert world.state("b") is RowState.RUNNING
    assert world.state("c") is RowState.QUEUED
    world.progress(0, finished=[ref("b", 0, 1)])
    assert world.state("c") is RowState.RUNNING
    assert [row.faults for row in world.scheduler.audit().rows] == [0, 0, 0]


def test_a_row_that_crashes_a_worker_while_alone_fails_with_its_id() -> None:
    world = World((50,))
    poison, innocent = make_request("poison", LONG), make_request("good", OTHER, rank=9)
    world.submit(poison)
    world.submit(innocent)
    for attempt in (1, 2):
        world.down(0, DownCause.FAULT)
        world.worker_up(0, 50)
        if attempt == 1:
            world.submit(poison, attempt=1, recovering=True)
            world.submit(innocent, attempt=1, recovering=True)
    [failed] = world.heard(Failed)
    assert isinstance(failed, Failed)
    assert failed.ref == ref("poison", 0, 1)
    assert "poison" in failed.reason
    assert world.state("poison") is RowState.DONE
    assert world.state("good") is RowState.RUNNING
    world.close("poison")


def test_a_suspect_empties_one_worker_and_the_others_go_on() -> None:
    world = World((50, 50, 50), caching=False)
    for i in range(3):
        world.submit(make_request(f"r{i}", LONG))  # one on each
    world.down(0, DownCause.FAULT)
    world.submit(make_request("r0", LONG), attempt=1, recovering=True)
    assert world.state("r0") is RowState.QUEUED, "worker 1 is to be emptied first"
    world.submit(make_request("more", OTHER))
    assert [worker for worker, _ in world.assigns()] == [2]
    world.progress(1, finished=[ref("r1")])
    assert [(w, a.ref.request, a.role) for w, a in world.assigns()] == [(1, "r0", Role.LOCAL)]
    world.submit(make_request("other", OTHER))
    assert [worker for worker, _ in world.assigns()] == [2]
    world.progress(1, finished=[ref("r0", 0, 1)])
    world.submit(make_request("last", OTHER))
    assert [worker for worker, _ in world.assigns()] == [1]


def test_a_restarted_worker_takes_the_suspect_at_once() -> None:
    world = World((50, 50))
    world.submit(make_request("a", LONG))  # worker 0
    world.submit(make_request("b", OTHER))  # worker 1
    world.down(0, DownCause.FAULT)
    world.submit(make_request("a", LONG), attempt=1, recovering=True)
    world.submit(make_request("c", list(range(900, 990))))
    assert world.state("c") is RowState.QUEUED
    world.worker_up(0, 50)
    assert sorted((w, a.ref.request) for w, a in world.assigns()) == [(0, "a"), (1, "c")]


def test_steps_are_counted_by_size() -> None:
    world = World((50,))
    steps = (1, 2, 3, 16, 17, 256, 300, 1 << 14, (1 << 14) + 1, 1 << 20)
    sizes = [0] * STEP_SIZES
    for tokens in steps:
        sizes[step_size(tokens)] += 1
    assert sizes == [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 2]
    for _ in range(2):
        report = Progress(EPOCH, 0, 1, 10, 1.0, sum(steps) - 7, 7, [], [], [], [], [])
        world.step(msgspec.structs.replace(report, step_sizes=sizes))
    world.tick()
    stats = world.heard(Stats)[-1]
    assert isinstance(stats, Stats)
    assert stats.step_sizes == [2 * count for count in sizes]
    assert stats.step_tokens == 2 * sum(steps)


def test_losses_are_counted() -> None:
    world = World((50,))
    world.submit(make_request("a", LONG))
    world.down(0)
    world.tick()
    stats = world.heard(Stats)[-1]
    assert isinstance(stats, Stats)
    assert (stats.losses, stats.preemptions, stats.running) == (1, 0, 0)
