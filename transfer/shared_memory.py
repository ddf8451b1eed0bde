"""Anonymous shared memory of one host: memfd, passed by descriptor, so that nothing can leak.

Owns the mapping. Invariant: the memory has no name anywhere; it is gone when the last process that
holds the descriptor or a mapping of it ends, however that process ended.
"""

import mmap
import os
from contextlib import suppress
from typing import Final

from diptych.engine.core.errors import ConfigError

_HUGE_PAGE_BYTES: Final = 2 << 20


def create_memory(name: str, num_bytes: int) -> int:
    """A descriptor of zeroed memory, allocated on first touch. `name` is for /proc only."""
    fd = os.memfd_create(f"diptych-{name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, max(num_bytes, mmap.PAGESIZE))
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot reserve {num_bytes} bytes of shared memory: {error}") from error
    return fd


class SharedMemory:
    """A mapping of `create_memory`'s descriptor. Keeps no hold on the descriptor itself."""

    def __init__(self, fd: int, num_bytes: int, *, writable: bool = True) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        self._map = mmap.mmap(fd, max(num_bytes, mmap.PAGESIZE), mmap.MAP_SHARED, access)
        self.view = memoryview(self._map)[:num_bytes]
        if num_bytes >= _HUGE_PAGE_BYTES:
            with suppress(OSError):  # a kernel without huge pages here: small ones serve as well
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def close(self) -> None:
        """Unmaps. Every view of the memory must be released before, else BufferError."""
        self.view.release()
        self._map.close()
