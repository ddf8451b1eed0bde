"""Moves of the dial controller: towards the pressure, one half step, never away from a role."""

from itertools import product
from math import inf

import pytest

from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.messages import Address, Joined, SetDial
from diptych.engine.core.types import DownCause
from diptych.scheduler.dials import TURN_PERIODS, DialController, Move, covers, repair
from diptych.scheduler.load import Load
from diptych.scheduler.members import Worker
from tests.unit.scheduler.world import EPOCH, World, make_request


def workers_of(*dials: int) -> list[Worker]:
    workers = []
    for number, dial in enumerate(dials):
        worker = Worker(number, 1, 0, dial, Address("worker", number, 1), dial, joined=True)
        workers.append(worker)
    return workers


def load_of(workers: list[Worker], prefill: float, decode: float) -> Load:
    capacity = sum(worker.dial for worker in workers) / 100.0
    return Load(prefill, decode, capacity, len(workers) - capacity, num_rows=1)


def apply(moves: list[Move]) -> None:
    for move in moves:
        move.worker.dial = move.dial


def settle(controller: DialController, workers: list[Worker], prefill: float, decode: float) -> int:
    """Periods with this demand per unit of capacity, until nothing moves; returns the moves."""
    count = quiet = 0
    for _ in range(40):
        capacity = sum(worker.dial for worker in workers) / 100.0
        rest = len(workers) - capacity
        load = Load(
            prefill / capacity if prefill else 0.0,
            (decode / rest if rest else inf) if decode else 0.0,
            capacity,
            rest,
            num_rows=1,
        )
        moves = controller.decide(workers, load)
        apply(moves)
        assert covers([worker.dial for worker in workers])
        count += len(moves)
        quiet = 0 if moves else quiet + 1
        if quiet > TURN_PERIODS + 1:
            break
    return count


def test_workers_follow_the_pressure_and_come_back() -> None:
    workers = workers_of(100, 100, 0, 0)
    controller = DialController()
    settle(controller, workers, prefill=6.0, decode=0.2)
    assert sum(worker.dial for worker in workers) == 350
    settle(controller, workers, prefill=0.2, decode=6.0)
    assert sum(worker.dial for worker in workers) == 50


def test_a_balanced_overload_moves_nobody() -> None:
    workers = workers_of(100, 0)
    assert not settle(DialController(), workers, prefill=5.0, decode=5.0)


def test_a_met_target_moves_nobody() -> None:
    workers = workers_of(100, 0, 0)
    assert not settle(DialController(), workers, prefill=0.7, decode=0.4)


@pytest.mark.parametrize("dials", list(product((0, 50, 100), repeat=3)))
def test_no_role_is_ever_empty(dials: tuple[int, ...]) -> None:
    if not covers(dials):
        return
    for prefill, decode in product((0.0, 0.1, 0.9, 3.0, 50.0, inf), repeat=2):
        workers = workers_of(*dials)
        controller = DialController()
        for _ in range(8):
            apply(controller.decide(workers, load_of(workers, prefill, decode)))
            assert covers([worker.dial for worker in workers])


def test_it_does_not_turn_round_at_once() -> None:
    workers = workers_of(100, 0, 0, 0)
    controller = DialController()
    moves = controller.decide(workers, load_of(workers, 1.9, 0.1))
    assert [move.dial for move in moves] == [50]
    apply(moves)
    for _ in range(TURN_PERIODS):
        assert not controller.decide(workers, load_of(workers, 0.1, 1.9))
    assert controller.decide(workers, load_of(workers, 0.1, 1.9))


def test_an_urgent_load_moves_more_and_turns_sooner() -> None:
    workers = workers_of(100, 0, 0, 0)
    controller = DialController()
    apply(controller.decide(workers, load_of(workers, 9.0, 0.1)))
    assert [worker.dial for worker in workers] == [100, 100, 0, 0]
    assert not controller.decide(workers, load_of(workers, 0.1, 9.0))
    assert controller.decide(workers, load_of(workers, 0.1, 9.0))


def test_a_worker_that_does_both_moves_first_then_the_least_busy() -> None:
    workers = workers_of(100, 0, 50, 0)
    moves = DialController().decide(workers, load_of(workers, 1.5, 0.1))
    assert [(move.worker.id, move.dial) for move in moves] == [(2, 100)]
    workers = workers_of(100, 0, 0)
    workers[1].assigned["x", 0] = None  # type: ignore[assignment]
    moves = DialController().decide(workers, load_of(workers, 1.5, 0.1))
    assert [(move.worker.id, move.dial) for move in moves] == [(2, 50)]


def test_calm_brings_the_first_roles_back() -> None:
    workers = workers_of(100, 0)
    workers[1].dial = 50
    controller = DialController()
    for _ in range(9):
        assert not controller.decide(workers, load_of(workers, 0.0, 0.1))
    apply(controller.decide(workers, load_of(workers, 0.0, 0.1)))
    assert [worker.dial for worker in workers] == [100, 0]


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


def test_a_burst_of_prompts_turns_a_decode_worker() -> None:
    world = World((100, 0, 0), options=STEERED, num_blocks=400)
    world.tick(1.0)
    assert not dials_sent(world)
    for number in range(3):
        world.submit(make_request(f"0-{number}-x", range(number * 1000, number * 1000 + 900)))
    world.progress(0, compute_s=1.0, prefill_tokens=200)  # 5 ms a token
    world.tick(1.0)
    assert dials_sent(world) == [(2, 50), (2, 100)]  # the less busy one of the two


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
    assert joins == [100]
