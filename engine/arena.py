"""Memory that packed weights live in: one private mapping, on huge pages where the system has them.

Owns the mapping, which lives as long as a tensor of it. Invariant: what was carved out never moves
and never overlaps. A forked child shares every page of it, since nobody writes after packing.
"""

import ctypes
import mmap
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

__all__ = ["Arena"]

_ALIGN: Final = 64  # bytes: what the kernels' widest loads like
_HUGE: Final = 2 << 20


class Arena:
    """`empty` carves tensors out, in order; fresh pages cost nothing until they are written."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_bytes + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages: small ones serve as well
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._used = -address % _HUGE
        self._end = self._used + num_bytes

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] uninitialised; ordinary memory once the arena is full."""
        begin = -(-self._used // _ALIGN) * _ALIGN
        end = begin + size * dtype.itemsize
        if end > self._end:
            return torch.empty(size, dtype=dtype)
        self._used = end
        return self._bytes[begin:end].view(dtype)

    def holds(self, tensor: Tensor) -> bool:
        first = self._bytes.data_ptr()
        return first <= tensor.data_ptr() < first + self._bytes.numel()

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it lies here already, else a copy of it that does."""
        if self.holds(tensor) or tensor.numel() == 0:
            return tensor
        copy = self.empty(tensor.numel(), tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)
