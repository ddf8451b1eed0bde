"""Speed of the CPU kernels, beside what the machine can do at most, measured in the same run.

Run: python -m bench.kernels [--threads N] [--level NAME] [--dtype bf16] [--kv int8]
[--weights int8] [--onednn] [--out FILE]. GB/s are the
bytes of weights (or KV) that a call must read; GFLOP/s are its multiplications and additions. The
limits are a loop of loads over a buffer of the weights' size, a copy, and a loop of multiply-adds
in registers. Shapes are one layer of a model of about 1 B parameters.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

import torch

from bench.record import spread, write
from diptych.engine.core.types import KV_SCALE_BYTES
from diptych.kernels import NARROW, Narrow, library
from diptych.kernels.cpp import CppKernels, available_levels, level_index

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KV_DTYPES = {**DTYPES, "int8": torch.int8}
LAYERS = {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}  # N, K
ROWS = (1, 8, 64, 512)
NUM_Q, NUM_KV, DIM, BLOCK = 32, 8, 64, 16


@dataclass(frozen=True)
class Work:
    """What one call has to do."""

    bytes: float
    flop: float


def seconds(function: Callable[[], object], budget_s: float = 0.4) -> list[float]:
    """Times of single calls, at least 3, the first (cold) one left out."""
    function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 300):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return times


def rates(times: list[float], work: Work) -> dict[str, object]:
    best = min(times)  # of a busy machine, the call that nobody interrupted
    return {
        "ms": {name: round(value * 1e3, 4) for name, value in spread(times).items()},
        "gb_per_s": round(work.bytes / best / 1e9, 2),
        "gflop_per_s": round(work.flop / best / 1e9, 1),
    }


def limits(level: str, num_bytes: int) -> dict[str, float]:
    lib, index = library.load(), level_index(level)
    data = torch.ones(num_bytes // 4)  # of zeros the kernel has one page for all
    copy = torch.empty_like(data)
    read = min(seconds(lambda: lib.probe_read(index, data)))
    copied = min(seconds(lambda: copy.copy_(data)))
    rounds = 200_000
    found = {
        "read_gb_per_s": num_bytes / read / 1e9,
        "copy_gb_per_s": 2 * num_bytes / copied / 1e9,
    }
    for name, pairs in (("fma", False), ("bf16_dot", True)):
        operations = lib.probe_compute(index, rounds, pairs)
        fastest = min(seconds(partial(lib.probe_compute, index, rounds, pairs)))
        found[f"{name}_gflop_per_s"] = operations / fastest / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def linear(cpp: CppKernels, dtype: torch.dtype, narrow: Narrow | None) -> list[dict[str, object]]:
    results = []
    for name, (num_out, num_in) in LAYERS.items():
        packed = cpp.pack_linear(torch.randn(num_out, num_in).to(dtype), None, narrow)
        for rows in ROWS:
            x, out = torch.randn(rows, num_in), torch.empty(rows, num_out)
            times = seconds(partial(cpp.linear, out, x, packed))
            scale_bytes = 0 if packed.scales is None else packed.scales.nbytes
            work = Work(packed.data.nbytes + scale_bytes, 2.0 * rows * num_out * num_in)
            results.append({"layer": name, "rows": rows, **rates(times, work)})
    return results


def onednn(dtype: torch.dtype) -> list[dict[str, object]]:
    """The same layers by torch (oneDNN), activations in the weights' dtype: the baseline."""
    results = []
    for name, (num_out, num_in) in LAYERS.items():
        weight = torch.randn(num_out, num_in).to(dtype)
        for rows in ROWS:
            x = torch.randn(rows, num_in).to(dtype)
            times = seconds(partial(torch.nn.functional.linear, x, weight))
            work = Work(weight.nbytes, 2.0 * rows * num_out * num_in)
            results.append({"layer": name, "rows": rows, **rates(times, work)})
    return results


def random_pool(cpp: CppKernels, dtype: torch.dtype, num_blocks: int) -> torch.Tensor:
    """[num_blocks, 1, 2, NUM_KV, BLOCK, DIM], of int8 with the scales behind each row."""
    width = DIM + (KV_SCALE_BYTES if dtype == torch.int8 else 0)
    pool = torch.zeros(num_blocks, 1, 2, NUM_KV, BLOCK, width, dtype=dtype)
    k, v = (torch.randn(num_blocks * BLOCK, NUM_KV, DIM) for _ in range(2))
    slots = torch.arange(num_blocks * BLOCK, dtype=torch.int32)
    cpp.write_kv(pool[:, 0, 0], pool[:, 0, 1], k, v, slots)
    return pool


def attention(cpp: CppKernels, dtypes: list[str]) -> list[dict[str, object]]:
    """Decode: rows of many sequences, or one long one; prefill: one chunk after a past. Each
    over KV of every dtype in turn."""
    cases = {
        "decode 16 x 1024": (16, 1, 1024),
        "decode 16 x 4096": (16, 1, 4096),
        "decode 1 x 4096": (1, 1, 4096),
        "decode 1 x 8192": (1, 1, 8192),
        "decode 1 x 16384": (1, 1, 16384),
        "prefill 512 at 0": (1, 512, 512),
        "prefill 512 at 1536": (1, 512, 2048),
    }
    results = []
    for (name, (seqs, tokens, kv_len)), kv in product(cases.items(), dtypes):
        per_seq = kv_len // BLOCK
        pool = random_pool(cpp, KV_DTYPES[kv], seqs * per_seq)
        q = torch.randn(seqs * tokens, NUM_Q, DIM)
        arguments = (
            torch.empty_like(q),
            q,
            pool[:, 0, 0],
            pool[:, 0, 1],
            torch.arange(seqs + 1, dtype=torch.int32) * tokens,
            torch.arange(seqs + 1, dtype=torch.int32) * per_seq,
            torch.randperm(seqs * per_seq).to(torch.int32),
            torch.full((seqs,), kv_len, dtype=torch.int32),
            DIM**-0.5,
            0,
        )
        times = seconds(partial(cpp.attention, *arguments))
        pairs = seqs * sum(kv_len - t for t in range(tokens))  # (query, key) pairs that count
        work = Work(pool.nbytes, 4.0 * pairs * NUM_Q * DIM)
        results.append({"case": name, "kv": kv, **rates(times, work)})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", choices=available_levels())
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument(
        "--kv", nargs="*", choices=list(KV_DTYPES), default=["int8"], help="beside --dtype's"
    )
    parser.add_argument("--weights", choices=list(NARROW), help="rounded weights")
    parser.add_argument("--onednn", action="store_true", help="torch's linear layers beside ours")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(flags.threads)
    cpp, dtype = CppKernels(flags.level), DTYPES[flags.dtype]
    cpp.set_num_threads(flags.threads)
    num_out, num_in = LAYERS["gate_up"]
    result: dict[str, object] = {
        "level": cpp.level,
        "threads": flags.threads,
        "dtype": flags.dtype,
        "limits": limits(cpp.level, num_out * num_in * dtype.itemsize),
        "weights": flags.weights or flags.dtype,
        "linear": linear(cpp, dtype, NARROW[flags.weights] if flags.weights else None),
        **({"linear_onednn": onednn(dtype)} if flags.onednn else {}),
        "attention": attention(cpp, list(dict.fromkeys((flags.dtype, *flags.kv)))),
        "limits_after": limits(cpp.level, num_out * num_in * dtype.itemsize),
    }
    write(flags.out, result)


if __name__ == "__main__":
    main()
