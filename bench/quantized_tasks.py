"""Right answers of the built-in model by how its weights and its KV are rounded, task by task.

Run: python -m bench.quantized_tasks [--count 60] [--out FILE]. Greedy, held-out prompts of
bench/train_builtin, through an inline engine.
"""

import argparse
from pathlib import Path
from typing import Final

from transformers import AutoTokenizer

from bench.record import write
from bench.train_builtin.report import render
from bench.train_builtin.tasks import GENERATORS, held_out_examples
from diptych.engine.core.config import KVCacheDtype, Quantization
from diptych.engine.core.params import SamplingParams
from diptych.server.builtin import BUILTIN_MODEL
from diptych.server.engine import Engine

SEED = 2024
SCHEMES: Final[list[tuple[Quantization | None, KVCacheDtype]]] = [
    (None, "auto"),
    (None, "int8"),
    ("int8", "auto"),
    ("w8a8", "auto"),
    ("w8a8", "int8"),
    ("int4-g32", "auto"),
    ("int4", "auto"),
    ("w4a8-g32", "auto"),
    ("w4a8", "auto"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="prompts per task")
    parser.add_argument("--schemes", type=int, help="only so many, from the first")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODEL)
    params = SamplingParams(temperature=0, max_tokens=120)
    rows: list[dict[str, object]] = []
    for scheme, kv in SCHEMES[: args.schemes]:
        shares: dict[str, float] = {}
        with Engine(inline=True, quantization=scheme, kv_cache_dtype=kv, threads=1) as engine:
            for name in (*GENERATORS, "multi_turn", "completion"):
                examples = list(held_out_examples(name, SEED, args.count))
                prompts = [
                    tokenizer.encode(render(tokenizer, example), add_special_tokens=False)
                    for example in examples
                ]
                outputs = engine.generate(prompts, params)
                pairs = zip(examples, outputs, strict=True)
                right = sum(example.is_right(output.text) for example, output in pairs)
                shares[name] = round(right / args.count, 4)
        mean = round(sum(shares.values()) / len(shares), 4)
        rows.append(
            {
                "weights": scheme or "bf16",
                "kv": "bf16" if kv == "auto" else kv,
                "mean": mean,
                **shares,
            }
        )
    write(args.out, {"prompts_per_task": args.count, "seed": SEED, "rows": rows})


if __name__ == "__main__":
    main()
