"""A handoff between two network namespaces: how much of the transfer the prefill hides.

Prefill side and decode side are two processes, each in a namespace of its own; between the
namespaces is a link of this program's: two TUN devices and a relay that lets bytes pass at
`--mbit` and holds each packet for `--delay-ms` each way (netem, which a kernel may lack, does the
same). The prefill side computes prompts with the real runner in the chunks that a worker's planner
makes of them (at most `--chunk` tokens, shorter towards the end), and publishes after each; the
decode side pulls with the engine's own machines (Porter, Puller, TcpBackend). In turns
with that, a prompt is published only when all of it is computed: that time is the wire's. Scheduler
and seal are not part of it. Exposed is what passes from the end of the prefill to the last verified
block; the share hidden is (wire - exposed) / min(wire, compute). Needs root (CAP_NET_ADMIN).

    python -m bench.netns --tokens 2048 4096
"""

import argparse
import fcntl
import json
import mmap
import os
import random
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import torch

from bench.drive import Driver
from bench.models import write_model
from bench.record import write
from diptych.engine.core.config import BatchOptions, ModelOptions
from diptych.engine.core.handoff import PublishBlocks, PullEnded, StartPull, TransferNews
from diptych.engine.core.messages import Address, Publish, Send
from diptych.engine.core.model_config import load_model_config
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import blocks_for
from diptych.engine.runner import load_model
from diptych.scheduler.step_plan import chunk_length
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.porter import PeerMessage, Porter
from diptych.transfer.tcp_backend import TcpBackend
from diptych.transfer.tcp_server import BlockServer

_NAMES: Final = ("dt-prefill", "dt-decode")
_IPS: Final = ("10.77.0.1", "10.77.0.2")
_MTU: Final = 60_000  # a relay in Python passes 1 Gbit/s in 2,000 packets a second
_QUEUE_BYTES_MAX: Final = 4 << 20
_KEY: Final = b"k" * 32
_LAYOUT: Final = b"l" * 32
_BLOCK_SIZE: Final = 16
_PREFILL: Final = Address("worker", 0, 1)
_DECODE: Final = Address("worker", 1, 1)
_CONTROL_PORT: Final = 7000
_TUNSETIFF: Final = 0x400454CA
_TUN_NO_PI: Final = 0x0001 | 0x1000


# ---- the link ------------------------------------------------------------------------------------


def run(*words: str) -> None:
    subprocess.run(words, check=True)


@contextmanager
def namespaces() -> Iterator[list[int]]:
    """Two namespaces with a TUN device each; the descriptors of the devices' other ends."""
    fds = []
    try:
        for name, ip in zip(_NAMES, _IPS, strict=True):
            run("ip", "netns", "add", name)
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_NO_PI))
            fds.append(fd)
            run("ip", "link", "set", name, "netns", name)
            run("ip", "-n", name, "addr", "add", f"{ip}/30", "dev", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", name, "mtu", str(_MTU), "up")
        yield fds
    finally:
        for name in _NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        for fd in fds:
            os.close(fd)


class Relay:
    """One direction each way: a packet leaves when the line is free, and arrives later."""

    def __init__(self, fds: list[int], mbit: float, delay_s: float) -> None:
        self._ways = [(fds[0], fds[1]), (fds[1], fds[0])]
        self._byte_s = 8e-6 / mbit
        self._delay_s = delay_s
        self._queues: list[deque[tuple[float, bytes]]] = [deque(), deque()]
        self._queued = [0, 0]  # bytes
        self._free_at = [0.0, 0.0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            now = time.monotonic()
            for way in (0, 1):
                self._deliver(way, now)
            due = [queue[0][0] for queue in self._queues if queue]
            wait_s = max(0.0, min(min(due, default=now + 0.05) - now, 0.05))
            inputs = [self._ways[w][0] for w in (0, 1) if self._queued[w] < _QUEUE_BYTES_MAX]
            ready = select.select(inputs, [], [], wait_s)[0]
            for way in (0, 1):
                if self._ways[way][0] in ready:
                    self._take(way)

    def _take(self, way: int) -> None:
        now = time.monotonic()
        while self._queued[way] < _QUEUE_BYTES_MAX:
            try:
                packet = os.read(self._ways[way][0], 65536)
            except BlockingIOError:
                return
            self._free_at[way] = max(now, self._free_at[way]) + len(packet) * self._byte_s
            self._queues[way].append((self._free_at[way] + self._delay_s, packet))
            self._queued[way] += len(packet)

    def _deliver(self, way: int, now: float) -> None:
        queue = self._queues[way]
        while queue and queue[0][0] <= now:
            packet = queue.popleft()[1]
            self._queued[way] -= len(packet)
            os.write(self._ways[way][1], packet)


# ---- the two sides -------------------------------------------------------------------------------


class Line:
    """JSON and messages between the two sides, on the link as well."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(PeerMessage | dict[str, object])

    def say(self, what: object) -> None:
        data = self._encoder.encode(what)
        self.socket.sendall(len(data).to_bytes(4, "little") + data)

    def waits(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def hear(self) -> PeerMessage | dict[str, object]:
        size = int.from_bytes(self._exactly(4), "little")
        return self._decoder.decode(self._exactly(size))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def make_page(num_blocks: int) -> ControlPage:
    page = ControlPage(memoryview(bytearray(page_bytes(num_blocks, 0))), num_blocks, 0)
    for block in range(num_blocks):
        page.clear(block, 1)
    return page


def decode_side() -> None:
    """Pulls what it is told of, and says when the last block was verified."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    line = Line(socket.create_connection((_IPS[0], _CONTROL_PORT)))
    start = line.hear()
    assert isinstance(start, dict)
    num_blocks, block_bytes = int(str(start["num_blocks"])), int(str(start["block_bytes"]))
    own = PoolMemory(
        memoryview(mmap.mmap(-1, num_blocks * block_bytes)), make_page(num_blocks), block_bytes
    )
    news: list[TransferNews] = []
    porter = Porter(
        _DECODE,
        own,
        {0: TcpBackend(own, _KEY, _LAYOUT)},
        "",
        lambda send: line.say(send.message),
        news.append,
    )
    while True:
        fds = porter.fds()
        writes = [fd for fd, write_too in fds.items() if write_too]
        ready = select.select([line.socket, *fds], writes, [], porter.due_s(0.5))[0]
        if line.socket in ready:
            try:
                message = line.hear()
            except EOFError:
                return
            if isinstance(message, dict):
                porter.order(msgspec.convert(message["pull"], StartPull))
            else:
                porter.hear(message)
        porter.turn()
        for ended in [item for item in news if isinstance(item, PullEnded)]:
            line.say({"landed_at": time.monotonic(), "complete": ended.complete})
        news.clear()


class PrefillSide:
    def __init__(self, folder: Path, tokens_max: int, listener: socket.socket) -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        model = load_model(ModelOptions(path=str(folder), load_format="dummy"))
        self._num_blocks = 2 * blocks_for(tokens_max + 1, _BLOCK_SIZE) + 8
        self._driver = Driver(model, self._num_blocks, _BLOCK_SIZE)
        block_bytes = model.config.block_bytes(_BLOCK_SIZE)
        data = memoryview(self._driver.pool.data.view(torch.uint8).reshape(-1).numpy())
        own = PoolMemory(data, make_page(self._num_blocks), block_bytes)
        server = BlockServer(_IPS[0], own, _KEY, _LAYOUT)
        print("ready", flush=True)
        self._line = Line(listener.accept()[0])
        self._line.say({"num_blocks": self._num_blocks, "block_bytes": block_bytes})
        self._porter = Porter(_PREFILL, own, {}, server.endpoint, self._send, lambda news: None)
        self._count = 0
        self._vocab = model.config.vocab_size

    def _send(self, send: Send) -> None:
        self._line.say(send.message)

    def one(self, num_tokens: int, chunk: int, pipelined: bool) -> dict[str, float]:
        """A prompt of its own; all its blocks go over."""
        self._count += 1
        ref = SeqRef(str(self._count), 0, 0)
        rng = random.Random(self._count)
        seq = self._driver.add([rng.randrange(self._vocab) for _ in range(num_tokens)], 1)
        table = seq.block_table[: blocks_for(num_tokens, _BLOCK_SIZE)]
        ones = [1] * len(table)
        mine = random.Random(-self._count).sample(range(self._num_blocks), len(table))
        peer = (_PREFILL.number, _PREFILL.epoch)
        self._line.say(
            {"pull": msgspec.to_builtins(StartPull(1, ref, peer, 0, 0, table, ones, mine))}
        )
        published, started, done = 0, time.monotonic(), False
        while not done:
            start = seq.num_computed
            self._driver.step(chunk_length(start, num_tokens, chunk, _BLOCK_SIZE, pulled=True))
            self._listen()
            done = seq.num_computed == num_tokens
            upto = len(table) if done else seq.num_computed // _BLOCK_SIZE
            if pipelined and not done and upto > published:
                self._publish(ref, table, published, upto)
                published = upto
        sealed_at = time.monotonic()
        self._publish(ref, table, published, len(table))
        landed = self._landed()
        self._driver.seqs.remove(seq)
        self._driver._free += seq.block_table
        return {"compute_s": sealed_at - started, "exposed_s": landed - sealed_at}

    def _publish(self, ref: SeqRef, table: list[int], first: int, end: int) -> None:
        peer = (_DECODE.number, _DECODE.epoch)
        self._porter.order(PublishBlocks(1, ref, peer, first, table[first:end]))

    def _listen(self) -> None:
        while self._line.waits():
            message = self._line.hear()
            assert not isinstance(message, dict | Publish)
            self._porter.hear(message)

    def _landed(self) -> float:
        while not isinstance(message := self._line.hear(), dict):
            self._porter.hear(message)
        assert message["complete"], "the pull was given up"
        return float(str(message["landed_at"]))


def prefill_side(args: argparse.Namespace) -> None:
    with socket.create_server((_IPS[0], _CONTROL_PORT)) as listener:
        side = PrefillSide(Path(args.folder), max(args.tokens), listener)
        side.one(min(args.tokens), args.chunk, True)  # touches memory, connects
        for num_tokens in args.tokens:
            for _ in range(args.rounds):
                for pipelined in (True, False):
                    row = side.one(num_tokens, args.chunk, pipelined)
                    print(
                        json.dumps({"tokens": num_tokens, "pipelined": pipelined, **row}),
                        flush=True,
                    )


# ---- the whole -----------------------------------------------------------------------------------


def summary(
    rows: list[dict[str, float]], num_tokens: int, args: argparse.Namespace
) -> dict[str, float]:
    mine = [row for row in rows if row["tokens"] == num_tokens]
    piped = [row for row in mine if row["pipelined"]]
    wire_s = statistics.median(row["exposed_s"] for row in mine if not row["pipelined"])
    exposed_s = statistics.median(row["exposed_s"] for row in piped)
    compute_s = statistics.median(row["compute_s"] for row in piped)
    config = load_model_config(args.folder)
    num_bytes = blocks_for(num_tokens, _BLOCK_SIZE) * config.block_bytes(_BLOCK_SIZE)
    return {
        "tokens": num_tokens,
        "megabytes": num_bytes / 1e6,
        "compute_s": compute_s,
        "wire_s": wire_s,
        "wire_s_by_arithmetic": num_bytes * 8e-6 / args.mbit + 2e-3 * args.delay_ms,
        "exposed_s": exposed_s,
        "bound_s": max(0.0, wire_s - compute_s),
        "hidden_share": (wire_s - exposed_s) / min(wire_s, compute_s),
    }


def orchestrate(args: argparse.Namespace) -> dict[str, object]:
    rows: list[dict[str, float]] = []
    with namespaces() as fds:
        relay = Relay(fds, args.mbit, args.delay_ms / 1e3)
        words = [sys.executable, "-m", "bench.netns", *sys.argv[1:], "--folder", str(args.folder)]
        sides = [
            subprocess.Popen(["ip", "netns", "exec", name, *words, "--side", side], stdout=out)
            for name, side, out in ((_NAMES[0], "prefill", subprocess.PIPE),)
        ]
        assert sides[0].stdout is not None
        assert sides[0].stdout.readline().strip() == b"ready", "the prefill side did not start"
        sides.append(
            subprocess.Popen(["ip", "netns", "exec", _NAMES[1], *words, "--side", "decode"])
        )
        for text in sides[0].stdout:
            rows.append(json.loads(text))
            print(rows[-1])
        codes = [side.wait() for side in sides]
        relay.close()
    assert codes == [0, 0], f"a side failed: {codes}"
    found = [summary(rows, num_tokens, args) for num_tokens in args.tokens]
    return {
        "model": args.size,
        "chunk_tokens": args.chunk,
        "mbit_per_s": args.mbit,
        "delay_ms_each_way": args.delay_ms,
        "rounds": args.rounds,
        "prompts": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument(
        "--chunk",
        type=int,
        default=BatchOptions().max_num_batched_tokens,
        help="most tokens of one prefill chunk (default: the engine's, %(default)s)",
    )
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--delay-ms", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="bench-360m")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["prefill", "decode"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "decode":
        decode_side()
    elif args.side == "prefill":
        prefill_side(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            args.folder = str(write_model(Path(folder), args.size))
            write(args.out, orchestrate(args))


if __name__ == "__main__":
    main()
