"""A sharded model: the unsharded one within rounding, and equal to itself bit for bit."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.drive import Driver
from bench.oracle import VOCAB_SIZE
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ConfigError
from diptych.engine.runner import LoadedModel, load_model
from tests.unit.engine.models import BACKEND, all_logits, tiny_model
from tests.unit.engine.test_bitwise import LONG, levels

# tied and GQA; biases; norms of heads, tied; windows and biases of q, k, v
FAMILIES = ["llama3", "llama-biases", "qwen3", "qwen2-window"]
NUM_TOKENS = 24


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (50, 1, 33, 16)]


def logits_of(model: LoadedModel) -> Tensor:
    driver = Driver(model)
    return all_logits(model, driver.pool, driver.add(prompts()[0], 1), [])


def answers(model: LoadedModel) -> list[list[int]]:
    driver = Driver(model)
    for prompt in prompts():
        driver.add(prompt, NUM_TOKENS)
    return driver.finish()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_shards", [2, 4])  # 4 of two KV heads: each is in two shards
def test_as_the_unsharded_model_on_fp32(family: str, num_shards: int) -> None:
    whole, sharded = tiny_model(family), tiny_model(family, num_shards=num_shards)
    torch.testing.assert_close(logits_of(sharded), logits_of(whole), rtol=2e-5, atol=2e-5)
    assert answers(sharded) == answers(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_within_the_error_of_the_dtype(dtype: torch.dtype) -> None:
    whole, sharded = tiny_model("llama3", dtype), tiny_model("llama3", dtype, num_shards=2)
    exact = logits_of(tiny_model("llama3", dtype, kernels="reference"))
    error = (logits_of(whole) - exact).abs().max()
    assert (logits_of(sharded) - exact).abs().max() <= 3 * error + 1e-6


def test_the_reference_backend_shards_too() -> None:
    whole = tiny_model("llama-biases", kernels="reference")
    sharded = tiny_model("llama-biases", kernels="reference", num_shards=4)
    torch.testing.assert_close(logits_of(sharded), logits_of(whole), rtol=2e-5, atol=2e-5)


def test_quantized_weights_shard_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LONG | {"dtype": "bfloat16"}))
    options = ModelOptions(path=str(tmp_path), load_format="dummy", quantization="int8")
    logits = []
    for num_shards in (1, 2):
        model = load_model(options, num_shards)
        driver = Driver(model)
        seq = driver.add(list(range(90)), 1)
        logits.append(all_logits(model, driver.pool, seq, []))
    scale = logits[0].abs().max()
    assert (logits[1] - logits[0]).abs().max() < 0.05 * scale


@pytest.mark.skipif(BACKEND == "reference", reason="the C++ library is not built")
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_batch_and_chunk_gives_the_same_bits(tmp_path: Path, level: str, dtype: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LONG | {"dtype": dtype}))
    options = ModelOptions(path=str(tmp_path), load_format="dummy", kernel_level=level)
    model = load_model(options, 4)
    rng = random.Random(9)
    texts = [[rng.randrange(96) for _ in range(n)] for n in (300, 33, 17)]

    def run(chosen: list[int], chunk: int, threads: int) -> list[Tensor]:
        driver = Driver(model, threads=threads)
        names = [driver.add(texts[index], 3).ref.request for index in chosen]
        driver.finish(chunk=chunk, budget=400)
        return [torch.stack(driver.recorder.logits[name]) for name in names]

    together = run([0, 1, 2], chunk=70, threads=2)
    for index in range(3):
        (single,) = run([index], chunk=400, threads=1)
        assert torch.equal(single, together[index])


def test_the_number_of_shards_is_in_the_fingerprint() -> None:
    prints = {tiny_model("llama3", num_shards=shards).fingerprint for shards in (1, 2, 4)}
    assert len(prints) == 3


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor-parallel size 3"):
        tiny_model("llama3", num_shards=3)
