"""The control page against a plain model of it, with the writer cut off between any two stores."""

import random
from hashlib import sha256

import pytest

from diptych.transfer import control_page
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.shared_memory import SharedMemory, create_memory

BLOCKS = 8


def name(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def test_memory_is_shared_zeroed_and_unnamed() -> None:
    import os

    fd = create_memory("test", 4 << 20)
    first, second = SharedMemory(fd, 4 << 20), SharedMemory(fd, 4 << 20)
    os.close(fd)
    assert not any(first.view[::4096])
    first.view[5] = 9
    assert second.view[5] == 9
    first.close()
    second.close()


@pytest.mark.parametrize("seed", range(20))
def test_entries_against_a_model(seed: int) -> None:
    rng = random.Random(seed)
    page = ControlPage(memoryview(bytearray(page_bytes(BLOCKS, 1))), BLOCKS, 1)
    generations = [0] * BLOCKS
    valid: dict[int, tuple[int, bytes, bytes]] = {}
    for number in range(200):
        block = rng.randrange(BLOCKS)
        if generations[block] == 0 or rng.random() < 0.5:
            generations[block] += rng.randint(1, 3)
            page.clear(block, generations[block])
            valid.pop(block, None)
        elif block not in valid:
            page.commit(block, generations[block], name(number), name(number + 1))
            valid[block] = (generations[block], name(number), name(number + 1))
        got_generations, entries = page.read_all()
        assert got_generations == generations, f"seed {seed}"
        got = {entry.block: (entry.generation, entry.hash, entry.parent) for entry in entries}
        assert got == valid, f"seed {seed}"


class Killed(Exception):
    pass


class DyingView:
    """A column that lets `budget` writes through, counted over all columns, then dies."""

    def __init__(self, view: memoryview, budget: list[int]) -> None:
        self._view = view
        self._budget = budget

    def __getitem__(self, index: int | slice) -> object:
        return self._view[index]

    def __setitem__(self, index: int | slice, value: object) -> None:
        if self._budget[0] == 0:
            raise Killed
        self._budget[0] -= 1
        self._view[index] = value  # type: ignore[call-overload]


@pytest.mark.parametrize("stores", range(9))
def test_a_writer_killed_between_two_stores_leaves_no_wrong_entry(
    stores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memoryview(bytearray(page_bytes(BLOCKS, 1)))
    writer = ControlPage(memory, BLOCKS, 1)
    budget = [stores]
    for column in ("_generation", "_committed", "_hash", "_parent"):
        setattr(writer, column, DyingView(getattr(writer, column), budget))

    def store(column: DyingView, start: int, value: bytes) -> None:
        column[start : start + len(value)] = value

    monkeypatch.setattr(control_page, "_PACK_HASH", store)
    try:
        writer.clear(3, 1)
        writer.commit(3, 1, name(1), name(0))
        writer.clear(3, 2)
        writer.commit(3, 2, name(2), name(0))
    except Killed:
        pass
    _, entries = ControlPage(memory, BLOCKS, 1).read_all()
    for entry in entries:
        assert (entry.hash, entry.parent) == (name(entry.generation), name(0))
    assert len(entries) == (1 if stores in (4, 8) else 0)


def test_pulse() -> None:
    page = ControlPage(memoryview(bytearray(page_bytes(BLOCKS, 3))), BLOCKS, 3)
    page.step_begin(1)
    page.beat(1)
    busy = page.pulse(1)
    page.counter(1)[0] += 1
    page.step_end(1)
    idle = page.pulse(1)
    assert (busy.busy, idle.busy, busy.steps, idle.counter) == (True, False, 1, 4)
    assert page.pulse(0).counter == page.pulse(2).counter == 0
    assert page.read_all() == ([0] * BLOCKS, [])
