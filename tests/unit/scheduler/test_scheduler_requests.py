"""What API servers see: admission, attempts, abort, close, statistics."""

import pytest

from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.messages import (
    Abort,
    Accepted,
    ApiDown,
    ApiUp,
    Assign,
    Closed,
    Lost,
    Rejected,
    Stats,
    Submit,
)
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Role
from diptych.scheduler.lifecycle import RowState
from tests.unit.scheduler.world import EPOCH, World, make_request

LONG = list(range(100))


def ref(name: str, choice: int = 0, attempt: int = 0) -> SeqRef:
    return SeqRef(name, choice, attempt)


def test_one_request_from_submit_to_rest() -> None:
    world = World()
    world.submit(make_request("a", LONG))
    assert world.of(Accepted) == [Accepted(EPOCH, "a")]
    assigns = dict(world.assigns())
    assert assigns[0].role is Role.PREFILL
    assert assigns[1].role is Role.DECODE
    assert assigns[0].block_table == assigns[1].block_table
    assert assigns[0].generations == assigns[1].generations
    assert len(assigns[0].block_table) == 8  # 7 for 100 tokens and one more: 115 in all
    assert assigns[0].peer == (1, 1)
    assert assigns[1].peer == (0, 1)
    world.prefill_done(0, ref("a"))
    assert world.state("a") is RowState.RUNNING
    world.progress(1, finished=[ref("a")])
    assert world.state("a") is RowState.DONE
    world.close("a")
    world.at_rest()


def test_submit_is_idempotent_and_always_answered() -> None:
    world = World()
    request = make_request("a", LONG)
    world.submit(request)
    world.submit(request)
    assert world.of(Accepted) == [Accepted(EPOCH, "a")]
    assert not world.assigns()


def test_n_choices_are_admitted_together_and_run_apart() -> None:
    world = World(options=SchedulerOptions(max_waiting=3), up=False)
    world.step(ApiUp(0, 1))
    world.submit(make_request("a", LONG, n=3), choices=range(3))
    assert world.of(Accepted)
    world.submit(make_request("b", LONG))
    [rejected] = world.of(Rejected)
    assert isinstance(rejected, Rejected)
    assert rejected.retry_after_s == 60.0
    assert world.scheduler.audit().waiting == 3


def test_waiting_tokens_are_capped_too() -> None:
    world = World(options=SchedulerOptions(max_waiting_tokens=150), up=False)
    world.step(ApiUp(0, 1))
    world.submit(make_request("a", LONG))
    world.submit(make_request("b", LONG))
    assert world.of(Rejected)
    world.submit(make_request("c", LONG[:50]))
    assert world.of(Accepted)


def test_recovering_requests_are_never_rejected_and_come_before_new_ones() -> None:
    world = World(options=SchedulerOptions(max_waiting=2), up=False)
    world.step(ApiUp(0, 1))
    for i in range(5):
        world.submit(make_request(f"r{i}", LONG), recovering=True, attempt=3, emitted=[1, 2])
        assert world.of(Accepted)
    world.submit(make_request("new", LONG))
    [rejected] = world.of(Rejected)
    assert isinstance(rejected, Rejected)
    assert "restart" in rejected.reason


def test_a_request_that_never_fits_is_rejected_for_good() -> None:
    world = World(num_blocks=8)
    world.submit(make_request("a", LONG, max_tokens=30))  # 129 tokens of KV: 9 blocks
    [rejected] = world.of(Rejected)
    assert isinstance(rejected, Rejected)
    assert rejected.retry_after_s is None
    assert "9 KV blocks" in rejected.reason
    world.submit(make_request("b", LONG, max_tokens=29))
    assert world.of(Accepted)


def test_a_request_that_could_never_wait_is_rejected_for_good() -> None:
    world = World(options=SchedulerOptions(max_waiting=2))
    world.submit(make_request("a", LONG, n=3), choices=range(3))
    [rejected] = world.of(Rejected)
    assert isinstance(rejected, Rejected)
    assert rejected.retry_after_s is None


def test_a_request_id_in_use_is_rejected() -> None:
    world = World()
    world.step(ApiUp(1, 1))
    request = make_request("a", LONG)
    world.submit(request)
    world.submit(request, api=1)
    assert world.of(Rejected)
    assert world.state("a") is RowState.RUNNING


def test_requests_before_the_pool_is_ready_wait() -> None:
    world = World(up=False)
    world.step(ApiUp(0, 1))
    world.submit(make_request("a", LONG))
    assert world.of(Accepted)
    assert world.state("a") is RowState.QUEUED


def test_a_newer_attempt_takes_the_old_one_back_first() -> None:
    world = World()
    request = make_request("a", LONG)
    world.submit(request)
    world.submit(request, attempt=1, emitted=[5], recovering=True)
    assert sorted(world.revoked()) == [0, 1]
    assert not world.assigns()
    world.progress(0, released=[ref("a")])
    assert not world.assigns(), "the decode side may still touch the blocks"
    world.progress(1, released=[ref("a")])
    assert [a.ref.attempt for _, a in world.assigns()] == [1, 1]
    assert not world.heard(Lost)
    world.submit(request, attempt=1, recovering=True)
    world.submit(request, attempt=0, recovering=True)
    assert not world.revoked(), "an old or equal attempt changes nothing"


def test_the_last_of_several_new_attempts_counts() -> None:
    world = World()
    request = make_request("a", LONG)
    world.submit(request)
    world.submit(request, attempt=1)
    world.submit(request, attempt=4, emitted=[7, 8])
    world.progress(0, released=[ref("a")])
    world.progress(1, released=[ref("a")])
    assert [(a.ref.attempt, len(a.emitted) // 4) for _, a in world.assigns()] == [(4, 2), (4, 2)]


def test_reports_about_an_old_attempt_change_nothing() -> None:
    world = World()
    request = make_request("a", LONG)
    world.submit(request)
    for worker in (0, 1):
        world.progress(worker, released=[ref("a")])
        if worker == 0:
            world.submit(request, attempt=1)
    assert world.state("a") is RowState.RUNNING
    for kind in ("sealed", "finished", "released", "starved"):
        world.progress(1, **{kind: [ref("a")]})  # type: ignore[arg-type]
    assert world.state("a") is RowState.RUNNING


@pytest.mark.parametrize("first", ["abort", "finish"])
def test_abort_and_finish_may_cross(first: str) -> None:
    world = World((50,))
    world.submit(make_request("a", LONG))
    if first == "abort":
        world.abort("a")
        assert world.revoked() == [0]
        world.progress(0, finished=[ref("a")])
    else:
        world.progress(0, finished=[ref("a")])
        world.abort("a")
        assert not world.revoked()
    assert world.state("a") is RowState.DONE
    world.progress(0, released=[ref("a")])
    world.close("a")
    world.at_rest()


def test_abort_of_one_choice_leaves_the_others() -> None:
    world = World((50,), caching=False)
    world.submit(make_request("a", LONG, n=2), choices=range(2))
    world.abort("a", 1)
    world.progress(0, released=[ref("a", 1)])
    assert world.state("a", 1) is RowState.DONE
    assert world.state("a", 0) is RowState.RUNNING


def test_close_in_every_state_leaves_nothing() -> None:
    options = SchedulerOptions(max_num_seqs=1)
    world = World((50,), options=options)
    request = make_request("run", LONG)
    world.submit(request)
    world.submit(make_request("wait", LONG))
    assert world.state("wait") is RowState.QUEUED
    world.close("wait")
    assert world.state("wait") is None
    world.close("run")
    assert world.state("run") is RowState.CLOSING
    world.submit(request, attempt=1)
    assert world.of(Rejected), "a closed id is not taken again"
    world.progress(0, released=[ref("run")])
    world.close("run")
    world.close("never seen")
    world.at_rest()


def test_the_end_of_an_api_server_ends_its_requests_only() -> None:
    world = World((50,))
    world.step(ApiUp(1, 1))
    world.submit(make_request("a", LONG))
    world.submit(make_request("b", list(range(500, 600))), api=1)
    world.step(ApiDown(0, 1))
    assert world.revoked() == [0]
    world.progress(0, released=[ref("a")])
    assert world.state("a") is None
    assert world.state("b") is RowState.RUNNING
    world.submit(make_request("late", LONG))
    assert not world.sent, "a submit of a dead incarnation"
    assert world.state("late") is None


def test_messages_of_another_scheduler_epoch_are_ignored() -> None:
    world = World((50,))
    request = make_request("a", LONG)
    world.step(Submit(0, 1, EPOCH - 1, request, [], False))
    assert not world.sent
    world.submit(request)
    world.step(Abort(0, EPOCH - 1, "a", 0))
    world.step(Closed(0, EPOCH - 1, "a"))
    assert world.state("a") is RowState.RUNNING


def test_a_submit_may_overtake_its_api_up() -> None:
    world = World()
    world.submit(make_request("a", LONG), api=3, api_epoch=2)
    assert [send.to.number for send in world.sent if isinstance(send.message, Accepted)] == [3]
    world.step(ApiUp(3, 2))
    assert world.state("a") is RowState.RUNNING


def test_priority_then_rank_decides_who_is_placed() -> None:
    world = World((50,), options=SchedulerOptions(max_num_seqs=1), caching=False)
    world.submit(make_request("first", LONG))
    world.submit(make_request("late", LONG, rank=30))
    world.submit(make_request("early", LONG, rank=10))
    world.submit(make_request("urgent", LONG, rank=90, priority=-1))
    order = []
    name = "first"
    for _ in range(3):
        world.progress(0, finished=[ref(name)])
        [(_, assign)] = world.assigns()
        assert isinstance(assign, Assign)
        name = assign.ref.request
        order.append(name)
    assert order == ["urgent", "early", "late"]


def test_statistics_come_four_times_a_second_and_when_readiness_changes() -> None:
    world = World(up=False)
    world.step(ApiUp(0, 1))
    [stats] = world.of(Stats)
    assert isinstance(stats, Stats)
    assert not stats.ready
    started = World()
    ready = [s.ready for s in started.heard(Stats) if isinstance(s, Stats)]
    assert ready == [False, True]
    started.submit(make_request("a", LONG))
    started.tick(0.2)
    assert not started.of(Stats)
    started.tick(0.1)
    [stats] = started.of(Stats)
    assert isinstance(stats, Stats)
    assert (stats.running, stats.waiting, stats.blocks_used) == (1, 0, 8)
    assert [(w.worker, w.running) for w in stats.workers] == [(0, 1), (1, 1)]
    started.down(1)
    [stats] = started.of(Stats)
    assert isinstance(stats, Stats)
    assert not stats.ready
