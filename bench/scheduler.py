"""Cost of the central scheduler: per change, per step, and of placing an 8k-token prompt.

Run: python -m bench.scheduler [--vllm-python PATH] [--out FILE]. A change is a committed block of a
running sequence (it extends the sequence's grant); in real traffic each sequence makes one in 16
decode steps, so the cost of one decode step of n sequences is that of n / 16 changes. With the
Python of an environment that has vLLM its V1 scheduler, which does the work of our batcher and our
scheduler, runs in turns with ours, and `bench.batcher` stands beside.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import batcher
from bench.models import write_model
from bench.record import write
from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.hashing import extend_chain, hash_root
from diptych.engine.core.messages import (
    ApiUp,
    Assign,
    ChoiceState,
    Closed,
    CommittedBlock,
    Grants,
    Joined,
    PoolUp,
    Progress,
    Send,
    Submit,
    WorkerUp,
)
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import pack_ids
from diptych.scheduler.commands import PoolRead, SchedulerCommand, SchedulerInput
from diptych.scheduler.scheduler import Scheduler
from diptych.server.collector import calm_collector

BLOCK = 16
NUM_BLOCKS = 1 << 17
ROOT = hash_root("bench")
SIZES = (64, 256, 1024)
_ZERO = bytes(32)


class Driver:
    """A scheduler with one mixed worker, and the bookkeeping of a worker that obeys."""

    def __init__(self, max_num_seqs: int) -> None:
        options = SchedulerOptions(max_num_seqs=max_num_seqs, max_waiting=1 << 20)
        self.scheduler = Scheduler(1, options, CacheOptions(num_blocks=NUM_BLOCKS))
        self.tables: dict[SeqRef, tuple[list[int], list[int]]] = {}
        self.now = 0.0
        self.step([PoolUp(0, NUM_BLOCKS, BLOCK), WorkerUp(0, 1, 0, 50), ApiUp(0, 1)])
        self.step([Joined(1, 0, 1)])
        self.step([PoolRead(0, [0] * NUM_BLOCKS, [])])

    def step(self, inputs: list[SchedulerInput]) -> float:
        """Seconds of one step; what it assigned and granted is noted after the clock stopped."""
        self.now += 1e-4
        start = perf_counter()
        commands = self.scheduler.step(inputs, self.now)
        seconds = perf_counter() - start
        self._note(commands)
        return seconds

    def _note(self, commands: list[SchedulerCommand]) -> None:
        for command in commands:
            if not isinstance(command, Send):
                continue
            message = command.message
            if isinstance(message, Assign):
                self.tables[message.ref] = (list(message.block_table), list(message.generations))
            elif isinstance(message, Grants):
                for grant in message.grants:
                    blocks, generations = self.tables[grant.ref]
                    blocks += grant.blocks
                    generations += grant.generations

    def submit(self, name: str, prompt: bytes, hashes: list[bytes]) -> Submit:
        request = Request(name, prompt, SamplingParams(max_tokens=4096, seed=0), 0, 0, ROOT)
        return Submit(0, 1, 1, request, [ChoiceState(0, 0, b"", hashes)], False)


def progress(
    *,
    committed: list[CommittedBlock] | None = None,
    finished: list[SeqRef] | None = None,
    released: list[SeqRef] | None = None,
) -> Progress:
    return Progress(
        1, 0, 1, 16, 0.1, 0, 16, committed or [], [], finished or [], released or [], []
    )


def measure(num_running: int) -> dict[str, float]:
    driver = Driver(num_running + 1)
    prompt = pack_ids([5])
    for index in range(num_running):
        driver.step([driver.submit(f"r{index}", prompt, [])])
    refs = list(driver.tables)
    assert len(refs) == num_running, "all are placed"
    ticks = [driver.step([]) for _ in range(400)]
    commits = []
    for index in range(64):
        rows = []
        for ref in refs:
            blocks, generations = driver.tables[ref]
            name = f"{ref.request} {index}".encode().ljust(32, b"\0")
            rows.append(CommittedBlock(ref, index, blocks[index], generations[index], name, _ZERO))
        commits.append(driver.step([progress(committed=rows)]) / num_running)
    lives = []
    for index in range(200):
        seconds = driver.step([driver.submit(f"new{index}", prompt, [])])
        ref = SeqRef(f"new{index}", 0, 0)
        seconds += driver.step([progress(finished=[ref])])
        seconds += driver.step([Closed(0, 1, ref.request)])
        lives.append(seconds)
    change_us = statistics.median(commits) * 1e6
    return {
        "running": num_running,
        "idle_step_us_p50": round(statistics.median(ticks) * 1e6, 2),
        "change_us_p50": round(change_us, 2),
        "per_decode_step_us": round(change_us * num_running / BLOCK, 1),
        "request_life_us_p50": round(statistics.median(lives) * 1e6, 1),
    }


def median_us(work: Callable[[], object], count: int = 50) -> float:
    times = []
    for _ in range(count):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return round(statistics.median(times) * 1e6, 1)


def prefix_lookup(num_tokens: int = 8192) -> dict[str, float]:
    """Hashing (in the API server) and finding a prompt that is in the cache but for its tail."""
    driver = Driver(16)
    prompt = pack_ids([i % 50000 for i in range(num_tokens)])
    hashes = extend_chain(ROOT, prompt, BLOCK)
    driver.step([driver.submit("first", prompt, hashes)])
    ref = SeqRef("first", 0, 0)
    blocks, generations = driver.tables[ref]
    parents = [ROOT, *hashes]
    rows = [
        CommittedBlock(ref, i, blocks[i], generations[i], name, parents[i])
        for i, name in enumerate(hashes)
    ]
    driver.step([progress(committed=rows)])
    driver.step([progress(finished=[ref]), Closed(0, 1, "first")])
    times = []
    for index in range(30):
        times.append(driver.step([driver.submit(f"again{index}", prompt, hashes)]))
        again = SeqRef(f"again{index}", 0, 0)
        driver.step([progress(finished=[again]), Closed(0, 1, again.request)])
    return {
        "prompt_tokens": num_tokens,
        "hash_us_p50": median_us(lambda: extend_chain(ROOT, prompt, BLOCK)),
        "submit_to_assign_us_p50": round(statistics.median(times) * 1e6, 1),
    }


def vllm(python: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """What `bench/vllm_scheduler.py` prints."""
    script = Path(__file__).with_name("vllm_scheduler.py")
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), "tiny")
        done = subprocess.run(
            [str(python), "-P", str(script), str(model), *map(str, sizes)],
            stdout=subprocess.PIPE,
            env=os.environ | quiet,
            cwd=folder,
            check=True,
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def beside_vllm(python: Path) -> dict[str, Any]:
    """Per size in turns: ours (batcher and scheduler of a decode step in real traffic), theirs."""
    rows = []
    for size in SIZES:
        ours, mine, theirs = measure(size), batcher.measure(size), vllm(python, [size])
        both_us = ours["per_decode_step_us"] + mine["spread_us_p50"]
        their_us = theirs["rows"][0]["step_us_p50"]
        rows.append(
            {
                "running": size,
                "scheduler_us": ours["per_decode_step_us"],
                "batcher_uneventful_us": mine["uneventful_us_p50"],
                "batcher_us": mine["spread_us_p50"],
                "vllm_step_us": their_us,
                "vllm_over_ours": round(their_us / both_us, 1),
            }
        )
    return {"version": theirs["version"], "rows": rows, "prefix": theirs["prefix"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", type=Path, metavar="PATH")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    calm_collector()  # as the process of a scheduler does
    result: dict[str, object] = {
        "rows": [measure(size) for size in SIZES],
        "prefix": prefix_lookup(),
    }
    if args.vllm_python is not None:
        result["vllm"] = beside_vllm(args.vllm_python)
    write(args.out, result)


if __name__ == "__main__":
    main()
