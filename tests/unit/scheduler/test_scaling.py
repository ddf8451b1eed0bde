"""More and fewer workers: when one is asked for, who leaves, and what becomes of what it ran."""

from math import inf

import pytest

from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.messages import Grow, Lost, Message, Retire
from diptych.engine.core.types import LossCause
from diptych.scheduler.autoscaler import GROW_PERIODS, Autoscaler
from diptych.scheduler.load import Load
from tests.unit.scheduler.world import EPOCH, World, make_request

OPTIONS = SchedulerOptions(
    autoscale=(0, 3), idle_s=5.0, leave_s=2.0, ttft_slo_s=0.5, local_prefill_tokens=0
)


def load_of(prefill: float, decode: float, workers: int = 2, rows: int = 1) -> Load:
    return Load(prefill, decode, workers / 2, workers / 2, rows)


def asked(world: World) -> list[Message]:
    return [s.message for s in world.sent if s.to.kind == "supervisor"]


class Quiet(World):
    """A supervisor that only listens."""

    def _deliver(self, to: object, message: Message) -> None:
        if not isinstance(message, Grow | Retire):
            super()._deliver(to, message)  # type: ignore[arg-type]


def test_pressure_that_lasts_asks_for_one_more_at_a_time() -> None:
    scaler = Autoscaler((1, 4), idle_s=10.0)
    for _ in range(GROW_PERIODS - 1):
        assert scaler.decide(load_of(3.0, 3.0), 2, 0, 0.0) == 2
    assert scaler.decide(load_of(3.0, 3.0), 2, 0, 0.0) == 3
    for _ in range(10):
        assert scaler.decide(load_of(3.0, 3.0), 3, 1, 0.0) == 3, "one is on its way"
    for _ in range(10):
        assert scaler.decide(load_of(9.0, 9.0, 4), 4, 0, 0.0) == 4, "the upper limit"


def test_what_a_move_of_roles_can_cure_asks_for_nobody() -> None:
    scaler = Autoscaler((1, 4), idle_s=10.0)
    for _ in range(10):
        assert scaler.decide(load_of(1.2, 0.1, 4), 4, 0, 0.0) == 4


@pytest.mark.parametrize("fewest", [0, 1])
def test_idleness_that_lasts_sends_one_after_the_other_away(fewest: int) -> None:
    scaler = Autoscaler((fewest, 3), idle_s=10.0)
    counts, workers = [], 3
    for now in range(60):
        workers = scaler.decide(load_of(0.0, 0.0, workers, rows=0), workers, 0, float(now))
        counts.append(workers)
    assert counts[9] == 3
    assert counts[10] == 2
    assert counts[-1] == fewest


def test_the_last_one_stays_while_there_is_anything_to_do() -> None:
    scaler = Autoscaler((0, 3), idle_s=1.0)
    for now in range(30):
        assert scaler.decide(load_of(0.0, 0.001, 1, rows=1), 1, 0, float(now)) == 1
    assert scaler.decide(load_of(inf, 0.0, 0, rows=1), 0, 0, 31.0) == 1, "from none at once"


def test_the_first_row_brings_the_first_worker_at_once() -> None:
    world = Quiet((), options=OPTIONS)
    assert not asked(world)
    world.submit(make_request("0-1-x", range(50)))
    assert asked(world) == [Grow(EPOCH, 1)]
    world.tick(1.0)
    assert asked(world) == [Grow(EPOCH, 1)], "said again until it is there"
    assert world.scheduler.audit().waiting == 1
    world.worker_up(0, 100)
    assert [assign.ref.request for _, assign in world.assigns()] == ["0-1-x"]
    world.tick(1.0)
    assert not asked(world)


def test_who_did_not_come_in_time_is_not_waited_for() -> None:
    world = Quiet((50,), options=OPTIONS, num_blocks=2000)
    for number in range(6):
        prompt = range(1000 * number + 1000, 1000 * number + 1900)
        world.submit(make_request(f"0-b{number}-x", prompt))
    world.progress(0, compute_s=1.0, prefill_tokens=100)
    for _ in range(GROW_PERIODS + 1):
        world.tick(1.0)
    assert asked(world) == [Grow(EPOCH, 2)]
    for number in range(6):
        world.abort(f"0-b{number}-x")
    told = []
    for _ in range(12):
        told += asked(world)
        for ref in list(world.held[0]):
            world.progress(0, released=[ref])
        world.tick(1.0)
    assert Grow(EPOCH, 1) in told, "Ray need not look for a place any more"
    assert told.count(Grow(EPOCH, 1)) == 1


def test_an_empty_worker_is_retired_and_nothing_more_is_placed_on_it() -> None:
    world = Quiet((50, 50), options=OPTIONS)
    for _ in range(8):
        world.tick(1.0)
    assert asked(world) == [Retire(EPOCH, 1, 1, 1)]
    for number in (1, 2):
        world.submit(make_request(f"0-{number}-x", range(number * 100, number * 100 + 50)))
        assert {worker for worker, _ in world.assigns()} == {0}
    world.down(1)
    assert world.state("0-1-x") is not None


def test_what_a_leaving_worker_cannot_finish_goes_on_elsewhere() -> None:
    world = Quiet((50, 50), options=OPTIONS, num_blocks=512)
    for number in range(2):
        world.submit(make_request(f"0-{number}-x", range(number * 100, number * 100 + 40)))
    (ref,) = world.held[1]
    world.prefill_done(0, next(iter(world.held[0])))
    world.prefill_done(1, ref)
    for _ in range(7):
        world.tick(1.0)
    assert not world.revoked(), "it has some time to finish"
    for _ in range(2):
        world.tick(1.0)
        if world.revoked():
            break
    (leaving,) = world.revoked()
    (ref,) = world.held[leaving]
    world.progress(leaving, released=[ref])
    (lost,) = world.heard(Lost)
    assert isinstance(lost, Lost)
    assert (lost.ref, lost.cause) == (ref, LossCause.MOVED)
    world.tick(1.0)
    assert asked(world) == [Retire(EPOCH, leaving, 1, 1)]
    world.submit(make_request(ref.request, range(40)), attempt=1, emitted=[7], recovering=True)
    assert [worker for worker, _ in world.assigns()] == [1 - leaving]


def test_more_load_keeps_who_was_about_to_leave() -> None:
    world = Quiet((50, 50), options=OPTIONS, num_blocks=2000)
    world.submit(make_request("0-0-x", range(40)))
    world.submit(make_request("0-1-x", range(100, 140)))
    for _ in range(6):
        world.tick(1.0)
    leaving = [w.id for w in world.scheduler._members.workers.values() if w.leaving]
    assert len(leaving) == 1
    for number in range(6):
        prompt = range(1000 * number + 1000, 1000 * number + 1900)
        world.submit(make_request(f"0-b{number}-x", prompt))
    world.progress(1 - leaving[0], compute_s=1.0, prefill_tokens=100)
    for _ in range(GROW_PERIODS + 1):
        world.tick(1.0)
        assert not [m for m in asked(world) if isinstance(m, Grow)], "one is there already"
        if not any(w.leaving for w in world.scheduler._members.workers.values()):
            break
    assert not any(w.leaving for w in world.scheduler._members.workers.values())
