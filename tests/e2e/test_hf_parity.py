"""The engine against transformers on the same random weights, every family and rope scaling.

A slice of `python -m bench.parity`, which runs 64 prompts of 64 tokens each.
"""

from pathlib import Path

import pytest
import torch

from bench.oracle import FAMILIES, make_checkpoint
from bench.parity import BF16_LIMIT, bf16_distance, make_prompts, oracle_of, tokens_equal
from diptych.engine.core.config import ModelOptions
from diptych.engine.runner import load_model


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_greedy_tokens_equal(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family, seed=1)
    model = load_model(ModelOptions(path=str(tmp_path)))
    prompts = make_prompts(8, most=70, seed=1)
    equal, total = tokens_equal(model, oracle_of(model, tmp_path), prompts, 16, chunk=24)
    assert (equal, total) == (128, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_are_close(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family, torch.bfloat16, seed=1)
    model = load_model(ModelOptions(path=str(tmp_path)))
    assert model.config.dtype == "bfloat16"
    far = bf16_distance(tmp_path, model, make_prompts(2, most=70, seed=1))
    assert far.to_fp32 <= BF16_LIMIT / 2, far
    assert far.to_bf16 <= BF16_LIMIT, far


def test_fp16_logits_are_close(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", torch.float16, seed=1)
    model = load_model(ModelOptions(path=str(tmp_path)))
    assert model.config.dtype == "float16"
    far = bf16_distance(tmp_path, model, make_prompts(2, most=70, seed=1))
    assert far.to_fp32 <= 2e-3, far


def test_reference_kernels_give_the_same_tokens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", seed=1)
    model = load_model(ModelOptions(path=str(tmp_path), kernels="reference"))
    prompts = make_prompts(2, most=30, seed=1)
    equal, total = tokens_equal(model, oracle_of(model, tmp_path), prompts, 4, chunk=24)
    assert equal == total
