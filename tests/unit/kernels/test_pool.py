"""The thread pool: forks, concurrent callers, idleness."""

import os
import threading
import time

import pytest
import torch
from torch import Tensor

from diptych.kernels.base import PackedLinear
from diptych.kernels.cpp import CppKernels


def _problem(cpp: CppKernels) -> tuple[PackedLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    return cpp.pack_linear(weight, None), torch.randn(32, 256, generator=generator)


def _run(cpp: CppKernels, packed: PackedLinear, x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], packed.num_out)
    cpp.linear(out, x, packed)
    return out


def _fork_and_compare(cpp: CppKernels, packed: PackedLinear, x: Tensor, right: Tensor) -> int:
    """The child's exit status: 0 if it computed the same with three threads."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            cpp.set_num_threads(3)
            same = all(torch.equal(_run(cpp, packed, x), right) for _ in range(20))
            tasks = len(os.listdir("/proc/self/task"))
            status = 0 if same and tasks >= 3 else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it works is the point
def test_a_forked_child_has_its_own_pool(cpp: CppKernels) -> None:
    packed, x = _problem(cpp)
    right = _run(cpp, packed, x)
    assert _fork_and_compare(cpp, packed, x, right) == 0
    cpp.set_num_threads(3)
    assert torch.equal(_run(cpp, packed, x), right)
    assert _fork_and_compare(cpp, packed, x, right) == 0
    assert torch.equal(_run(cpp, packed, x), right)


def test_callers_on_several_threads_do_not_disturb_each_other(cpp: CppKernels) -> None:
    packed, x = _problem(cpp)
    right = _run(cpp, packed, x)
    cpp.set_num_threads(3)
    wrong: list[int] = []

    def work(rows: int) -> None:
        for _ in range(100):
            if not torch.equal(_run(cpp, packed, x[:rows].contiguous()), right[:rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 8, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_idle_workers_burn_no_cpu() -> None:
    cpp = CppKernels()
    packed, x = _problem(cpp)
    cpp.set_num_threads(3)
    try:
        _run(cpp, packed, x)
        before = time.process_time()
        threading.Event().wait(0.2)
        assert time.process_time() - before < 0.05
    finally:
        cpp.set_num_threads(1)
