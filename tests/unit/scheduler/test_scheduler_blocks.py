"""Blocks of running rows: grants, running out, preemption, and the prefix cache in use."""

import random

import msgspec
import pytest

from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.messages import Assign, Grants, Lost, Stats
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import LossCause, Role
from diptych.scheduler.lifecycle import RowState
from tests.unit.scheduler.world import World, make_request

LONG = list(range(100))


def ref(name: str, choice: int = 0, attempt: int = 0) -> SeqRef:
    return SeqRef(name, choice, attempt)


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


# ---- grants ------------------------------------------------------------------------------------


def test_headroom_is_kept_up_to_what_max_tokens_needs() -> None:
    world = World((50,))
    world.submit(make_request("a", ids(1, 32), max_tokens=65))  # 96 tokens of KV: 6 blocks
    assert len(world.held[0][ref("a")].table) == 4
    world.prefill_done(0, ref("a"))
    [grants] = world.of(Grants)
    assert isinstance(grants, Grants)
    [grant] = grants.grants
    assert (grant.first, len(grant.blocks)) == (4, 1)  # writes block 2, has 3 and 4 ahead
    world.progress(0, committed=world.full(0, ref("a"), 3))
    assert len(world.held[0][ref("a")].table) == 6
    world.progress(0, committed=world.full(0, ref("a"), 6))
    assert not world.of(Grants)


def test_grants_of_a_pair_go_to_the_decode_side() -> None:
    world = World()
    world.submit(make_request("a", ids(1, 48), max_tokens=200))
    world.prefill_done(0, ref("a"))
    assert [send.to.number for send in world.sent if isinstance(send.message, Grants)] == [1]


def test_a_decode_report_may_overtake_the_prefill_report() -> None:
    world = World()
    world.submit(make_request("a", ids(1, 48), max_tokens=200))
    late = world.full(0, ref("a"), 3)
    world.held[1][ref("a")].committed = 3
    world.progress(1, committed=world.full(1, ref("a"), 4))
    assert len(world.held[1][ref("a")].table) == 7
    world.progress(0, committed=late, sealed=[ref("a")])
    world.progress(1, finished=[ref("a")])
    world.close("a")
    world.at_rest()
    assert world.scheduler.audit().pools[0].cached == 4


def test_a_prefill_side_that_ends_the_sequence_frees_the_decode_side() -> None:
    world = World()
    world.submit(make_request("a", LONG))
    world.progress(0, finished=[ref("a")])
    assert world.revoked() == [1]
    assert world.state("a") is RowState.FINISHING
    assert world.scheduler.audit().pools[0].private == 8, "the decode side has not let go"
    world.progress(1, released=[ref("a")])
    assert world.state("a") is RowState.DONE
    assert world.scheduler.audit().pools[0].free == 64


def test_reports_of_blocks_that_are_not_owned_are_ignored() -> None:
    world = World((50,))
    world.submit(make_request("a", LONG))
    [first, second] = world.full(0, ref("a"), 2)
    wrong = [
        msgspec.structs.replace(first, block=second.block),
        msgspec.structs.replace(first, index=99),
        msgspec.structs.replace(first, generation=first.generation + 1),
    ]
    world.progress(0, committed=wrong)
    assert world.scheduler.audit().ignored_commits == 3
    assert world.scheduler.audit().pools[0].shared == 0


# ---- running out -------------------------------------------------------------------------------


def fill(world: World, name: str, upto: int, worker: int = 0, attempt: int = 0) -> None:
    world.progress(worker, committed=world.full(worker, ref(name, 0, attempt), upto))


def test_out_of_blocks_preempts_the_newest_of_the_lowest_priority() -> None:
    world = World((50,), num_blocks=16)
    for name, rank, priority in (("old", 1, 1), ("new", 2, 1), ("vip", 3, 0)):
        request = make_request(name, ids(rank, 32), rank=rank, priority=priority, max_tokens=160)
        world.submit(request)  # 4 blocks each
        fill(world, name, 2)  # and a fifth
    fill(world, "vip", 3)
    assert world.scheduler.audit().pools[0].free == 0
    fill(world, "vip", 4)  # no headroom, but a block to write: nobody is preempted for that
    fill(world, "vip", 5)
    assert not world.revoked()
    fill(world, "vip", 6)
    assert world.state("new") is RowState.PREEMPTING
    assert not world.heard(Lost)
    world.progress(0, released=[ref("new")])
    [lost] = world.heard(Lost)
    assert isinstance(lost, Lost)
    assert (lost.ref, lost.cause) == (ref("new"), LossCause.PREEMPTED)
    assert len(world.held[0][ref("vip")].table) == 9
    assert world.state("new") is RowState.LOST


def test_the_asker_may_be_the_one_that_goes() -> None:
    world = World((50,), num_blocks=8)
    for name, rank in (("old", 1), ("new", 2)):
        world.submit(make_request(name, ids(rank, 32), rank=rank, max_tokens=90))
    fill(world, "new", 4)
    assert world.state("new") is RowState.PREEMPTING
    assert world.state("old") is RowState.RUNNING


def test_a_preempted_pair_is_taken_from_both_sides() -> None:
    world = World(num_blocks=16)
    for name, rank in (("old", 1), ("new", 2)):
        world.submit(make_request(name, ids(rank, 96), rank=rank, max_tokens=90))  # 8 blocks each
    world.progress(0, committed=world.full(0, ref("old"), 6), sealed=[ref("old")])
    world.held[1][ref("old")].committed = 6
    fill(world, "old", 8, worker=1)
    assert sorted(world.revoked()) == [0, 1]
    world.progress(0, released=[ref("new")])
    assert world.state("new") is RowState.PREEMPTING
    assert world.scheduler.audit().pools[0].free == 0
    world.progress(1, released=[ref("new")])
    assert world.state("new") is RowState.LOST
    assert len(world.held[1][ref("old")].table) == 11


def test_a_finish_that_crosses_the_preemption_is_no_loss() -> None:
    world = World((50,), num_blocks=8)
    for name, rank in (("old", 1), ("new", 2)):
        world.submit(make_request(name, ids(rank, 32), rank=rank, max_tokens=90))
    fill(world, "old", 4)
    assert world.state("new") is RowState.PREEMPTING
    world.progress(0, finished=[ref("new")])
    assert world.state("new") is RowState.DONE
    assert not world.heard(Lost)
    assert len(world.held[0][ref("old")].table) == 7


def test_no_new_rows_while_a_running_one_lacks_blocks() -> None:
    world = World((50,), num_blocks=9)
    for name, rank in (("old", 1), ("new", 2)):
        world.submit(make_request(name, ids(rank, 32), rank=rank, max_tokens=90))
    fill(world, "old", 3)  # wants 2, gets the last one
    world.submit(make_request("tiny", [1], max_tokens=1))
    assert world.state("tiny") is RowState.QUEUED
    world.progress(0, finished=[ref("new")])
    assert world.state("tiny") is RowState.RUNNING


@pytest.mark.parametrize("preemptions_max", [0, 1, 3])
def test_two_that_do_not_fit_together_both_end(preemptions_max: int) -> None:
    """Each fits alone; driven to the end, with every loss resubmitted."""
    options = SchedulerOptions(preemptions_max=preemptions_max)
    world = World((50,), num_blocks=10, options=options)
    requests = {
        name: make_request(name, ids(rank, 32), rank=rank, max_tokens=129)  # 10 blocks
        for name, rank in (("a", 1), ("b", 2), ("c", 3))
    }
    attempts = dict.fromkeys(requests, 0)
    for request in requests.values():
        world.submit(request)
    done: list[str] = []
    for _ in range(500):
        if len(done) == 3:
            break
        for held_ref, held in list(world.held[0].items()):
            name, attempt = held_ref.request, held_ref.attempt
            if world.state(name) is RowState.PREEMPTING:
                world.progress(0, released=[held_ref])
                attempts[name] = attempt + 1
                assert world.state(name) is RowState.LOST
                world.submit(requests[name], attempt=attempt + 1, recovering=True)
            elif held.committed == 10:
                world.progress(0, finished=[held_ref])
                world.close(name)
                done.append(name)
            elif held.committed < len(held.table):
                blocks = world.full(0, held_ref, held.committed + 1, salt=attempt)
                world.progress(0, committed=blocks)
    assert sorted(done) == ["a", "b", "c"]
    assert all(attempt <= preemptions_max for attempt in attempts.values()), attempts
    world.at_rest()


# ---- the prefix cache --------------------------------------------------------------------------


def run_to_end(world: World, name: str, prompt: list[int], max_tokens: int = 4) -> None:
    world.submit(make_request(name, prompt, max_tokens=max_tokens))
    world.prefill_done(0, ref(name))
    world.progress(0, finished=[ref(name)])
    world.close(name)


def hit(world: World) -> int:
    """Tokens found by the last assignment."""
    [(_, assign)] = world.assigns()
    assert isinstance(assign, Assign)
    return assign.num_computed


def test_a_finished_prompt_is_found_again_but_for_its_last_token() -> None:
    world = World((50,))
    prompt = ids(1, 64)
    run_to_end(world, "a", prompt)
    world.submit(make_request("b", prompt))
    assert hit(world) == 48  # the fourth block holds the last token
    world.submit(make_request("c", [*prompt, 1]))
    assert hit(world) == 64
    world.submit(make_request("d", [*prompt[:32], *ids(2, 40)]))
    assert hit(world) == 32


def test_blocks_of_a_running_row_are_shared_once_committed() -> None:
    world = World((50,))
    prompt = ids(1, 64)
    world.submit(make_request("a", prompt))
    world.prefill_done(0, ref("a"))
    world.submit(make_request("b", prompt))
    assert hit(world) == 48
    table = world.held[0][ref("b")].table
    assert table[:3] == world.held[0][ref("a")].table[:3]
    assert world.scheduler.audit().pools[0].shared == 4


@pytest.mark.parametrize("case", ["caching off", "prompt logprobs"])
def test_no_lookup(case: str) -> None:
    world = World((50,), caching=case != "caching off")
    prompt = ids(1, 64)
    run_to_end(world, "a", prompt)
    assert world.scheduler.audit().pools[0].cached == 4
    world.submit(make_request("b", prompt), want_prompt_logprobs=case == "prompt logprobs")
    assert hit(world) == 0


def test_cached_blocks_are_evicted_when_blocks_are_needed() -> None:
    world = World((50,), num_blocks=8)
    run_to_end(world, "a", ids(1, 64))
    world.submit(make_request("b", ids(2, 96), max_tokens=4))
    assert world.state("b") is RowState.RUNNING
    pool = world.scheduler.audit().pools[0]
    assert (pool.private, pool.cached) == (7, 1)


def test_a_row_waits_for_a_prefix_that_is_being_computed() -> None:
    world = World()
    prompt = ids(1, 320)
    world.submit(make_request("a", prompt))
    world.submit(make_request("b", [*prompt[:160], *ids(2, 100)]))
    assert not world.assigns()
    assert [row.held for row in world.scheduler.audit().rows] == [False, True]
    world.submit(make_request("c", ids(3, 100)))
    assert world.state("c") is RowState.RUNNING, "nobody waits behind a held row"
    world.progress(0, committed=world.full(0, ref("a"), 9), prefill_tokens=144)
    assert not world.assigns()
    world.progress(0, committed=world.full(0, ref("a"), 10), prefill_tokens=16)
    assert [(a.ref.request, a.num_computed) for _, a in world.assigns()] == [("b", 160)] * 2


def test_a_held_row_goes_on_when_the_other_is_gone() -> None:
    world = World()
    prompt = ids(1, 320)
    world.submit(make_request("a", prompt))
    world.submit(make_request("b", prompt))
    world.close("a")
    assert not world.assigns()
    world.progress(0, released=[ref("a")])
    world.progress(1, released=[ref("a")])
    assert [(a.ref.request, a.num_computed) for _, a in world.assigns()] == [("b", 0)] * 2


def test_a_held_row_may_be_aborted() -> None:
    world = World()
    world.submit(make_request("a", ids(1, 320)))
    world.submit(make_request("b", ids(1, 320)))
    world.abort("b")
    assert world.state("b") is RowState.DONE
    world.prefill_done(0, ref("a"))
    assert world.state("b") is RowState.DONE
    assert not world.assigns()


def test_waiting_is_not_chosen_when_another_worker_is_sooner() -> None:
    world = World((50, 50))
    other = ids(9, 320)
    world.submit(make_request("a", ids(1, 320), max_tokens=1))  # worker 0
    world.submit(make_request("x", other, max_tokens=1))  # worker 1
    world.submit(make_request("y", ids(8, 320), max_tokens=1))  # behind a
    [(worker, _)] = world.assigns()
    world.progress(1 - worker, finished=[ref("x" if worker == 0 else "a")])
    # The idle worker computes 16 shared tokens sooner than the busy one reaches them.
    world.submit(make_request("z", [*ids(8, 16), *ids(7, 40)], max_tokens=1))
    [(chosen, _)] = world.assigns()
    assert chosen == 1 - worker


def test_a_short_prompt_runs_where_it_decodes() -> None:
    world = World()
    world.submit(make_request("a", [1, 2, 3]))
    assert [(worker, a.role) for worker, a in world.assigns()] == [(1, Role.LOCAL)]


def test_hits_are_counted_in_tokens() -> None:
    world = World((50,))
    run_to_end(world, "a", ids(1, 64))
    world.submit(make_request("b", ids(1, 64)))
    world.tick()
    stats = world.heard(Stats)[-1]
    assert isinstance(stats, Stats)
    assert (stats.prefix_queries, stats.prefix_hits) == (128, 48)
