"""What rounding weights or KV costs in accuracy: logits of quantised models against bf16's.

Run: python -m bench.quantized [--model FOLDER | --size bench-360m] [--schemes int8 int4] [--kv
int8]. Over prompts of random tokens (a model of random weights) or of the text given: mean KL
divergence of the next-token distribution in nats, how often the best token is the same, and bytes
of the layers or of the KV.
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from bench.drive import Driver
from bench.models import SIZES, write_model
from bench.record import write
from diptych.engine.batch import build_input
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.model_config import KVDtype
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.models.decoder import Decoder
from diptych.engine.runner import LoadedModel, load_model
from diptych.kernels import NARROW


def log_probabilities(
    model: LoadedModel, prompts: list[list[int]], kv_dtype: KVDtype | None = None
) -> Tensor:
    """Of every position of every prompt; [positions, V] fp32."""
    parts: list[Tensor] = []
    for prompt in prompts:
        threads = torch.get_num_threads()
        driver = Driver(model, len(prompt) // 16 + 2, threads=threads, kv_dtype=kv_dtype)
        decoder = Decoder(model.config, model.weights, model.kernels, driver.pool)
        row = StepRow(driver.add(prompt, 1), 0, len(prompt), True)
        hidden = decoder.forward(build_input(StepPlan([row], len(prompt), 0), 16))
        parts.append(decoder.logits(hidden.clone()).log_softmax(dim=1))
    return torch.cat(parts)


def layer_bytes(model: LoadedModel) -> int:
    packed = [
        linear
        for layer in model.weights.layers
        for shard in layer.shards
        for linear in (shard.qkv, shard.o, shard.gate_up, shard.down)
    ]
    return sum(p.data.nbytes + (0 if p.scales is None else p.scales.nbytes) for p in packed)


def compare(wanted: Tensor, found: Tensor) -> dict[str, object]:
    """Both [positions, V]."""
    kl = (wanted.exp() * (wanted - found)).sum(dim=1)  # [positions]
    same = (wanted.argmax(1) == found.argmax(1)).float().mean()
    return {
        "kl_mean": round(float(kl.mean()), 6),
        "kl_max": round(float(kl.max()), 6),
        "same_best": round(float(same), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; without it random weights")
    parser.add_argument("--text", type=Path, help="a file of prompts, one a line, for --model")
    parser.add_argument("--size", choices=SIZES, default="bench-360m")
    parser.add_argument("--schemes", nargs="*", default=list(NARROW))
    parser.add_argument("--kv", nargs="*", choices=get_args(KVDtype), default=["int8"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or write_model(Path(made), args.size)
        how = "auto" if args.model else "dummy"
        exact = load_model(ModelOptions(path=str(folder), load_format=how))
        if args.text is None:
            shape = (args.prompts, args.length)
            prompts = torch.randint(exact.config.vocab_size, shape, generator=generator).tolist()
        else:
            from diptych.server.text.tokenizer import Tokenizer

            tokenizer = Tokenizer(str(folder), None)
            prompts = [tokenizer.encode(line) for line in args.text.read_text().splitlines()]
        wanted = log_probabilities(exact, prompts)  # [positions, V]
        for scheme in args.schemes:
            options = ModelOptions(path=str(folder), load_format=how, quantization=scheme)
            model = load_model(options)
            found = log_probabilities(model, prompts)
            share = round(layer_bytes(model) / layer_bytes(exact), 3)
            rows.append({"scheme": scheme, **compare(wanted, found), "layer_bytes_of_bf16": share})
        for dtype in args.kv:
            found = log_probabilities(exact, prompts, dtype)
            share = round(exact.config.block_bytes(16, dtype) / exact.config.block_bytes(16), 3)
            rows.append({"kv": dtype, **compare(wanted, found), "kv_bytes_of_bf16": share})
    write(args.out, {"positions": wanted.shape[0], "rows": rows})


if __name__ == "__main__":
    main()
