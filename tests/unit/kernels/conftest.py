"""Tests that ask for `cpp` run on every level of this machine; each leaves one thread behind."""

from collections.abc import Iterator

import pytest
import torch

from diptych.kernels import library
from diptych.kernels.cpp import CppKernels, available_levels
from diptych.kernels.reference import ReferenceKernels

LEVELS = available_levels() if library.find() is not None else []


@pytest.fixture(params=LEVELS)
def cpp(request: pytest.FixtureRequest) -> Iterator[CppKernels]:
    kernels = CppKernels(request.param)
    kernels.set_num_threads(1)
    yield kernels
    kernels.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The reference computes tiny things: torch's own threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference() -> ReferenceKernels:
    return ReferenceKernels()
