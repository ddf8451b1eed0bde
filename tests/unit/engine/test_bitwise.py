"""Logits do not depend, by one bit, on batch, chunk, threads, block size, prefill or decode."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.drive import Driver
from bench.oracle import VOCAB_SIZE
from diptych.engine.core.config import ModelOptions, Quantization
from diptych.engine.core.model_config import KVDtype
from diptych.engine.runner import LoadedModel, load_model
from tests.unit.engine.models import BACKEND, all_logits, tiny_model

FAMILIES = ["llama3", "qwen2-window", "qwen3"]
CASES = [(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]
NUM_TOKENS = 6
LONG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 192,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the C++ library is not built")


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def alone(family: str, dtype: torch.dtype, prompt: list[int], **how: int) -> list[Tensor]:
    driver = Driver(tiny_model(family, dtype), threads=how.pop("threads", 1))
    seq = driver.add(prompt, NUM_TOKENS)
    driver.finish(**how)
    return driver.recorder.logits[seq.ref.request]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert torch.equal(torch.stack(got), torch.stack(wanted))


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_chunks_and_threads(family: str, dtype: torch.dtype) -> None:
    prompt = prompt_of(83, seed=1)
    wanted = alone(family, dtype, prompt)
    for chunk in (1, 7, 16, 64):
        assert_equal(alone(family, dtype, prompt, chunk=chunk), wanted)
    assert_equal(alone(family, dtype, prompt, threads=2), wanted)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_among_others(family: str, dtype: torch.dtype) -> None:
    prompts = [prompt_of(length, seed=length) for length in (83, 1, 16, 17, 40, 100, 2)]
    driver = Driver(tiny_model(family, dtype), threads=2)
    seqs = [driver.add(prompt, NUM_TOKENS) for prompt in prompts]
    driver.finish(chunk=20, budget=50)
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert_equal(driver.recorder.logits[seq.ref.request], alone(family, dtype, prompt))


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_decode_rows_equal_prefill_rows(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    driver = Driver(model)
    ids = prompt_of(70, seed=3)
    whole = all_logits(model, driver.pool, driver.add(ids, 1), [])
    one_by_one = all_logits(model, driver.pool, driver.add(ids, 1), list(range(30, 70)))
    assert torch.equal(whole, one_by_one)


def test_block_size_changes_no_bit() -> None:
    model = tiny_model("llama2")
    ids = prompt_of(70, seed=4)
    results = []
    for block_size in (16, 32, 64):
        driver = Driver(model, 16, block_size)
        results.append(all_logits(model, driver.pool, driver.add(ids, 1), [33]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def levels() -> list[str]:
    if BACKEND == "reference":
        return []
    from diptych.kernels.cpp import available_levels

    return available_levels()


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_long_prompts_on_every_level(tmp_path: Path, level: str, dtype: str) -> None:
    """Long enough for several splits of the keys, with real head sizes."""
    (tmp_path / "config.json").write_text(json.dumps(LONG | {"dtype": dtype}))
    assert_any_batching(
        load_model(ModelOptions(path=str(tmp_path), load_format="dummy", kernel_level=level))
    )


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("quantization", ["int8", "int4-g32", "int4-g128", "w8a8", "w4a8"])
def test_quantized_weights_on_every_level(
    tmp_path: Path, level: str, quantization: Quantization
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LONG | {"dtype": "bfloat16"}))
    path = str(tmp_path)
    options = ModelOptions(
        path=path, load_format="dummy", kernel_level=level, quantization=quantization
    )
    assert_any_batching(load_model(options))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_kv_on_every_level(tmp_path: Path, level: str, dtype: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LONG | {"dtype": dtype}))
    options = ModelOptions(path=str(tmp_path), load_format="dummy", kernel_level=level)
    assert_any_batching(load_model(options), kv_dtype="int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_kv_rows_and_block_sizes(family: str) -> None:
    """A chunk sees its own tokens as later steps will: rounded."""
    model = tiny_model(family, torch.bfloat16)
    ids = prompt_of(70, seed=5)
    results = []
    for block_size, cuts in ((16, []), (32, [33]), (16, list(range(30, 70)))):
        driver = Driver(model, 64, block_size, kv_dtype="int8")
        results.append(all_logits(model, driver.pool, driver.add(ids, 1), cuts))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def assert_any_batching(model: LoadedModel, kv_dtype: KVDtype | None = None) -> None:
    prompts = [
        [token % 96 for token in prompt_of(length, seed=length)] for length in (700, 33, 517)
    ]

    def run(chosen: list[int], chunk: int, threads: int) -> list[list[Tensor]]:
        driver = Driver(model, threads=threads, kv_dtype=kv_dtype)
        names = [driver.add(prompts[index], 3).ref.request for index in chosen]
        driver.finish(chunk=chunk, budget=600)
        return [driver.recorder.logits[name] for name in names]

    together = run([0, 1, 2], chunk=130, threads=2)
    for index in range(3):
        (single,) = run([index], chunk=600, threads=1)
        assert_equal(single, together[index])
