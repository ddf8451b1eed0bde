"""What a worker and its NIXL process say to each other, and two NIXL processes to find each other.

Orders and answers are msgpack, one a packet, over a Unix socket; a bell (an eventfd) each way says
that there are some. Nobody sleeps on the socket: Linux takes its writer to be about to sleep, and
wakes the reader on the writer's core, where the copying is to go on. Owns nothing. Invariant: every
`NixlRead` is answered by `NixlDone` or `ReadFailed`, or by the end of the process.
"""

import importlib.util
import os
from contextlib import suppress
from typing import Final

import msgspec

from diptych.engine.core.errors import ConfigError
from diptych.transfer.spans import CancelRead, ReadFailed

PACKET_BYTES_MAX: Final = 1 << 20
START_S_MAX: Final = 60.0
"""From the start of the process to its `NixlUp`: it loads 120 MB of libraries."""
ALIVE_S: Final = 0.5
"""So often it says something."""
SILENT_S_MAX: Final = 3.0
"""After so long without a word it stands still, and is killed."""
STALL_S_MAX: Final = 5.0
"""A transfer that takes longer ends the process, and with it whatever might still write."""


class NixlBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For the process, on its standard input."""

    worker_pid: int
    control_fd: int
    order_bell_fd: int  # rung by the worker
    answer_bell_fd: int  # by the process
    listen_fd: int  # where peers ask for `NixlCard`
    pool_fd: int
    page_fd: int
    num_blocks: int
    num_pulses: int
    block_bytes: int
    key: str  # hex
    layout: str  # hex, of the own pool, which is served
    peer_layout: str  # hex, of the pools that are read
    into_fd: int  # where they are read into: the own pool, or a staging memory of their layout
    into_blocks: int
    into_block_bytes: int
    loopback: bool  # nothing but the loopback device may be used


class NixlUp(msgspec.Struct, frozen=True, tag=True):
    """It takes orders; repeated when there was nothing else to say."""


class NixlMoved(msgspec.Struct, frozen=True, tag=True):
    """These own blocks are here: digests are for the worker to take, while more is on its way."""

    own: bytes  # int32 each


class NixlDone(msgspec.Struct, frozen=True, tag=True):
    """All blocks of these reads are here, as was said, and their generations were read after."""

    handles: list[int]
    generations: bytes  # u64 each, by block, of one read after the other


class NixlFailed(msgspec.Struct, frozen=True, tag=True):
    handle: int
    reason: str
    lost: bool = False
    refused: bool = False

    def as_answer(self) -> ReadFailed:
        return ReadFailed(self.handle, self.reason, self.lost, self.refused)


class NixlRead(msgspec.Struct, frozen=True, tag=True):
    """A `Read`, with its blocks as int32: this side computes, that side copies."""

    handle: int
    endpoint: str
    source: bytes
    own: bytes


class NixlCancel(msgspec.Struct, frozen=True, tag=True):
    cancel: CancelRead


class NixlCard(msgspec.Struct, frozen=True, kw_only=True):
    """How to read the pool of the process that hands it out, after the hello of tcp_wire."""

    metadata: bytes  # of the agent
    pool_address: int
    generations_address: int
    num_blocks: int


NixlOrder = NixlRead | NixlCancel
NixlAnswer = NixlUp | NixlMoved | NixlDone | NixlFailed


def make_bell() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def ring(bell: int) -> None:
    os.eventfd_write(bell, 1)


def still(bell: int) -> None:
    """Until it is rung again; what it was rung for is looked at after this."""
    with suppress(BlockingIOError):
        os.eventfd_read(bell)


def nixl_installed() -> bool:
    return any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))


def require_nixl() -> None:
    """Raises ConfigError where NIXL is not installed."""
    if not nixl_installed():
        raise ConfigError(
            "--transfer nixl needs NIXL, which is not installed; run `pip install 'diptych[nixl]'`"
        )
