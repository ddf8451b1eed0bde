"""The core table: one byte per worker."""

from diptych.transfer.core_table import BUSY, PREFILL, CoreTable


def test_work_and_rest() -> None:
    memory = bytearray(3)
    table = CoreTable(memoryview(memory))
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
    memory = bytearray(1)
    table = CoreTable(memoryview(memory))
    table.introduce(0, 100)
    table.wake(0, 0)
    assert list(memory) == [BUSY]
    table.wake(0, 80)
    assert list(memory) == [BUSY | PREFILL]
