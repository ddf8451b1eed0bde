"""Prompts that wait on a worker which turns to decoding are placed again where that is sooner."""

import pytest

from diptych.engine.core.config import BatchOptions, CacheOptions, SchedulerOptions
from diptych.engine.core.messages import Revoke
from diptych.engine.core.request import SeqRef
from diptych.scheduler import moving
from diptych.scheduler.dials import DialController, Move
from diptych.scheduler.members import Worker
from diptych.scheduler.moving import MOVES_MAX, better_elsewhere, prompts_on
from diptych.scheduler.rows import Row
from tests.unit.scheduler.timed import Arrival, Costs, Run, Timed
from tests.unit.scheduler.world import SIZE, World, make_request

DEVICE = Costs(base_s=1e-2, decode_s=1e-4, prefill_s=5e-5)  # a step costs much, a token little
CACHE = CacheOptions()
LONG = [7] * 320


def world_of(*dials: int) -> World:
    options = SchedulerOptions(ttft_slo_s=1.0, itl_slo_s=0.1, steer_s=1000.0)
    world = World(dials, num_blocks=512, options=options)
    for worker in workers_of(world):
        worker.cost.prefill_s, worker.cost.step_s = 5e-5, 1e-2
    return world


def workers_of(world: World) -> list[Worker]:
    return list(world.scheduler._members.workers.values())


def submit(world: World, names: str) -> None:
    for name in names:
        world.submit(make_request(name, [*name.encode(), *LONG]))


def turn(world: World, worker: int) -> list[SeqRef]:
    """It decodes only from now; returns what is taken back."""
    steering = world.scheduler._steering
    steering._apply([Move(workers_of(world)[worker], 0)])
    steering._move_prompts()
    world.step()
    return [revoke.ref for revoke in world.of(Revoke) if isinstance(revoke, Revoke)]


def decoding_and_waiting() -> tuple[World, int, list[Row]]:
    """Two workers that do both; one decodes a first request and has long prompts behind it."""
    world = world_of(50, 50)
    submit(world, "dabcdef")
    worker = next(w for w, held in world.held.items() if any(r.request == "d" for r in held))
    ref = next(ref for ref in world.held[worker] if ref.request == "d")
    world.prefill_done(worker, ref)
    rows = [prompt.row for prompt in prompts_on(workers_of(world)[worker], SIZE)]
    assert len(rows) >= 2
    return world, worker, rows


def test_who_has_not_begun_goes() -> None:
    world, worker, rows = decoding_and_waiting()
    assert turn(world, worker) == [row.ref for row in rows]


def test_who_has_nearly_done_stays() -> None:
    world, worker, rows = decoding_and_waiting()
    first = rows[0].ref
    assert first is not None
    world.progress(worker, committed=world.full(worker, first, 19))
    assert turn(world, worker) == [row.ref for row in rows[1:]]


def play(dials: list[int], moves_max: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, int]:
    """Decodes, then a burst of long prompts; the last worker is turned to decoding meanwhile."""
    monkeypatch.setattr(moving, "MOVES_MAX", moves_max)
    monkeypatch.setattr(DialController, "decide", lambda *_: [])
    arrivals = [Arrival(0.01 * i, 16, 150) for i in range(24)]
    arrivals += [Arrival(0.2 + 0.001 * i, 2048, 16) for i in range(12)]
    options = SchedulerOptions(ttft_slo_s=5.0, itl_slo_s=0.05, steer_s=0.25)
    batch = BatchOptions(max_num_batched_tokens=256, itl_slo_s=0.05)
    timed = Timed(dials, DEVICE, options, batch)
    run = timed.play(arrivals, [(0.3, len(dials) - 1, 0)])
    assert all(len(a.times_s) == a.arrival.answer for a in run.answers), "none is lost"
    return run, timed.num_moved


@pytest.mark.parametrize("dials", [[50, 50], [50, 50, 50]])
def test_they_do_not_crawl(dials: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []
    for moves_max in (0, MOVES_MAX):
        run, num_moved = play(dials, moves_max, monkeypatch)
        assert (num_moved > 0) == (moves_max > 0)
        waits = [a.times_s[0] - a.arrival.at_s for a in run.answers if a.arrival.prompt > 16]
        longest.append(max(waits))
    assert longest[1] < 0.7 * longest[0], longest


def test_where_nothing_decodes_they_stay() -> None:
    world = world_of(100, 100, 0)
    submit(world, "abcd")
    for worker in workers_of(world)[:2]:
        assert len(prompts_on(worker, SIZE)) == 2
        others = [other for other in workers_of(world) if other is not worker]
        assert better_elsewhere(worker, others, CACHE) == []


def test_a_row_is_moved_no_more_than_so_often() -> None:
    world, worker, rows = decoding_and_waiting()
    for row in rows[1:]:
        row.moves = MOVES_MAX
    assert turn(world, worker) == [rows[0].ref]
    assert rows[0].moves == 1


def test_without_anybody_else_who_prefills_they_stay() -> None:
    world, worker, _ = decoding_and_waiting()
    other = workers_of(world)[1 - worker]
    other.dial = 0
    assert better_elsewhere(workers_of(world)[worker], [other], CACHE) == []
    assert better_elsewhere(workers_of(world)[worker], [], CACHE) == []
