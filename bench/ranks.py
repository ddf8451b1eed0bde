"""Tensor parallelism on one host: what an exchange between two ranks costs, and what steps take.

`python -m bench.ranks --out FILE`. Exchanges: the parts of two shards gathered and added up, over
shared memory and over gloo. Steps: prefill of 512 tokens and decode of 8 sequences by one process
of two threads (the model whole, and in two shards) and by two ranks of one thread each; the cases
take turns, the median counts.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from bench.drive import Driver
from bench.models import write_model
from bench.record import write
from diptych.engine.collectives import Collectives
from diptych.engine.core.config import ModelOptions
from diptych.engine.follower import step_numbers_max
from diptych.engine.gloo_collectives import GlooCollectives, store_on_host
from diptych.engine.runner import (
    LoadedModel,
    exchange_floats_max,
    follow_steps,
    load_model,
    make_runner,
)
from diptych.engine.shm_collectives import RankMemory, ShmCollectives
from diptych.kernels import load

_RANKS: Final = 2
_SIZES: Final = (2048, 16 * 2048, 512 * 2048)  # floats of one shard
_EXCHANGES: Final = 300
_PREFILL: Final = 512
_SEQS: Final = 8
_DECODES: Final = 24
_ROUNDS: Final = 5


def forked(work: Callable[[], object]) -> int:
    """Its pid; it ends by itself or by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            sys.stderr.flush()
            os._exit(0)
    return pid


def time_exchanges(ranks: Collectives, size: int) -> list[float]:
    kernels = load(num_threads=1)
    out = torch.empty(size)
    seconds = []
    for _ in range(_EXCHANGES):
        start = time.perf_counter()
        ranks.parts(size)
        kernels.sum_parts(out, ranks.gather())
        seconds.append(time.perf_counter() - start)
    return seconds[_EXCHANGES // 5 :]


def exchanges(folder: Path) -> dict[str, float]:
    """Microseconds, median, by "kind size"."""
    rows = {}
    for kind in ("shm", "gloo"):
        for size in _SIZES:
            memory = RankMemory(_RANKS * size, 1)
            path = folder / f"{kind}{size}"

            def link(
                rank: int, kind: str = kind, memory: RankMemory = memory, path: Path = path
            ) -> Collectives:
                if kind == "shm":
                    return ShmCollectives(memory, rank, _RANKS, _RANKS)
                return GlooCollectives(
                    store_on_host(path, _RANKS), rank, _RANKS, _RANKS, "127.0.0.1"
                )

            def other(link: Callable[[int], Collectives] = link, size: int = size) -> None:
                time_exchanges(link(1), size)

            pid = forked(other)
            rows[f"{kind} {size}"] = 1e6 * statistics.median(time_exchanges(link(0), size))
            os.waitpid(pid, 0)
            print(f"exchange over {kind}, {size} floats: {rows[f'{kind} {size}']:.1f} us")
    return rows


class Case:
    """One way to compute the steps."""

    def __init__(self, model: LoadedModel, num_ranks: int) -> None:
        self._driver = Driver(model, num_blocks=1024)
        self._others: list[int] = []
        pool, shards = self._driver.pool, len(model.weights.shards)
        ranks: Collectives | None = None
        if num_ranks > 1:
            memory = RankMemory(
                exchange_floats_max(model, _PREFILL), step_numbers_max(_PREFILL, 64, 1024)
            )

            def other() -> None:
                ranks = ShmCollectives(memory, 1, num_ranks, shards)
                follow_steps(model, pool, 1, None, ranks)

            self._others.append(forked(other))
            ranks = ShmCollectives(memory, 0, num_ranks, shards)
        self._threads = _RANKS // num_ranks
        self._driver.runner = make_runner(model, pool, self._threads, None, ranks)
        self._model = model

    def round(self) -> tuple[float, float]:
        """Seconds of one prefill, and of one decode step (median)."""
        self._model.kernels.set_num_threads(self._threads)
        driver = self._driver
        driver.clear()
        driver.add([token % 1000 for token in range(_PREFILL)], 1)
        start = time.perf_counter()
        driver.step()
        prefill_s = time.perf_counter() - start
        for index in range(_SEQS):
            driver.add([index + 1] * 40, _DECODES)
        driver.step(budget=_PREFILL)
        seconds = []
        for _ in range(_DECODES - 2):
            start = time.perf_counter()
            driver.step()
            seconds.append(time.perf_counter() - start)
        return prefill_s, statistics.median(seconds)

    def close(self) -> None:
        for pid in self._others:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def steps(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by case."""
    write_model(folder, "bench-1b", num_hidden_layers=4)
    options = ModelOptions(path=str(folder), load_format="dummy", max_model_len=2048)
    models = {shards: load_model(options, shards) for shards in (1, _RANKS)}
    cases = {
        "1 rank, whole": Case(models[1], 1),
        "1 rank, 2 shards": Case(models[_RANKS], 1),
        "2 ranks": Case(models[_RANKS], _RANKS),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    try:
        for round_ in range(_ROUNDS + 1):
            for name, case in cases.items():
                seconds = case.round()
                if round_:
                    times[name].append(seconds)
    finally:
        for case in cases.values():
            case.close()
    rows = {}
    for name, pairs in times.items():
        prefill_ms, decode_ms = (1e3 * statistics.median(column) for column in zip(*pairs))
        rows[name] = {"prefill_512_ms": prefill_ms, "decode_8_ms": decode_ms}
        print(f"{name}: prefill of 512 {prefill_ms:.1f} ms, decode of 8 {decode_ms:.2f} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, object] = {
            "exchange_us": exchanges(Path(folder)),
            "steps": steps(Path(folder)),
        }
    write(args.out, result)


if __name__ == "__main__":
    main()
