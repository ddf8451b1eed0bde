"""The launcher of one host: workers forked from a warm parent, watched by pidfd.

Owns the warm parent and the fences of all workers. Invariant: a warm parent that ends takes no
worker with it; orders that it did not carry out are answered as exits, so none is ever forgotten.
"""

import logging
import os
import socket
import subprocess
import time
from contextlib import suppress
from typing import Final

import msgspec

from diptych.engine.core.messages import Address
from diptych.engine.core.types import DownCause
from diptych.server.boot import HostBoot
from diptych.server.client import EngineInfo
from diptych.server.fence import Fence
from diptych.server.launcher import (
    LauncherEvent,
    ModelFailed,
    ModelLoading,
    ModelLost,
    ModelReady,
    ProcessExited,
    ProcessStarted,
)
from diptych.server.lifeline import cause_of, describe_exit
from diptych.server.spawn import kill_child, spawn
from diptych.server.warm_wire import (
    PACKET_BYTES_MAX,
    Forked,
    ForkWorker,
    FromWarm,
    Loaded,
    LoadFailed,
    Loading,
    Reaped,
    WarmBoot,
)

RELOAD_S: Final = 0.25
RELOAD_S_MAX: Final = 10.0

_log = logging.getLogger("diptych")


class WarmLauncher:
    """A `Launcher`; its `fds` change between calls."""

    def __init__(self, boot: HostBoot) -> None:
        self._boot = boot
        self._info: EngineInfo | None = None
        self._fences: dict[Address, Fence] = {}
        self._ordered: set[Address] = set()  # asked for, not forked yet
        self._failed_loads = 0  # in a row
        self._open_at_s = 0.0
        self._closed = False
        self._resting = False
        self._wire: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._open()

    @property
    def warm_pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self, address: Address) -> None:
        assert self._wire is not None, "start only between ModelReady and ModelLost"
        self._ordered.add(address)
        order = ForkWorker(address.number, address.epoch)
        with suppress(OSError):  # it is dying: the end of the wire, seen next, answers the order
            self._wire.send(msgspec.msgpack.encode(order))

    def rest(self) -> None:
        assert not self._fences, "nobody rests while workers run"
        self._resting = True
        if self._process is not None:
            kill_child(self._process)
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def wake(self) -> None:
        self._resting = False
        self._open_at_s = 0.0

    def kill(self, address: Address) -> None:
        fence = self._fences.get(address)
        if fence is not None:
            fence.kill()
        elif address in self._ordered and self._process is not None:
            kill_child(self._process)  # it stands still: nobody else can answer the order

    def fds(self) -> list[int]:
        fds = [fence.pidfd for fence in self._fences.values() if not fence.exited]
        return fds if self._wire is None else [self._wire.fileno(), *fds]

    def num_running(self) -> int:
        return len(self._fences) + len(self._ordered)

    def events(self, now: float) -> list[LauncherEvent]:
        events: list[LauncherEvent] = []
        idle = self._wire is None and self._process is None
        if idle and not self._closed and not self._resting and now >= self._open_at_s:
            self._open()
        while self._wire is not None and self._read_packet(self._wire, events, now):
            pass
        for address, fence in list(self._fences.items()):
            if fence.gone(now):
                events.append(self._exit_event(address, fence))
        return events

    def reaped(self, pid: int, wait_status: int) -> None:
        if self._process is not None and pid == self._process.pid:
            self._process.returncode = wait_status
            self._process = None
            level = logging.INFO if self._resting else logging.WARNING
            _log.log(level, "warm parent ended: %s", describe_exit(wait_status))
        for fence in self._fences.values():
            if fence.pid == pid:
                fence.wait_status = wait_status

    def close(self) -> None:
        self._closed = True
        for fence in self._fences.values():
            fence.kill()
        if self._process is not None:
            kill_child(self._process)
            self._process.wait()
            self._process = None
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        self._ordered.clear()

    def _open(self) -> None:
        self._wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wire.setblocking(False)
        boot, layout = self._boot, self._boot.layout
        fds = [theirs.fileno(), *layout.fds, boot.lifeline_fd]
        spawned_ns = time.monotonic_ns()
        warm_boot = WarmBoot(host=boot, socket_fd=theirs.fileno(), spawned_ns=spawned_ns)
        self._process = spawn("diptych.server.warm_parent", warm_boot, fds)
        theirs.close()

    def _read_packet(self, wire: socket.socket, events: list[LauncherEvent], now: float) -> bool:
        """False when nothing waits or the warm parent is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(wire, PACKET_BYTES_MAX, 1)
        except BlockingIOError:
            return False
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self._lose(events, now)
            return False
        match packet := msgspec.msgpack.decode(data, type=FromWarm):
            case Loaded():
                self._loaded(packet, events)
            case Loading(done_bytes, total_bytes):
                events.append(ModelLoading(done_bytes, total_bytes))
            case LoadFailed(kind, message):
                events.append(ModelFailed(kind, message))
            case Forked(worker, epoch, pid):
                address = Address("worker", worker, epoch)
                self._ordered.discard(address)
                self._fences[address] = Fence(pid, fds[0])
                os.set_inheritable(fds[0], False)
                events.append(ProcessStarted(address, pid))
            case Reaped(pid, wait_status):
                self.reaped(pid, wait_status)
        return True

    def _loaded(self, loaded: Loaded, events: list[LauncherEvent]) -> None:
        info = loaded.info
        if self._info is not None and info != self._info:
            events.append(
                ModelFailed("ConfigError", "the model's files changed while it is served")
            )
            assert self._process is not None
            kill_child(self._process)
            return
        self._info = info
        self._failed_loads = 0
        events.append(ModelReady(info, loaded.import_s, loaded.weights_s))

    def _lose(self, events: list[LauncherEvent], now: float) -> None:
        assert self._wire is not None
        self._wire.close()
        self._wire = None
        if self._process is not None:
            kill_child(self._process)  # the wire ended: if it is not dead it is of no use
        self._open_at_s = now + min(RELOAD_S_MAX, RELOAD_S * 2.0 ** min(self._failed_loads, 10))
        self._failed_loads += 1
        if self._info is None:
            message = "The process that loads the model ended before it was done; see the log."
            events.append(ModelFailed("EngineDeadError", message))
        events.append(ModelLost())
        for address in self._ordered:
            events.append(ProcessExited(address, DownCause.KILLED, "never forked"))
        self._ordered.clear()

    def _exit_event(self, address: Address, fence: Fence) -> ProcessExited:
        del self._fences[address]
        fence.close()
        if fence.wait_status is None:
            return ProcessExited(address, DownCause.KILLED, "exit status unknown")
        status = fence.wait_status
        return ProcessExited(address, cause_of(status), describe_exit(status))
