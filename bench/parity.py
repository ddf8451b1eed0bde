"""`python -m bench.parity`: the engine's greedy tokens and logits against transformers, per family.

Prints one row per family: how many of the fp32 tokens are equal, and for bf16 weights how far the
logits are, at most and relative to the row's largest, from transformers in bf16 and in fp32 on the
same weights; and, as a measure, how far transformers in bf16 is from itself in fp32. Exit status 1
when a token differs or a distance is above its limit.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.drive import Driver
from bench.oracle import FAMILIES, VOCAB_SIZE, Oracle, make_checkpoint
from diptych.engine.core.config import ModelOptions
from diptych.engine.runner import LoadedModel, load_model

__all__ = ["bf16_distance", "main", "make_prompts", "oracle_of", "tokens_equal"]

BF16_LIMIT = 2e-2


def make_prompts(count: int, most: int, seed: int) -> list[list[int]]:
    """Prompts of mixed lengths from 1 to `most` tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, most))] for _ in range(count)]


def oracle_of(model: LoadedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Oracle:
    return Oracle.load(folder, dtype, model.config.rope.frozen_len or None)


def tokens_equal(
    model: LoadedModel, oracle: Oracle, prompts: list[list[int]], num_tokens: int, chunk: int
) -> tuple[int, int]:
    """(equal, all): tokens of all prompts in one batch, chunked, against generate one by one."""
    driver = Driver(model, num_blocks=2 + sum(len(p) + num_tokens + 16 for p in prompts) // 16)
    for prompt in prompts:
        driver.add(prompt, num_tokens)
    answers = driver.finish(chunk=chunk, budget=96)
    equal = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = oracle.greedy(prompt, num_tokens)
        equal += sum(ours == theirs for ours, theirs in zip(answer, wanted, strict=True))
    return equal, len(prompts) * num_tokens


def engine_logits(model: LoadedModel, ids: list[int], prompt_len: int) -> Tensor:
    """Logits after each of ids[prompt_len - 1:], teacher-forced; [len(ids) - prompt_len + 1, V]."""
    driver = Driver(model, num_blocks=2 + len(ids) // 16)
    seq = driver.add(ids[:prompt_len], len(ids) - prompt_len + 1)
    while driver.step(chunk=24) is not None:
        if seq.num_emitted and len(seq.tokens) <= len(ids):
            seq.tokens[-1] = ids[len(seq.tokens) - 1]
    return torch.stack(driver.recorder.logits[seq.ref.request])


class Bf16Distance(NamedTuple):
    """Largest distances of logits, each relative to the largest logit of its row."""

    to_bf16: float  # engine to transformers in bf16
    to_fp32: float  # engine to transformers in fp32, same bf16 weights
    oracles: float  # transformers in bf16 to transformers in fp32


def bf16_distance(folder: Path, model: LoadedModel, prompts: list[list[int]]) -> Bf16Distance:
    bf16, fp32 = (oracle_of(model, folder, dtype) for dtype in (torch.bfloat16, torch.float32))
    worst = [0.0, 0.0, 0.0]
    for ids in prompts:
        first = max(1, len(ids) // 2)
        low, high = bf16.logits(ids)[first - 1 :], fp32.logits(ids)[first - 1 :]  # [R, V]
        ours = engine_logits(model, ids, first)
        for index, (x, y) in enumerate(((ours, low), (ours, high), (low, high))):
            distance = (x - y).abs().amax(dim=1) / y.abs().amax(dim=1)  # [R]
            worst[index] = max(worst[index], float(distance.max()))
    return Bf16Distance(*worst)


def run_family(family: str, args: argparse.Namespace) -> bool:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, family, seed=args.seed)
        model = load_model(ModelOptions(path=name, kernels=args.kernels))
        prompts = make_prompts(args.prompts, args.prompt_len, args.seed)
        equal, total = tokens_equal(
            model, oracle_of(model, folder), prompts, args.tokens, args.chunk
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, family, torch.bfloat16, seed=args.seed)
        model = load_model(ModelOptions(path=name, kernels=args.kernels))
        far = bf16_distance(folder, model, prompts[:8])
    good = equal == total and max(far.to_bf16, far.to_fp32) <= BF16_LIMIT
    seconds = time.perf_counter() - started
    print(
        f"{family:14} {equal:6}/{total:<6} {far.to_bf16:10.2e} {far.to_fp32:10.2e}"
        f" {far.oracles:10.2e} {seconds:6.1f} s  {'ok' if good else 'FAILED'}",
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=100, help="longest prompt, in tokens")
    parser.add_argument("--chunk", type=int, default=24, help="prefill chunk, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", choices=("auto", "cpp", "reference"), default="auto")
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append")
    args = parser.parse_args()
    print(f"{'family':14} {'fp32 tokens':>13} {'bf16-bf16':>10} {'bf16-fp32':>10} {'oracles':>10}")
    results = [run_family(family, args) for family in args.family or FAMILIES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
