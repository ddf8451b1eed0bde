"""Right answers of the built-in model by how its weights are rounded, task by task.

Run: python -m bench.quantized_tasks [--count 60] [--out FILE]. Greedy, held-out prompts of
bench/train_builtin, through an inline engine.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from bench.record import write
from bench.train_builtin.report import render
from bench.train_builtin.tasks import GENERATORS, held_out_examples
from diptych.engine.core.config import Quantization
from diptych.engine.core.params import SamplingParams
from diptych.server.builtin import BUILTIN_MODEL
from diptych.server.engine import Engine

SEED = 2024
SCHEMES: list[Quantization | None] = [None, "int8", "w8a8", "int4-g32", "int4", "w4a8-g32", "w4a8"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="prompts per task")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODEL)
    params = SamplingParams(temperature=0, max_tokens=120)
    rows: list[dict[str, object]] = []
    for scheme in SCHEMES:
        shares: dict[str, float] = {}
        with Engine(inline=True, quantization=scheme, threads=1) as engine:
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
        rows.append({"weights": scheme or "bf16", "mean": mean, **shares})
    write(args.out, {"prompts_per_task": args.count, "seed": SEED, "rows": rows})


if __name__ == "__main__":
    main()
