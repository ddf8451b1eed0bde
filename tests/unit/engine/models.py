"""Tiny checkpoints and backends for the engine's tests."""

import functools
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bench.oracle import make_checkpoint
from diptych.engine.batch import build_input
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.core.request import Sequence
from diptych.engine.models.decoder import Decoder
from diptych.engine.pool import KVPool
from diptych.engine.runner import LoadedModel, load_model
from diptych.kernels import library

BACKEND: Literal["cpp", "reference"] = "reference" if library.find() is None else "cpp"


@functools.cache
def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    kernels: str = BACKEND,
    level: str | None = None,
    num_shards: int = 1,
) -> LoadedModel:
    """A loaded model of bench.oracle.FAMILIES; its folder is gone, its weights are kept."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), family, dtype)
        options = ModelOptions(path=folder, kernels=kernels, kernel_level=level)
        return load_model(options, num_shards)


def all_logits(model: LoadedModel, pool: KVPool, seq: Sequence, cuts: list[int]) -> Tensor:
    """Logits of every token of `seq`, computed in steps [0, cuts[0]), [cuts[0], cuts[1]) ...;
    [len(tokens), V]."""
    decoder = Decoder(model.config, model.weights, model.kernels, pool)
    parts: list[Tensor] = []
    for start, end in zip([0, *cuts], [*cuts, len(seq.tokens)], strict=True):
        plan = StepPlan([StepRow(seq, start, end - start, False)], end - start, 0)
        hidden = decoder.forward(build_input(plan, pool.block_size))
        parts.append(decoder.logits(hidden.clone()).clone())
    return torch.cat(parts)
