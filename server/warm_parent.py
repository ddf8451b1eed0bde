"""The warm parent: torch imported, weights loaded and packed once, workers forked from it.

Owns the packed weights, whose pages all workers share, and the exit statuses of its forks.
Invariant: it stays single-threaded, so that a fork is safe; it holds no request and no decision, so
that its death costs nothing but the time of loading again.
"""

import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import torch

from diptych.engine.core.errors import ConfigError, DiptychError
from diptych.engine.packing import Prepared, keep_packed
from diptych.engine.runner import LoadedModel, load_model
from diptych.server.boot import HostBoot
from diptych.server.client import EngineInfo
from diptych.server.lifeline import EXIT_FAULT, die_by_kernel, leave_signals_to_supervisor
from diptych.server.logs import configure_logs
from diptych.server.warm_wire import (
    PACKET_BYTES_MAX,
    Forked,
    ForkWorker,
    Loaded,
    LoadFailed,
    Loading,
    Packet,
    Reaped,
    WarmBoot,
)
from diptych.server.worker import run_worker
from diptych.transfer.processes import name_process

PROGRESS_S: Final = 0.1

_log = logging.getLogger("diptych")


class WarmParent:
    """Serves fork orders until its socket or its supervisor ends."""

    def __init__(self, boot: HostBoot, wire: socket.socket, import_s: float) -> None:
        self._boot = boot
        self._import_s = import_s  # that starting this process took
        self._wire = wire
        self._signal_read, self._signal_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._next_progress_s = 0.0

    def serve(self) -> int:
        started_s = time.monotonic()
        try:
            model = load_model(
                self._boot.options.model,
                self._boot.options.num_shards,
                threads=len(self._boot.layout.cores),
                on_progress=self._tell_progress,
            )
            weights_s = time.monotonic() - started_s
            self._send(Loaded(engine_info(self._boot, model), self._import_s, weights_s))
        except DiptychError as error:
            self._send(LoadFailed(type(error).__name__, error.message))
            return 1
        gc.collect()
        gc.freeze()  # what is loaded is never garbage: the forks' collectors leave its pages alone
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signal_write)
        if model.prepared.cache_path is not None:
            self._keep(model.prepared, model.prepared.cache_path)
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        poll.register(self._signal_read, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._signal_read in ready:
                os.read(self._signal_read, 4096)
                self._reap()
            if self._wire.fileno() in ready:
                packet = self._wire.recv(PACKET_BYTES_MAX)
                if not packet:
                    return 0
                order = msgspec.msgpack.decode(packet, type=ForkWorker)
                self._fork(model, order)

    def _tell_progress(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next_progress_s:
            self._next_progress_s = now + PROGRESS_S
            self._send(Loading(done_bytes, total_bytes))

    def _keep(self, prepared: Prepared, path: Path) -> None:
        """In a child, which shares the weights' memory: nobody waits for the disk."""
        if os.fork() != 0:
            return
        status = EXIT_FAULT
        try:
            signal.set_wakeup_fd(-1)
            self._wire.close()
            die_by_kernel(self._boot.lifeline_fd)
            os.setpriority(os.PRIO_PROCESS, 0, 19)
            name_process("pack")
            num_bytes = keep_packed(prepared, path)
            _log.info("packed weights are kept in %s (%d bytes)", path, num_bytes)
            status = 0
        except DiptychError as error:
            _log.warning("packed weights are not kept: %s", error.message)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _fork(self, model: LoadedModel, order: ForkWorker) -> None:
        """The worker goes on only when the supervisor is sure to learn of it."""
        go_read, go_write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(go_write)
            self._become_worker(model, order, go_read)
        os.close(go_read)
        pidfd = os.pidfd_open(pid)
        self._send(Forked(order.worker, order.epoch, pid), pidfd)
        os.close(pidfd)
        with suppress(BrokenPipeError):
            os.write(go_write, b"g")
        os.close(go_write)

    def _become_worker(self, model: LoadedModel, order: ForkWorker, go_read: int) -> NoReturn:
        status = EXIT_FAULT
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            self._wire.close()
            os.close(self._signal_read)
            os.close(self._signal_write)
            if os.read(go_read, 1):
                os.close(go_read)
                run_worker(self._boot, model, order.worker, order.epoch)
            status = 0
        except BaseException:
            _log.exception("worker %d ends by an uncaught exception", order.worker)
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._send(Reaped(pid, status))

    def _send(self, packet: Packet, *fds: int) -> None:
        socket.send_fds(self._wire, [msgspec.msgpack.encode(packet)], fds)


def engine_info(boot: HostBoot, model: LoadedModel) -> EngineInfo:
    config, layout = model.config, boot.layout
    for pool in layout.pools:
        if config.block_bytes(layout.block_size, pool.dtype) != pool.block_bytes:
            raise ConfigError("the model's files changed while the server was starting")
    return EngineInfo(
        model_path=boot.options.model.path,
        dtype=config.dtype,
        vocab_size=config.vocab_size,
        max_model_len=min(config.max_model_len, layout.num_blocks * layout.block_size),
        eos_token_ids=sorted(config.eos_token_ids),
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        fingerprint=model.fingerprint_over([pool.dtype for pool in layout.pools]),
    )


def main() -> None:
    boot = msgspec.json.decode(sys.stdin.buffer.read(), type=WarmBoot)
    configure_logs("warm", boot.host.log_level)
    name_process("warm")
    leave_signals_to_supervisor()  # its workers inherit that
    die_by_kernel(boot.host.lifeline_fd)
    torch.set_num_threads(1)  # no thread may exist at a fork; workers compute with the kernels'
    wire = socket.socket(fileno=boot.socket_fd)
    try:
        import_s = (time.monotonic_ns() - boot.spawned_ns) / 1e9
        status = WarmParent(boot.host, wire, import_s).serve()
    except BaseException:
        _log.exception("the warm parent ends by an uncaught exception")
        status = EXIT_FAULT
    sys.exit(status)


if __name__ == "__main__":
    main()
