"""`python -m bench.parity_http`: greedy tokens through HTTP against transformers, per family.

Every family is served in fp32 by `diptych serve` with a prefill and a decode worker in processes of
their own; all prompts are sent at once. Exit status 1 when a token differs.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.models import write_tokenizer
from bench.oracle import FAMILIES, Oracle, make_checkpoint
from bench.parity import make_prompts
from bench.record import write
from bench.serving import Serving
from diptych.engine.core.model_config import load_model_config


def equal_tokens(
    family: str, num_prompts: int, num_tokens: int, prompt_len: int, seed: int
) -> tuple[int, int]:
    """(equal, all) tokens of the family's answers."""
    prompts = make_prompts(num_prompts, prompt_len, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, family, seed=seed)
        write_tokenizer(folder)
        frozen = load_model_config(name).rope.frozen_len or None
        oracle = Oracle.load(folder, torch.float32, frozen)
        with Serving(folder, "--served-model-name", "m") as server:

            def ask(prompt: list[int]) -> list[int]:
                body = {
                    "model": "m",
                    "prompt": prompt,
                    "max_tokens": num_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "return_token_ids": True,
                }
                status, answer = server.post("/v1/completions", body)
                assert status == 200, answer
                ids: list[int] = answer["choices"][0]["token_ids"]
                return ids

            with ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(ask, prompts))
        wanted = [oracle.greedy(prompt, num_tokens) for prompt in prompts]
    pairs = [
        ours == theirs
        for answer, want in zip(answers, wanted, strict=True)
        for ours, theirs in zip(answer, want, strict=True)
    ]
    return sum(pairs), len(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: dict[str, object] = {}
    good = True
    for family in args.family or FAMILIES:
        start = time.perf_counter()
        equal, total = equal_tokens(family, args.prompts, args.tokens, args.prompt_len, args.seed)
        rows[family] = {"equal": equal, "tokens": total}
        good = good and equal == total
        print(f"{family:16} {equal}/{total} {time.perf_counter() - start:.1f} s", flush=True)
    write(args.out, {"families": rows})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
