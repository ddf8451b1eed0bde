"""The core table: one byte per rank."""

from diptych.engine.core.config import WorkerSpec
from diptych.transfer.core_table import BUSY, PREFILL, CoreTable, rank_slots


def test_work_and_rest() -> None:
    memory, slots = bytearray(3), [range(worker, worker + 1) for worker in range(3)]
    table = CoreTable(memoryview(memory), slots)
    for slot, dial in enumerate((100, 0, 50)):
        table.introduce(slot, dial)
    assert list(memory) == [PREFILL, 0, 0]
    table.wake(0, 100)
    table.wake(2, 50)
    assert list(memory) == [PREFILL | BUSY, 0, BUSY]
    assert [table.busy(slot) for slot in range(3)] == [True, False, True]
    table.rest(0)
    assert list(memory) == [PREFILL, 0, BUSY]


def test_a_moved_dial_changes_the_side() -> None:
    memory, slots = bytearray(1), [range(1)]
    table = CoreTable(memoryview(memory), slots)
    table.introduce(0, 100)
    table.wake(0, 0)
    assert list(memory) == [BUSY]
    table.wake(0, 80)
    assert list(memory) == [BUSY | PREFILL]


def test_the_ranks_of_a_worker_wake_and_rest_together() -> None:
    slots = rank_slots([WorkerSpec(0, 0, 100, 2), WorkerSpec(1, 0, 0), WorkerSpec(2, 0, 0, 3)])
    assert slots == [range(2), range(2, 3), range(3, 6)]
    memory = bytearray(6)
    table = CoreTable(memoryview(memory), slots)
    table.wake(0, 100)
    table.wake(2, 0)
    assert list(memory) == [PREFILL | BUSY, PREFILL | BUSY, 0, BUSY, BUSY, BUSY]
    table.rest(2)
    assert [table.busy(worker) for worker in range(3)] == [True, False, False]
