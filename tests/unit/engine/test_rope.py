"""The rope table against transformers' formulas."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bench.oracle import FAMILIES, make_checkpoint
from diptych.engine.core.model_config import load_model_config
from diptych.engine.models.rope import cos_sin_table, inverse_frequencies

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
SCALED = ["llama3", "llama-linear", "llama-dynamic", "llama-yarn", "qwen2-yarn"]


def assert_like_transformers(folder: Path) -> None:
    config, theirs = load_model_config(folder), AutoConfig.from_pretrained(folder)
    kind = theirs.rope_parameters["rope_type"]
    assert kind == config.rope.type
    if kind == "default":
        dim = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        wanted, scale = 1.0 / theirs.rope_parameters["rope_theta"] ** dim, 1.0
    else:
        seq_len = config.rope.frozen_len or None
        wanted, scale = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=seq_len)
    ours = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=0)
    assert config.rope.attention_factor == pytest.approx(scale)
    angles = torch.outer(torch.arange(100, dtype=torch.float32), ours)
    table = torch.cat((angles.cos(), angles.sin()), dim=1) * scale
    torch.testing.assert_close(cos_sin_table(config.rope, config.head_dim, 100), table)


@pytest.mark.parametrize("family", SCALED)
def test_scaled_families(tmp_path: Path, family: str) -> None:
    assert family in FAMILIES
    make_checkpoint(tmp_path, family)
    assert_like_transformers(tmp_path)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_models(name: str) -> None:
    assert_like_transformers(CONFIGS / name)


def test_a_longer_table_begins_with_the_shorter() -> None:
    rope = load_model_config(CONFIGS / "Llama-3.1-8B-Instruct").rope
    assert torch.equal(cos_sin_table(rope, 64, 9000)[:500], cos_sin_table(rope, 64, 500))
