"""The waiting room: order, caps, and a Retry-After that follows the drain rate."""

import random

import pytest

from diptych.engine.core.messages import ChoiceState
from diptych.scheduler.queue import RankHeap, WaitingRoom
from diptych.scheduler.rows import Row, RowTable
from tests.unit.scheduler.world import make_request


def make_row(table: RowTable, name: str, *, rank: int = 0, priority: int = 0, n: int = 4) -> Row:
    request = make_request(name, range(n), rank=rank, priority=priority)
    return table.add(table.open(request, 0, 1), ChoiceState(0, 0, b"", []))


def test_lower_priority_then_lower_rank_then_arrival() -> None:
    rows, heap = RowTable(), RankHeap()
    order = [("a", 5, 1), ("b", 9, 0), ("c", 3, 1), ("d", 3, 1)]
    for name, rank, priority in order:
        row = make_row(rows, name, rank=rank, priority=priority)
        heap.push(row, row.order)
    seen = []
    while (first := heap.peek()) is not None:
        seen.append(first.key[0])
        heap.discard(first)
    assert seen == ["b", "c", "d", "a"]


@pytest.mark.parametrize("seed", range(10))
def test_a_heap_with_departures_matches_a_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    rows, heap = RowTable(), RankHeap()
    every = [make_row(rows, f"r{i}", rank=rng.randrange(20)) for i in range(40)]
    inside: list[Row] = []
    for _ in range(1000):
        row = rng.choice(every)
        assert (row in heap) == (row in inside), f"seed {seed}"
        if row in inside:
            assert heap.discard(row)
            inside.remove(row)
        else:
            assert not heap.discard(row)
            heap.push(row, row.order)
            inside.append(row)
        first = heap.peek()
        assert first is min(inside, key=lambda r: r.order, default=None), f"seed {seed}"
        assert len(heap) == len(inside)
        assert len(heap._heap) <= 2 * len(every) + 65


def test_caps_count_sequences_and_tokens() -> None:
    rows, room = RowTable(), WaitingRoom(3, 100, 60.0)
    assert room.has_room(3, 100)
    assert not room.has_room(4, 1)
    assert not room.has_room(1, 101)
    row = make_row(rows, "a", n=60)
    room.enter(row)
    assert room.has_room(2, 40)
    assert not room.has_room(2, 41)
    assert not room.has_room(3, 1)
    room.leave(row)
    assert room.has_room(3, 100)
    room.check_integrity()


def test_a_held_row_waits_but_is_not_tried() -> None:
    rows, room = RowTable(), WaitingRoom(9, 100, 60.0)
    row = make_row(rows, "a")
    room.enter(row)
    room.hold(row, b"h")
    assert room.ready.peek() is None
    assert room.num_rows == 1
    room.wake([row], b"other")
    assert room.ready.peek() is None
    room.wake([row], b"h")
    assert room.ready.peek() is row
    room.leave(row)
    assert room.num_rows == 0


def test_retry_after_follows_the_drain_rate() -> None:
    rows, room = RowTable(), WaitingRoom(9, 10_000, 60.0)
    assert room.retry_after_s() == 60.0
    for i in range(8):
        room.enter(make_row(rows, f"r{i}"))
    now = 0.0
    for step in range(400):  # two rows a second
        if step % 5 == 0:
            room.rate.placed()
        room.rate.tick(now, room.num_rows)
        now += 0.1
    assert room.rate.rows_per_s == pytest.approx(2.0, rel=0.35)
    assert 3.0 <= room.retry_after_s() <= 7.0


def test_an_idle_queue_does_not_lower_the_rate() -> None:
    rows, room = RowTable(), WaitingRoom(9, 10_000, 60.0)
    row = make_row(rows, "a")
    room.enter(row)
    room.rate.tick(0.0, 1)
    for _ in range(10):
        room.rate.placed()
    room.rate.tick(1.0, 0)
    assert room.rate.rows_per_s == pytest.approx(10.0)
    for now in range(2, 50):
        room.rate.tick(float(now), 0)
    assert room.rate.rows_per_s == pytest.approx(10.0)
    assert room.retry_after_s() == 1.0
