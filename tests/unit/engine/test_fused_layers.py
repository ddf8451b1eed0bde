"""Whole layers in one call give the bits of single calls: every level, dtype, rounding, family."""

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
from diptych.engine.models.decoder import Decoder
from diptych.engine.pool import KVPool
from diptych.engine.runner import LoadedModel, load_model
from tests.unit.engine.models import BACKEND, tiny_model
from tests.unit.engine.test_bitwise import LONG, levels

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the C++ library is not built")

LENGTHS = (90, 1, 33, 16, 47)


def _steps(model: LoadedModel, driver: Driver) -> list[ModelInput]:
    """A chunk, a step of everything, and decodes of all sequences but one, whose KV is there."""
    rng = random.Random(5)
    vocab = min(VOCAB_SIZE, model.config.vocab_size)
    seqs = [driver.add([rng.randrange(vocab) for _ in range(n)], 1) for n in LENGTHS]
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
    model: LoadedModel, *, fuse: bool, watched: bool = False, kv_dtype: KVDtype | None = None
) -> tuple[Tensor, Tensor]:
    """The hidden states of all steps, and what is in the pool in the end."""
    driver = Driver(model, threads=2, kv_dtype=kv_dtype)
    decoder = Decoder(model.config, model.weights, model.kernels, driver.pool, fuse=fuse)
    seen: list[int] = []
    on_layer = (lambda: seen.append(0)) if watched else None
    steps = _steps(model, driver)
    hidden = torch.cat([decoder.forward(step, on_layer).clone() for step in steps])
    assert len(seen) == (len(steps) * model.config.num_layers if watched else 0)
    model.kernels.set_num_threads(1)
    return hidden, driver.pool.data.view(torch.uint8)


def _assert_equal(model: LoadedModel, kv_dtype: KVDtype | None = None) -> None:
    hidden, pool = _computed(model, fuse=True, kv_dtype=kv_dtype)
    single, single_pool = _computed(model, fuse=False, kv_dtype=kv_dtype)
    assert hidden.isfinite().all()
    assert torch.equal(hidden, single)
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
def test_every_rounding(tmp_path: Path, level: str, quantization: Quantization) -> None:
    config = LONG | {"dtype": "bfloat16", "attention_bias": True, "mlp_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ModelOptions(
        path=str(tmp_path), load_format="dummy", kernel_level=level, quantization=quantization
    )
    _assert_equal(load_model(options))


def test_watched_after_each_layer() -> None:
    model = tiny_model("llama3")
    hidden, _ = _computed(model, fuse=True, watched=True)
    assert torch.equal(hidden, _computed(model, fuse=True)[0])


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


def test_a_pool_of_another_shape_is_refused() -> None:
    model, other = tiny_model("llama3"), tiny_model("mistral")  # head sizes differ
    with pytest.raises(AssertionError):
        Decoder(model.config, model.weights, model.kernels, KVPool.over(None, other.config, 4, 16))
