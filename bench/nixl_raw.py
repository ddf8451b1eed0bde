"""Plain NIXL as a baseline of bench/transfer.py: one agent reads scattered blocks of another's.

`python -m bench.nixl_raw` is the reader: for each line on standard input it makes one request of
all blocks, posts it, waits until it is done, and prints the seconds. The source is a process of its
own, which only keeps its agent alive. `UCX_TLS` in the environment says what UCX may use;
`--threads`: NIXL has the threads that the engine's agents have, which it has not by itself.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from typing import Any, Final

import numpy as np

from diptych.transfer.nixl_agent import PROGRESS_DELAY_US, copy_threads, nixl
from diptych.transfer.shared_memory import SharedMemory, create_memory

_SOURCE: Final = "source"


class RawAgent:
    def __init__(self, name: str, num_bytes: int, params: dict[str, str]) -> None:
        os.putenv("UCX_NET_DEVICES", "lo")
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_DELAY_US
        self.agent = nixl.nixlAgent(name, config)
        backend = self.agent.createBackend("UCX", params)
        self.memory = SharedMemory(create_memory("raw", num_bytes), num_bytes).view  # as a pool
        self.address = int(np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0])
        rows = [(self.address, num_bytes, 0, "")]
        self.agent.registerMem(nixl.nixlRegDList(nixl.DRAM_SEG, rows), [backend])

    def pieces(self, name: Any, address: int, count: int, size: int) -> Any:
        rows = np.array([(address + i * size, size, 0) for i in range(count)], np.uint64)
        return self.agent.prepXferDlist(name, nixl.nixlXferDList(nixl.DRAM_SEG, rows), [])


def serve(count: int, size: int, params: dict[str, str]) -> None:
    """The source: says how to read it, and lives until its standard input ends."""
    source = RawAgent(_SOURCE, count * size, params)
    for block in range(count):
        source.memory[block * size : block * size + 8] = block.to_bytes(8, "little")
    print(source.agent.getLocalMD().hex(), source.address, flush=True)
    sys.stdin.read()


def read(count: int, size: int, blocks: int, seed: int, params: dict[str, str]) -> None:
    command = [sys.executable, "-m", "bench.nixl_raw", "--serve", str(count), str(size)]
    command += ["--threads"] if params else []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdout is not None
        metadata, address = peer.stdout.readline().split()
        own = RawAgent("reader", count * size, params)
        name = own.agent.loadRemoteMD(bytes.fromhex(metadata))
        mine = own.pieces(nixl.NIXL_INIT_AGENT, own.address, count, size)
        theirs = own.pieces(name, int(address), count, size)
        rng = random.Random(seed)
        from_, to = rng.sample(range(count), blocks), rng.sample(range(count), blocks)
        rows = [np.array(to, np.int32), np.array(from_, np.int32)]
        print("ready", peer.pid, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            request = own.agent.makeXferReq(
                nixl.NIXL_READ, mine, rows[0], theirs, rows[1], b"", [], False
            )
            state = own.agent.postXferReq(request, b"")
            while state == nixl.NIXL_IN_PROG:
                state = own.agent.getXferStatus(request)
            seconds = time.perf_counter() - start
            assert state == nixl.NIXL_SUCCESS
            own.agent.releaseXferReq(request)
            print(seconds, flush=True)
        for a, b in zip(from_, to, strict=True):
            assert own.memory[b * size : b * size + 8] == a.to_bytes(8, "little")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("count", type=int, help="blocks of each pool")
    parser.add_argument("size", type=int, help="bytes of a block")
    parser.add_argument("blocks", type=int, nargs="?", help="to read")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--threads", action="store_true")
    args = parser.parse_args()
    params = copy_threads() if args.threads else {}
    if args.serve:
        serve(args.count, args.size, params)
    else:
        read(args.count, args.size, args.blocks, args.seed, params)
    sys.stdout.flush()
    os._exit(0)  # no destructor of UCX's may hang on the peer


if __name__ == "__main__":
    main()
