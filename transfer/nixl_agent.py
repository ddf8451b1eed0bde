"""NIXL's agent, as far as this engine needs it; the only module that imports NIXL.

Lives in the NIXL process of a worker. Owns the registered memory and the transfers. Invariant: a
transfer whose end cannot be proven ends the process, for then nothing writes any more.
"""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np

from diptych.transfer.control_page import generations_offset, page_bytes
from diptych.transfer.nixl_wire import NixlBoot, NixlCard
from diptych.transfer.shared_memory import SharedMemory

try:
    from nixl_cu13 import _bindings as nixl
except ImportError:
    from nixl_cu12 import _bindings as nixl

PROGRESS_DELAY_US: Final = 200  # NIXL's own Python module leaves it at 0: the thread would spin
COPY_THREADS_MAX: Final = 2
SPLIT_BLOCKS: Final = 16
"""Transfers of so many pieces go over NIXL's threads; smaller ones are carried out by the post."""
ENTRIES: Final = 512  # generations of one page of the column
SCRATCH_PAGES: Final = 256

Indices = np.ndarray[Any, np.dtype[np.int32]]  # [count]

_log = logging.getLogger("diptych")


def copy_threads() -> dict[str, str]:
    """For the pools of one host, where no device moves the bytes: two threads copy faster than one,
    and the posts return, so that this process answers while they copy."""
    threads = min(COPY_THREADS_MAX, len(os.sched_getaffinity(0)))
    return {"num_threads": str(threads), "split_batch_size": str(SPLIT_BLOCKS)}


class Agent:
    """NIXL's agent with the own pool and page registered."""

    def __init__(self, boot: NixlBoot) -> None:
        if boot.loopback:
            os.putenv("UCX_NET_DEVICES", "lo")  # it would listen on every address
        config = nixl.nixlAgentConfig()
        config.useProgThread = True  # without it a peer's read of a passive side never ends
        config.pthrDelay = PROGRESS_DELAY_US
        self._has_threads = boot.loopback
        self.raw = nixl.nixlAgent(f"diptych-{os.getpid()}-{os.urandom(8).hex()}", config)
        self._backend = self.raw.createBackend("UCX", copy_threads() if boot.loopback else {})
        pool_bytes = boot.num_blocks * boot.block_bytes
        self._pool = SharedMemory(boot.pool_fd, pool_bytes)
        into_bytes = boot.into_blocks * boot.into_block_bytes
        self._into = SharedMemory(boot.into_fd, into_bytes)
        self._page = SharedMemory(boot.page_fd, page_bytes(boot.num_blocks, boot.num_pulses))
        self.scratch = np.zeros((SCRATCH_PAGES, ENTRIES), np.uint64)
        pool, page, into = (
            self._register(np.frombuffer(memory.view, np.uint8))
            for memory in (self._pool, self._page, self._into)
        )
        scratch = self._register(self.scratch)
        self.blocks = self.prepare(None, into, boot.into_block_bytes, boot.into_blocks)
        self._scratch_address = scratch
        self.peer_block_bytes = boot.into_block_bytes
        self.card = NixlCard(
            metadata=self.raw.getLocalMD(),
            pool_address=pool,
            generations_address=page + generations_offset(boot.num_pulses),
            num_blocks=boot.num_blocks,
        )

    def _register(self, memory: "np.ndarray[Any, Any]") -> int:
        address = int(memory.__array_interface__["data"][0])
        rows = [(address, memory.nbytes, 0, "")]
        self.raw.registerMem(nixl.nixlRegDList(nixl.DRAM_SEG, rows), [self._backend])
        return address

    def prepare(self, name: bytes | None, address: int, size: int, count: int) -> Any:
        """`count` pieces of `size` bytes, one after the other; of a peer, or own."""
        return self.prepare_rows(name, [(address + i * size, size, 0) for i in range(count)])

    def scratch_pages(self, size: int) -> Any:
        """The pages of `scratch`, of which `size` bytes each are used."""
        at, step = self._scratch_address, 8 * ENTRIES
        return self.prepare_rows(None, [(at + i * step, size, 0) for i in range(SCRATCH_PAGES)])

    def prepare_rows(self, name: bytes | None, rows: list[tuple[int, int, int]]) -> Any:
        pieces = nixl.nixlXferDList(nixl.DRAM_SEG, np.array(rows, np.uint64))
        return self.raw.prepXferDlist(nixl.NIXL_INIT_AGENT if name is None else name, pieces, [])

    def make(self, mine: Any, own: Indices, theirs: Any, source: Indices) -> "Transfer":
        """Not begun yet. Raises an error of NIXL's where the peer has no such blocks."""
        request = self.raw.makeXferReq(nixl.NIXL_READ, mine, own, theirs, source, b"", [], False)
        return Transfer(self, request, self._has_threads and len(own) >= SPLIT_BLOCKS)


class PeerGone(Exception):
    """UCX saw its peer die, and has ended what was under way with it."""


@dataclass(slots=True)
class Transfer:
    agent: Agent
    request: Any  # None: over
    is_split: bool  # over threads: one that sees the peer dead does not speak for the others

    def post(self) -> None:
        """A small one copies before it returns, under CMA: one of the traps this process is for."""
        self._judge(lambda: self.agent.raw.postXferReq(self.request, b""))

    def over(self) -> bool:
        if self.request is not None:
            self._judge(lambda: self.agent.raw.getXferStatus(self.request))
        return self.request is None

    def _judge(self, call: Callable[[], Any]) -> None:
        try:
            state = call()
        except nixl.nixlRemoteDisconnectError as error:
            if self.is_split:
                end_process(f"a peer of several threads is gone: {words(error)}")
            self._release()
            raise PeerGone(str(error)) from error
        except Exception as error:  # does it write still? Nothing of NIXL's tells
            end_process(f"a transfer failed: {words(error)}")
        if state == nixl.NIXL_SUCCESS:
            self._release()
        elif state != nixl.NIXL_IN_PROG:
            end_process(f"a transfer failed: {state}")

    def _release(self) -> None:
        request, self.request = self.request, None
        self.agent.raw.releaseXferReq(request)


class RemotePool:
    """A peer's blocks and generations, ready to be read."""

    def __init__(self, agent: Agent, card: NixlCard) -> None:
        self._agent = agent
        self._name = agent.raw.loadRemoteMD(card.metadata)
        at, count = card.generations_address, card.num_blocks
        size = 8 * min(ENTRIES, count)
        rows = [(at + 8 * first, size, 0) for first in range(0, count, ENTRIES)]
        self.blocks = agent.prepare(self._name, card.pool_address, agent.peer_block_bytes, count)
        self.pages = agent.prepare_rows(self._name, rows)  # the last may hold what lies behind
        self.scratch = agent.scratch_pages(size)

    def forget(self) -> None:
        with suppress(Exception):  # NIXL may have forgotten it already
            self._agent.raw.invalidateRemoteMD(self._name)


def end_process(reason: str) -> NoReturn:
    """What cannot be proven to be over is over when its process is."""
    _log.error("%s: the NIXL process ends, and with it whatever may still write", reason)
    os._exit(1)


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
