"""The sharing of a host's cores: spans against their rules, and where the threads then work."""

import mmap
import os
import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diptych.kernels import library
from diptych.kernels.cpp import CppKernels

BUSY, PREFILL = 1, 2


def span(table: list[int], slot: int, cores: int, share: int = 50, limit: int = 256) -> list[int]:
    """[begin, end, seat] of a busy worker."""
    out = torch.zeros(3, dtype=torch.int32)
    states = torch.tensor(table, dtype=torch.uint8)
    library.load().core_span(out, states, slot, cores, share, limit)
    return [int(value) for value in out]


def test_an_idle_host_is_one_workers_own() -> None:
    assert span([BUSY | PREFILL, 0], 0, 8)[:2] == [0, 8]
    assert span([PREFILL, BUSY], 1, 8)[:2] == [0, 8]


def test_prefill_and_decode_share_by_the_percentage() -> None:
    both = [BUSY | PREFILL, BUSY]
    assert [span(both, slot, 8) for slot in (0, 1)] == [[0, 4, 0], [4, 8, 4]]
    assert [span(both, slot, 8, share=75) for slot in (0, 1)] == [[0, 6, 0], [6, 8, 6]]
    assert [span(both, slot, 2, share=0) for slot in (0, 1)] == [[0, 1, 0], [1, 2, 1]]
    assert [span(both, slot, 1)[2] for slot in (0, 1)] == [0, 0]


def test_a_worker_keeps_its_seat_when_a_neighbour_comes() -> None:
    assert span([PREFILL, BUSY], 1, 2) == [0, 2, 1]
    assert span([PREFILL | BUSY, BUSY], 1, 2) == [1, 2, 1]


def test_more_workers_than_cores_keep_their_sides_apart() -> None:
    table = [BUSY | PREFILL, BUSY | PREFILL, BUSY, BUSY]
    assert [span(table, slot, 2)[2] for slot in range(4)] == [0, 0, 1, 1]


def test_spans_of_any_host() -> None:
    """Busy workers never overlap, waste no core, and share evenly within their side."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for _ in range(2000):
        workers, cores, share = rng.randint(1, 12), rng.randint(1, 24), rng.randint(0, 100)
        table = [rng.randrange(4) for _ in range(workers)]
        busy = [slot for slot in range(workers) if table[slot] & BUSY]
        spans = {slot: span(table, slot, cores, share) for slot in busy}
        note = f"seed {seed}: {table} {cores=} {share=} {spans}"
        sides = [[s for s in busy if bool(table[s] & PREFILL) == side] for side in (False, True)]
        owned = [core for begin, end, _ in spans.values() for core in range(begin, end)]
        if cores > 1 or not all(sides):
            assert sorted(owned) == (list(range(cores)) if busy else []), note
        for side in sides:
            sizes = [spans[slot][1] - spans[slot][0] for slot in side]
            assert not sizes or max(sizes) - min(sizes) <= 1, note
            low = min((spans[slot][0] for slot in side), default=0)
            high = max((spans[slot][1] for slot in side), default=cores)
            for slot in side:
                begin, end, seat = spans[slot]
                assert begin <= seat < end if begin < end else low <= seat < high, note
        for slot in busy:
            limit = rng.randint(1, cores)
            begin, end, seat = span(table, slot, cores, share, limit)
            whole = spans[slot]
            assert whole[0] <= begin <= end <= whole[1], note
            assert end - begin == min(limit, whole[1] - whole[0]), note
            assert seat == whole[2], note
            assert begin == end or begin <= seat < end, note


class Shared:
    """In a forked child: worker 0 of two on cores 0 and 1 (as far as this machine has them)."""

    def __init__(self) -> None:
        self.cores = sorted(os.sched_getaffinity(0))[:2]
        self.table = torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.uint8, count=2)
        self.kernels = CppKernels()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(2048, 256, generator=generator)
        self.packed = self.kernels.pack_linear(weight, None)
        self.x = torch.randn(32, 256, generator=generator)
        self.right = self.run()
        self.table[0] = BUSY | PREFILL
        self.kernels.set_num_threads(len(self.cores))
        self.kernels.share_cores(self.table, 0, self.cores, 50)

    def run(self) -> Tensor:
        out = torch.empty(self.x.shape[0], self.packed.num_out)
        self.kernels.linear(out, self.x, self.packed)
        return out

    def items(self) -> list[int]:
        counts = torch.zeros(2, dtype=torch.int64)
        library.load().items_of_cores(counts)
        return [int(count) for count in counts]


def _in_a_child(check: Callable[[Shared], None]) -> None:
    """Cores stay shared for the life of a process, so that the tests' own must not be it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check(Shared())
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _neighbours_core(shared: Shared) -> None:
    """Used while the neighbour is idle, and never while it is busy."""
    deadline = time.monotonic() + 60
    while len(shared.cores) == 2 and not shared.items()[1]:
        assert torch.equal(shared.run(), shared.right)
        assert time.monotonic() < deadline, "an idle neighbour's core was never used"
    assert os.sched_getaffinity(0) == {shared.cores[0]}
    shared.table[1] = BUSY
    shared.run()  # a job that was open when the neighbour woke may still have an item there
    before = shared.items()
    for _ in range(50):
        assert torch.equal(shared.run(), shared.right)
    after = shared.items()
    assert after[1] == before[1]
    assert after[0] > before[0]


def _neighbour_comes_and_goes(shared: Shared) -> None:
    """Every job ends with the right bits, whoever wakes in its middle."""
    over = threading.Event()

    def toggle() -> None:
        while not over.wait(0.0003):
            shared.table[1] ^= BUSY

    thread = threading.Thread(target=toggle)
    thread.start()
    for _ in range(300):
        assert torch.equal(shared.run(), shared.right)
    over.set()
    thread.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("check", [_neighbours_core, _neighbour_comes_and_goes])
def test_threads_keep_to_the_table(check: Callable[[Shared], None]) -> None:
    _in_a_child(check)
