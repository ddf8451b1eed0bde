"""Moving blocks between two pools: 64 MiB in 2,048 scattered blocks of 32 KiB, in one process.

Each way stands beside its bound, measured in the same run in turns: shared memory beside plain
copies of the same blocks, TCP on loopback beside a bare sendmsg and recv_into loop over the same
pieces. The figures of the backends hold all that serving needs: requests, generations, and one
digest per block, which is also timed alone.
"""

import argparse
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.record import spread, write
from diptych.transfer.backend import Backend
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.pull import READ_BLOCKS_MAX
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


def make_pool() -> PoolMemory:
    page = ControlPage(memoryview(bytearray(page_bytes(_POOL_BLOCKS, 0))), _POOL_BLOCKS, 0)
    data = bytearray(_POOL_BLOCKS * BLOCK_BYTES)
    for block in range(_POOL_BLOCKS):
        data[block * BLOCK_BYTES : block * BLOCK_BYTES + 8] = block.to_bytes(8, "little")
    return PoolMemory(memoryview(data), page, BLOCK_BYTES)


class Job:
    """Which blocks go where."""

    def __init__(self, rng: random.Random) -> None:
        self.source = rng.sample(range(_POOL_BLOCKS), BLOCKS)
        self.own = rng.sample(range(_POOL_BLOCKS), BLOCKS)

    def reads(self, endpoint: str) -> list[Read]:
        return [
            Read(start, (0, 1), 0, endpoint, coalesce(self.source[start:end], self.own[start:end]))
            for start in range(0, BLOCKS, READ_BLOCKS_MAX)
            for end in (start + READ_BLOCKS_MAX,)
        ]


def through(backend: Backend, job: Job, endpoint: str) -> None:
    """All reads, as a worker without other work runs them."""
    for read in job.reads(endpoint):
        backend.read(read)
    left = BLOCKS // READ_BLOCKS_MAX
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


def digests(pool: PoolMemory, job: Job) -> None:
    for block in job.own:
        pool.digest(block)


def gigabytes_per_s(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return BLOCKS * BLOCK_BYTES / (time.perf_counter() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source, own = make_pool(), make_pool()
    server = BlockServer("127.0.0.1", source, _KEY, _LAYOUT)
    shm, tcp = ShmBackend(own, {0: source}), TcpBackend(own, _KEY, _LAYOUT)
    job = Job(random.Random(args.seed))
    ways: dict[str, Callable[[], None]] = {
        "copies": lambda: copies(source, own, job),
        "shm": lambda: through(shm, job, ""),
        "bare tcp": lambda: bare_tcp(source, own, job),
        "tcp": lambda: through(tcp, job, server.endpoint),
        "digests": lambda: digests(own, job),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for name in ways:
        ways[name]()  # touch all memory, connect
    for _ in range(args.rounds):
        for name, way in ways.items():
            speeds[name].append(gigabytes_per_s(way))
    for a, b in zip(job.source, job.own, strict=True):
        assert own.blocks(b, 1) == source.blocks(a, 1), "a block is not what it should be"
    for name, values in speeds.items():
        print(
            f"{name:9s} median {sorted(values)[len(values) // 2]:6.2f} best {max(values):6.2f} GB/s"
        )
    for name, bound in (("shm", "copies"), ("tcp", "bare tcp")):
        share = sorted(speeds[name])[args.rounds // 2] / sorted(speeds[bound])[args.rounds // 2]
        print(f"{name} / {bound}: {share:.2f} (medians)")
    if args.out:
        write(args.out, {name: spread(values) for name, values in speeds.items()})
    tcp.close()
    server.close()


if __name__ == "__main__":
    main()
