"""Moves of the dial controller: to the split that promises most, never away from a role."""

from itertools import product

import pytest

from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.messages import Address, Joined, SetDial
from diptych.engine.core.types import DownCause
from diptych.scheduler.dials import (
    PATIENCE,
    TURN_PERIODS,
    URGENT,
    DialController,
    candidates,
    covers,
    moves_to,
    repair,
    split_of,
)
from diptych.scheduler.forecast import Costs, Demand, Split
from diptych.scheduler.members import Worker
from tests.unit.scheduler.world import EPOCH, World, make_request

SLO_S = (1.0, 10e-3)
COSTS = Costs(prefill_s=2e-4, base_s=2e-3, row_s=2e-4)
PROMPTS = Demand(6000.0, 1000.0, 0.0, 20.0)  # 1.2 workers' worth
ANSWERS = Demand(100.0, 20.0, 0.0, 4200.0)
IDLE = Demand(0.0, 0.0, 0.0, 0.0)


def workers_of(*dials: int) -> list[Worker]:
    return [
        Worker(number, 1, 0, dial, Address("worker", number, 1), joined=True)
        for number, dial in enumerate(dials)
    ]


def controller_of(slo_s: tuple[float, float] = SLO_S) -> DialController:
    return DialController(slo_s, 64)


def settle(
    controller: DialController, workers: list[Worker], demand: Demand, costs: Costs = COSTS
) -> list[int]:
    """The dials once nothing moves under this demand."""
    for _ in range(30):
        for move in controller.decide(workers, [(1.0, demand)], costs):
            assert move.worker.dial != move.dial
            move.worker.dial = move.dial
        assert covers([worker.dial for worker in workers])
    return [worker.dial for worker in workers]


@pytest.mark.parametrize("demand", [PROMPTS, ANSWERS])
def test_few_workers_do_both(demand: Demand) -> None:
    assert settle(controller_of(), workers_of(100, 0), demand) == [50, 50]


def test_roles_are_separate_where_steps_leave_no_time_for_prompts() -> None:
    """A target between tokens that a step only just meets."""
    demand = Demand(2000.0, 1000.0, 0.0, 100.0)
    tight = controller_of((1.0, 2.6e-3))
    assert settle(tight, workers_of(100, 0), demand) == [100, 0]
    assert sorted(settle(tight, workers_of(50, 50), demand)) == [0, 100]


def test_costly_steps_are_left_to_few_workers() -> None:
    """Each worker that decodes pays for its steps, however few rows are in them."""
    costs = Costs(prefill_s=1e-4, base_s=5e-3, row_s=2e-5)
    demand = Demand(35000.0, 2000.0, 0.0, 2500.0)
    dials = settle(controller_of((1.2, 7e-3)), workers_of(*[50] * 6), demand, costs)
    assert dials.count(100) >= 4
    assert dials.count(50) + dials.count(0) <= 2


def test_nothing_moves_without_demand_or_costs() -> None:
    workers = workers_of(100, 0, 0)
    controller = controller_of()
    assert not controller.decide(workers, [(1.0, IDLE)], COSTS)
    assert not controller.decide(workers, [(1.0, PROMPTS)], None)
    assert not controller.decide(workers_of(100), [(1.0, PROMPTS)], COSTS)


def test_a_first_step_away_from_both_takes_patience() -> None:
    workers = workers_of(50, 50)
    controller = controller_of((1.0, 2.6e-3))
    demand = Demand(2000.0, 1000.0, 0.0, 100.0)
    looks = 1
    while not controller.decide(workers, [(1.0, demand)], COSTS):
        looks += 1
    assert looks == PATIENCE - 1, "a great gain: one look less"


def test_a_blip_does_not_part_the_roles() -> None:
    """What it takes is several looks in a row."""
    workers = workers_of(50, 50)
    controller = controller_of((1.0, 2.6e-3))
    for _ in range(10):
        assert not controller.decide(workers, [(1.0, Demand(2000.0, 1000.0, 0.0, 100.0))], COSTS)
        assert not controller.decide(workers, [(1.0, Demand(0.0, 0.0, 0.0, 100.0))], COSTS)


def test_a_move_is_followed_by_rest_unless_urgent() -> None:
    workers = workers_of(100, 0)
    controller = controller_of()
    for move in controller.decide(workers, [(1.0, PROMPTS)], COSTS):
        move.worker.dial = move.dial
    assert split_of(workers) == Split(0, 2, 0)
    gain = 0.5 * URGENT
    assert not controller._worth(gain, 0)
    assert controller._worth(URGENT, 0)
    for _ in range(TURN_PERIODS + 1):
        assert not controller.decide(workers, [(1.0, PROMPTS)], COSTS)
    assert controller._worth(gain, 0)


@pytest.mark.parametrize("dials", list(product((0, 50, 100), repeat=3)))
def test_no_role_is_ever_empty(dials: tuple[int, ...]) -> None:
    if not covers(dials):
        return
    for prefill, decode in product((0.0, 10.0, 1e4, 1e7), repeat=2):
        for queued in (0.0, 1e6):
            demand = Demand(prefill, 500.0, queued, decode)
            settle(controller_of(), workers_of(*dials), demand)


def test_equal_inputs_give_equal_moves() -> None:
    for demand in (PROMPTS, ANSWERS):
        moves = [
            [(m.worker.id, m.dial) for m in controller_of().decide(workers, [(1.0, demand)], COSTS)]
            for workers in (workers_of(100, 100, 0, 0), workers_of(100, 100, 0, 0))
        ]
        assert moves[0] == moves[1]


@pytest.mark.parametrize("count", [2, 3, 8, 9, 40])
def test_candidates_cover_and_count(count: int) -> None:
    here = Split(1, 0, count - 1)
    splits = list(candidates(here))
    assert splits[0] == here
    assert Split(0, count, 0) in splits
    assert all(s.covers and s.prefill + s.mixed + s.decode == count for s in splits)
    assert len(splits) <= 100


def test_moves_are_few_and_short_and_take_the_least_busy() -> None:
    workers = workers_of(100, 0, 50, 0)
    moves = moves_to(Split(2, 0, 2), workers)
    assert [(move.worker.id, move.dial) for move in moves] == [(2, 100)]
    workers = workers_of(100, 0, 0)
    workers[1].assigned["x", 0] = None  # type: ignore[assignment]
    moves = moves_to(Split(1, 1, 1), workers)
    assert [(move.worker.id, move.dial) for move in moves] == [(2, 50)]


def test_a_lost_role_is_taken_over() -> None:
    assert not repair(workers_of(100, 0))
    assert not repair(workers_of(50))
    assert not repair([])
    assert [move.dial for move in repair(workers_of(100))] == [50]
    assert [move.dial for move in repair(workers_of(0, 0))] == [50]


# ---- inside the scheduler

STEERED = SchedulerOptions(ttft_slo_s=0.5, itl_slo_s=0.1, local_prefill_tokens=0)


def dials_sent(world: World) -> list[tuple[int, int]]:
    return [(s.to.number, s.message.dial) for s in world.sent if isinstance(s.message, SetDial)]


def test_a_burst_of_prompts_turns_the_decode_workers() -> None:
    world = World((100, 0, 0), options=STEERED, num_blocks=400)
    world.tick(1.0)
    assert not dials_sent(world)
    for number in range(3):
        world.submit(make_request(f"0-{number}-x", range(number * 1000, number * 1000 + 900)))
    world.progress(0, compute_s=1.0, prefill_tokens=200)  # 5 ms a token
    world.tick(1.0)
    assert sorted(dials_sent(world)) == [(0, 50), (1, 50), (2, 50)]


def test_without_targets_nothing_moves() -> None:
    world = World((100, 0), options=SchedulerOptions(local_prefill_tokens=0), num_blocks=400)
    for number in range(4):
        world.submit(make_request(f"0-{number}-x", range(number * 1000, number * 1000 + 900)))
    world.progress(0, compute_s=1.0, prefill_tokens=200)
    for _ in range(5):
        world.tick(1.0)
        assert not dials_sent(world)


def test_the_last_worker_does_both_until_the_other_is_back() -> None:
    world = World((100, 0), options=STEERED)
    world.submit(make_request("0-1-x", range(100)))
    world.down(1, DownCause.KILLED)
    assert dials_sent(world) == [(0, 50)]
    ref = next(iter(world.held[0]))
    world.progress(0, released=[ref])
    world.submit(make_request("0-2-x", range(50)))
    assert [assign.peer for _, assign in world.assigns()] == [None]
    world.worker_up(1, 0, join=False)
    world.step(Joined(EPOCH, 1, world.epochs[1]))
    assert dials_sent(world) == [(0, 100)]


def test_a_restarted_worker_keeps_its_dial() -> None:
    world = World((100, 0, 0), options=STEERED, num_blocks=400)
    for number in range(4):
        world.submit(make_request(f"0-{number}-x", range(number * 1000, number * 1000 + 900)))
    world.progress(0, compute_s=1.0, prefill_tokens=200)
    world.tick(1.0)
    moved, _ = dials_sent(world)[-1]
    world.down(moved)
    sent = world.worker_up(moved, 0)
    joins = [send.message.dial for send in sent if type(send.message).__name__ == "Join"]
    assert joins == [50]
