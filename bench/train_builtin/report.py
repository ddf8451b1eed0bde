"""Report the shipped model's held-out accuracy: `python -m bench.train_builtin.report`.

Loads the folder with transformers (not with the training code), renders prompts with its chat
template, decodes greedily in bf16 and writes `bench/results/builtin_model.json`. Every prompt is
new to the model: see `words.is_held_out`.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from bench.train_builtin.tasks import GENERATORS, Example, held_out_examples

ROOT = Path(__file__).resolve().parents[2]
_BATCH = 50


def render(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """The prompt text, special tokens included."""
    if example.completion:
        return f"{tokenizer.bos_token}{example.prompt[0][1]}"
    messages = [{"role": role, "content": content} for role, content in example.prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """Greedy answers of one batch."""
    inputs = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_length=None,
        max_new_tokens=110,
    )
    width = inputs["input_ids"].shape[1]
    return [tokenizer.decode(ids[width:], skip_special_tokens=True) for ids in output]


def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, seed: int, count: int
) -> tuple[float, list[tuple[str, str]]]:
    """Share of exactly right answers of a task, and (prompt, answer) of the wrong ones."""
    examples = list(held_out_examples(name, seed, count))
    examples.sort(key=lambda e: len(render(tokenizer, e)))
    wrong: list[tuple[str, str]] = []
    for start in range(0, count, _BATCH):
        part = examples[start : start + _BATCH]
        prompts = [render(tokenizer, e) for e in part]
        for example, prompt, text in zip(
            part, prompts, answers(model, tokenizer, prompts), strict=True
        ):
            if not example.is_right(text):
                wrong.append((prompt, text))
    return 1 - len(wrong) / count, wrong


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main() -> None:
    """Parse the command line, evaluate, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "server" / "builtin_model")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/builtin_model.json")
    parser.add_argument("--count", type=int, default=400, help="prompts per task")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    exact: dict[str, float] = {}
    for name in (*GENERATORS, "multi_turn", "completion"):
        exact[name], wrong = score(model, tokenizer, name, args.seed, args.count)
        print(f"{name:12} {exact[name]:.2%}", flush=True)
        for prompt, text in wrong[: args.show]:
            print(f"    {prompt!r} -> {text!r}")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    report = {
        "exact_match": {name: round(share, 4) for name, share in exact.items()},
        "prompts_per_task": args.count,
        "seed": args.seed,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16",
        "decoding": "greedy, transformers",
        "commit": commit.stdout.strip(),
        "cpu": _machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m bench.train_builtin.report", *sys.argv[1:]]),
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
