"""Whole layers and decode steps in one call give the bits of single calls: every level, dtype,
rounding and family."""

import json
import random
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from bench.drive import Driver
from bench.oracle import FAMILIES, VOCAB_SIZE
from diptych.engine.batch import ModelInput, build_input
from diptych.engine.core.config import ModelOptions, Quantization
from diptych.engine.core.model_config import KVDtype
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.decode_batch import DecodeBatch
from diptych.engine.models.decoder import Decoder
from diptych.engine.pool import KVPool
from diptych.engine.runner import LoadedModel, load_model
from tests.unit.engine.models import BACKEND, tiny_model
from tests.unit.engine.test_bitwise import LONG, levels

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the C++ library is not built")

LENGTHS = (90, 1, 33, 16, 47)
TOKENS_MAX = 6  # after each prompt


def _steps(model: LoadedModel, driver: Driver) -> list[ModelInput]:
    """A chunk, a step of everything, and decodes of all sequences but one, whose KV is there."""
    rng = random.Random(5)
    vocab = min(VOCAB_SIZE, model.config.vocab_size)
    seqs = [driver.add([rng.randrange(vocab) for _ in range(n)], TOKENS_MAX) for n in LENGTHS]
    plans = [
        [StepRow(seqs[0], 0, 70, False)],
        [StepRow(seqs[0], 70, 20, True), *(StepRow(s, 0, len(s.tokens), True) for s in seqs[1:])],
        [StepRow(s, len(s.tokens) - 1, 1, True) for s in seqs[:4]],
        [StepRow(seqs[4], len(seqs[4].tokens) - 1, 1, True)],
    ]
    return [
        build_input(StepPlan(rows, sum(row.length for row in rows), 0), driver.pool.block_size)
        for rows in plans
    ]


def _computed(
    model: LoadedModel, *, fuse: bool, kv_dtype: KVDtype | None = None
) -> tuple[Tensor, Tensor]:
    """The hidden states of all steps, and what is in the pool in the end."""
    driver = Driver(model, threads=2, kv_dtype=kv_dtype)
    pulse = torch.zeros(1, dtype=torch.int64)
    decoder = Decoder(
        model.config, model.weights, model.kernels, driver.pool, pulse=pulse, fuse=fuse
    )
    steps = _steps(model, driver)
    hidden = torch.cat([decoder.forward(step).clone() for step in steps])
    assert int(pulse) == len(steps) * model.config.num_layers
    model.kernels.set_num_threads(1)
    return hidden, driver.pool.data.view(torch.uint8)


def _last_rows(model: LoadedModel, kv_dtype: KVDtype | None) -> tuple[list[Tensor], Tensor]:
    """Every step asked for the last rows of some sequences only, and of all: what the rows were
    when all was asked for, beside what they are; and the pool."""
    driver = Driver(model, threads=2, kv_dtype=kv_dtype)
    decoder = Decoder(model.config, model.weights, model.kernels, driver.pool)
    pairs = []
    for number, step in enumerate(_steps(model, driver)):
        whole, seqs = decoder.forward(step).clone(), list(range(len(step.kv_len)))
        for asked in (seqs[number % 2 :: 2], seqs[-1:], [], seqs):
            outputs = torch.tensor(asked, dtype=torch.int32)
            rows = step.qo_indptr[1:].index_select(0, outputs) - 1
            got = decoder.forward(step, outputs)
            pairs.append(torch.stack([t.index_select(0, rows) for t in (whole, got)]))
    model.kernels.set_num_threads(1)
    return pairs, driver.pool.data.view(torch.uint8)


def _decoded(
    model: LoadedModel, *, fuse: bool, kv_dtype: KVDtype | None
) -> tuple[list[Tensor], Tensor]:
    """Logits, choices and their logprobs of decode steps of growing and shrinking batches, and what
    is in the pool in the end."""
    driver = Driver(model, threads=2, kv_dtype=kv_dtype)
    pulse = torch.zeros(1, dtype=torch.int64)
    decoder = Decoder(
        model.config, model.weights, model.kernels, driver.pool, pulse=pulse, fuse=fuse
    )
    for step in _steps(model, driver):
        decoder.forward(step)
    before, batch, results = int(pulse), DecodeBatch(driver.pool.num_parts), []
    for count in (2, 5, 5, 1):
        rows = [StepRow(s, len(s.tokens) - 1, 1, True) for s in driver.seqs[:count]]
        if fuse:
            batch.take(rows)
            logits = decoder.decode(batch.rows, choose=True)
            assert logits is not None
            results += [logits.clone(), torch.tensor(batch.chosen(), dtype=torch.int32)]
            results.append(batch.rows.logprobs[:count].clone())
        else:
            hidden = decoder.forward(build_input(StepPlan(rows, count, 0), driver.pool.block_size))
            logits = decoder.logits(hidden.clone())
            results += [logits.clone(), *model.kernels.argmax_logprob(logits)]
        for seq in driver.seqs[:count]:
            seq.tokens.append((seq.tokens[-1] * 7 + 1) % min(VOCAB_SIZE, model.config.vocab_size))
    assert int(pulse) - before == 4 * model.config.num_layers
    model.kernels.set_num_threads(1)
    return results, driver.pool.data.view(torch.uint8)


def _assert_equal(model: LoadedModel, kv_dtype: KVDtype | None = None) -> None:
    hidden, pool = _computed(model, fuse=True, kv_dtype=kv_dtype)
    single, single_pool = _computed(model, fuse=False, kv_dtype=kv_dtype)
    assert hidden.isfinite().all()
    assert torch.equal(hidden, single)
    assert torch.equal(pool, single_pool)
    pairs, pool = _last_rows(model, kv_dtype)
    for whole, got in pairs:
        assert torch.equal(whole, got)
    assert torch.equal(pool, single_pool)
    results, pool = _decoded(model, fuse=True, kv_dtype=kv_dtype)
    singles, single_pool = _decoded(model, fuse=False, kv_dtype=kv_dtype)
    assert all(map(torch.equal, results, singles))
    assert all(result.isfinite().all() for result in results)
    assert torch.equal(pool, single_pool)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family(family: str, dtype: torch.dtype) -> None:
    _assert_equal(tiny_model(family, dtype))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_level(level: str, dtype: torch.dtype) -> None:
    _assert_equal(tiny_model("qwen3", dtype, level=level))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("kv_dtype", get_args(KVDtype))
def test_every_dtype_of_kv(level: str, kv_dtype: KVDtype) -> None:
    _assert_equal(tiny_model("llama3", torch.bfloat16, level=level), kv_dtype)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("quantization", ["int8", "int4-g32", "int4-g128", "w8a8", "w4a8"])
@pytest.mark.parametrize("inner", [192, 200])  # whole panels of gates, and half of one
def test_every_rounding(tmp_path: Path, level: str, quantization: Quantization, inner: int) -> None:
    config = LONG | {"dtype": "bfloat16", "attention_bias": True, "mlp_bias": True}
    config |= {"intermediate_size": inner}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ModelOptions(
        path=str(tmp_path), load_format="dummy", kernel_level=level, quantization=quantization
    )
    _assert_equal(load_model(options))


def test_wrong_indices_are_refused() -> None:
    model = tiny_model("llama3")
    driver = Driver(model)
    decoder = Decoder(model.config, model.weights, model.kernels, driver.pool)
    step = _steps(model, driver)[0]
    for name in ("positions", "slot_mapping", "kv_indices"):
        tensor = getattr(step, name)
        before = tensor[3].clone()
        tensor[3] = 1 << 24
        with pytest.raises(AssertionError):
            decoder.forward(step)
        tensor[3] = before
    decoder.forward(step)
    for wrong in ([-1], [1], [0, 0]):
        with pytest.raises(AssertionError):
            decoder.forward(step, torch.tensor(wrong, dtype=torch.int32))


def test_wrong_indices_of_a_decode_step_are_refused() -> None:
    model = tiny_model("llama3")
    driver = Driver(model)
    decoder = Decoder(model.config, model.weights, model.kernels, driver.pool)
    for step in _steps(model, driver):
        decoder.forward(step)
    batch = DecodeBatch(driver.pool.num_parts)
    batch.take([StepRow(s, len(s.tokens) - 1, 1, True) for s in driver.seqs])
    before = driver.pool.data.clone()
    for name in ("ids", "positions", "kv_indices", "kv_indptr"):
        tensor = getattr(batch.rows, name)
        for wrong in (-1, 1 << 24):
            right = tensor[2].clone()
            tensor[2] = wrong
            with pytest.raises(AssertionError):
                decoder.decode(batch.rows, choose=True)
            tensor[2] = right
    assert torch.equal(driver.pool.data, before)
    batch.rows.num_rows = 1 << 20
    with pytest.raises(AssertionError):
        decoder.decode(batch.rows, choose=True)
    batch.rows.num_rows = len(driver.seqs)
    assert decoder.decode(batch.rows, choose=True) is not None


def test_a_pool_of_another_shape_is_refused() -> None:
    model, other = tiny_model("llama3"), tiny_model("mistral")  # head sizes differ
    with pytest.raises(AssertionError):
        Decoder(model.config, model.weights, model.kernels, KVPool.over(None, other.config, 4, 16))
