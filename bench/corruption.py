"""Corrupted and stale deliveries between two pools: how many are found, how many are believed.

Two porters move blocks over the shared-memory backend, which lies here: a wrong bit, half of an old
block, another block's bytes, or a block that its source has given to somebody else. Believed is
what the reader's machine calls pulled although its bytes or its life are not the source's.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Final

from bench.record import write
from diptych.engine.core.handoff import PublishBlocks, Pulled, PullEnded, StartPull, TransferNews
from diptych.engine.core.messages import Address, AskPublish, Publish, PullOver, Send
from diptych.engine.core.request import SeqRef
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.porter import Porter
from diptych.transfer.shm_backend import ShmBackend
from diptych.transfer.spans import Read

_BLOCKS: Final = 256
_BLOCK_BYTES: Final = 1024
_PULL_BLOCKS: Final = 32
_BAD_SHARE: Final = 0.1
_HERE: Final = Address("worker", 1, 1)
_THERE: Final = Address("worker", 0, 1)


def make_pool(rng: random.Random) -> PoolMemory:
    page = ControlPage(memoryview(bytearray(page_bytes(_BLOCKS, 0))), _BLOCKS, 0)
    for block in range(_BLOCKS):
        page.clear(block, 1)
    data = bytearray(rng.randbytes(_BLOCKS * _BLOCK_BYTES))
    return PoolMemory(memoryview(data), page, _BLOCK_BYTES)


class LyingBackend(ShmBackend):
    """Delivers some blocks wrong; `bad` counts them by kind."""

    def __init__(self, own: PoolMemory, source: PoolMemory, rng: random.Random) -> None:
        super().__init__(own, {0: source})
        self.bad = dict.fromkeys(("bit", "torn", "other", "stale"), 0)
        self._source = source
        self._rng = rng

    def _copy(self, read: Read) -> list[int]:
        places = [(s.source + i, s.own + i) for s in read.spans for i in range(s.count)]
        for source, own in places:
            mine, rng = self._own.blocks(own, 1), self._rng
            old = bytes(mine)
            mine[:] = self._source.blocks(source, 1)
            if rng.random() >= _BAD_SHARE:
                continue
            kind = rng.choices(tuple(self.bad), (6, 6, 6, 1))[0]
            right = bytes(mine)
            if kind == "bit":
                mine[rng.randrange(_BLOCK_BYTES)] ^= 1 << rng.randrange(8)
            elif kind == "torn":
                cut = rng.randrange(_BLOCK_BYTES)
                mine[cut:] = old[cut:]
            elif kind == "other":
                mine[:] = self._source.blocks((source + 1) % _BLOCKS, 1)
            else:
                self._source.page.clear(source, self._source.page.generation(source) + 1)
            self.bad[kind] += kind == "stale" or bytes(mine) != right
        return self._own.digests([own for _, own in places])


class Bench:
    """One pull after the other, until enough deliveries were bad."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.source, self.own = make_pool(self.rng), make_pool(self.rng)
        self.backend = LyingBackend(self.own, self.source, self.rng)
        self.wire: list[Send] = []
        self.news: list[TransferNews] = []
        self.now = 0.0
        self.reader = self._porter(_HERE, self.own, {0: self.backend})
        self.writer = self._porter(_THERE, self.source, {})
        self.pulls = self.complete = self.blocks = self.believed = 0

    def _porter(self, me: Address, own: PoolMemory, routes: dict[int, LyingBackend]) -> Porter:
        return Porter(me, own, routes, "", self.wire.append, self.news.append, lambda: self.now)

    def pull(self) -> None:
        """One sequence's blocks; checks what the reader says of them."""
        self.pulls += 1
        ref = SeqRef(str(self.pulls), 0, 0)
        source = self.rng.sample(range(_BLOCKS), _PULL_BLOCKS)
        mine = self.rng.sample(range(_BLOCKS), _PULL_BLOCKS)
        lives = [self.source.page.generation(block) for block in source]
        self.news.clear()
        self.reader.order(StartPull(1, ref, (0, 1), 0, 0, source, lives, mine))
        self.writer.order(PublishBlocks(1, ref, (1, 1), 0, source))
        while not (self.news and isinstance(self.news[-1], PullEnded)):
            self.now += 0.06
            self._carry()
            self.reader.turn()
        self._carry()
        ended = self.news[-1]
        assert isinstance(ended, PullEnded)
        self.complete += ended.complete
        upto = max((item.upto for item in self.news if isinstance(item, Pulled)), default=0)
        self.blocks += upto
        for a, b, life in zip(source[:upto], mine[:upto], lives[:upto], strict=True):
            same = bytes(self.own.blocks(b, 1)) == bytes(self.source.blocks(a, 1))
            self.believed += not same or self.source.page.generation(a) != life

    def _carry(self) -> None:
        while self.wire:
            send = self.wire.pop(0)
            assert isinstance(send.message, Publish | AskPublish | PullOver)
            (self.reader if send.to == _HERE else self.writer).hear(send.message)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bad", type=int, default=100_000, help="bad deliveries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench, start = Bench(args.seed), time.perf_counter()
    while sum(bench.backend.bad.values()) < args.bad:
        bench.pull()
    result: dict[str, object] = {
        "seed": args.seed,
        "bad_deliveries": bench.backend.bad,
        "believed": bench.believed,
        "pulls": bench.pulls,
        "pulls_complete": bench.complete,
        "blocks_pulled": bench.blocks,
        "seconds": time.perf_counter() - start,
    }
    write(args.out, result)
    return 1 if bench.believed else 0


if __name__ == "__main__":
    raise SystemExit(main())
