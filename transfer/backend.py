"""The contract of everything that moves blocks from a peer's pool into the own one.

register: the constructor gets the own pool, and what it needs to reach the peers'. read: begin.
poll: what ended since, each read exactly once. cancel: from here on nothing is written into the
read's own blocks, or the read ends later with `ReadFailed`; either way it is answered. close: as if
all were cancelled. Nothing blocks. Invariant: a read is answered only when it writes no more, and
its generations were read at the source after its data.
"""

from typing import Protocol

from diptych.transfer.spans import Read, ReadDone, ReadFailed

POLL_BYTES_MAX = 8 << 20
"""Bytes moved in one `poll`: it stands between two steps of the worker."""


class Backend(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def eager(self) -> bool:
        """`poll` has something to do without waiting for a descriptor."""
        ...

    def read(self, read: Read) -> None: ...

    def poll(self) -> list[ReadDone | ReadFailed]: ...

    def cancel(self, handle: int) -> None: ...

    def fds(self) -> dict[int, bool]:
        """Descriptors whose readability (True: or writability) makes `poll` worth calling."""
        ...

    def close(self) -> None: ...
