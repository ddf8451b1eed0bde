"""Reads through NIXL: RDMA, shared memory or TCP, whatever UCX finds between two hosts.

Owns the worker's NIXL process (nixl_process.py), which does all of it, and the listening socket
where peers ask that process how to read the own pool: so the endpoint outlives the process. A
process that ends fails its reads, which are asked for again; the next one is started at once, then
ever more rarely. Invariant: the reads of a process fail only when it is reaped, for then it writes
nothing any more.
"""

import logging
import os
import select
import socket
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from diptych.engine.core.types import BlockId
from diptych.transfer.backend import POLL_BYTES_MAX
from diptych.transfer.nixl_wire import (
    PACKET_BYTES_MAX,
    SILENT_S_MAX,
    START_S_MAX,
    NixlAnswer,
    NixlBoot,
    NixlCancel,
    NixlDone,
    NixlMoved,
    NixlOrder,
    NixlRead,
    NixlUp,
    make_bell,
    require_nixl,
    ring,
    still,
)
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.spans import CancelRead, Read, ReadDone, ReadFailed, own_blocks, source_blocks

RESTART_S: Final = 0.25
"""Before the second start in a row that came to nothing; doubles up to the next."""
RESTART_S_MAX: Final = 10.0
_BACKLOG: Final = 128

_log = logging.getLogger("diptych")


@dataclass(slots=True)
class _Reading:
    blocks: list[BlockId]  # own
    cancelled: bool = False


class _Process:
    """One incarnation of the NIXL process."""

    def __init__(self, boot: NixlBoot, now: float) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.bell, self._their_bell = make_bell(), make_bell()
        orders = msgspec.structs.replace(
            boot,
            control_fd=theirs.fileno(),
            order_bell_fd=self._their_bell,
            answer_bell_fd=self.bell,
        )
        fds = [
            value for name, value in msgspec.structs.asdict(orders).items() if name[-3:] == "_fd"
        ]
        command = [sys.executable, "-P", "-m", "diptych.transfer.nixl_process"]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds)
        theirs.close()
        self.pidfd = os.pidfd_open(self.popen.pid)
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # its end is seen by the pidfd
            self.popen.stdin.write(msgspec.json.encode(orders))
            self.popen.stdin.close()
        self.unsent: deque[bytes] = deque()
        self.up = False
        self.heard_at = now

    def say(self, order: NixlOrder) -> None:
        self.unsent.append(msgspec.msgpack.encode(order))
        self.flush()

    def flush(self) -> None:
        with suppress(BlockingIOError, OSError):  # full: later; gone: the pidfd tells
            while self.unsent:
                self.socket.send(self.unsent[0])
                self.unsent.popleft()
                ring(self._their_bell)

    def hear(self) -> NixlAnswer | None:
        try:
            packet = self.socket.recv(PACKET_BYTES_MAX)
        except OSError:
            return None
        return msgspec.msgpack.decode(packet, type=NixlAnswer) if packet else None

    def ended(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0)) and self.popen.poll() is not None

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for fd in (self.pidfd, self.bell, self._their_bell):
            os.close(fd)
        self.socket.close()


class NixlBackend:
    """Serves `own`, whose descriptors are `pool_fd` and `page_fd`; reads into it, or into `into`
    (memory and descriptor) where the peers' blocks have another layout."""

    name = "nixl"

    def __init__(
        self,
        own: PoolMemory,
        pool_fd: int,
        page_fd: int,
        key: bytes,
        layout: bytes,
        host: str,
        into: tuple[PoolMemory, int] | None = None,
        peer_layout: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_nixl()
        self._into, into_fd = into or (own, pool_fd)
        self._clock = clock
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        self.endpoint = "{}:{}".format(*self._listener.getsockname()[:2])
        self._boot = NixlBoot(
            worker_pid=os.getpid(),
            control_fd=-1,
            order_bell_fd=-1,
            answer_bell_fd=-1,
            listen_fd=self._listener.fileno(),
            pool_fd=pool_fd,
            page_fd=page_fd,
            num_blocks=own.num_blocks,
            num_pulses=own.page.num_pulses,
            block_bytes=own.block_bytes,
            key=key.hex(),
            layout=layout.hex(),
            peer_layout=(peer_layout or layout).hex(),
            into_fd=into_fd,
            into_blocks=self._into.num_blocks,
            into_block_bytes=self._into.block_bytes,
            loopback=host == "127.0.0.1",
        )
        self._reads: dict[int, _Reading] = {}  # of the process that runs
        self._digests: dict[BlockId, int] = {}  # of own blocks that are here, of those
        self._answers: list[ReadDone | ReadFailed] = []
        self._failed_starts = 0  # in a row
        self._start_at = 0.0
        self._process: _Process | None = None
        self._start()

    @property
    def eager(self) -> bool:
        return bool(self._answers)

    @property
    def pid(self) -> int | None:
        """Of the process; None while none runs."""
        return None if self._process is None else self._process.popen.pid

    def wait_up(
        self, timeout_s: float = START_S_MAX, on_wait: Callable[[], None] = lambda: None
    ) -> bool:
        """Before the worker takes work: NIXL takes seconds to load. Without success it goes on.
        `on_wait` is called every half second at least."""
        until = self._clock() + timeout_s
        while (process := self._process) is not None and self._clock() < until:
            if process.up:
                return True
            select.select([process.bell, process.pidfd], [], [], 0.5)
            on_wait()
            self._hear(process)
            self._watch(process)
        return False

    def read(self, read: Read) -> None:
        process = self._process
        if process is None:
            self._answers.append(ReadFailed(read.handle, "the NIXL process is down"))
            return
        blocks = own_blocks(read.spans)
        self._reads[read.handle] = _Reading(blocks)
        source, own = array("i", source_blocks(read.spans)), array("i", blocks)
        process.say(NixlRead(read.handle, read.endpoint, source.tobytes(), own.tobytes()))

    def poll(self) -> list[ReadDone | ReadFailed]:
        process = self._process
        if process is not None:
            process.flush()
            self._hear(process)
            self._watch(process)
        elif self._clock() >= self._start_at:
            self._start()
        answers, self._answers = self._answers, []
        return answers

    def cancel(self, handle: int) -> None:
        reading = self._reads.get(handle)
        if reading is not None and not reading.cancelled:
            assert self._process is not None
            reading.cancelled = True
            self._process.say(NixlCancel(CancelRead(handle)))

    def fds(self) -> dict[int, bool]:
        process = self._process
        if process is None:
            return {}
        waiting = {process.socket.fileno(): True} if process.unsent else {}
        return {process.bell: False, process.pidfd: False, **waiting}

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        self._reads.clear()
        self._digests.clear()
        self._listener.close()

    def _start(self) -> None:
        self._process = _Process(self._boot, self._clock())

    def _hear(self, process: _Process) -> None:
        still(process.bell)
        num_bytes = 0
        while (answer := process.hear()) is not None:
            process.heard_at = self._clock()
            if isinstance(answer, NixlUp):
                process.up, self._failed_starts = True, 0
            elif isinstance(answer, NixlMoved):
                num_bytes += self._digest(answer) * self._into.block_bytes
                if num_bytes >= POLL_BYTES_MAX:
                    ring(process.bell)  # there may be more
                    return
            elif isinstance(answer, NixlDone):
                self._take(answer)
            else:
                for block in self._reads.pop(answer.handle).blocks:
                    self._digests.pop(block, None)
                self._answers.append(answer.as_answer())

    def _digest(self, moved: NixlMoved) -> int:
        """Digests are taken here: of what this process sees of the bytes, on its own core, while
        the other one moves more. How many blocks it were."""
        blocks = array("i", moved.own)
        self._digests.update(zip(blocks, self._into.digests(blocks), strict=True))
        return len(blocks)

    def _take(self, done: NixlDone) -> None:
        generations, first = array("Q", done.generations).tolist(), 0
        for handle in done.handles:
            reading = self._reads.pop(handle)
            end = first + len(reading.blocks)
            digests = list(map(self._digests.pop, reading.blocks))
            if reading.cancelled:  # it was quicker
                self._answers.append(ReadFailed(handle, "cancelled"))
            else:
                self._answers.append(ReadDone(handle, generations[first:end], digests))
            first = end

    def _watch(self, process: _Process) -> None:
        if process.ended():
            self._lose(process)
            return
        silent_s = self._clock() - process.heard_at
        # It ends itself when a transfer stands still; when it does not even do that, so do we.
        if silent_s > (SILENT_S_MAX if process.up else START_S_MAX):
            _log.error("the NIXL process says nothing for %.0f s: it is killed", silent_s)
            process.popen.kill()  # its end is seen above, next time
            process.heard_at = self._clock()

    def _lose(self, process: _Process) -> None:
        status = process.popen.returncode
        _log.warning(
            "the NIXL process ended (status %d) with %d reads under way", status, len(self._reads)
        )
        failed = [ReadFailed(handle, "the NIXL process ended") for handle in self._reads]
        self._answers += failed
        self._reads.clear()
        self._digests.clear()
        wait_s = 0.0
        if not process.up:
            wait_s = min(RESTART_S_MAX, RESTART_S * 2.0 ** min(self._failed_starts, 10))
            self._failed_starts += 1
        process.close()
        self._process = None
        self._start_at = self._clock() + wait_s
        if not wait_s:
            self._start()
