"""Moving blocks between two pools: 64 MiB in 2,048 scattered blocks of 32 KiB.

Each way stands beside its bound, measured in the same run in turns: shared memory beside plain
copies of the same blocks; TCP on loopback beside a bare sendmsg and recv_into loop over the same
pieces, ZeroMQ multipart messages and NIXL over TCP; NIXL beside plain NIXL (bench/nixl_raw.py), as
it is by itself, where the thread that posts copies, and with as many threads as ours has. The
figures of the backends hold all that serving needs: requests, generations, and one digest per
block, which is also timed alone. Without NIXL installed its rows are left out.
"""

import argparse
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from bench.record import spread, write
from diptych.transfer.backend import Backend
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.nixl_backend import NixlBackend
from diptych.transfer.nixl_wire import nixl_installed
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.pull import read_blocks
from diptych.transfer.shared_memory import SharedMemory, create_memory
from diptych.transfer.shm_backend import ShmBackend
from diptych.transfer.spans import Read, ReadDone, coalesce
from diptych.transfer.tcp_backend import TcpBackend
from diptych.transfer.tcp_server import BlockServer

BLOCKS: Final = 2048
BLOCK_BYTES: Final = 32 << 10
_POOL_BLOCKS: Final = 2 * BLOCKS
_KEY: Final = b"k" * 32
_LAYOUT: Final = b"l" * 32
_PIECES: Final = 512
_READ_BLOCKS: Final = read_blocks(BLOCK_BYTES)
_BOUNDS: Final = (
    ("shm", "copies"),
    ("tcp", "bare tcp"),
    ("tcp", "zmq"),
    ("tcp", "nixl over tcp"),
    ("nixl", "raw nixl"),
    ("nixl", "raw nixl threads"),
)
Way = Callable[[], float]
"""Moves all blocks once; returns the seconds."""


@dataclass(frozen=True, slots=True)
class Pool:
    """As a worker has it: memory that other processes can map."""

    memory: PoolMemory
    pool_fd: int
    page_fd: int

    @staticmethod
    def make() -> "Pool":
        num_bytes, num_page = _POOL_BLOCKS * BLOCK_BYTES, page_bytes(_POOL_BLOCKS, 0)
        pool_fd, page_fd = create_memory("pool", num_bytes), create_memory("page", num_page)
        page = ControlPage(SharedMemory(page_fd, num_page).view, _POOL_BLOCKS, 0)
        data = SharedMemory(pool_fd, num_bytes).view
        for block in range(_POOL_BLOCKS):
            data[block * BLOCK_BYTES : block * BLOCK_BYTES + 8] = block.to_bytes(8, "little")
        return Pool(PoolMemory(data, page, BLOCK_BYTES), pool_fd, page_fd)


class Job:
    """Which blocks go where."""

    def __init__(self, rng: random.Random) -> None:
        self.source = rng.sample(range(_POOL_BLOCKS), BLOCKS)
        self.own = rng.sample(range(_POOL_BLOCKS), BLOCKS)

    def reads(self, endpoint: str) -> list[Read]:
        return [
            Read(start, (0, 1), 0, endpoint, coalesce(self.source[start:end], self.own[start:end]))
            for start in range(0, BLOCKS, _READ_BLOCKS)
            for end in (start + _READ_BLOCKS,)
        ]


def through(backend: Backend, reads: list[Read]) -> None:
    """All reads, as a worker without other work runs them."""
    for read in reads:
        backend.read(read)
    left = BLOCKS // _READ_BLOCKS
    while left:
        fds = backend.fds()
        if fds and not backend.eager:
            select.select(list(fds), [], [])
        for answer in backend.poll():
            assert isinstance(answer, ReadDone), answer
            left -= 1


def copies(source: PoolMemory, own: PoolMemory, job: Job) -> None:
    for a, b in zip(job.source, job.own, strict=True):
        own.blocks(b, 1)[:] = source.blocks(a, 1)


def bare_tcp(source: PoolMemory, own: PoolMemory, job: Job) -> None:
    """One side sends in a thread, the other receives each block where it belongs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = socket.create_connection(listener.getsockname())
        sender = listener.accept()[0]

    def send() -> None:
        pieces = [source.blocks(block, 1) for block in job.source]
        while pieces:
            sent = sender.sendmsg(pieces[:_PIECES])
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = pieces[0][sent:]

    thread = threading.Thread(target=send)
    thread.start()
    for block in job.own:
        view = own.blocks(block, 1)
        while view:
            view = view[receiver.recv_into(view) :]
    thread.join()
    sender.close()
    receiver.close()


class ZmqPair:
    """One multipart message of all blocks over tcp://, each frame copied where it belongs."""

    def __init__(self) -> None:
        context = zmq.Context.instance()
        self._sender, self._receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        port = self._sender.bind_to_random_port("tcp://127.0.0.1")
        self._receiver.connect(f"tcp://127.0.0.1:{port}")

    def run(self, source: PoolMemory, own: PoolMemory, job: Job) -> None:
        pieces = [source.blocks(block, 1) for block in job.source]
        thread = threading.Thread(
            target=self._sender.send_multipart, args=(pieces,), kwargs={"copy": False}
        )
        thread.start()
        frames = self._receiver.recv_multipart(copy=False)
        for block, frame in zip(job.own, frames, strict=True):
            own.blocks(block, 1)[:] = frame.buffer
        thread.join()


class Sleepers:
    """Processes that stand still but while their way is measured: their threads poll. Once they
    go on, the way is gone once for nothing: the first time finds cold caches and sleeping cores."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def awake(self, way: "Way") -> "Way":
        def run() -> float:
            self.send(signal.SIGCONT)
            try:
                way()
                return way()
            finally:
                self.send(signal.SIGSTOP)

        return run

    def send(self, number: int) -> None:
        for pid in self._pids:
            os.kill(pid, number)


class RawNixl:
    """bench/nixl_raw.py, told what UCX may use; times itself."""

    def __init__(self, tls: str, seed: int, *flags: str) -> None:
        words = [str(_POOL_BLOCKS), str(BLOCK_BYTES), str(BLOCKS), str(seed), *flags]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.nixl_raw", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **({"UCX_TLS": tls} if tls else {})},
        )
        word, self.source_pid = self._line().split()
        assert word == "ready"

    @property
    def pids(self) -> list[int]:
        return [self._process.pid, int(self.source_pid)]

    def run(self) -> float:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def digests(pool: PoolMemory, job: Job) -> None:
    for start in range(0, BLOCKS, _READ_BLOCKS):
        pool.digests(job.own[start : start + _READ_BLOCKS])


def timed(work: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def gigabytes_per_s(seconds: float) -> float:
    return BLOCKS * BLOCK_BYTES / seconds / 1e9


def make_ways(source: Pool, own: Pool, seed: int, stack: ExitStack) -> dict[str, Way]:
    """By name, in the order in which a round runs them."""
    job = Job(random.Random(seed))
    here, there = own.memory, source.memory
    server = BlockServer("127.0.0.1", there, _KEY, _LAYOUT)
    stack.callback(server.close)
    shm, tcp, pair = ShmBackend(here, {0: there}), TcpBackend(here, _KEY, _LAYOUT), ZmqPair()
    stack.callback(tcp.close)
    ways: dict[str, Way] = {
        "copies": timed(lambda: copies(there, here, job)),
        "shm": timed(lambda: through(shm, job.reads(""))),
        "bare tcp": timed(lambda: bare_tcp(there, here, job)),
        "tcp": timed(lambda: through(tcp, job.reads(server.endpoint))),
        "zmq": timed(lambda: pair.run(there, here, job)),
        "digests": timed(lambda: digests(here, job)),
    }
    if nixl_installed():
        ends = [
            NixlBackend(p.memory, p.pool_fd, p.page_fd, _KEY, _LAYOUT, "127.0.0.1")
            for p in (source, own)
        ]
        raw, raw_tcp = RawNixl("", seed), RawNixl("tcp", seed)
        raw_threads = RawNixl("", seed, "--threads")
        for end in (*ends, raw, raw_threads, raw_tcp):
            stack.callback(end.close)
        reads = job.reads(ends[0].endpoint)  # plain NIXL has its lists ready too
        through_nixl = timed(lambda: through(ends[1], reads))
        through_nixl()  # up and connected, before it is stopped for the first time
        pids = [end.pid for end in ends if end.pid is not None]
        for name, way, processes in (
            ("raw nixl", raw.run, raw.pids),
            ("nixl", through_nixl, pids),
            ("raw nixl threads", raw_threads.run, raw_threads.pids),
            ("nixl over tcp", raw_tcp.run, raw_tcp.pids),
        ):
            sleepers = Sleepers(processes)
            ways[name] = sleepers.awake(way)
            stack.callback(sleepers.send, signal.SIGCONT)
    return ways


def verify(source: PoolMemory, own: PoolMemory, job: Job) -> None:
    for a, b in zip(job.source, job.own, strict=True):
        assert own.blocks(b, 1) == source.blocks(a, 1), "a block is not what it should be"
        own.blocks(b, 1)[:] = bytes(BLOCK_BYTES)


def report(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Each way's share of its bound: the median over rounds of the two beside each other."""
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(f"{name:16s} median {middle:6.2f} best {max(values):6.2f} GB/s")
    shares = {}
    for name, bound in _BOUNDS:
        if bound in speeds and name in speeds:
            pairs = zip(speeds[name], speeds[bound], strict=True)
            shares[f"{name} / {bound}"] = statistics.median(a / b for a, b in pairs)
            print(f"{name} / {bound}: {shares[f'{name} / {bound}']:.2f}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source, own = Pool.make(), Pool.make()
    job = Job(random.Random(args.seed))
    with ExitStack() as stack:
        ways = make_ways(source, own, args.seed, stack)
        for name, way in ways.items():
            way()  # touch all memory, connect
            if "raw" not in name and name not in ("digests", "nixl over tcp"):
                verify(source.memory, own.memory, job)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                speeds[name].append(gigabytes_per_s(way()))
        shares = report(speeds)
    if args.out:
        figures: dict[str, object] = {name: spread(values) for name, values in speeds.items()}
        write(args.out, {"unit": "GB/s", "shares": shares, **figures})


if __name__ == "__main__":
    main()
