"""The losslessness matrix: what a client gets never depends on how it was computed.

{inline, 1P1D, 2P2D, mixed, separate pools over shm, tcp and (where installed) nixl, with blocks of
one size and of 16 > 32 tokens, KV of the model's dtype and of int8, prefill and decode workers of
one and two ranks ("tp2:1": two for prefill, one for decode)} x {chunk 16, 64, whole} x {alone, 16
others} x {cold, prefix hit} x {undisturbed, worker killed, preempted} x {greedy, seeded, n=3}.
Every cell must give token ids and log-probabilities that equal, bit for bit, those of one
undisturbed request alone in the inline engine (with as many shards of the model).
`python -m bench.losslessness` runs the whole product, `--pairwise` a cover of all pairs.
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, Literal

from bench.models import write_model
from bench.procs import engine_processes
from bench.record import write
from diptych.engine.core.config import (
    BatchOptions,
    CacheOptions,
    EngineOptions,
    ModelOptions,
    PoolOptions,
    Transfer,
)
from diptych.engine.core.messages import Stats
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import TokenLogprobs
from diptych.server.client import EngineClient
from diptych.server.hosting import Hosted, host_engine
from diptych.server.inline import InlineClient
from diptych.transfer.nixl_wire import nixl_installed

_TOPOLOGIES: Final = (
    "inline",
    "1P1D",
    "2P2D",
    "mixed",
    "1P1D shm",
    "2P2D tcp",
    "1P1D tp2:1",
    "1P1D tp1:2 shm",
    "2P2D tp2:2 tcp",
    "2P2D shm 16>32",
    "1P1D tcp 16>32",
    "2P2D int8",
    "1P1D tp2:1 tcp 16>32 int8",
)
"""Workers; how blocks move between separate pools; tokens of a block there; dtype of KV."""
_WITH_NIXL: Final = ("2P2D nixl", "1P1D nixl 16>32")
AXES: Final[dict[str, tuple[str, ...]]] = {
    "topology": (*_TOPOLOGIES, *(_WITH_NIXL if nixl_installed() else ())),
    "chunk": ("16", "64", "whole"),
    "company": ("alone", "16 others"),
    "cache": ("cold", "prefix hit"),
    "disturbance": ("undisturbed", "worker killed", "preempted"),
    "sampling": ("greedy", "seeded", "n=3"),
}
_WORKERS: Final = {"inline": (0, 0, 1), "1P1D": (1, 1, 0), "2P2D": (2, 2, 0), "mixed": (0, 0, 2)}
_TRANSFERS: Final[dict[str, Transfer]] = {"shm": "shm", "tcp": "tcp", "nixl": "nixl"}
_NUM_PROMPT: Final = 150
_NUM_OUTPUT: Final = 96
_DISTURB_AT: Final = 12  # tokens of the target before it is disturbed
_BLOCKS_LARGE: Final = 2048
_BLOCKS_SMALL: Final = 344
_HOGS: Final = 6  # their prompts fit beside the target, their answers do not
_HOG_PROMPT: Final = 800
_HOG_OUTPUT: Final = 600
_CELL_S_MAX: Final = 60.0

PARAMS: Final = {
    "greedy": SamplingParams(
        temperature=0, max_tokens=_NUM_OUTPUT, logprobs=3, ignore_eos=True, seed=0
    ),
    "seeded": SamplingParams(
        temperature=0.9,
        top_p=0.95,
        top_k=80,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        seed=7,
        max_tokens=_NUM_OUTPUT,
        logprobs=3,
        ignore_eos=True,
    ),
    "n=3": SamplingParams(
        n=3, temperature=1.0, seed=11, max_tokens=_NUM_OUTPUT, logprobs=2, ignore_eos=True
    ),
}


@dataclass(frozen=True, slots=True)
class Cell:
    topology: str
    chunk: str
    company: str
    cache: str
    disturbance: str
    sampling: str

    @property
    def engine_key(self) -> tuple[str, str, bool]:
        """Cells of one key share an engine."""
        return self.topology, self.chunk, self.disturbance == "preempted"

    def __str__(self) -> str:
        return " | ".join(astuple(self))


@dataclass(slots=True)
class Answer:
    """Token ids and log-probabilities of every choice."""

    ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]]


def all_cells() -> list[Cell]:
    return [Cell(*values) for values in itertools.product(*AXES.values())]


def pairwise_cells(seed: int) -> list[Cell]:
    """A small set of cells in which every pair of values of two axes occurs (greedy cover)."""
    rng = random.Random(seed)
    cells = all_cells()
    rng.shuffle(cells)
    width = len(AXES)

    def pairs(cell: Cell) -> set[tuple[int, int, str, str]]:
        values = astuple(cell)
        return {(i, j, values[i], values[j]) for i in range(width) for j in range(i + 1, width)}

    missing = set().union(*map(pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def prompt_of(name: str, length: int) -> list[int]:
    return random.Random(name).choices(range(256), k=length)


async def ask(
    client: EngineClient,
    name: str,
    prompt: list[int],
    params: SamplingParams,
    *,
    salt: str,
    priority: int = 0,
    reached: asyncio.Event | None = None,
) -> Answer:
    """One request to its end; sets `reached` at the token where it is to be disturbed."""
    answer = Answer([[] for _ in range(params.n)], [[] for _ in range(params.n)])
    stream = client.stream(name, prompt, params, cache_salt=salt, priority=priority)
    async for delta in stream:
        assert delta.first_index == len(answer.ids[delta.choice]), "a gap or an overlap"
        answer.ids[delta.choice] += delta.ids
        answer.logprobs[delta.choice] += delta.logprobs or []
        if reached is not None and len(answer.ids[delta.choice]) >= _DISTURB_AT:
            reached.set()
    return answer


class MatrixEngine:
    """One engine of the matrix, and how to disturb it."""

    def __init__(self, hosted: Hosted, num_workers: int) -> None:
        self.hosted = hosted
        self._num_workers = num_workers
        self._turn = 0
        self._serial = itertools.count()

    @property
    def client(self) -> EngineClient:
        return self.hosted.client

    async def run(self, cell: Cell, serial: int) -> Answer:
        """The target's answer under the cell's conditions."""
        prompt = prompt_of("target", _NUM_PROMPT)
        salt = f"cell {serial}"
        params = PARAMS[cell.sampling]
        if cell.cache == "prefix hit":
            first = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            await ask(self.client, f"{serial}-prime", prompt, first, salt=salt)
        company = []
        if cell.company == "16 others":
            company = [asyncio.create_task(self._other(serial, i)) for i in range(16)]
            await asyncio.sleep(0)
        reached = asyncio.Event()
        target = asyncio.create_task(
            ask(self.client, f"{serial}-target", prompt, params, salt=salt, reached=reached)
        )
        disturber = asyncio.create_task(self._disturb(cell.disturbance, reached, serial))
        answer = await target
        reached.set()
        await asyncio.gather(disturber, *company)
        return answer

    async def _other(self, serial: int, index: int) -> None:
        rng = random.Random(f"{serial} {index}")
        prompt = prompt_of(f"other {serial} {index}", rng.randrange(1, 300))
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8]), max_tokens=rng.randrange(1, 120), seed=index
        )
        await ask(self.client, f"{serial}-other{index}", prompt, params, salt="")

    async def _disturb(self, kind: str, reached: asyncio.Event, serial: int) -> None:
        await reached.wait()
        if kind == "worker killed":
            self._kill_one()
        elif kind == "preempted":
            await asyncio.gather(*(self._hog(serial, i) for i in range(_HOGS)))

    def _kill_one(self) -> None:
        self._turn += 1
        worker = self._turn % self._num_workers
        if isinstance(self.client, InlineClient):
            self.client.fail_worker(worker)
        else:
            assert self.hosted.launched is not None
            pid = engine_processes(self.hosted.launched.supervisor_pid)[f"worker{worker}"]
            os.kill(pid, signal.SIGKILL)

    async def _hog(self, serial: int, index: int) -> None:
        """More urgent; all of them together outgrow the pool."""
        prompt = prompt_of(f"hog {serial} {index}", _HOG_PROMPT)
        params = SamplingParams(temperature=0, max_tokens=_HOG_OUTPUT, ignore_eos=True)
        await ask(self.client, f"{serial}-hog{index}", prompt, params, salt="", priority=-1)


def ranks_of(topology: str) -> tuple[int, int]:
    """Of each prefill worker, of each decode worker."""
    for word in topology.split(" "):
        if word.startswith("tp"):
            prefill, decode = word.removeprefix("tp").split(":")
            return int(prefill), int(decode)
    return 1, 1


def transfer_of(topology: str) -> Transfer | None:
    return next((_TRANSFERS[word] for word in topology.split(" ") if word in _TRANSFERS), None)


def block_sizes_of(topology: str) -> tuple[int, int]:
    """Tokens of a block in the prefill side's pool, in the decode side's."""
    for word in topology.split(" "):
        if ">" in word:
            prefill, decode = word.split(">")
            return int(prefill), int(decode)
    return 16, 16


def is_int8(topology: str) -> bool:
    return "int8" in topology.split(" ")


def engine_options(folder: Path, key: tuple[str, str, bool]) -> EngineOptions:
    topology, chunk, small = key
    prefill, decode, mixed = _WORKERS[topology.split(" ")[0]]
    transfer = transfer_of(topology)
    sizes = ranks_of(topology)
    prefill_size, decode_size = block_sizes_of(topology)
    return EngineOptions(
        model=ModelOptions(path=str(folder), load_format="dummy"),
        cache=CacheOptions(
            num_blocks=(_BLOCKS_SMALL if small else _BLOCKS_LARGE) * 16 // decode_size,
            block_size=decode_size,
            kv_cache_dtype="int8" if is_int8(topology) else "auto",
        ),
        batch=BatchOptions(
            max_num_batched_tokens=4096 if chunk == "whole" else 256,
            max_chunk_tokens=None if chunk == "whole" else int(chunk),
        ),
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        separate_pools=transfer is not None,
        transfer=transfer or "auto",
        tensor_parallel_size=max(sizes) if mixed else 1,
        prefill_tp=sizes[0],
        decode_tp=sizes[1],
        prefill_pool=PoolOptions(block_size=prefill_size if transfer else None),
        threads=1,
    )


async def references(folder: Path, num_shards: int, int8: bool) -> dict[str, Answer]:
    """One request alone in the inline engine, the whole prompt in one chunk."""
    topology = f"inline tp{num_shards}:{num_shards}{' int8' if int8 else ''}"
    hosted = await host_engine(engine_options(folder, (topology, "whole", False)), inline=True)
    try:
        prompt = prompt_of("target", _NUM_PROMPT)
        return {
            name: await ask(hosted.client, name, prompt, params, salt=name)
            for name, params in PARAMS.items()
        }
    finally:
        await hosted.close()


Outcome = Literal["ok", "wrong", "error"]
Row = tuple[Cell, Outcome, str]


async def run_cells(cells: list[Cell], folder: Path) -> list[Row]:
    """Runs the cells grouped by engine; one row of outcome each."""
    variants = {(max(ranks_of(cell.topology)), is_int8(cell.topology)) for cell in cells}
    expected = {variant: await references(folder, *variant) for variant in variants}
    rows: list[Row] = []
    serial = itertools.count()
    ordered = sorted(cells, key=lambda cell: cell.engine_key)
    for key, group in itertools.groupby(ordered, key=lambda cell: cell.engine_key):
        inline = key[0].startswith("inline")
        hosted = await host_engine(engine_options(folder, key), inline=inline)
        engine = MatrixEngine(hosted, sum(_WORKERS[key[0].split(" ")[0]]))
        right = expected[max(ranks_of(key[0])), is_int8(key[0])]
        stats: Stats | None = None
        try:
            for cell in group:
                rows.append((cell, *await _judge(engine, cell, next(serial), right)))
            stats = await _fresh_stats(hosted)
        finally:
            await hosted.close()
        if key[2] and not (stats and stats.preemptions):
            rows.append((cell, "error", "nothing was preempted: the cell proves nothing"))
        if transfer_of(key[0]) and not (stats and stats.blocks_pulled):
            rows.append((cell, "error", "no block was moved: the cell proves nothing"))
    return rows


async def _judge(
    engine: MatrixEngine, cell: Cell, serial: int, expected: dict[str, Answer]
) -> tuple[Outcome, str]:
    try:
        answer = await asyncio.wait_for(engine.run(cell, serial), _CELL_S_MAX)
    except Exception as error:
        return "error", repr(error)
    want = expected[cell.sampling]
    for choice, (got, good) in enumerate(zip(answer.ids, want.ids, strict=True)):
        if got != good:
            at = next((i for i, (a, b) in enumerate(zip(got, good)) if a != b), len(got))
            return "wrong", f"choice {choice} differs from token {at} of {len(good)}"
    if answer.logprobs != want.logprobs:
        return "wrong", "log-probabilities differ"
    return "ok", ""


async def _fresh_stats(hosted: Hosted) -> Stats | None:
    """The second report of the scheduler from now: the first may have been on its way."""
    fresh, before = 0, hosted.client.stats()
    for _ in range(200):
        stats = hosted.client.stats()
        if stats is not before:
            fresh, before = fresh + 1, stats
        if fresh >= 2:
            break
        await asyncio.sleep(0.01)
    return before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairwise", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="run only cells whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cells = pairwise_cells(args.seed) if args.pairwise else all_cells()
    cells = [cell for cell in cells if args.only is None or args.only in str(cell)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(run_cells(cells, write_model(Path(folder), "tiny")))
    bad = [row for row in rows if row[1] != "ok"]
    for cell, outcome, detail in bad:
        print(f"{outcome}: {cell}: {detail}")
    seconds = time.perf_counter() - start
    print(f"{len(cells)} cells, {len(bad)} bad, {seconds:.1f} s, seed {args.seed}")
    write(args.out, {"cells": len(cells), "bad": [str(row[0]) for row in bad], "seconds": seconds})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
