"""The supervisor's decisions as a table of events, and under random events against invariants."""

import random
from collections.abc import Callable

import msgspec
import pytest

from diptych.engine.core.config import WorkerSpec
from diptych.engine.core.messages import (
    Address,
    ApiDown,
    ApiUp,
    Drain,
    Message,
    PoolDown,
    PoolUp,
    SchedulerDown,
    SchedulerUp,
    Send,
    StartTimes,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import DownCause
from diptych.server.fleet import Fleet
from diptych.server.fleet_members import (
    CUT_S,
    FAST_FAULT_S,
    LEAVE_S_MAX,
    START_S_MAX,
    STILL_S_MAX,
    Dismiss,
    GiveUp,
    Kill,
    Places,
    Rest,
    Start,
    State,
    Wake,
)

HANG_S = 3.0
SPECS = [WorkerSpec(0, 0, 100), WorkerSpec(1, 0, 0)]
POOL = PoolUp(0, 64, 16)


def scheduler(epoch: int = 1) -> Address:
    return Address("scheduler", 0, epoch)


def worker(number: int, epoch: int = 1) -> Address:
    return Address("worker", number, epoch)


def api(epoch: int = 1) -> Address:
    return Address("api", 0, epoch)


def make(external_api: bool = False) -> Fleet:
    return Fleet(SPECS, num_apis=1, external_api=external_api, pools=[POOL], hang_s=HANG_S)


def serving() -> Fleet:
    fleet = make()
    fleet.model_ready()
    fleet.tick(0.0)
    for address in (scheduler(), worker(0), worker(1), api()):
        fleet.ready(address, 1.0)
    assert fleet.engine_up()
    fleet.take()
    return fleet


def told(fleet: Fleet) -> list[object]:
    """Its commands, without how long a worker took to start."""
    rows: list[object] = []
    for command in fleet.take():
        if isinstance(command, Send) and isinstance(command.message, WorkerUp):
            assert command.message.start is not None
            message = msgspec.structs.replace(command.message, start=None)
            command = Send(command.to, message)
        rows.append(command)
    return rows


def to_scheduler(epoch: int, *messages: Message) -> list[Send]:
    return [Send(scheduler(epoch), message) for message in messages]


def test_workers_and_apis_wait_for_the_model() -> None:
    fleet = make()
    fleet.tick(0.0)
    assert fleet.take() == [Start(scheduler())]
    fleet.model_ready()
    fleet.tick(0.1)
    assert fleet.take() == [Start(worker(0)), Start(worker(1)), Start(api())]


def test_who_comes_up_is_told_of_all_that_are_up() -> None:
    fleet = make()
    fleet.model_ready()
    fleet.tick(0.0)
    fleet.take()
    fleet.ready(worker(1), 1.0)
    fleet.ready(api(), 1.0)
    assert fleet.take() == []
    fleet.ready(scheduler(), 1.0)
    assert told(fleet) == [
        *to_scheduler(1, WorkerUp(1, 1, 0, 0), POOL, ApiUp(0, 1)),
        Send(api(), SchedulerUp(1)),
    ]
    fleet.ready(worker(0), 1.0)
    assert told(fleet) == to_scheduler(1, WorkerUp(0, 1, 0, 100))


def test_a_dead_worker_is_announced_then_started_again_at_once() -> None:
    fleet = serving()
    fleet.exited(worker(0), DownCause.KILLED, 50.0)
    fleet.tick(50.0)
    assert fleet.take() == [
        *to_scheduler(1, WorkerDown(0, 1, DownCause.KILLED)),
        Start(worker(0, 2)),
    ]
    fleet.ready(worker(0, 1), 51.0)  # a late word of the dead
    assert fleet.take() == []
    fleet.ready(worker(0, 2), 51.0)
    assert told(fleet) == to_scheduler(1, WorkerUp(0, 2, 0, 100))


def test_a_dead_scheduler_is_told_everything_again() -> None:
    fleet = serving()
    fleet.exited(scheduler(), DownCause.KILLED, 50.0)
    fleet.exited(worker(1), DownCause.KILLED, 50.0)  # nobody to tell
    fleet.tick(50.0)
    assert fleet.take() == [
        Send(api(), SchedulerDown(1)),
        Start(scheduler(2)),
        Start(worker(1, 2)),
    ]
    fleet.ready(scheduler(2), 50.1)
    assert told(fleet) == [
        *to_scheduler(2, WorkerUp(0, 1, 0, 100), POOL, ApiUp(0, 1)),
        Send(api(), SchedulerUp(2)),
    ]


def test_a_worker_that_is_being_fenced_still_counts_for_a_new_scheduler() -> None:
    """Its pool is not read before its end is announced."""
    fleet = serving()
    for now in range(40):
        fleet.beats({worker(0): 5, worker(1): now}, 50.0 + now / 10)
    assert next(c for c in fleet.take() if isinstance(c, Kill)).address == worker(0)
    fleet.exited(scheduler(), DownCause.KILLED, 60.0)
    fleet.tick(60.0)
    fleet.take()
    fleet.ready(scheduler(2), 60.1)
    sends = [c for c in told(fleet) if isinstance(c, Send) and c.to == scheduler(2)]
    assert [send.message for send in sends] == [
        WorkerUp(0, 1, 0, 100),
        WorkerUp(1, 1, 0, 0),
        POOL,
        ApiUp(0, 1),
    ]
    fleet.exited(worker(0), DownCause.KILLED, 60.2)
    assert fleet.take() == to_scheduler(2, WorkerDown(0, 1, DownCause.HUNG))


def scaled() -> Fleet:
    """One of two workers runs."""
    fleet = Fleet(SPECS, num_apis=1, external_api=False, pools=[POOL], hang_s=HANG_S, num_started=1)
    fleet.model_ready()
    fleet.tick(0.0)
    for address in (scheduler(), worker(0), api()):
        fleet.ready(address, 1.0)
    assert fleet.engine_up()
    assert Start(worker(1)) not in fleet.take()
    return fleet


def test_a_worker_more_when_it_is_asked_for_and_no_more_than_there_are_places() -> None:
    fleet = scaled()
    fleet.grow(7, 2)  # of another scheduler
    fleet.tick(2.0)
    assert not fleet.take()
    for _ in range(2):
        fleet.grow(1, 5)
        fleet.tick(2.0)
    assert fleet.take() == [Start(worker(1))]
    fleet.started(worker(1), 2.5)
    fleet.ready(worker(1), 3.0)
    (send,) = fleet.take()
    assert isinstance(send, Send)
    assert isinstance(send.message, WorkerUp)
    assert send.message.start == StartTimes(0.0, 0.0, 0.5, 0.5)


def test_a_retired_worker_leaves_by_itself_and_stays_away() -> None:
    fleet = scaled()
    fleet.retire(1, worker(0, 2), 5.0)  # of another incarnation
    assert not fleet.take()
    fleet.retire(1, worker(0), 5.0)
    fleet.retire(1, worker(0), 5.1)
    assert fleet.take() == [Send(worker(0), Drain(0.0))]
    fleet.beats({worker(0): 1}, 6.0)
    fleet.tick(9.0)
    assert not fleet.take(), "nobody kills it for standing still"
    fleet.exited(worker(0), DownCause.KILLED, 9.5)
    assert fleet.take() == to_scheduler(1, WorkerDown(0, 1, DownCause.KILLED))
    for now in (10.0, 20.0, 30.0):
        fleet.tick(now)
    assert fleet.take() == [Rest()], "and with the last one the weights go"
    fleet.grow(1, 1)
    fleet.tick(31.0)
    assert fleet.take() == [Wake()]
    fleet.tick(32.0)
    assert not fleet.take()
    fleet.model_ready(import_s=1.5, weights_s=2.5)
    fleet.tick(35.0)
    assert fleet.take() == [Start(worker(0, 2))]
    fleet.started(worker(0, 2), 35.25)
    fleet.ready(worker(0, 2), 36.0)
    (send,) = fleet.take()
    assert isinstance(send, Send)
    assert send.message == WorkerUp(0, 2, 0, 100, StartTimes(1.5, 2.5, 0.25, 0.75))


def test_who_does_not_leave_is_killed() -> None:
    fleet = scaled()
    fleet.retire(1, worker(0), 5.0)
    fleet.take()
    fleet.tick(5.0 + LEAVE_S_MAX + 0.1)
    (kill,) = fleet.take()
    assert isinstance(kill, Kill)


def test_a_fault_of_an_added_worker_is_not_the_end() -> None:
    fleet = scaled()
    fleet.grow(1, 2)
    fleet.tick(2.0)
    fleet.take()
    fleet.exited(worker(1), DownCause.FAULT, 2.5)
    assert not fleet.take()
    fleet.tick(3.0)
    assert fleet.take() == [Start(worker(1, 2))]


def test_a_dead_api_server() -> None:
    fleet = serving()
    fleet.exited(api(), DownCause.KILLED, 50.0)
    fleet.tick(50.0)
    assert fleet.take() == [*to_scheduler(1, ApiDown(0, 1)), Start(api(2))]
    fleet.drain()
    fleet.exited(api(2), DownCause.KILLED, 51.0)
    fleet.tick(51.0)
    assert [c for c in fleet.take() if isinstance(c, Start)] == []
    assert fleet.apis_gone()


def test_an_external_api_is_never_started() -> None:
    fleet = make(external_api=True)
    fleet.model_ready()
    fleet.tick(0.0)
    assert api() not in [c.address for c in fleet.take() if isinstance(c, Start)]
    fleet.ready(scheduler(), 1.0)
    fleet.take()
    fleet.ready(api(), 2.0)
    assert fleet.take() == [*to_scheduler(1, ApiUp(0, 1)), Send(api(), SchedulerUp(1))]
    fleet.tick(1000.0)
    assert Kill(api(), "not up after 120 s") not in fleet.take()


def test_without_a_warm_parent_workers_wait() -> None:
    fleet = serving()
    fleet.model_lost()
    fleet.exited(worker(0), DownCause.KILLED, 50.0)
    fleet.tick(50.0)
    assert [c for c in fleet.take() if isinstance(c, Start)] == []
    fleet.model_ready()
    fleet.tick(52.0)
    assert fleet.take() == [Start(worker(0, 2))]


def test_a_hang_is_killed_once_and_announced_as_such() -> None:
    fleet = serving()
    now = 1.0
    while now < 10.0:
        fleet.beats({worker(0): 5, worker(1): int(now * 10)}, now)
        now += 0.1
    kills = [c for c in fleet.take() if isinstance(c, Kill)]
    assert [kill.address for kill in kills] == [worker(0)]
    fleet.exited(worker(0), DownCause.KILLED, now)
    assert fleet.take() == to_scheduler(1, WorkerDown(0, 1, DownCause.HUNG))


def test_a_start_that_stands_still_is_killed_long_before_its_limit() -> None:
    fleet = make()
    fleet.model_ready()
    fleet.tick(0.0)
    fleet.take()
    now = 0.1
    while now < STILL_S_MAX + 1.0:  # worker 1 goes on, worker 0 and the scheduler do not
        fleet.beats({worker(0): 7, worker(1): int(now * 10), scheduler(): 0}, now)
        fleet.tick(now)
        now += 0.1
    kills = [c.address for c in fleet.take() if isinstance(c, Kill)]
    assert len(kills) == 2
    assert set(kills) == {worker(0), scheduler()}
    assert set(fleet.watched()) == {worker(1)}


def test_who_stops_reading_is_killed_and_an_older_incarnation_is_nobody() -> None:
    fleet = serving()
    fleet.stuck(worker(0, 9), 1.0)
    assert fleet.take() == []
    fleet.stuck(worker(1), 1.0)
    fleet.stuck(worker(1), 1.1)
    assert [c.address for c in fleet.take() if isinstance(c, Kill)] == [worker(1)]
    fleet.exited(worker(1), DownCause.KILLED, 1.2)
    assert fleet.take() == to_scheduler(1, WorkerDown(1, 1, DownCause.HUNG))


def test_a_supervisor_that_stood_still_itself_blames_nobody() -> None:
    fleet = serving()
    fleet.beats({worker(0): 5}, 1.0)
    fleet.beats({worker(0): 5}, 100.0)
    fleet.beats({worker(0): 5}, 100.1)
    assert fleet.take() == []


def test_what_does_not_come_up_is_killed() -> None:
    fleet = make()
    fleet.tick(0.0)
    fleet.take()
    fleet.tick(START_S_MAX + 1)
    assert [c.address for c in fleet.take() if isinstance(c, Kill)] == [scheduler()]


@pytest.mark.parametrize(
    ("address", "cause", "gives_up"),
    [
        (worker(0), DownCause.FAULT, True),
        (worker(0), DownCause.KILLED, False),
        (api(), DownCause.KILLED, True),
    ],
)
def test_what_ends_before_it_was_ever_up(
    address: Address, cause: DownCause, gives_up: bool
) -> None:
    fleet = make()
    fleet.model_ready()
    fleet.tick(0.0)
    fleet.take()
    fleet.exited(address, cause, 0.5)
    assert any(isinstance(c, GiveUp) for c in fleet.take()) == gives_up


def restarts_s(cause: DownCause, lived_s: float) -> list[float]:
    """Waits before each of ten restarts of worker 0."""
    fleet, now, waits = serving(), 100.0, []
    for epoch in range(1, 11):
        fleet.exited(worker(0, epoch), cause, now)
        ended = now
        while Start(worker(0, epoch + 1)) not in fleet.take():
            fleet.tick(now)
            now += 0.125
        waits.append(now - 0.125 - ended)
        fleet.ready(worker(0, epoch + 1), now)
        now += lived_s
    return waits


def test_only_repeated_fast_faults_are_slowed_down() -> None:
    assert restarts_s(DownCause.KILLED, 0.01) == [0.0] * 10
    assert restarts_s(DownCause.FAULT, FAST_FAULT_S + 1) == [0.0] * 10
    faults = restarts_s(DownCause.FAULT, 0.0)
    assert faults[:4] == [0.0] * 4  # the first one ended a long life
    assert faults[4:7] == [0.5, 1.0, 2.0]
    assert max(faults) == 10.0


@pytest.mark.parametrize("seed", range(30))
def test_random_events(seed: int) -> None:
    """One incarnation at a time, epochs only grow, a Down only for what was told to be Up."""
    rng = random.Random(seed)
    fleet = make()
    now = 0.0
    running: dict[tuple[str, int], int] = {}
    told: dict[int, int] = {}  # worker -> epoch that this scheduler was told is up
    events: list[Callable[[], None]] = [fleet.model_ready, fleet.model_lost]
    for _ in range(400):
        now += rng.random()
        some = list(running.items())
        if some and rng.random() < 0.7:
            (kind, number), epoch = rng.choice(some)
            address = Address(kind, number, epoch)  # type: ignore[arg-type]
            if rng.random() < 0.6:
                fleet.ready(address, now)
            else:
                fleet.exited(address, rng.choice(list(DownCause)), now)
                del running[kind, number]
                if kind == "scheduler":
                    told.clear()
        else:
            rng.choice(events)()
        fleet.tick(now)
        for command in fleet.take():
            if isinstance(command, Start):
                key = (command.address.kind, command.address.number)
                assert key not in running, f"seed {seed}"
                running[key] = command.address.epoch
            elif isinstance(command, Send) and isinstance(command.message, WorkerUp):
                assert running["worker", command.message.worker] == command.message.worker_epoch
                told[command.message.worker] = command.message.worker_epoch
            elif isinstance(command, Send) and isinstance(command.message, WorkerDown):
                epoch = told.pop(command.message.worker, command.message.worker_epoch)
                assert epoch == command.message.worker_epoch, f"seed {seed}"
        for address, state in fleet.states():
            here = running.get((address.kind, address.number)) == address.epoch
            assert here == (state is not State.DOWN), f"seed {seed}: {address} {state}"


# ---- other hosts

FAR_SPECS = [WorkerSpec(2, 1, 0), WorkerSpec(3, 1, 0)]
FAR_POOL = PoolUp(1, 64, 16)


def with_host() -> Fleet:
    """Host 1 has joined a serving head, and its workers are up."""
    fleet = serving()
    fleet.join(1, FAR_SPECS, [FAR_POOL])
    fleet.model_ready(1)
    fleet.tick(2.0)
    for number in (2, 3):
        fleet.ready(worker(number), 3.0)
    told(fleet)
    return fleet


def test_workers_of_a_host_wait_for_its_model() -> None:
    fleet = serving()
    fleet.join(1, FAR_SPECS, [FAR_POOL])
    fleet.tick(2.0)
    assert told(fleet) == to_scheduler(1, FAR_POOL)
    assert fleet.engine_up() is False
    fleet.model_ready(1)
    fleet.tick(2.1)
    assert told(fleet) == [Start(worker(2)), Start(worker(3))]
    fleet.ready(worker(3), 3.0)
    assert told(fleet) == to_scheduler(1, WorkerUp(3, 1, 1, 0))
    assert [fleet.host_of(worker(n)) for n in (0, 2)] == [0, 1]


def test_a_lost_host_takes_its_workers_then_its_pool() -> None:
    fleet = with_host()
    assert fleet.leave(1) == [worker(2), worker(3)]
    downs = [WorkerDown(n, 1, DownCause.KILLED) for n in (2, 3)]
    assert told(fleet) == to_scheduler(1, *downs, PoolDown(1))
    assert fleet.engine_up()
    fleet.ready(worker(2), 4.0)  # what a zombie says
    fleet.stuck(worker(2), 4.0)
    fleet.exited(worker(3), DownCause.FAULT, 4.0)
    fleet.tick(5.0)
    assert told(fleet) == []
    fleet.exited(scheduler(), DownCause.KILLED, 6.0)
    fleet.tick(6.0)
    told(fleet)
    fleet.ready(scheduler(2), 7.0)
    heard = [c.message for c in told(fleet) if isinstance(c, Send) and c.to == scheduler(2)]
    alone = PoolUp(0, 64, 16, apart=True)  # who decodes must not wait for those that are lost
    assert heard == [WorkerUp(0, 1, 0, 100), WorkerUp(1, 1, 0, 0), alone, ApiUp(0, 1)]


def test_the_start_waits_for_as_many_workers_as_were_asked_for() -> None:
    fleet = Fleet([], num_apis=1, external_api=True, pools=[], hang_s=HANG_S, num_workers=2)
    fleet.tick(0.0)
    fleet.ready(scheduler(), 0.5)
    assert not fleet.engine_up()
    fleet.join(1, FAR_SPECS, [FAR_POOL])
    fleet.model_ready(1)
    fleet.tick(1.0)
    fleet.ready(worker(2), 2.0)
    assert not fleet.engine_up()
    fleet.ready(worker(3), 2.0)
    assert fleet.engine_up()


def test_a_joined_host_whose_workers_crash_at_once_is_not_the_end() -> None:
    fleet = with_host()
    fleet.join(2, [WorkerSpec(4, 2, 0)], [PoolUp(2, 64, 16)])
    fleet.model_ready(2)
    fleet.tick(3.0)
    fleet.exited(worker(4), DownCause.FAULT, 3.1)
    assert [c for c in told(fleet) if isinstance(c, GiveUp)] == []


@pytest.mark.parametrize(
    ("sender", "peer", "victim"),
    [
        (worker(2), worker(0), worker(0)),
        (worker(2), scheduler(), worker(2)),
        (scheduler(), worker(3), worker(3)),
        (api(), worker(3), worker(3)),
        (worker(3), api(), worker(3)),
        (api(), scheduler(), None),
    ],
)
def test_a_broken_connection_between_two_that_live_costs_a_worker(
    sender: Address, peer: Address, victim: Address | None
) -> None:
    fleet = with_host()
    fleet.cut(sender, peer, 10.0)
    fleet.tick(10.5)
    assert told(fleet) == []
    fleet.tick(10.0 + CUT_S + 0.1)
    killed = [] if victim is None else [victim]
    assert [c.address for c in told(fleet) if isinstance(c, Kill)] == killed
    fleet.tick(20.0)
    assert [c for c in told(fleet) if isinstance(c, Kill)] == []


def test_a_connection_to_one_that_died_is_no_news() -> None:
    fleet = with_host()
    fleet.cut(worker(2), scheduler(), 10.0)
    fleet.cut(worker(3), scheduler(), 10.0)
    fleet.exited(scheduler(), DownCause.KILLED, 10.2)
    fleet.tick(10.3)
    fleet.ready(scheduler(2), 10.4)
    fleet.tick(12.0)
    assert [c for c in told(fleet) if isinstance(c, Kill)] == []


def test_an_api_server_of_a_host_is_started_there_and_lost_with_it() -> None:
    fleet = serving()
    fleet.join(1, [], [], apis=[1])
    there = Address("api", 1, 1)
    fleet.tick(2.0)
    assert told(fleet) == [Start(there)]
    assert fleet.host_of(there) == 1
    fleet.ready(there, 3.0)
    assert told(fleet) == [*to_scheduler(1, ApiUp(1, 1)), Send(there, SchedulerUp(1))]
    assert fleet.leave(1) == [there]
    assert told(fleet) == to_scheduler(1, ApiDown(1, 1))
    assert not fleet.apis_gone()


# ---- hosts of one worker each, that come and go


def elastic() -> Fleet:
    """Two hosts were asked for, joined, and serve."""
    fleet = Fleet(
        [], num_apis=1, external_api=True, pools=[], hang_s=HANG_S, num_workers=2, elastic=2
    )
    fleet.tick(0.0)
    assert Places(2) in told(fleet)
    fleet.ready(scheduler(), 0.5)
    for host in (1, 2):
        fleet.join(host, [WorkerSpec(host, host, 50)], [PoolUp(host, 64, 16)])
        fleet.model_ready(host)
        fleet.tick(1.0)
        fleet.ready(worker(host), 2.0)
    assert fleet.engine_up()
    told(fleet)
    return fleet


def test_more_workers_are_places_for_hosts() -> None:
    fleet = elastic()
    fleet.grow(1, 3)
    fleet.grow(1, 3)
    fleet.tick(3.0)
    assert told(fleet) == [Places(3)]
    fleet.grow(1, 2)
    fleet.tick(4.0)
    assert told(fleet) == [Places(2)]


def test_a_host_goes_once_its_worker_has_left() -> None:
    fleet = elastic()
    fleet.retire(1, worker(2), 3.0, wanted=1)
    fleet.tick(3.0)
    assert told(fleet) == [Send(worker(2), Drain(0.0))], "until then it has its place"
    fleet.exited(worker(2), DownCause.KILLED, 3.5)
    fleet.tick(3.6)
    commands = told(fleet)
    assert [c for c in commands if isinstance(c, Start)] == [], "it does not come again"
    assert commands[-2:] == [Dismiss(2), Places(1)]
    fleet.tick(3.7)
    assert told(fleet) == []
    assert fleet.leave(2) == [worker(2, 2)]
    assert told(fleet) == to_scheduler(1, PoolDown(2))


def test_a_dismissed_host_is_not_asked_for_again_but_another_is() -> None:
    fleet = elastic()
    fleet.retire(1, worker(2), 3.0, wanted=1)
    fleet.grow(1, 2)
    fleet.tick(3.1)
    assert Places(3) in told(fleet), "the one that leaves keeps its place until it is gone"
    fleet.exited(worker(2), DownCause.KILLED, 3.5)
    fleet.tick(3.6)
    assert told(fleet)[-2:] == [Dismiss(2), Places(2)]


def test_down_to_no_host_and_back() -> None:
    fleet = elastic()
    for number, left in ((2, 1), (1, 0)):
        fleet.retire(1, worker(number), 3.0, wanted=left)
        fleet.exited(worker(number), DownCause.KILLED, 3.5)
        fleet.tick(3.6)
        assert told(fleet)[-2:] == [Dismiss(number), Places(left)]
        fleet.leave(number)
    told(fleet)
    fleet.grow(1, 1)
    fleet.tick(10.0)
    assert told(fleet) == [Places(1)]
    fleet.join(3, [WorkerSpec(3, 3, 50)], [PoolUp(3, 64, 16)])
    fleet.model_ready(3)
    fleet.tick(11.0)
    assert Start(worker(3)) in told(fleet)


def test_a_worker_that_crashes_keeps_its_host() -> None:
    fleet = elastic()
    fleet.exited(worker(2), DownCause.KILLED, 30.0)
    fleet.tick(31.0)
    assert [c for c in told(fleet) if isinstance(c, Dismiss | Places)] == []
